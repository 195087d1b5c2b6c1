package phd

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestPrefillEqualsSteps(t *testing.T) {
	m := demo(t)
	tokens := tokensOf(t, m, verse)
	s := newSession(t, m, &SessionOptions{NSequences: 3})
	whole, parts, steps := s.Sequence(0), s.Sequence(1), s.Sequence(2)
	must(t, whole.Prefill(background, tokens))
	must(t, parts.Prefill(background, tokens[:17]))
	must(t, parts.Prefill(background, tokens[17:]))
	for _, token := range tokens {
		must(t, steps.Step(background, token))
	}
	want := logitsOf(t, whole)
	if len(want) != m.Info().NVocab {
		t.Fatalf("there are %d logits", len(want))
	}
	wantNear(t, logitsOf(t, parts), want)
	wantNear(t, logitsOf(t, steps), want)
	for _, q := range []*Sequence{whole, parts, steps} {
		if q.Len() != len(tokens) {
			t.Errorf("sequence %d has %d positions, expected %d", q.ID(), q.Len(), len(tokens))
		}
		wantSame(t, value[[]Token](t)(q.Tokens()), tokens)
	}
}

// expected.json is what a reference implementation in double precision says of the demo model.
type expected struct {
	File    string
	Window  int
	MeanNLL float64 `json:"mean_nll"`
	Greedy  []struct {
		Prompt         string
		Tokens, Greedy []Token
		Text           string
	}
}

func readExpected(t testing.TB) (e expected) {
	t.Helper()
	must(t, json.Unmarshal(value[[]byte](t)(os.ReadFile(filepath.Join(demoPath, "expected.json"))), &e))
	return e
}

func TestReferenceText(t *testing.T) {
	m := demo(t)
	greedy := newGreedySampler(t, m)
	stream := newStream(t, m)
	q := newSession(t, m, &SessionOptions{CacheType: CacheF32}).Sequence(0)
	for _, want := range readExpected(t).Greedy {
		must(t, q.Truncate(0))
		wantSame(t, tokensOf(t, m, want.Prompt), want.Tokens)
		must(t, q.Prefill(background, want.Tokens))
		var tokens []Token
		text := ""
		for range want.Greedy {
			token := value[Token](t)(greedy.Sample(q))
			tokens = append(tokens, token)
			text += value[string](t)(stream.Push(token))
			must(t, q.Step(background, token))
		}
		wantSame(t, tokens, want.Greedy)
		if text += value[string](t)(stream.Finish()); text != want.Text {
			t.Errorf("%q goes on %q, expected %q", want.Prompt, text, want.Text)
		}
	}
}

func TestReferenceLoss(t *testing.T) {
	m := demo(t)
	want := readExpected(t)
	text := value[[]byte](t)(os.ReadFile(filepath.Join(demoPath, want.File)))
	tokens := value[[]Token](t)(m.Tokenize(string(text), false, false))
	q := newSession(t, m, &SessionOptions{NPositions: want.Window + 1, CacheType: CacheF32}).Sequence(0)
	sum, n := 0.0, 0
	for start := 0; start < len(tokens); start += want.Window {
		must(t, q.Truncate(0))
		end := min(start+want.Window+1, len(tokens)) // a window's last input predicts the next window's first token
		for _, score := range value[[]float32](t)(q.Score(background, tokens[start:end])) {
			sum -= float64(score)
			n++
		}
	}
	if found := sum / float64(n); math.Abs(found-want.MeanNLL) > 1e-3 || n != len(tokens)-1 {
		t.Errorf("the loss of %d tokens is %v, expected %v", n, found, want.MeanNLL)
	}
}

func TestForkTruncate(t *testing.T) {
	m := demo(t)
	tokens := tokensOf(t, m, verse)
	s := newSession(t, m, &SessionOptions{NSequences: 2})
	a, b := s.Sequence(0), s.Sequence(1)
	must(t, a.Prefill(background, tokens[:40]))
	before := logitsOf(t, a)
	must(t, a.CopyTo(b))
	wantSame(t, logitsOf(t, b), before)
	if s.Usage().Shared == 0 {
		t.Error("a fork shares nothing")
	}
	must(t, b.Prefill(background, tokens[40:]))
	wantSame(t, logitsOf(t, a), before)
	want := logitsOf(t, b)
	must(t, b.Truncate(35))
	if _, err := b.Logits(nil); !errors.Is(err, ErrInvalidArgument) {
		t.Errorf("logits after truncating: %v", err)
	}
	must(t, b.Prefill(background, tokens[35:]))
	wantNear(t, logitsOf(t, b), want)
	must(t, b.Truncate(0))
	if b.Len() != 0 || a.Len() != 40 {
		t.Errorf("lengths are %d and %d", a.Len(), b.Len())
	}
	wantError(t, a.Truncate(-1), ErrInvalidArgument)
	wantError(t, a.Truncate(41), ErrInvalidArgument)
	wantError(t, a.CopyTo(nil), ErrInvalidArgument)
	wantError(t, a.CopyTo(newDemoSequence(t)), ErrInvalidArgument)
}

func TestBatch(t *testing.T) {
	m := demo(t)
	tokens := tokensOf(t, m, verse)
	s := newSession(t, m, &SessionOptions{NSequences: 4, NDraft: 4, BatchInvariant: true})
	q := make([]*Sequence, s.NSequences())
	for i := range q {
		q[i] = s.Sequence(i)
		if q[i].ID() != i || q[i].Session() != s || s.Sequence(i) != q[i] {
			t.Fatalf("sequence %d is %+v", i, q[i])
		}
	}
	must(t, s.Decode(background, []Entry{
		{Sequence: q[0], Tokens: tokens, Logits: true},
		{Sequence: q[1], Tokens: tokens[:20]},
		{Sequence: q[2], Tokens: tokens[:1], Logits: true},
		{Sequence: q[3], Tokens: tokens[:4], LogitsAll: true},
	}))
	alone := newDemoSequence(t)
	must(t, alone.Prefill(background, tokens[:1]))
	wantSame(t, logitsOf(t, q[2]), logitsOf(t, alone))
	wantSame(t, value[[]float32](t)(q[3].LogitsAt(0, nil)), logitsOf(t, alone))
	must(t, alone.Prefill(background, tokens[1:]))
	wantSame(t, logitsOf(t, q[0]), logitsOf(t, alone))
	_, err := q[1].Logits(nil)
	wantError(t, err, ErrInvalidArgument)
	wantSame(t, value[[]float32](t)(q[3].LogitsAt(3, nil)), logitsOf(t, q[3]))
	sampler := newSamplerOf(t, m, nil)
	twin := value[*Sampler](t)(sampler.Clone())
	t.Cleanup(func() { twin.Close() })
	for i := range 4 {
		want := value[Token](t)(twin.SampleLogits(value[[]float32](t)(q[3].LogitsAt(i, nil))))
		if token := value[Token](t)(sampler.SampleAt(q[3], i)); token != want {
			t.Errorf("after token %d of the entry, %d is sampled, expected %d", i, token, want)
		}
	}
	for _, i := range []int{-1, 4, 1 << 40} {
		_, err = q[3].LogitsAt(i, nil)
		wantError(t, err, ErrInvalidArgument)
		_, err = sampler.SampleAt(q[3], i)
		wantError(t, err, ErrInvalidArgument)
	}

	// A batch is carried out whole or not at all.
	before := logitsOf(t, q[0])
	wantError(t, s.Decode(background, []Entry{
		{Sequence: q[0], Tokens: tokens[:3], Logits: true},
		{Sequence: q[1], Tokens: []Token{Token(m.Info().NVocab)}},
	}), ErrInvalidArgument)
	if q[0].Len() != len(tokens) || q[1].Len() != 20 {
		t.Errorf("a failed batch has appended")
	}
	wantSame(t, logitsOf(t, q[0]), before)
	for _, entries := range [][]Entry{
		{{Tokens: tokens}},
		{{Sequence: alone, Tokens: tokens}},
		{{Sequence: q[0]}},
		{{Sequence: q[0], Tokens: tokens}, {Sequence: q[0], Tokens: tokens}},
	} {
		wantError(t, s.Decode(background, entries), ErrInvalidArgument)
	}

	// Batches of growing and shrinking size, through the same memory.
	for _, n := range []int{1, 40, 2, 50, 3} {
		for i := range q {
			must(t, q[i].Truncate(0))
		}
		var entries []Entry
		for i := range q {
			entries = append(entries, Entry{Sequence: q[i], Tokens: tokens[i : i+min(n, len(tokens)-4)]})
		}
		must(t, s.Decode(background, entries))
		for i := range q {
			wantSame(t, value[[]Token](t)(q[i].Tokens()), entries[i].Tokens)
		}
	}
}

func TestCacheFull(t *testing.T) {
	m := demo(t)
	tokens := manyTokens(m, 33)
	q := newSession(t, m, &SessionOptions{NPositions: 32}).Sequence(0)
	must(t, q.Prefill(background, tokens[:30]))
	before := logitsOf(t, q)
	err := q.Prefill(background, tokens[30:])
	wantError(t, err, ErrCacheFull)
	if q.Len() != 30 {
		t.Errorf("the sequence has %d positions", q.Len())
	}
	wantSame(t, logitsOf(t, q), before)
	must(t, q.Prefill(background, tokens[30:32])) // exactly full
	wantError(t, q.Step(background, 1), ErrCacheFull)
	if s := q.Session().Stats(); s.CacheFull != 2 {
		t.Errorf("stats are %+v", s)
	}
}

func TestPolicy(t *testing.T) {
	m := demo(t)
	q := newSession(t, m, &SessionOptions{NPositions: 256}).Sequence(0)
	must(t, q.SetPolicy(&Policy{DropMiddle: true, Keep: 16, Limit: 128}))
	for _, token := range manyTokens(m, 300) {
		must(t, q.Step(background, token))
	}
	if q.Dropped() == 0 || q.Len() > 128 || q.Len()+q.Dropped() != 300 {
		t.Errorf("%d positions, %d dropped", q.Len(), q.Dropped())
	}
	must(t, q.SetPolicy(nil))
	var err error
	for err == nil {
		err = q.Step(background, 1)
	}
	wantError(t, err, ErrCacheFull)
	if q.Len() != 256 {
		t.Errorf("the sequence has %d positions", q.Len())
	}
	for _, p := range []Policy{{Keep: -1}, {Limit: -1}, {DropMiddle: true, Keep: 250, Limit: 256}} {
		wantError(t, q.SetPolicy(&p), ErrInvalidArgument)
	}
}

func TestPrefix(t *testing.T) {
	m := demo(t)
	tokens := tokensOf(t, m, verse)
	n := len(tokens)
	s := newSession(t, m, &SessionOptions{NSequences: 2})
	a, b := s.Sequence(0), s.Sequence(1)
	must(t, a.Prefill(background, tokens))
	want := logitsOf(t, a)
	if found, q, err := s.MatchPrefix(tokens[:n-1]); found != n-1 || q != a || err != nil {
		t.Errorf("matches %d of %v: %v", found, q, err)
	}
	must(t, a.Retain())
	if u := s.Usage(); a.Len() != 0 || u.Used != 0 || u.Retained == 0 || u.Retained+u.Free != 2048 {
		t.Errorf("%d positions, usage %+v", a.Len(), u)
	}
	if found, q, err := s.MatchPrefix(tokens[:n-1]); found != n-1 || q != nil || err != nil {
		t.Errorf("matches %d of %v: %v", found, q, err)
	}
	if got := value[int](t)(b.TakePrefix(tokens[:n-1])); got != n-1 || b.Len() != n-1 {
		t.Errorf("takes %d, has %d", got, b.Len())
	}
	must(t, b.Step(background, tokens[n-1]))
	wantNear(t, logitsOf(t, b), want)
	if found, q, err := s.MatchPrefix([]Token{5}); found != 0 || q != nil || err != nil {
		t.Errorf("matches %d of %v: %v", found, q, err)
	}
	if st := s.Stats(); st.PrefixHits == 0 || st.PrefixTokens != uint64(n-1) {
		t.Errorf("stats are %+v", st)
	}
	s = newSession(t, m, &SessionOptions{NRetained: -1})
	must(t, s.Sequence(0).Prefill(background, tokens))
	must(t, s.Sequence(0).Retain())
	if found, _, err := s.MatchPrefix(tokens); found != 0 || err != nil {
		t.Errorf("a session that retains nothing matches %d: %v", found, err)
	}
}

func TestSaveRestore(t *testing.T) {
	m := demo(t)
	tokens := tokensOf(t, m, verse)
	a := newDemoSequence(t)
	must(t, a.Prefill(background, tokens))
	state := value[[]byte](t)(a.Save())
	path := filepath.Join(t.TempDir(), "state")
	must(t, a.SaveFile(path))
	if content := value[[]byte](t)(os.ReadFile(path)); !slices.Equal(content, state) {
		t.Error("the file has another state")
	}
	b := newSession(t, m, &SessionOptions{NSequences: 2}).Sequence(1)
	for _, restore := range []func() error{
		func() error { return b.Restore(state) },
		func() error { return b.RestoreFile(path) },
	} {
		must(t, b.Truncate(0))
		must(t, restore())
		wantSame(t, logitsOf(t, b), logitsOf(t, a))
		wantSame(t, value[[]Token](t)(b.Tokens()), tokens)
	}
	must(t, a.Step(background, 7))
	must(t, b.Step(background, 7))
	wantNear(t, logitsOf(t, b), logitsOf(t, a))

	damaged := slices.Clone(state)
	damaged[len(damaged)/2] ^= 1
	for _, state := range [][]byte{nil, damaged, state[:len(state)-1], make([]byte, 100)} {
		wantError(t, b.Restore(state), ErrInvalidArgument)
	}
	must(t, os.WriteFile(path, damaged, 0o600))
	wantError(t, b.RestoreFile(path), ErrFormat)
	wantError(t, b.RestoreFile(path+"2"), ErrIO)
	wantError(t, b.RestoreFile("\x00"), ErrInvalidArgument)
	wantError(t, b.SaveFile("/nonesuch/state"), ErrIO)
	wantError(t, b.SaveFile("\x00"), ErrInvalidArgument)
	if b.Len() != len(tokens)+1 {
		t.Error("a failed restore has changed the sequence")
	}
	other := newSession(t, m, &SessionOptions{CacheType: CacheF32}).Sequence(0)
	wantError(t, other.Restore(state), ErrInvalidArgument)
}

func TestScoreEmbed(t *testing.T) {
	m := demo(t)
	tokens := tokensOf(t, m, verse)
	q := newDemoSequence(t)
	scores := value[[]float32](t)(q.Score(background, tokens))
	if len(scores) != len(tokens)-1 {
		t.Fatalf("there are %d scores", len(scores))
	}
	must(t, q.Truncate(0))
	for i, token := range tokens[:10] {
		if i > 0 {
			want := value[[]float32](t)(q.Logprobs([]Token{token}))[0]
			if math.Abs(float64(scores[i-1]-want)) > 0.02 {
				t.Errorf("score %d is %v, expected %v", i-1, scores[i-1], want)
			}
		}
		must(t, q.Step(background, token))
	}
	must(t, q.Truncate(0))
	last := value[[]float32](t)(q.Embed(background, tokens, PoolingLast, true))
	must(t, q.Truncate(0))
	mean := value[[]float32](t)(q.Embed(background, tokens, PoolingMean, true))
	for _, embedding := range [][]float32{last, mean} {
		sum := 0.0
		for _, x := range embedding {
			sum += float64(x) * float64(x)
		}
		if len(embedding) != m.Info().NEmbd || math.Abs(sum-1) > 1e-3 {
			t.Errorf("an embedding of %d numbers has length %v", len(embedding), math.Sqrt(sum))
		}
	}
	if slices.Equal(last, mean) {
		t.Error("the last position's embedding is the mean's")
	}
	_, err := q.Embed(background, tokens, 9, false)
	wantError(t, err, ErrInvalidArgument)
	_, err = q.Score(background, nil)
	wantError(t, err, ErrInvalidArgument)
}

func TestLogprobs(t *testing.T) {
	m := demo(t)
	q := newDemoSequence(t)
	must(t, q.Prefill(background, tokensOf(t, m, verse)))
	logits := logitsOf(t, q)
	sum := 0.0
	for _, l := range logits {
		sum += math.Exp(float64(l))
	}
	top := value[[]TokenLogprob](t)(q.TopLogprobs(5))
	if len(top) != 5 || top[0].Token != argmax(logits) {
		t.Fatalf("the best are %v", top)
	}
	for i, x := range top {
		want := float64(logits[x.Token]) - math.Log(sum)
		if math.Abs(float64(x.Logprob)-want) > 1e-4 || i > 0 && x.Logprob > top[i-1].Logprob {
			t.Errorf("the best are %v, expected %v for %d", top, want, i)
		}
		if got := value[[]float32](t)(q.Logprobs([]Token{x.Token, 3})); got[0] != x.Logprob || len(got) != 2 {
			t.Errorf("log-probabilities are %v", got)
		}
	}
	if top := value[[]TokenLogprob](t)(q.TopLogprobs(0)); len(top) != 0 {
		t.Errorf("the best 0 are %v", top)
	}
	if top := value[[]TokenLogprob](t)(q.TopLogprobs(len(logits))); len(top) != len(logits) {
		t.Errorf("there are %d of all", len(top))
	}
	for _, n := range []int{-1, len(logits) + 1, 1 << 40} {
		_, err := q.TopLogprobs(n)
		wantError(t, err, ErrInvalidArgument)
	}
	_, err := q.Logprobs([]Token{-1})
	wantError(t, err, ErrInvalidArgument)
	buffer := make([]float32, 3, len(logits))
	if got := value[[]float32](t)(q.Logits(buffer)); &got[0] != &buffer[0] {
		t.Error("Logits has not used the buffer")
	}
}

func TestSessionOptions(t *testing.T) {
	m := demo(t)
	for _, o := range []SessionOptions{
		{NPositions: -1}, {NSequences: 1 << 33}, {NThreads: -1}, {NDraft: -1}, {NRetained: -2}, {CacheType: 9},
	} {
		s, err := m.NewSession(&o)
		if err == nil {
			must(t, s.Close())
		}
		wantError(t, err, ErrInvalidArgument)
	}
	bytes := map[CacheType]uint64{}
	for _, c := range []CacheType{CacheDefault, CacheF32, CacheF16, CacheQ8_0, CacheBF16} {
		s := newSession(t, m, &SessionOptions{CacheType: c, NThreads: 1})
		if s.Model() != m || s.NSequences() != 1 {
			t.Errorf("the session has %d sequences", s.NSequences())
		}
		memory := s.Memory()
		bytes[c] = memory.Cache
		if memory.Weights == 0 || memory.Hidden == 0 || memory.Scratch == 0 {
			t.Errorf("memory is %+v", memory)
		}
		if u := s.Usage(); u.Free != 2048 || u.Used != 0 || u.Block == 0 {
			t.Errorf("usage is %+v", u)
		}
	}
	if bytes[CacheDefault] != bytes[CacheF16] || bytes[CacheF32] != 2*bytes[CacheF16] || bytes[CacheBF16] != bytes[CacheF16] ||
		bytes[CacheQ8_0] >= bytes[CacheF16] {
		t.Errorf("bytes of caches are %v", bytes)
	}
	defer func() {
		if recover() == nil {
			t.Error("there is a sequence 1")
		}
	}()
	newSession(t, m, nil).Sequence(1)
}

func TestStats(t *testing.T) {
	m := demo(t)
	q := newDemoSequence(t)
	must(t, q.Prefill(background, manyTokens(m, 10)))
	must(t, q.Step(background, 1))
	s := q.Session().Stats()
	if s.PromptTokens != 10 || s.StepTokens != 1 || s.Calls != 2 || s.Passes != 2 || s.Rows == 0 || s.PrefillTime <= 0 || s.StepTime <= 0 {
		t.Errorf("stats are %+v", s)
	}
}

// A step, and sampling from what it leaves, make no garbage.
func TestAllocations(t *testing.T) {
	m := demo(t)
	q := newDemoSequence(t)
	s := q.Session()
	sampler := newSamplerOf(t, m, nil)
	tokens := []Token{5}
	entries := []Entry{{Sequence: q, Tokens: tokens, Logits: true}}
	must(t, s.Decode(background, entries))
	verified := newDemoSequence(t)
	must(t, verified.Session().Decode(background, []Entry{{Sequence: verified, Tokens: []Token{5, 6}, LogitsAll: true}}))
	logits := logitsOf(t, q)
	ctx, cancel := context.WithCancel(background)
	defer cancel()
	for name, call := range map[string]struct {
		most float64
		f    func() error
	}{
		"Step":     {0, func() error { return q.Step(background, 5) }},
		"Decode":   {0, func() error { return s.Decode(background, entries) }},
		"Sample":   {0, func() error { _, err := sampler.Sample(q); return err }},
		"SampleAt": {0, func() error { _, err := sampler.SampleAt(verified, 1); return err }},
		"Accept":   {0, func() error { return sampler.Accept(5) }},
		"Logits":   {0, func() (err error) { logits, err = q.Logits(logits); return }},
		"Len":      {0, func() error { q.Len(); return nil }},
		"Stats":    {0, func() error { s.Stats(); s.Usage(); return nil }},
		// What context.AfterFunc costs.
		"Step with a context": {4, func() error { return q.Step(ctx, 5) }},
	} {
		must(t, call.f())
		if n := testing.AllocsPerRun(20, func() { must(t, call.f()) }); n > call.most {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}
