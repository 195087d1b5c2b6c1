package phd

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// longPrompt takes several passes, so that progress is reported in between.
const longPrompt = 1500

// newPausing returns a sequence whose calls run paused between the first two passes of a prefill, and from then on not.
func newPausing(t testing.TB, m *Model, paused func(s *Session)) *Sequence {
	var s *Session
	var once sync.Once
	s = newSession(t, m, &SessionOptions{NSequences: 3, Progress: func(float32) bool {
		once.Do(func() { paused(s) })
		return true
	}})
	return s.Sequence(0)
}

// hasFired reports whether the end of the running call's context, if it has one, has become a request to cancel.
func hasFired(s *Session) func() bool {
	return func() bool { return s.stop == nil || len(s.fired) == 1 }
}

func TestContextCancelsPrefill(t *testing.T) {
	for name, model := range map[string]func(testing.TB) *Model{"demo": demo, "SmolLM2": chat} {
		t.Run(name, func(t *testing.T) {
			m := model(t)
			ctx, cancel := context.WithCancel(background)
			defer cancel()
			q := newPausing(t, m, func(s *Session) {
				cancel()
				spinUntil(hasFired(s))
			})
			must(t, q.Prefill(background, manyTokens(m, 3)))
			before := logitsOf(t, q)
			err := q.Prefill(ctx, manyTokens(m, longPrompt))
			wantError(t, err, ErrCancelled, context.Canceled)
			if q.Len() != 3 || q.Session().Stats().Cancelled != 1 {
				t.Errorf("%d positions, %+v", q.Len(), q.Session().Stats())
			}
			wantSame(t, logitsOf(t, q), before)
			must(t, q.Step(background, 5))
		})
	}
}

func TestDeadlineCancelsBatch(t *testing.T) {
	m := demo(t)
	ctx, cancel := context.WithTimeout(background, time.Millisecond)
	defer cancel()
	q := newPausing(t, m, func(s *Session) {
		<-ctx.Done()
		spinUntil(hasFired(s))
	})
	s := q.Session()
	entries := []Entry{
		{Sequence: s.Sequence(1), Tokens: manyTokens(m, 2), Logits: true},
		{Sequence: q, Tokens: manyTokens(m, longPrompt)},
	}
	// A machine that is busy may not get to the first pass in time; then this shows the same of a call that is not made.
	wantError(t, s.Decode(ctx, entries), ErrCancelled, context.DeadlineExceeded)
	if q.Len() != 0 || s.Sequence(1).Len() != 0 {
		t.Errorf("%d and %d positions", q.Len(), s.Sequence(1).Len())
	}
	must(t, s.Decode(background, entries))
}

func TestEndedContextMakesNoCall(t *testing.T) {
	m := demo(t)
	ctx, cancel := context.WithCancel(background)
	cancel()
	q := newDemoSequence(t)
	sampler := newSamplerOf(t, m, nil)
	speculator := newSpeculator(t, m, nil)
	tokens := manyTokens(m, 5)
	for name, call := range map[string]func() error{
		"Prefill":         func() error { return q.Prefill(ctx, tokens) },
		"Step":            func() error { return q.Step(ctx, 1) },
		"Decode":          func() error { return q.Session().Decode(ctx, []Entry{{Sequence: q, Tokens: tokens}}) },
		"Score":           func() error { _, err := q.Score(ctx, tokens); return err },
		"Embed":           func() error { _, err := q.Embed(ctx, tokens, PoolingLast, false); return err },
		"Speculator.Step": func() error { _, err := speculator.Step(ctx, q, 1, sampler); return err },
	} {
		if err := call(); !errors.Is(err, ErrCancelled) || !errors.Is(err, context.Canceled) {
			t.Errorf("%s returns %v", name, err)
		}
	}
	if s := q.Session().Stats(); s.Calls != 0 {
		t.Errorf("stats are %+v", s)
	}
	must(t, q.Prefill(background, tokens))
}

// A context that ends when C has finished must not cancel the next call.
func TestLateContext(t *testing.T) {
	s := newSession(t, demo(t), &SessionOptions{NSequences: 2})
	q, other := s.Sequence(0), s.Sequence(1)
	lateCall := func(q *Sequence, during func()) {
		t.Helper()
		ctx, cancel := context.WithCancel(background)
		_, err := s.begin(ctx, q)
		must(t, err)
		cancel()
		spinUntil(hasFired(s))
		during()
		must(t, s.end(ctx, q, nil, cStatus(StatusOK)))
	}
	lateCall(q, func() {})
	must(t, q.Step(background, 1))
	// What Cancel asked for meanwhile must.
	lateCall(q, q.Cancel)
	err := q.Step(background, 1)
	wantError(t, err, ErrCancelled)
	if errors.Is(err, context.Canceled) {
		t.Errorf("%v is of a context", err)
	}
	must(t, q.Step(background, 1))
	// Unless it was taken back, or was there before and has been used up.
	lateCall(q, func() { q.Cancel(); q.CancelClear() })
	must(t, q.Step(background, 1))
	q.Cancel()
	wantError(t, q.Step(background, 1), ErrCancelled)
	lateCall(q, func() {})
	must(t, q.Step(background, 1))
	other.Cancel()
	wantError(t, s.Decode(background, []Entry{{Sequence: q, Tokens: []Token{1}}, {Sequence: other, Tokens: []Token{1}}}), ErrCancelled)
	lateCall(other, func() {})
	must(t, other.Step(background, 1))
}

func TestCancel(t *testing.T) {
	m := demo(t)
	s := newSession(t, m, &SessionOptions{NSequences: 2})
	a, b := s.Sequence(0), s.Sequence(1)
	entries := []Entry{{Sequence: a, Tokens: []Token{1}}, {Sequence: b, Tokens: []Token{1}}}
	b.Cancel()
	must(t, a.Step(background, 1)) // another sequence
	wantError(t, s.Decode(background, entries), ErrCancelled)
	must(t, s.Decode(background, entries))
	b.Cancel()
	b.CancelClear()
	must(t, s.Decode(background, entries))

	q := newPausing(t, m, func(s *Session) { s.Sequence(0).Cancel() })
	wantError(t, q.Prefill(background, manyTokens(m, longPrompt)), ErrCancelled)
	must(t, q.Prefill(background, manyTokens(m, longPrompt)))
}

// A call that waits for another one stops waiting when its context ends.
func TestContextEndsWaiting(t *testing.T) {
	m := demo(t)
	inside, resume := make(chan bool), make(chan bool)
	q := newPausing(t, m, func(*Session) {
		inside <- true
		<-resume
	})
	done := make(chan error)
	go func() { done <- q.Prefill(background, manyTokens(m, longPrompt)) }()
	<-inside
	ctx, cancel := context.WithCancel(background)
	waiting := make(chan error)
	go func() { waiting <- q.Session().Sequence(1).Step(ctx, 1) }()
	spinUntil(func() bool { return q.session.gate.state.Load() == 2 }) // it has begun
	cancel()
	wantError(t, <-waiting, ErrCancelled, context.Canceled)
	go func() { waiting <- q.Session().Sequence(1).Step(background, 1) }()
	resume <- true
	must(t, <-done)
	must(t, <-waiting)
	must(t, q.Step(background, 1))
}

// Contexts of many calls on one session end at any moment: each call fails by its own context or not at all.
func TestContextsOfOthers(t *testing.T) {
	m := demo(t)
	s := newSession(t, m, &SessionOptions{NSequences: 4})
	var group sync.WaitGroup
	var cancelled atomic.Int64
	for i := range 8 {
		q := s.Sequence(i / 2) // two goroutines a sequence
		spawn(&group, func() {
			for n := range 40 {
				ctx, cancel := context.WithCancel(background)
				if i%2 == 0 {
					before := s.Stats().Calls
					go func() { // while the call waits, runs, or has ended, by how many calls come first
						spinUntil(func() bool { return ctx.Err() != nil || s.Stats().Calls >= before+uint64(n%12) })
						cancel()
					}()
				}
				var err error
				if n%2 == 0 {
					err = q.Step(ctx, Token(n+1))
				} else {
					err = s.Decode(ctx, []Entry{{Sequence: q, Tokens: []Token{1, 2, 3}, Logits: true}})
				}
				if err != nil {
					cancelled.Add(1)
					if !errors.Is(err, ErrCancelled) || ctx.Err() == nil || !errors.Is(err, ctx.Err()) {
						t.Errorf("goroutine %d: %v, its context: %v", i, err, ctx.Err())
					}
				}
				cancel()
			}
		})
	}
	group.Wait()
	t.Logf("%d of 320 calls were cancelled", cancelled.Load())
	for i := range s.NSequences() {
		must(t, s.Sequence(i).Step(background, 1))
	}
}
