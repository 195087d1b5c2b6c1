package phd

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
)

func TestSessionProgress(t *testing.T) {
	m := demo(t)
	var fractions []float32
	goOn := true
	q := newSession(t, m, &SessionOptions{Progress: func(fraction float32) bool {
		fractions = append(fractions, fraction)
		return goOn
	}}).Sequence(0)
	must(t, q.Prefill(background, manyTokens(m, longPrompt)))
	if len(fractions) == 0 || fractions[0] <= 0 || fractions[len(fractions)-1] >= 1 {
		t.Errorf("progress is %v", fractions)
	}
	must(t, q.Truncate(0))
	goOn = false
	err := q.Prefill(background, manyTokens(m, longPrompt))
	wantError(t, err, ErrCancelled)
	if errors.Is(err, context.Canceled) || q.Len() != 0 {
		t.Errorf("%v, %d positions", err, q.Len())
	}
}

func TestSessionPanic(t *testing.T) {
	m := demo(t)
	q := newPausing(t, m, func(*Session) { panic("on purpose") })
	func() {
		defer func() {
			if r := recover(); r != "on purpose" {
				t.Errorf("recovered %v", r)
			}
		}()
		err := q.Prefill(background, manyTokens(m, longPrompt))
		t.Errorf("returned %v, expected a panic", err)
	}()
	if q.Len() != 0 {
		t.Errorf("%d positions", q.Len())
	}
	must(t, q.Prefill(background, manyTokens(m, longPrompt)))
}

// A progress function that calls into its own session is refused, and does not wait for itself for ever.
func TestReentrance(t *testing.T) {
	m := demo(t)
	other := newDemoSequence(t)
	sampler := newSamplerOf(t, m, nil)
	q := newPausing(t, m, func(s *Session) {
		q := s.Sequence(1)
		_, sampleError := sampler.Sample(q)
		_, logitsError := q.Logits(nil)
		for _, err := range []error{q.Step(background, 1), q.Truncate(0), sampleError, logitsError} {
			if !errors.Is(err, ErrInvalidArgument) || !strings.Contains(err.Error(), "own progress function") {
				t.Errorf("a call within a call returns %v", err)
			}
		}
		if s.Usage() != (Usage{}) || q.Len() != 0 {
			t.Error("a call within a call answers")
		}
		if err := other.Step(background, 1); err != nil { // another session
			t.Error(err)
		}
	})
	must(t, q.Prefill(background, manyTokens(m, longPrompt)))
	must(t, q.Session().Sequence(1).Step(background, 1))
}

// lockedBuffer is for handlers of several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return l.b.String()
}

func TestLogger(t *testing.T) {
	m := demo(t)
	defer SetLogger(nil)
	var out lockedBuffer
	use := func() string {
		q := newSession(t, m, &SessionOptions{NPositions: 16}).Sequence(0)
		wantError(t, q.Prefill(background, manyTokens(m, 17)), ErrCacheFull)
		return out.take()
	}
	for level, want := range map[slog.Level][2]bool{
		slog.LevelDebug: {true, true}, slog.LevelInfo: {true, false}, slog.LevelError: {false, false}, slog.LevelError + 4: {false, false},
	} {
		SetLogger(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: level})))
		said := use()
		if got := [2]bool{strings.Contains(said, "level=INFO"), strings.Contains(said, "level=DEBUG")}; got != want {
			t.Errorf("at level %v: %q", level, said)
		}
	}
	SetLogger(nil)
	if said := use(); said != "" {
		t.Errorf("without a logger: %q", said)
	}
	// A handler's panic stays where it is.
	SetLogger(slog.New(panicking{slog.NewTextHandler(&out, nil)}))
	use()
}

type panicking struct{ slog.Handler }

func (panicking) Handle(context.Context, slog.Record) error { panic("on purpose") }
