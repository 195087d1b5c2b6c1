package phd

// #include "shim.h"
import "C"

import (
	"context"
	"sync"
	"unsafe"
)

// A Sequence is a text in a session: tokens, their cached keys and values, and the logits of its last position, if the
// last call left any. It belongs to its session and has no Close.
type Sequence struct {
	session *Session
	id      C.int32_t

	cancel      sync.Mutex
	isRequested bool // by Cancel, and no call has used it up yet; guarded by cancel
}

// ID returns the sequence's number in its session.
func (q *Sequence) ID() int { return int(q.id) }

// Session returns the session that the sequence belongs to.
func (q *Sequence) Session() *Session { return q.session }

// Prefill appends tokens and leaves the last position's logits. After any error the sequence, its logits included, is
// what it was; [ErrCacheFull] names the positions needed and free.
func (q *Sequence) Prefill(ctx context.Context, tokens []Token) error {
	s := q.session
	ptr, err := s.begin(ctx, q)
	if err != nil {
		return err
	}
	from, count := cTokens(tokens)
	status := C.phd_prefill(ptr, q.id, from, count, s.err)
	return s.end(ctx, q, nil, status)
}

// Step appends one token; otherwise as Prefill.
func (q *Sequence) Step(ctx context.Context, token Token) error {
	s := q.session
	ptr, err := s.begin(ctx, q)
	if err != nil {
		return err
	}
	status := C.phd_step(ptr, q.id, C.int32_t(token), s.err)
	return s.end(ctx, q, nil, status)
}

// Score appends tokens, leaves no logits, and returns ln p(tokens[i] | everything before it) for i = 1, 2, ...:
// len(tokens)-1 of them.
func (q *Sequence) Score(ctx context.Context, tokens []Token) ([]float32, error) {
	s := q.session
	ptr, err := s.begin(ctx, q)
	if err != nil {
		return nil, err
	}
	scores := make([]float32, max(len(tokens)-1, 0))
	from, count := cTokens(tokens)
	to, capacity := cFloats(scores)
	var n C.size_t
	status := C.phd_score(ptr, q.id, from, count, to, capacity, &n, s.err)
	if err := s.end(ctx, q, nil, status); err != nil {
		return nil, err
	}
	return scores[:n], nil
}

// Pooling is what an embedding is of.
type Pooling uint32

// The poolings.
const (
	PoolingLast Pooling = C.PHD_POOLING_LAST // the last position
	PoolingMean Pooling = C.PHD_POOLING_MEAN // the mean over all positions given
)

// Embed appends tokens, leaves no logits, and returns an embedding of them, ModelInfo.NEmbd numbers: the output norm's
// row, pooled over the tokens, divided by its length if normalize. Empty the sequence before and after for embeddings of
// single texts.
func (q *Sequence) Embed(ctx context.Context, tokens []Token, p Pooling, normalize bool) ([]float32, error) {
	s := q.session
	ptr, err := s.begin(ctx, q)
	if err != nil {
		return nil, err
	}
	embedding := make([]float32, s.model.info.NEmbd)
	from, count := cTokens(tokens)
	to, capacity := cFloats(embedding)
	var n C.size_t
	status := C.phd_embed(ptr, q.id, from, count, C.uint32_t(p), C.bool(normalize), to, capacity, &n, s.err)
	if err := s.end(ctx, q, nil, status); err != nil {
		return nil, err
	}
	return embedding[:n], nil
}

// Logits appends a copy of the logits that the last call on the sequence left to dst[:0] and returns it, one number for
// each token of the vocabulary. It is [ErrInvalidArgument] to ask for logits where there are none. [Sampler.Sample],
// [Sequence.TopLogprobs] and [Sequence.Logprobs] need no copy.
func (q *Sequence) Logits(dst []float32) ([]float32, error) {
	ptr, err := q.session.beginRead()
	if err != nil {
		return nil, err
	}
	defer q.session.endRead()
	var logits *C.float
	var n C.size_t
	var e *C.phd_error
	if err := check(C.phd_logits(ptr, q.id, &logits, &n, &e), e); err != nil {
		return nil, err
	}
	return append(dst[:0], unsafe.Slice((*float32)(logits), n)...), nil
}

// LogitsAt is Logits after token i of the sequence's last entry, if that asked for Entry.LogitsAll and no later call,
// of any sequence, has.
func (q *Sequence) LogitsAt(i int, dst []float32) ([]float32, error) {
	if i < 0 {
		return nil, invalid("index is %d, expected 0 or more", i)
	}
	ptr, err := q.session.beginRead()
	if err != nil {
		return nil, err
	}
	defer q.session.endRead()
	var logits *C.float
	var n C.size_t
	var e *C.phd_error
	if err := check(C.phd_logits_at(ptr, q.id, C.size_t(i), &logits, &n, &e), e); err != nil {
		return nil, err
	}
	return append(dst[:0], unsafe.Slice((*float32)(logits), n)...), nil
}

// A TokenLogprob is a token and its natural log-probability.
type TokenLogprob struct {
	Token   Token
	Logprob float32
}

// TopLogprobs returns the n most probable tokens by the sequence's logits, best first.
func (q *Sequence) TopLogprobs(n int) ([]TokenLogprob, error) {
	nVocab := q.session.model.info.NVocab
	if n < 0 || n > nVocab {
		return nil, invalid("n is %d, expected 0 to %d, the vocabulary's size", n, nVocab)
	}
	ptr, err := q.session.beginRead()
	if err != nil {
		return nil, err
	}
	defer q.session.endRead()
	tokens, logprobs := make([]Token, n), make([]float32, n)
	toTokens, _ := cTokens(tokens)
	toLogprobs, _ := cFloats(logprobs)
	var e *C.phd_error
	if err := check(C.phd_go_top_logprobs(ptr, q.id, C.size_t(n), toTokens, toLogprobs, &e), e); err != nil {
		return nil, err
	}
	top := make([]TokenLogprob, n)
	for i := range top {
		top[i] = TokenLogprob{tokens[i], logprobs[i]}
	}
	return top, nil
}

// Logprobs returns the natural log-probabilities of tokens by the sequence's logits.
func (q *Sequence) Logprobs(tokens []Token) ([]float32, error) {
	ptr, err := q.session.beginRead()
	if err != nil {
		return nil, err
	}
	defer q.session.endRead()
	logprobs := make([]float32, len(tokens))
	from, count := cTokens(tokens)
	to, _ := cFloats(logprobs)
	var e *C.phd_error
	if err := check(C.phd_go_logprobs(ptr, q.id, from, count, to, &e), e); err != nil {
		return nil, err
	}
	return logprobs, nil
}

// Len returns the positions in the sequence, and 0 after the session's Close.
func (q *Sequence) Len() int {
	ptr, err := q.session.beginRead()
	if err != nil {
		return 0
	}
	defer q.session.endRead()
	var n C.size_t
	if C.phd_seq_length(ptr, q.id, &n, nil) != C.PHD_OK {
		return 0
	}
	return int(n)
}

// change runs one call that changes the sequence and has no context.
func (q *Sequence) change(call func(ptr *C.phd_session, e **C.phd_error) cStatus) error {
	s, ctx := q.session, context.Background()
	ptr, err := s.begin(ctx, q)
	if err != nil {
		return err
	}
	return s.end(ctx, q, nil, call(ptr, s.err))
}

// Truncate shortens the sequence to n positions; 0 empties it. Unless that changes nothing, its logits are gone.
func (q *Sequence) Truncate(n int) error {
	if n < 0 {
		return invalid("n is %d, expected 0 or more", n)
	}
	return q.change(func(ptr *C.phd_session, e **C.phd_error) cStatus {
		return C.phd_seq_truncate(ptr, q.id, C.size_t(n), e)
	})
}

// CopyTo makes dst, whatever it held, a copy of the sequence, logits included. Cache blocks are shared until one of the
// two writes into them.
func (q *Sequence) CopyTo(dst *Sequence) error {
	if dst == nil || dst.session != q.session {
		return invalid("dst is not a sequence of the same session")
	}
	return q.change(func(ptr *C.phd_session, e **C.phd_error) cStatus {
		return C.phd_seq_fork(ptr, q.id, dst.id, e)
	})
}

// Retain empties the sequence and keeps its text as long as there is room, so that TakePrefix can take it over.
func (q *Sequence) Retain() error {
	return q.change(func(ptr *C.phd_session, e **C.phd_error) cStatus {
		return C.phd_seq_retain(ptr, q.id, e)
	})
}

// TakePrefix makes the sequence, whatever it held, the longest cached prefix of tokens, and returns its length. It has no
// logits then: leave the last token out, and prefill what is missing.
func (q *Sequence) TakePrefix(tokens []Token) (int, error) {
	from, count := cTokens(tokens)
	var n C.size_t
	err := q.change(func(ptr *C.phd_session, e **C.phd_error) cStatus {
		return C.phd_seq_take_prefix(ptr, q.id, from, count, &n, e)
	})
	return int(n), err
}

// Tokens returns the sequence's tokens, in order.
func (q *Sequence) Tokens() ([]Token, error) {
	ptr, err := q.session.beginRead()
	if err != nil {
		return nil, err
	}
	defer q.session.endRead()
	var n C.size_t
	var e *C.phd_error
	if err := check(C.phd_seq_length(ptr, q.id, &n, &e), e); err != nil {
		return nil, err
	}
	return fill(int(n), func(buffer []Token, n *C.size_t, e **C.phd_error) cStatus {
		to, capacity := cTokens(buffer)
		return C.phd_seq_tokens(ptr, q.id, to, capacity, n, e)
	})
}

// A Policy says what happens when a sequence has no room for more.
type Policy struct {
	// DropMiddle drops the oldest positions after the first Keep: half of what could be, or as much as is needed, in
	// whole chunks of the model. The rest has positions without a gap. Otherwise the call gets [ErrCacheFull].
	DropMiddle bool
	Keep       int // positions at the beginning that are never dropped; rounded up to whole blocks
	Limit      int // positions that the sequence may have; 0: as many as the session allows
}

// SetPolicy sets the policy from the next call on; nil is the default, to stop. For the moment of the dropping the old
// text and the new one both take room: Limit is at most the session's positions less Keep and a block.
func (q *Sequence) SetPolicy(p *Policy) error {
	var policy C.phd_seq_policy
	C.phd_seq_policy_init(&policy, C.sizeof_phd_seq_policy)
	if p != nil {
		var u u32s
		if p.DropMiddle {
			policy.when_full = C.PHD_WHEN_FULL_DROP_MIDDLE
		}
		policy.n_keep = u.of("Keep", p.Keep)
		policy.limit = u.of("Limit", p.Limit)
		if u.err != nil {
			return u.err
		}
	}
	return q.change(func(ptr *C.phd_session, e **C.phd_error) cStatus {
		return C.phd_seq_set_policy(ptr, q.id, &policy, e)
	})
}

// Dropped returns how many positions the policy has dropped from the sequence, and 0 after the session's Close.
func (q *Sequence) Dropped() int {
	ptr, err := q.session.beginRead()
	if err != nil {
		return 0
	}
	defer q.session.endRead()
	var n C.size_t
	if C.phd_seq_dropped(ptr, q.id, &n, nil) != C.PHD_OK {
		return 0
	}
	return int(n)
}

// Save returns the sequence, logits included, for [Sequence.Restore] in any session of the same model and cache type.
func (q *Sequence) Save() ([]byte, error) {
	ptr, err := q.session.beginRead()
	if err != nil {
		return nil, err
	}
	defer q.session.endRead()
	return fill(0, func(buffer []byte, n *C.size_t, e **C.phd_error) cStatus {
		to, capacity := cBytes(buffer)
		return C.phd_seq_save(ptr, q.id, to, capacity, n, e)
	})
}

// Restore makes the sequence, whatever it held, what Save returned. A state of another model or cache type, a damaged or
// a forged one is [ErrInvalidArgument]; after any error the sequence is what it was.
func (q *Sequence) Restore(state []byte) error {
	from, count := cBytes(state)
	return q.change(func(ptr *C.phd_session, e **C.phd_error) cStatus {
		return C.phd_seq_restore(ptr, q.id, from, count, e)
	})
}

// SaveFile is Save to a file, written whole or not at all.
func (q *Sequence) SaveFile(path string) error {
	name, err := cPath("path", path)
	if err != nil {
		return err
	}
	defer C.free(unsafe.Pointer(name))
	ptr, err := q.session.beginRead()
	if err != nil {
		return err
	}
	defer q.session.endRead()
	var e *C.phd_error
	return check(C.phd_seq_save_file(ptr, q.id, name, &e), e)
}

// RestoreFile is Restore from a file; what is wrong with its content is [ErrFormat].
func (q *Sequence) RestoreFile(path string) error {
	name, err := cPath("path", path)
	if err != nil {
		return err
	}
	defer C.free(unsafe.Pointer(name))
	return q.change(func(ptr *C.phd_session, e **C.phd_error) cStatus {
		return C.phd_seq_restore_file(ptr, q.id, name, e)
	})
}

// Cancel ends the call that runs on the sequence, or else the next one, with [ErrCancelled]; that uses the request up.
// A batch with the sequence ends whole. It may be called from any goroutine and does not wait. To end a call and no
// other, end its context.
func (q *Sequence) Cancel() {
	q.cancel.Lock()
	defer q.cancel.Unlock()
	if q.session.gate.enter() {
		q.isRequested = true
		q.requestCancel()
		q.session.gate.leave()
	}
}

// CancelClear takes back a Cancel that no call has used up.
func (q *Sequence) CancelClear() {
	q.cancel.Lock()
	defer q.cancel.Unlock()
	if q.session.gate.enter() {
		q.isRequested = false
		q.clearCancel()
		q.session.gate.leave()
	}
}

// requestCancel and clearCancel are for those inside the gate; they fail only for a sequence that does not exist.
func (q *Sequence) requestCancel() { C.phd_seq_cancel(q.session.ptr, q.id, nil) }
func (q *Sequence) clearCancel()   { C.phd_seq_cancel_clear(q.session.ptr, q.id, nil) }

// settleLate takes back the request of a context that ended when its call had finished: it would hit the next call. One
// of Cancel is meant to.
func (q *Sequence) settleLate() {
	q.cancel.Lock()
	defer q.cancel.Unlock()
	if !q.isRequested {
		q.clearCancel()
	}
}

// settleCancelled is for a call that returned ErrCancelled: that was for all requests until now, even if several came.
func (q *Sequence) settleCancelled() {
	q.cancel.Lock()
	defer q.cancel.Unlock()
	q.isRequested = false
	q.clearCancel()
}
