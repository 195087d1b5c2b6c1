package phd

// #include "shim.h"
import "C"

import (
	"context"
	"runtime"
)

// SpeculatorOptions describes a speculator. What is 0 has the library's default.
type SpeculatorOptions struct {
	NDraft int // drafts of a step at most, 1 to 256; SessionOptions.NDraft must be at least as large

	// Prompt look-up: tokens that must have stood before, and how many of them at most are compared, up to 64.
	NgramMin, NgramMax int

	// Draft model: drafting stops before a token less probable than this; negative: never.
	PMin float32
}

// DraftStats are counts since a speculator was created.
type DraftStats struct {
	Steps      uint64 // passes verified
	Drafted    uint64 // drafts that they verified
	Accepted   uint64 // those that became text
	DraftBytes uint64 // bytes of the draft model's session, weights not counted
}

// A Speculator guesses how the texts of a session's sequences go on, and verifies the guesses: docs/speculative.md.
type Speculator struct {
	owned[*C.phd_speculator]
	model  *Model // children keep their owners alive
	draft  *Model
	nDraft int
}

// NewSpeculator creates a speculator for sessions of m. If draft is nil, drafts come from the text itself: where its last
// tokens stood before, it may go on as it did there. Otherwise they come from draft, a smaller model of the same
// vocabulary, for which the speculator makes a session of draftOptions; that follows each sequence in the sequence of the
// same number and needs as many of them. draftOptions must have no Progress.
func (m *Model) NewSpeculator(draft *Model, draftOptions *SessionOptions, o *SpeculatorOptions) (*Speculator, error) {
	var params C.phd_speculator_params
	C.phd_speculator_params_init(&params, C.sizeof_phd_speculator_params)
	if o != nil {
		var u u32s
		set := func(to *C.uint32_t, name string, value int) {
			if value != 0 {
				*to = u.of(name, value)
			}
		}
		set(&params.n_draft, "NDraft", o.NDraft)
		set(&params.ngram_min, "NgramMin", o.NgramMin)
		set(&params.ngram_max, "NgramMax", o.NgramMax)
		if u.err != nil {
			return nil, u.err
		}
		if o.PMin != 0 {
			params.p_min = C.float(max(o.PMin, 0))
		}
	}
	model, err := m.enter()
	if err != nil {
		return nil, err
	}
	defer m.gate.leave()
	var draftModel *C.phd_model
	var draftParams *C.phd_session_params
	switch {
	case draft != nil:
		if draftOptions != nil && draftOptions.Progress != nil {
			return nil, invalid("draftOptions has a Progress, expected none")
		}
		params.kind = C.PHD_DRAFT_MODEL
		p, err := draftOptions.params()
		if err != nil {
			return nil, err
		}
		draftParams = &p
		if draftModel, err = draft.enter(); err != nil {
			return nil, err
		}
		defer draft.gate.leave()
	case draftOptions != nil:
		return nil, invalid("there are draftOptions, but no draft model")
	}
	var ptr *C.phd_speculator
	var e *C.phd_error
	status := C.phd_speculator_create(model, draftModel, draftParams, &params, &ptr, &e)
	if err := check(status, e); err != nil {
		return nil, err
	}
	s := &Speculator{owned: owned[*C.phd_speculator]{ptr: ptr}, model: m, draft: draft, nDraft: int(params.n_draft)}
	liveSpeculators.Add(1)
	s.cleanup = runtime.AddCleanup(s, freeSpeculator, ptr)
	return s, nil
}

func freeSpeculator(ptr *C.phd_speculator) {
	C.phd_speculator_free(ptr)
	liveSpeculators.Add(-1)
}

// Close frees the speculator, and the draft model's session.
func (s *Speculator) Close() error {
	s.owned.close(freeSpeculator)
	return nil
}

// Draft guesses how q goes on after token, which was chosen and is not in the session: up to NDraft tokens. It is the
// first part of a step, for servers: decode token and the drafts of each sequence as one [Entry] with LogitsAll (if all of
// them together are [ErrCacheFull], without drafts), and then Accept. The session is not changed.
func (s *Speculator) Draft(q *Sequence, token Token) ([]Token, error) {
	ptr, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer s.leave()
	drafts := make([]Token, s.nDraft)
	to, capacity := cTokens(drafts)
	var n C.size_t
	err = q.change(func(session *C.phd_session, e **C.phd_error) cStatus {
		return C.phd_speculator_draft(ptr, session, q.id, C.int32_t(token), to, capacity, &n, e)
	})
	if err != nil {
		return nil, err
	}
	return drafts[:n], nil
}

// Accept samples after each token of the last entry of q, which was decoded with LogitsAll and is the token chosen before
// and its drafts, until a sampled token is not the draft there or ends the generation, and tells the sampler of each. It
// returns the sampled tokens, one at least. All of them but the last, and nothing after them, are then in the session: the
// last is what the next step begins with. After any error session and sampler are what they were.
func (s *Speculator) Accept(q *Sequence, sampler *Sampler) ([]Token, error) {
	ptr, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer s.leave()
	samplerPtr, err := sampler.enter()
	if err != nil {
		return nil, err
	}
	defer sampler.leave()
	guess := s.nDraft + 1 // an entry of more tokens, of one's own drafts, is asked for again
	for {
		tokens := make([]Token, guess)
		to, capacity := cTokens(tokens)
		var n C.size_t
		err := q.change(func(session *C.phd_session, e **C.phd_error) cStatus {
			return C.phd_speculator_accept(ptr, session, q.id, samplerPtr, to, capacity, &n, e)
		})
		if err == nil {
			return tokens[:n], nil
		}
		if e, ok := err.(*Error); !ok || e.Status != StatusBufferTooSmall || int(n) <= guess {
			return nil, err
		}
		guess = int(n)
	}
}

// Step appends token, which was chosen last, with drafts, in one pass, and returns the tokens that follow it: one, and one
// more for each draft that was right. They are those that [Sequence.Step], [Sampler.Sample] and [Sampler.Accept] in turn
// would give. All of them but the last are then in the session too; the last is what the next step begins with. After any
// error the sequence's text and the sampler are what they were, but for what a policy has dropped.
func (s *Speculator) Step(ctx context.Context, q *Sequence, token Token, sampler *Sampler) ([]Token, error) {
	ptr, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer s.leave()
	samplerPtr, err := sampler.enter()
	if err != nil {
		return nil, err
	}
	defer sampler.leave()
	session := q.session
	sessionPtr, err := session.begin(ctx, q)
	if err != nil {
		return nil, err
	}
	tokens := make([]Token, s.nDraft+1)
	to, capacity := cTokens(tokens)
	var n C.size_t
	status := C.phd_speculator_step(ptr, sessionPtr, q.id, C.int32_t(token), samplerPtr, to, capacity, &n, session.err)
	if err := session.end(ctx, q, nil, status); err != nil {
		return nil, err
	}
	return tokens[:n], nil
}

// Forget gives up what the draft model holds of q's text: for one that has ended, so that others have its room.
func (s *Speculator) Forget(q *Sequence) error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	var e *C.phd_error
	return check(C.phd_speculator_forget(ptr, q.id, &e), e)
}

// Stats returns what has been drafted and accepted, and zeros after Close.
func (s *Speculator) Stats() DraftStats {
	ptr, err := s.enter()
	if err != nil {
		return DraftStats{}
	}
	defer s.leave()
	c := C.phd_draft_stats{struct_size: C.sizeof_phd_draft_stats}
	if C.phd_speculator_stats(ptr, &c, nil) != C.PHD_OK {
		return DraftStats{}
	}
	return DraftStats{
		Steps:      uint64(c.steps),
		Drafted:    uint64(c.drafted),
		Accepted:   uint64(c.accepted),
		DraftBytes: uint64(c.draft_bytes),
	}
}
