package phd

import (
	"encoding/json"
	"errors"
	"math"
	"regexp"
	"strings"
	"testing"
)

// generate lets a sampler go on for n tokens, or until it chooses an end token.
func generate(t testing.TB, q *Sequence, s *Sampler, n int) []Token {
	t.Helper()
	var tokens []Token
	for range n {
		token := value[Token](t)(s.Sample(q))
		must(t, s.Accept(token))
		if q.Session().Model().IsEnd(token) {
			break
		}
		tokens = append(tokens, token)
		must(t, q.Step(background, token))
	}
	return tokens
}

func newPrompted(t testing.TB, m *Model, prompt string) *Sequence {
	t.Helper()
	q := newSession(t, m, nil).Sequence(0)
	must(t, q.Prefill(background, tokensOf(t, m, prompt)))
	return q
}

func TestSamplerIsReproducible(t *testing.T) {
	m := demo(t)
	q := newPrompted(t, m, "And the king said")
	start := q.Len()
	run := func(s *Sampler) []Token {
		tokens := generate(t, q, s, 20)
		must(t, q.Truncate(start-1))
		must(t, q.Step(background, tokensOf(t, m, "And the king said")[start-1]))
		return tokens
	}
	o := DefaultSamplerOptions()
	o.Seed, o.RepetitionPenalty, o.DRYMultiplier = 7, 1.1, 0.8
	a, b := newSamplerOf(t, m, &o), newSamplerOf(t, m, &o)
	must(t, a.AddDRYBreaker("\n"))
	must(t, b.AddDRYBreaker("\n"))
	first := run(a)
	wantSame(t, run(b), first)
	must(t, a.Reset())
	wantSame(t, run(a), first)
	clone := value[*Sampler](t)(a.Clone())
	defer clone.Close()
	wantSame(t, run(clone), run(a)) // both go on from where a was
	o.Seed = 8
	if other := run(newSamplerOf(t, m, &o)); len(other) == len(first) && other[0] == first[0] && other[5] == first[5] && other[10] == first[10] {
		t.Errorf("another seed gives %v, too", other)
	}
}

func TestSamplerStages(t *testing.T) {
	m := demo(t)
	q := newPrompted(t, m, verse)
	logits := logitsOf(t, q)
	best := argmax(logits)
	cold := DefaultSamplerOptions()
	cold.Temperature = 0
	sampler := newSamplerOf(t, m, &cold)
	for range 3 {
		if token := value[Token](t)(sampler.Sample(q)); token != best {
			t.Errorf("at temperature 0 the choice is %d, expected %d", token, best)
		}
	}
	if token := value[Token](t)(sampler.SampleLogits(logits)); token != best {
		t.Errorf("of logits the choice is %d, expected %d", token, best)
	}
	must(t, sampler.AddLogitBias([]Token{best}, []float32{float32(math.Inf(-1))}))
	second := value[[]TokenLogprob](t)(q.TopLogprobs(2))[1].Token
	if token := value[Token](t)(sampler.Sample(q)); token != second {
		t.Errorf("with the best forbidden the choice is %d, expected %d", token, second)
	}

	// Each stage exists, and a chain of one that leaves a single candidate finds it.
	o := DefaultSamplerOptions()
	o.TopK = 1
	for stage := StagePenalties; stage <= StageMirostatV2; stage++ {
		s := value[*Sampler](t)(m.NewEmptySampler(1))
		must(t, s.AddStage(StageTopK, &o))
		must(t, s.AddStage(stage, nil))
		if token := value[Token](t)(s.Sample(q)); token != best {
			t.Errorf("with stage %d the choice is %d, expected %d", stage, token, best)
		}
		must(t, s.Close())
	}
	s := value[*Sampler](t)(m.NewEmptySampler(1))
	defer s.Close()
	wantError(t, s.AddStage(99, nil), ErrInvalidArgument)

	// Penalties see the prompt.
	o = cold
	o.RepetitionPenalty, o.PenaltyLastN = 1000, 16
	penalised := newSamplerOf(t, m, &o)
	must(t, penalised.AcceptPrompt([]Token{best}))
	if token := value[Token](t)(penalised.Sample(q)); token == best {
		t.Error("a penalised token is chosen")
	}
}

func TestSamplerErrors(t *testing.T) {
	m := demo(t)
	nan := float32(math.NaN())
	for _, change := range []func(*SamplerOptions){
		func(o *SamplerOptions) { o.Temperature = nan },
		func(o *SamplerOptions) { o.TopK = -1 },
		func(o *SamplerOptions) { o.PenaltyLastN = 1 << 33 },
		func(o *SamplerOptions) { o.DRYAllowedLength = -1 },
		func(o *SamplerOptions) { o.Mirostat = 1 },
		func(o *SamplerOptions) { o.MinKeep = -5 },
	} {
		o := DefaultSamplerOptions()
		change(&o)
		_, err := m.NewSampler(&o)
		wantError(t, err, ErrInvalidArgument)
	}
	s := newSamplerOf(t, m, nil)
	wantError(t, s.AddLogitBias([]Token{1}, nil), ErrInvalidArgument)
	wantError(t, s.AddLogitBias([]Token{-1}, []float32{1}), ErrInvalidArgument)
	wantError(t, s.AddDRYBreakerTokens(nil), ErrInvalidArgument)
	must(t, s.AddDRYBreakerTokens([]Token{1, 2}))
	wantError(t, s.AddDRYBreaker(""), ErrInvalidArgument)
	wantError(t, s.Accept(-1), ErrInvalidArgument)
	wantError(t, s.AcceptPrompt([]Token{1 << 30}), ErrInvalidArgument)
	_, err := s.SampleLogits([]float32{1, 2})
	wantError(t, err, ErrInvalidArgument)
	_, err = s.Sample(newDemoSequence(t)) // no logits
	wantError(t, err, ErrInvalidArgument)
	wantError(t, s.AddRegex("("), ErrInvalidArgument)
	wantError(t, s.AddGBNF("root ::= ("), ErrInvalidArgument)
	wantError(t, s.AddJSONSchema(`{"type":`), ErrInvalidArgument)
	wantError(t, s.AddJSONSchema(`{"type":"array","uniqueItems":true}`), ErrUnsupported)
}

func TestConstraints(t *testing.T) {
	m := demo(t)
	q := newPrompted(t, m, verse)
	start := value[[]byte](t)(q.Save())
	run := func(add func(*Sampler) error) string {
		t.Helper()
		must(t, q.Restore(start))
		s := newSamplerOf(t, m, nil)
		must(t, add(s))
		tokens := generate(t, q, s, 200)
		return string(value[[]byte](t)(m.Detokenize(tokens)))
	}
	text := run(func(s *Sampler) error {
		return s.AddJSONSchema(`{"type":"object","properties":{"king":{"enum":["David","Saul"]},"years":{"type":"integer",` +
			`"minimum":1,"maximum":99}},"required":["king","years"],"additionalProperties":false}`)
	})
	var found struct {
		King  string
		Years int
	}
	if err := json.Unmarshal([]byte(text), &found); err != nil || found.Years < 1 || found.Years > 99 || found.King[1] != 'a' {
		t.Errorf("JSON is %q: %v", text, err)
	}
	const re = `[A-Z][a-z]{2,5} begat [A-Z][a-z]{2,5}\.`
	if text := run(func(s *Sampler) error { return s.AddRegex(re) }); !regexp.MustCompile("^" + re + "$").MatchString(text) {
		t.Errorf("the regular expression gives %q", text)
	}
	if text := run(func(s *Sampler) error { return s.AddGrammar(`start: ("selah" " "?)~3`) }); strings.Count(text, "selah") != 3 {
		t.Errorf("the grammar gives %q", text)
	}
	if text := run(func(s *Sampler) error { return s.AddGBNF(`root ::= ("selah" " "?){3}`) }); strings.Count(text, "selah") != 3 {
		t.Errorf("the GBNF grammar gives %q", text)
	}

	// What the constraint does not allow is refused, and changes nothing.
	must(t, q.Restore(start))
	s := newSamplerOf(t, m, nil)
	must(t, s.AddRegex("b"))
	wantError(t, s.Accept(tokensOf(t, m, "a")[0]), ErrInvalidArgument)
	must(t, s.Accept(tokensOf(t, m, "b")[0]))
	if token := value[Token](t)(s.Sample(q)); !m.IsEnd(token) {
		t.Errorf("after the whole text comes %d", token)
	}
	wantError(t, s.AddRegex("c"), ErrInvalidArgument) // a second one
}

// A constraint within a text: it begins in the middle of a token and is taken away when it has ended.
func TestConstraintWithinText(t *testing.T) {
	m := demo(t)
	q := newPrompted(t, m, verse)
	s := newSamplerOf(t, m, nil)
	isDone := func() bool { return value[bool](t)(s.ConstraintDone()) }
	must(t, s.Accept(5))
	if isDone() {
		t.Error("no constraint has ended")
	}
	must(t, s.AddRegex("selah"))
	must(t, s.ConstraintAccept("se"))
	wantError(t, s.ConstraintAccept("x"), ErrInvalidArgument)
	text := "se"
	for !isDone() {
		token := value[Token](t)(s.Sample(q))
		must(t, s.Accept(token))
		text += string(value[[]byte](t)(m.TokenBytes(token, false)))
	}
	if text != "selah" {
		t.Errorf("the text is %q", text)
	}
	must(t, s.RemoveConstraint())
	must(t, s.RemoveConstraint()) // none
	must(t, s.Accept(5))
	must(t, s.AddRegex("b"))
}

func TestStream(t *testing.T) {
	m := demo(t)
	s := newStream(t, m)
	const text = "né 🐪"
	tokens := value[[]Token](t)(m.Tokenize(text, false, false))
	if len(tokens) < 6 {
		t.Fatalf("%q has the tokens %v, expected characters that are split", text, tokens)
	}
	got, held := "", 0
	for _, token := range tokens {
		piece := value[string](t)(s.Push(token))
		if piece == "" {
			held++
		}
		got += piece
		if !strings.HasPrefix(text, got) {
			t.Fatalf("the text begins %q", got)
		}
	}
	if rest := value[string](t)(s.Finish()); rest != "" || got != text || held < 3 {
		t.Errorf("the text is %q and %q, %d tokens held back", got, rest, held)
	}

	// An incomplete character.
	begun := value[string](t)(s.Push(tokens[len(tokens)-4]))
	if rest := value[string](t)(s.Finish()); begun != "" || rest != "\uFFFD" {
		t.Errorf("an incomplete character begins %q and ends %q", begun, rest)
	}

	// Stop strings; a text longer than the buffer.
	must(t, s.AddStop("Spirit of"))
	must(t, s.AddStop("never"))
	got = ""
	for _, token := range tokensOf(t, m, verse) {
		got += value[string](t)(s.Push(token))
	}
	want := verse[:strings.Index(verse, "Spirit of")]
	if index, n := s.Stopped(); got != want || index != 0 || n != uint64(len(want)) {
		t.Errorf("the text is %q; stopped by %d after %d bytes", got, index, n)
	}
	wantError(t, s.AddStop("x"), ErrInvalidArgument) // not between texts
	value[string](t)(s.Finish())
	if index, n := s.Stopped(); index != -1 || n != 0 {
		t.Errorf("a new text: stopped by %d after %d bytes", index, n)
	}
	long := strings.Repeat("a", 200) + "b"
	must(t, s.AddStop(long))
	got = ""
	for _, token := range value[[]Token](t)(m.Tokenize(long[1:201]+"c", false, false)) {
		got += value[string](t)(s.Push(token))
	}
	if got += value[string](t)(s.Finish()); got != long[1:201]+"c" {
		t.Errorf("200 bytes that were held back have become %q", got)
	}
	wantError(t, s.AddStop(""), ErrInvalidArgument)
	_, err := s.Push(-1)
	wantError(t, err, ErrInvalidArgument)

	end, _ := m.SpecialToken(SpecialEOS)
	spelled := ""
	for _, special := range []bool{false, true} {
		must(t, s.SetSpecial(special))
		spelled += "|" + value[string](t)(s.Push(end)) + value[string](t)(s.Finish())
	}
	if spelled != "||<|endoftext|>" {
		t.Errorf("the end token is spelled %q", spelled)
	}
}

func TestSpeculator(t *testing.T) {
	m := demo(t)
	const n = 40
	prompt := tokensOf(t, m, verse+" "+verse)
	plain := newPrompted(t, m, verse+" "+verse)
	var want []Token
	sampler := newGreedySampler(t, m)
	for range n {
		token := value[Token](t)(sampler.Sample(plain))
		want = append(want, token)
		must(t, plain.Step(background, token))
	}
	lookup := newSpeculator(t, m, &SpeculatorOptions{NDraft: 3, NgramMin: 1, NgramMax: 4})
	draft := value[*Speculator](t)(m.NewSpeculator(m, &SessionOptions{}, &SpeculatorOptions{NDraft: 3, PMin: -1}))
	defer draft.Close()
	for name, s := range map[string]*Speculator{"look-up": lookup, "draft model": draft} {
		q := newSession(t, m, &SessionOptions{NDraft: 3}).Sequence(0)
		must(t, q.Prefill(background, prompt))
		got := []Token{value[Token](t)(sampler.Sample(q))}
		for len(got) < n/2 {
			got = append(got, value[[]Token](t)(s.Step(background, q, got[len(got)-1], sampler))...)
		}
		// The same in parts, as servers do.
		for len(got) < n {
			last := got[len(got)-1]
			drafts := value[[]Token](t)(s.Draft(q, last))
			must(t, q.Session().Decode(background, []Entry{{Sequence: q, Tokens: append([]Token{last}, drafts...), LogitsAll: true}}))
			got = append(got, value[[]Token](t)(s.Accept(q, sampler))...)
		}
		wantSame(t, got[:n], want)
		if q.Len() != len(prompt)+len(got)-1 {
			t.Errorf("%s: %d positions for %d tokens", name, q.Len(), len(prompt)+len(got))
		}
		must(t, s.Forget(q))
		stats := s.Stats()
		if stats.Steps == 0 || stats.Accepted == 0 || stats.Accepted > stats.Drafted || (stats.DraftBytes > 0) != (s == draft) {
			t.Errorf("%s: %+v", name, stats)
		}
	}

	_, err := m.NewSpeculator(nil, &SessionOptions{}, nil)
	wantError(t, err, ErrInvalidArgument)
	_, err = m.NewSpeculator(m, &SessionOptions{Progress: func(float32) bool { return true }}, nil)
	wantError(t, err, ErrInvalidArgument)
	for _, o := range []SpeculatorOptions{{NDraft: -1}, {NDraft: 1000}, {NgramMin: 9, NgramMax: 3}} {
		if _, err := m.NewSpeculator(nil, nil, &o); !errors.Is(err, ErrInvalidArgument) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	q := newDemoSequence(t) // NDraft 0
	must(t, q.Prefill(background, prompt))
	if _, err := lookup.Step(background, q, 1, sampler); !errors.Is(err, ErrInvalidArgument) {
		t.Errorf("a session without NDraft: %v", err)
	}
	q = newSession(t, m, &SessionOptions{NDraft: 3}).Sequence(0)
	must(t, q.Prefill(background, prompt))
	q.Cancel()
	_, err = draft.Step(background, q, 1, sampler)
	wantError(t, err, ErrCancelled)
	value[[]Token](t)(draft.Step(background, q, 1, sampler))
}
