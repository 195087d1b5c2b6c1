package phd

// #include "shim.h"
import "C"

import (
	"context"
	"fmt"
	"runtime"
	"runtime/cgo"
	"sync"
	"time"
	"unsafe"
	"weak"
)

// CacheType is the element type of cached keys and values.
type CacheType uint32

// The cache types. Their numbers are not C's, so that the zero value of [SessionOptions] is the default.
const (
	CacheDefault CacheType = iota // the library's choice
	CacheF32
	CacheF16
	CacheQ8_0
	CacheBF16
)

// SessionOptions describes a session. What is 0 has the library's default.
type SessionOptions struct {
	NPositions int // the whole cache, in positions, shared by all sequences
	NSequences int
	NThreads   int // default: one per physical core that the process may use
	CacheType  CacheType
	NRetained  int // texts that [Sequence.Retain] keeps at most; -1: none

	// NDraft is for speculative decoding: how many positions can be taken back without recomputing hidden rows. For
	// each sequence of a batch, one token more is what Entry.LogitsAll can ask for (16 in all at least).
	NDraft int

	// BatchInvariant asks that a sequence's results do not depend, in any bit, on who shares its batches. On the CPU
	// they never do.
	BatchInvariant bool

	// Progress, if not nil, is told the fraction done between the passes of a long prefill. Returning false cancels the
	// call. It must not use the session: such calls fail. If it panics, the call is cancelled and panics. It must not end
	// its goroutine by runtime.Goexit, as t.FailNow does.
	Progress func(fraction float32) bool
}

// params are o for C.
func (o *SessionOptions) params() (C.phd_session_params, error) {
	var params C.phd_session_params
	C.phd_session_params_init(&params, C.sizeof_phd_session_params)
	if o == nil {
		return params, nil
	}
	var u u32s
	set := func(to *C.uint32_t, name string, value int) {
		if value != 0 {
			*to = u.of(name, value)
		}
	}
	set(&params.n_positions, "NPositions", o.NPositions)
	set(&params.n_sequences, "NSequences", o.NSequences)
	set(&params.n_threads, "NThreads", o.NThreads)
	set(&params.n_draft, "NDraft", o.NDraft)
	if o.NRetained == -1 {
		params.n_retained = 0
	} else {
		set(&params.n_retained, "NRetained", o.NRetained)
	}
	if u.err != nil {
		return params, u.err
	}
	switch o.CacheType {
	case CacheDefault:
	case CacheF32:
		params.cache_type = C.PHD_CACHE_F32
	case CacheF16:
		params.cache_type = C.PHD_CACHE_F16
	case CacheQ8_0:
		params.cache_type = C.PHD_CACHE_Q8_0
	case CacheBF16:
		params.cache_type = C.PHD_CACHE_BF16
	default:
		return params, invalid("CacheType is %d, expected one of the Cache constants", o.CacheType)
	}
	params.batch_invariant = cFlag(o.BatchInvariant)
	return params, nil
}

// A Session is a fixed-size cache and the sequences in it. Everything it will ever need is allocated when it is created.
//
// It may be used by several goroutines; calls that extend or change its sequences wait for each other, and stop waiting
// when their context ends.
type Session struct {
	gate  gate
	ptr   *C.phd_session // only within the gate
	model *Model         // a child keeps its owner alive
	seqs  []Sequence

	// turn is held by the call that changes the session: a lock that one can stop waiting for. rows is held by it, too,
	// and shared by those who read logits, which lie in C's memory.
	turn chan struct{}
	rows sync.RWMutex

	// Of the call that has its turn:
	watched *Sequence     // what the end of the context cancels
	stop    func() bool   // of context.AfterFunc; nil: the context has no end
	fired   chan struct{} // gets a value when onDone has run
	onDone  func()
	err     **C.phd_error // where C puts its error: not on the stack, which a progress function can make move
	batch   *batch        // what Decode passes to C

	progress progress
	handle   cgo.Handle // of a weak pointer to this; 0: no progress function
	cleanup  runtime.Cleanup
}

// resources are what a session owns outside of Go's memory.
type resources struct {
	ptr    *C.phd_session
	handle cgo.Handle
	batch  *batch
}

func (r resources) free() {
	C.phd_session_free(r.ptr)
	if r.handle != 0 {
		r.handle.Delete()
	}
	r.batch.free()
	liveSessions.Add(-1)
}

// weakSession is what C's progress pointer stands for. It is weak, so that a session that nobody closes is collected
// even though C knows of it; while a call runs, the session is there.
type weakSession struct{ weak.Pointer[Session] }

func (w weakSession) report(fraction float32) bool { return w.Value().progress.report(fraction) }

// NewSession creates a session with everything it will ever need.
func (m *Model) NewSession(o *SessionOptions) (*Session, error) {
	params, err := o.params()
	if err != nil {
		return nil, err
	}
	model, err := m.enter()
	if err != nil {
		return nil, err
	}
	defer m.gate.leave()
	s := &Session{
		model: m,
		turn:  make(chan struct{}, 1),
		fired: make(chan struct{}, 1),
		err:   new(*C.phd_error),
		batch: new(batch),
	}
	s.onDone = func() {
		s.watched.requestCancel()
		s.fired <- struct{}{}
	}
	if o != nil && o.Progress != nil {
		s.progress.function = o.Progress
		s.handle = cgo.NewHandle(weakSession{weak.Make(s)})
	}
	var e *C.phd_error
	status := C.phd_go_session_create(model, &params, C.uintptr_t(s.handle), &s.ptr, &e)
	if err := check(status, e); err != nil {
		if s.handle != 0 {
			s.handle.Delete()
		}
		return nil, err
	}
	liveSessions.Add(1)
	s.seqs = make([]Sequence, params.n_sequences)
	for i := range s.seqs {
		s.seqs[i] = Sequence{session: s, id: C.int32_t(i)}
	}
	s.cleanup = runtime.AddCleanup(s, resources.free, s.resources())
	return s, nil
}

func (s *Session) resources() resources { return resources{s.ptr, s.handle, s.batch} }

// Close frees the session when the calls that run on it have ended. It must not be called from the session's own
// progress function.
func (s *Session) Close() error {
	s.gate.close(func() {
		s.cleanup.Stop()
		s.resources().free()
		s.ptr = nil
	})
	return nil
}

// Model returns the model that the session was made of.
func (s *Session) Model() *Model { return s.model }

// NSequences returns how many sequences the session has.
func (s *Session) NSequences() int { return len(s.seqs) }

// Sequence returns sequence i, 0 to NSequences()-1, always the same one. Sequences exist from the start, empty.
func (s *Session) Sequence(i int) *Sequence {
	if i < 0 || i >= len(s.seqs) {
		panic(fmt.Sprintf("phd: sequence %d of a session with %d", i, len(s.seqs)))
	}
	return &s.seqs[i]
}

// errReentered is the error of a call that would wait for the call it is part of.
var errReentered = invalid("the session is called from its own progress function")

// isReentered reports whether this goroutine runs the session's progress function.
func (s *Session) isReentered() bool {
	return s.handle != 0 && C.phd_go_inside_progress() == C.uintptr_t(s.handle)
}

// begin waits for the turn of a call that changes the session, and returns the session for C; then end must follow. From
// then on the end of ctx cancels q, unless that is nil.
func (s *Session) begin(ctx context.Context, q *Sequence) (*C.phd_session, error) {
	if ctx.Err() != nil {
		return nil, contextError(ctx)
	}
	if !s.gate.enter() {
		return nil, ErrClosed
	}
	select {
	case s.turn <- struct{}{}:
	default:
		if s.isReentered() {
			s.gate.leave()
			return nil, errReentered
		}
		select {
		case s.turn <- struct{}{}:
		case <-ctx.Done():
			s.gate.leave()
			return nil, contextError(ctx)
		}
	}
	if s.gate.isClosed() { // while this waited: Close frees the session as soon as this leaves
		<-s.turn
		s.gate.leave()
		return nil, ErrClosed
	}
	s.rows.Lock()
	if q != nil && ctx.Done() != nil {
		// Only now, when no other call can take the request for its own.
		s.watched = q
		s.stop = context.AfterFunc(ctx, s.onDone)
	}
	ptr := s.ptr
	maybeGC()
	return ptr, nil
}

// end ends what begin began: it settles what has become of requests to cancel, lets the next call in, and makes an error
// of what C returned and put into *s.err. The call was on q and the sequences of entries.
func (s *Session) end(ctx context.Context, q *Sequence, entries []Entry, status cStatus) error {
	isLate := false
	if s.stop != nil {
		if !s.stop() {
			<-s.fired // now nothing of ctx is under way any more
			isLate = status != C.PHD_ERROR_CANCELLED
		}
		s.stop, s.watched = nil, nil
	}
	if isLate {
		q.settleLate()
	}
	if status == C.PHD_ERROR_CANCELLED {
		if q != nil {
			q.settleCancelled()
		}
		for i := range entries {
			entries[i].Sequence.settleCancelled()
		}
	}
	e, panicked := *s.err, s.progress.panicked
	*s.err, s.progress.panicked = nil, nil
	s.rows.Unlock()
	<-s.turn
	s.gate.leave()
	err := checkContext(ctx, status, e)
	if panicked != nil {
		panic(panicked)
	}
	return err
}

// beginRead is begin for calls that only read; then endRead must follow.
func (s *Session) beginRead() (*C.phd_session, error) {
	if !s.gate.enter() {
		return nil, ErrClosed
	}
	if !s.rows.TryRLock() {
		if s.isReentered() {
			s.gate.leave()
			return nil, errReentered
		}
		s.rows.RLock()
	}
	ptr := s.ptr
	maybeGC()
	return ptr, nil
}

func (s *Session) endRead() {
	s.rows.RUnlock()
	s.gate.leave()
}

// An Entry is one sequence's part of a batch.
type Entry struct {
	Sequence  *Sequence
	Tokens    []Token // what is appended: a piece of a prompt, or one token
	Logits    bool    // leave the logits of the last position; else the sequence has none afterwards
	LogitsAll bool    // leave the logits of all positions: see [Sequence.LogitsAt]
}

// Decode extends several sequences at once: pieces of prompts and single tokens, each sequence at most once. All copies
// of all tokens share each pass over the weights. The batch is carried out whole or not at all: after any error,
// [ErrCancelled] because of one of its sequences included, all of them are what they were, logits included.
func (s *Session) Decode(ctx context.Context, entries []Entry) error {
	for i := range entries {
		if q := entries[i].Sequence; q == nil || q.session != s {
			return invalid("Sequence of entry %d is not one of this session", i)
		}
	}
	var watched *Sequence
	if len(entries) > 0 {
		watched = entries[0].Sequence // one is enough: the batch ends whole
	}
	ptr, err := s.begin(ctx, watched)
	if err != nil {
		return err
	}
	status := C.phd_decode(ptr, s.batch.fill(entries), C.size_t(len(entries)), s.err)
	return s.end(ctx, watched, entries, status)
}

// A batch is entries as C reads them, with their tokens, in C's memory: Go's must not point to Go's. Pinning the slices
// instead would take 2.4 microseconds for eight single tokens, where copying takes 0.3, and as long as copying for eight
// pieces of 512. A batch grows to the largest call and is used again.
type batch struct {
	entries *C.phd_batch_entry
	tokens  *C.int32_t
	// Room, in elements.
	nEntries, nTokens int
}

func (b *batch) fill(from []Entry) *C.phd_batch_entry {
	nTokens := 0
	for i := range from {
		nTokens += len(from[i].Tokens)
	}
	if len(from) > b.nEntries {
		C.free(unsafe.Pointer(b.entries))
		b.nEntries = max(len(from), 2*b.nEntries)
		b.entries = (*C.phd_batch_entry)(C.malloc(C.size_t(b.nEntries) * C.sizeof_phd_batch_entry))
	}
	if nTokens > b.nTokens {
		C.free(unsafe.Pointer(b.tokens))
		b.nTokens = max(nTokens, 2*b.nTokens)
		b.tokens = (*C.int32_t)(C.malloc(C.size_t(b.nTokens) * C.sizeof_int32_t))
	}
	entries := unsafe.Slice(b.entries, len(from))
	tokens := unsafe.Slice((*Token)(b.tokens), nTokens)
	for i := range from {
		entry := &from[i]
		n := copy(tokens, entry.Tokens)
		var flags C.uint32_t
		if entry.Logits {
			flags |= C.PHD_ENTRY_LOGITS
		}
		if entry.LogitsAll {
			flags |= C.PHD_ENTRY_LOGITS_ALL
		}
		entries[i] = C.phd_batch_entry{
			struct_size: C.sizeof_phd_batch_entry,
			seq:         entry.Sequence.id,
			flags:       flags,
			tokens:      (*C.int32_t)(unsafe.SliceData(tokens)),
			n_tokens:    C.size_t(n),
		}
		tokens = tokens[n:]
	}
	return b.entries
}

func (b *batch) free() {
	C.free(unsafe.Pointer(b.entries))
	C.free(unsafe.Pointer(b.tokens))
	*b = batch{}
}

// Memory is the exact bytes that a session holds; the weights are shared with the model's other sessions.
type Memory struct {
	Weights uint64
	Cache   uint64 // keys and values of the original tokens
	Hidden  uint64 // hidden-token rings
	Scratch uint64
}

// Memory returns what the session holds, and zeros after Close.
func (s *Session) Memory() Memory {
	ptr, err := s.beginRead()
	if err != nil {
		return Memory{}
	}
	defer s.endRead()
	m := C.phd_memory{struct_size: C.sizeof_phd_memory}
	if C.phd_session_memory(ptr, &m, nil) != C.PHD_OK {
		return Memory{}
	}
	return Memory{
		Weights: uint64(m.weights_bytes),
		Cache:   uint64(m.cache_bytes),
		Hidden:  uint64(m.hidden_bytes),
		Scratch: uint64(m.scratch_bytes),
	}
}

// Usage is how a session's pool is used, in positions of whole blocks: Used + Retained + Free is the whole pool.
type Usage struct {
	Used     uint64 // in blocks that sequences refer to
	Free     uint64 // in blocks that nobody refers to
	Shared   uint64 // the part of Used that several sequences share, counted once
	Retained uint64 // in blocks that only retained texts refer to: given up as soon as a sequence needs them
	Block    uint64 // positions of a block
}

// Usage returns how the pool is used, and zeros after Close. It waits for a running call.
func (s *Session) Usage() Usage {
	ptr, err := s.beginRead()
	if err != nil {
		return Usage{}
	}
	defer s.endRead()
	u := C.phd_usage{struct_size: C.sizeof_phd_usage}
	if C.phd_session_usage(ptr, &u, nil) != C.PHD_OK {
		return Usage{}
	}
	return Usage{
		Used:     uint64(u.used),
		Free:     uint64(u.free),
		Shared:   uint64(u.shared),
		Retained: uint64(u.retained),
		Block:    uint64(u.block),
	}
}

// Stats are a session's counters since it was created.
type Stats struct {
	PromptTokens  uint64        // positions appended by entries of several tokens
	StepTokens    uint64        // positions appended by entries of one token
	PrefillTime   time.Duration // in calls with an entry of several tokens
	StepTime      time.Duration // in calls of single tokens only
	WaitTime      time.Duration // that calls have waited for one another within C
	Calls         uint64        // that extend sequences, failed ones included
	Passes        uint64        // over the weights
	Rows          uint64        // that have entered a layer, summed over layers
	Cancelled     uint64        // calls
	CacheFull     uint64        // calls that found the cache full
	PrefixLookups uint64
	PrefixHits    uint64 // look-ups that found at least one token
	PrefixTokens  uint64 // positions taken over instead of computed
	Dropped       uint64 // positions dropped by policies
	Evicted       uint64 // positions that retained texts have given up
}

// Stats returns the session's counters, without waiting for a running call, and zeros after Close.
func (s *Session) Stats() Stats {
	if !s.gate.enter() {
		return Stats{}
	}
	defer s.gate.leave()
	c := C.phd_stats{struct_size: C.sizeof_phd_stats}
	if C.phd_session_stats(s.ptr, &c, nil) != C.PHD_OK {
		return Stats{}
	}
	return Stats{
		PromptTokens:  uint64(c.prompt_tokens),
		StepTokens:    uint64(c.step_tokens),
		PrefillTime:   time.Duration(c.prefill_ns),
		StepTime:      time.Duration(c.step_ns),
		WaitTime:      time.Duration(c.wait_ns),
		Calls:         uint64(c.calls),
		Passes:        uint64(c.passes),
		Rows:          uint64(c.rows),
		Cancelled:     uint64(c.cancelled),
		CacheFull:     uint64(c.cache_full),
		PrefixLookups: uint64(c.prefix_lookups),
		PrefixHits:    uint64(c.prefix_hits),
		PrefixTokens:  uint64(c.prefix_tokens),
		Dropped:       uint64(c.dropped),
		Evicted:       uint64(c.evicted),
	}
}

// MatchPrefix returns how many of tokens the longest cached text has that they begin with, among all sequences and
// retained texts, and the sequence that has it: nil if none, or a retained text. Nothing is changed.
func (s *Session) MatchPrefix(tokens []Token) (n int, seq *Sequence, err error) {
	ptr, err := s.beginRead()
	if err != nil {
		return 0, nil, err
	}
	defer s.endRead()
	from, count := cTokens(tokens)
	var cn C.size_t
	var cseq C.int32_t
	var e *C.phd_error
	if err := check(C.phd_seq_match_prefix(ptr, from, count, &cn, &cseq, &e), e); err != nil {
		return 0, nil, err
	}
	if cseq >= 0 {
		seq = s.Sequence(int(cseq))
	}
	return int(cn), seq, nil
}
