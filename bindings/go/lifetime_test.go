package phd

import (
	"errors"
	"runtime"
	"sync"
	"testing"
)

func liveObjects() [5]int64 {
	return [5]int64{liveModels.Load(), liveSessions.Load(), liveSamplers.Load(), liveStreams.Load(), liveSpeculators.Load()}
}

// collect collects garbage until as many objects live as before.
func collect(t *testing.T, before [5]int64) {
	t.Helper()
	for range 200 {
		if runtime.GC(); liveObjects() == before {
			return
		}
		runtime.Gosched() // cleanups run on a goroutine of their own
	}
	t.Errorf("models, sessions, samplers, streams and speculators alive: %v, expected %v", liveObjects(), before)
}

// everything is one of each, children of one model.
type everything struct {
	model      *Model
	session    *Session
	sampler    *Sampler
	stream     *Stream
	speculator *Speculator
}

func newEverything(t testing.TB) (e everything) {
	t.Helper()
	e.model = value[*Model](t)(LoadModel(background, demoPath, nil))
	e.session = value[*Session](t)(e.model.NewSession(&SessionOptions{NThreads: 1, NDraft: 4, Progress: func(float32) bool {
		return e.session != nil // refers to the session itself
	}}))
	e.sampler = value[*Sampler](t)(e.model.NewSampler(nil))
	e.stream = value[*Stream](t)(e.model.NewStream())
	e.speculator = value[*Speculator](t)(e.model.NewSpeculator(nil, nil, nil))
	return e
}

func TestCollected(t *testing.T) {
	runtime.GC()
	before := liveObjects()
	func() {
		e := newEverything(t)
		must(t, e.session.Sequence(0).Prefill(background, manyTokens(e.model, 40)))
		value[*Sampler](t)(e.sampler.Clone())
		after := liveObjects()
		if after == before {
			t.Errorf("alive: %v, before %v", after, before)
		}
	}()
	collect(t, before)
}

// Whatever is reachable keeps what it needs.
func TestChildrenKeepOwners(t *testing.T) {
	before := liveObjects()
	q, sampler, stream := func() (*Sequence, *Sampler, *Stream) {
		e := newEverything(t)
		return e.session.Sequence(0), e.sampler, e.stream
	}()
	for range 3 {
		runtime.GC()
		runtime.Gosched()
	}
	m := q.Session().Model()
	must(t, q.Prefill(background, tokensOf(t, m, verse)))
	must(t, sampler.AddRegex("[a-z ]+"))
	token := value[Token](t)(sampler.Sample(q))
	value[string](t)(stream.Push(token))
	runtime.KeepAlive(m)
	q, sampler, stream, m = nil, nil, nil, nil
	collect(t, before)
}

// closers are e's Close methods.
func (e everything) closers() []func() error {
	return []func() error{e.model.Close, e.session.Close, e.sampler.Close, e.stream.Close, e.speculator.Close}
}

func TestClose(t *testing.T) {
	before := liveObjects()
	e := newEverything(t)
	for _, close := range e.closers() {
		var group sync.WaitGroup
		for range 3 {
			spawn(&group, func() {
				if err := close(); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	}
	if after := liveObjects(); after != before {
		t.Errorf("alive: %v, before %v", after, before)
	}
	q, tokens := e.session.Sequence(0), []Token{1}
	other := newDemoSequence(t)
	must(t, other.Prefill(background, tokens))
	otherSampler := newSamplerOf(t, demo(t), nil)
	otherSpeculator := newSpeculator(t, demo(t), nil)
	for name, call := range map[string]func() error{
		"Tokenize":        func() error { _, err := e.model.Tokenize("a", false, false); return err },
		"Detokenize":      func() error { _, err := e.model.Detokenize(tokens); return err },
		"TokenBytes":      func() error { _, err := e.model.TokenBytes(1, false); return err },
		"RenderChat":      func() error { _, err := e.model.RenderChat(ChatOptions{}); return err },
		"ChatTemplate":    func() error { _, _, err := e.model.ChatTemplate(""); return err },
		"NewSession":      func() error { _, err := e.model.NewSession(nil); return err },
		"NewStream":       func() error { _, err := e.model.NewStream(); return err },
		"NewSpeculator":   func() error { _, err := e.model.NewSpeculator(nil, nil, nil); return err },
		"draft model":     func() error { _, err := demo(t).NewSpeculator(e.model, nil, nil); return err },
		"Decode":          func() error { return e.session.Decode(background, []Entry{{Sequence: q, Tokens: tokens}}) },
		"MatchPrefix":     func() error { _, _, err := e.session.MatchPrefix(tokens); return err },
		"Prefill":         func() error { return q.Prefill(background, tokens) },
		"Step":            func() error { return q.Step(background, 1) },
		"Score":           func() error { _, err := q.Score(background, tokens); return err },
		"Embed":           func() error { _, err := q.Embed(background, tokens, PoolingLast, false); return err },
		"Logits":          func() error { _, err := q.Logits(nil); return err },
		"LogitsAt":        func() error { _, err := q.LogitsAt(0, nil); return err },
		"TopLogprobs":     func() error { _, err := q.TopLogprobs(1); return err },
		"Logprobs":        func() error { _, err := q.Logprobs(tokens); return err },
		"Truncate":        func() error { return q.Truncate(0) },
		"CopyTo":          func() error { return q.CopyTo(q) },
		"Retain":          q.Retain,
		"TakePrefix":      func() error { _, err := q.TakePrefix(tokens); return err },
		"Tokens":          func() error { _, err := q.Tokens(); return err },
		"SetPolicy":       func() error { return q.SetPolicy(nil) },
		"Save":            func() error { _, err := q.Save(); return err },
		"Restore":         func() error { return q.Restore(nil) },
		"SaveFile":        func() error { return q.SaveFile("x") },
		"RestoreFile":     func() error { return q.RestoreFile("x") },
		"AddStage":        func() error { return e.sampler.AddStage(StageDraw, nil) },
		"AddLogitBias":    func() error { return e.sampler.AddLogitBias(tokens, []float32{1}) },
		"AddDRYBreaker":   func() error { return e.sampler.AddDRYBreaker("x") },
		"AddBreakerToken": func() error { return e.sampler.AddDRYBreakerTokens(tokens) },
		"AddJSONSchema":   func() error { return e.sampler.AddJSONSchema("{}") },
		"AddRegex":        func() error { return e.sampler.AddRegex("a") },
		"AddGrammar":      func() error { return e.sampler.AddGrammar("start: /a/") },
		"AddGBNF":         func() error { return e.sampler.AddGBNF(`root ::= "a"`) },
		"ConstraintDone":  func() error { _, err := e.sampler.ConstraintDone(); return err },
		"ConstraintAcc":   func() error { return e.sampler.ConstraintAccept("a") },
		"RemoveConstr":    e.sampler.RemoveConstraint,
		"Sample":          func() error { _, err := e.sampler.Sample(other); return err },
		"Sample, session": func() error { _, err := otherSampler.Sample(q); return err },
		"SampleLogits":    func() error { _, err := e.sampler.SampleLogits(nil); return err },
		"Accept":          func() error { return e.sampler.Accept(1) },
		"AcceptPrompt":    func() error { return e.sampler.AcceptPrompt(tokens) },
		"Reset":           e.sampler.Reset,
		"Clone":           func() error { _, err := e.sampler.Clone(); return err },
		"AddStop":         func() error { return e.stream.AddStop("x") },
		"SetSpecial":      func() error { return e.stream.SetSpecial(true) },
		"Push":            func() error { _, err := e.stream.Push(1); return err },
		"Finish":          func() error { _, err := e.stream.Finish(); return err },
		"Draft":           func() error { _, err := e.speculator.Draft(other, 1); return err },
		"Draft, session":  func() error { _, err := otherSpeculator.Draft(q, 1); return err },
		"speculative":     func() error { _, err := e.speculator.Step(background, other, 1, otherSampler); return err },
		"its sampler":     func() error { _, err := otherSpeculator.Step(background, other, 1, e.sampler); return err },
		"its session":     func() error { _, err := otherSpeculator.Step(background, q, 1, otherSampler); return err },
		"accept":          func() error { _, err := e.speculator.Accept(other, otherSampler); return err },
		"accept, sampler": func() error { _, err := otherSpeculator.Accept(other, e.sampler); return err },
		"Forget":          func() error { return e.speculator.Forget(other) },
	} {
		if err := call(); !errors.Is(err, ErrClosed) {
			t.Errorf("%s returns %v", name, err)
		}
	}
	q.Cancel()
	q.CancelClear()
	_, special := e.model.SpecialToken(SpecialEOS)
	index, n := e.stream.Stopped()
	if e.model.IsEnd(0) || special || q.Len() != 0 || q.Dropped() != 0 || index != -1 || n != 0 ||
		e.session.Memory() != (Memory{}) || e.session.Usage() != (Usage{}) || e.session.Stats() != (Stats{}) ||
		e.speculator.Stats() != (DraftStats{}) {
		t.Error("a closed object answers")
	}
	if e.model.Info().NVocab == 0 || e.session.Model() != e.model {
		t.Error("a closed object has forgotten what it was")
	}
}

// Close waits for a call that runs; calls that wait for that one find the session closed.
func TestCloseWaits(t *testing.T) {
	m := demo(t)
	before := liveSessions.Load()
	inside, resume := make(chan bool), make(chan bool)
	var s *Session
	s = value[*Session](t)(m.NewSession(&SessionOptions{NSequences: 2, Progress: func(float32) bool {
		if inside != nil {
			inside <- true
			<-resume
			inside = nil
		}
		// A call within the call, while Close waits, does not wait for Close.
		return s.Stats() == Stats{}
	}}))
	running, waiting, closed := make(chan error, 1), make(chan error, 1), make(chan error, 1)
	go func() { running <- s.Sequence(0).Prefill(background, manyTokens(m, longPrompt)) }()
	<-inside
	go func() { waiting <- s.Sequence(1).Step(background, 1) }()
	spinUntil(func() bool { return s.gate.state.Load() == 2 })
	go func() { closed <- s.Close() }()
	spinUntil(s.gate.isClosed)
	if liveSessions.Load() != before+1 {
		t.Error("closed while a call runs")
	}
	resume <- true
	must(t, <-running)
	wantError(t, <-waiting, ErrClosed)
	must(t, <-closed)
	if liveSessions.Load() != before {
		t.Error("not freed")
	}
}

// Sessions outlive their model's Close.
func TestCloseOrder(t *testing.T) {
	e := newEverything(t)
	must(t, e.model.Close())
	q := e.session.Sequence(0)
	must(t, q.Prefill(background, manyTokens(e.model, 40)))
	token := value[Token](t)(e.sampler.Sample(q))
	value[string](t)(e.stream.Push(token))
	value[[]Token](t)(e.speculator.Step(background, q, token, e.sampler))
	for _, close := range e.closers() {
		must(t, close())
	}
}

// Many goroutines use what one of them closes.
func TestCloseConcurrently(t *testing.T) {
	before := liveObjects()
	for range 3 {
		e := newEverything(t)
		q := e.session.Sequence(0)
		var group sync.WaitGroup
		for _, call := range []func() error{
			func() error { _, err := e.model.Tokenize(verse, true, false); return err },
			func() error { q.Cancel(); q.CancelClear(); return q.Truncate(0) },
			func() error { return q.Prefill(background, manyTokens(e.model, 20)) },
			func() error { q.Len(); e.session.Usage(); e.session.Stats(); _, err := q.Tokens(); return err },
			func() error { _, err := e.sampler.Sample(q); return err },
			func() error { _, err := e.stream.Push(77); return err },
			func() error { _, err := e.speculator.Draft(q, 1); return err },
		} {
			spawn(&group, func() {
				for {
					if err := call(); errors.Is(err, ErrClosed) {
						return
					}
				}
			})
		}
		for _, close := range e.closers() {
			spawn(&group, func() {
				spinUntil(func() bool { return e.session.Stats().Calls > 2 || e.session.gate.isClosed() })
				if err := close(); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	}
	if after := liveObjects(); after != before {
		t.Errorf("alive: %v, before %v", after, before)
	}
}
