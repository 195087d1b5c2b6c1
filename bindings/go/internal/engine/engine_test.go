package engine

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

const modelPath = "../../../../models/kjv-phd-cswa-2-16-32"

var model = sync.OnceValue(func() *phd.Model {
	m, err := phd.LoadModel(context.Background(), modelPath, nil)
	if err != nil {
		panic(err)
	}
	return m
})

// open makes an engine of 4 slots and 1,024 positions, or what change makes of that.
func open(t *testing.T, change func(*Config)) *Engine {
	t.Helper()
	cfg := Config{Model: model(), Slots: 4, Context: 1024, SlotContext: 256, Threads: 2, MaxQueue: 1000}
	if change != nil {
		change(&cfg)
	}
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func tokenize(t *testing.T, text string) []phd.Token {
	t.Helper()
	tokens, err := model().Tokenize(text, true, false)
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

func greedy(t *testing.T) *phd.Sampler {
	t.Helper()
	o := phd.DefaultSamplerOptions()
	o.Temperature = 0
	s, err := model().NewSampler(&o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// params ask for n tokens after a text, the best ones.
func params(t *testing.T, text string, n int) Params {
	t.Helper()
	return Params{Prompt: tokenize(t, text), Slot: -1, MaxTokens: n, Sampler: greedy(t), Logprobs: -1, CachePrompt: true}
}

func start(t *testing.T, e *Engine, p Params) *Generation {
	t.Helper()
	g, err := e.Start(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// alone generates without an engine: what every generation of an engine must be equal to, whoever it shares batches with.
func alone(t *testing.T, text string, n int) []phd.Token {
	t.Helper()
	session, err := model().NewSession(&phd.SessionOptions{NPositions: 512, NSequences: 1, NThreads: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	sampler := greedy(t)
	defer sampler.Close()
	ctx, seq := context.Background(), session.Sequence(0)
	prompt := tokenize(t, text)
	if err := sampler.AcceptPrompt(prompt); err != nil {
		t.Fatal(err)
	}
	if err := seq.Prefill(ctx, prompt); err != nil {
		t.Fatal(err)
	}
	var tokens []phd.Token
	for {
		token, err := sampler.Sample(seq)
		if err != nil {
			t.Fatal(err)
		}
		if model().IsEnd(token) {
			return tokens
		}
		if tokens = append(tokens, token); len(tokens) == n {
			return tokens
		}
		if err := sampler.Accept(token); err != nil {
			t.Fatal(err)
		}
		if err := seq.Step(ctx, token); err != nil {
			t.Fatal(err)
		}
	}
}

// checkIdle says whether nothing runs, and every position of the pool is accounted for.
func checkIdle(t *testing.T, e *Engine) {
	t.Helper()
	if err := e.waitIdle(); err != nil {
		t.Fatal(err)
	}
	for i := range e.cfg.Slots {
		if _, err := e.EraseSlot(context.Background(), i); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.waitIdle(); err != nil {
		t.Fatal(err)
	}
	s := e.Snapshot()
	if s.Busy != 0 || s.Queued != 0 {
		t.Errorf("%d generations run and %d wait at the end", s.Busy, s.Queued)
	}
	if s.Started != s.Finished {
		t.Errorf("%d generations were started and %d have ended", s.Started, s.Finished)
	}
	if s.Usage.Used != 0 || s.Usage.Shared != 0 {
		t.Errorf("all slots are empty, and %d positions are in use, %d shared", s.Usage.Used, s.Usage.Shared)
	}
	if total := s.Usage.Free + s.Usage.Retained; total < uint64(e.cfg.Context) {
		t.Errorf("%d positions are free or retained of %d", total, e.cfg.Context)
	}
}

// waitIdle waits until nothing runs or waits.
func (e *Engine) waitIdle() error {
	e.mu.Lock()
	idle := e.idle
	e.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-time.After(time.Minute):
		return errors.New("the engine is not idle after a minute")
	}
}

var texts = []string{
	"In the beginning", "And God said, Let there be", "To be, or not to be", "The Lord is my shepherd", "Jesus wept.",
	"What is a man, if his chief good", "And it came to pass in those days, that there went out a decree from", "O Romeo, Romeo",
	"Blessed are the", "Now is the winter of our discontent made", "And the evening and the morning were the first day.",
	"Friends, Romans, countrymen, lend me your ears", "The king said unto",
}

func TestOneGeneration(t *testing.T) {
	e := open(t, nil)
	want := alone(t, texts[0], 40)
	g := start(t, e, params(t, texts[0], 40))
	var got []phd.Token
	var text strings.Builder
	for {
		event, ok := g.Next(context.Background())
		if !ok {
			break
		}
		got = append(got, event.Token)
		text.WriteString(event.Text)
	}
	r := g.Result()
	text.WriteString(r.Tail)
	if !slices.Equal(got, want) || !slices.Equal(r.Tokens, want) {
		t.Errorf("got %v and %v, want %v", got, r.Tokens, want)
	}
	plain, err := model().Detokenize(want)
	if err != nil {
		t.Fatal(err)
	}
	if text.String() != string(plain) {
		t.Errorf("the text is %q, its tokens spell %q", text.String(), plain)
	}
	if r.Reason != StopLimit || r.NDecoded != 40 || r.NPrompt != len(tokenize(t, texts[0])) || r.NCached != 0 || r.Truncated {
		t.Errorf("%+v", r)
	}
	checkIdle(t, e)
}

func TestManyAtOnceAreWhatTheyAreAlone(t *testing.T) {
	e := open(t, nil)
	var gens []*Generation
	for range 3 {
		for _, text := range texts {
			gens = append(gens, start(t, e, params(t, text, 24)))
		}
	}
	for i, g := range gens {
		text := texts[i%len(texts)]
		if r := g.Wait(); !slices.Equal(r.Tokens, alone(t, text, 24)) {
			t.Errorf("%q: %v, %v, alone %v", text, r.Tokens, r.Err, alone(t, text, 24))
		}
	}
	if s := e.Snapshot(); s.NBusy <= s.NDecode {
		t.Errorf("%d generations in %d batches: nothing was batched", s.NBusy, s.NDecode)
	}
	checkIdle(t, e)
}

// A generation waits or has a slot, whenever one looks: counted twice, it would be the full queue that others are refused for.
func TestAGenerationIsCountedOnce(t *testing.T) {
	e := open(t, nil)
	most, ended := make(chan int), make(chan struct{})
	go func() {
		largest := 0
		for {
			select {
			case <-ended:
				most <- largest
				return
			default:
			}
			e.mu.Lock()
			n := len(e.queue) + len(e.running())
			e.mu.Unlock()
			largest = max(largest, n)
		}
	}()
	for i := range 100 {
		start(t, e, params(t, texts[i%len(texts)], 1)).Wait()
	}
	close(ended)
	if n := <-most; n != 1 {
		t.Errorf("%d generations were counted of the one that there was at a time", n)
	}
}

// A pool that cannot hold all that run: the youngest give way and go on later, and nothing of that is seen in their texts.
func TestThoseWithoutRoomGiveWay(t *testing.T) {
	e := open(t, func(c *Config) { c.Context, c.SlotContext = 192, 192 })
	var gens []*Generation
	for _, text := range texts {
		gens = append(gens, start(t, e, params(t, text, 100)))
	}
	for i, g := range gens {
		if r := g.Wait(); !slices.Equal(r.Tokens, alone(t, texts[i], 100)) {
			t.Errorf("%q: %v (%v), alone %v", texts[i], r.Tokens, r.Err, alone(t, texts[i], 100))
		}
	}
	if s := e.Snapshot(); s.Preempted == 0 {
		t.Error("the pool was never too small: this tests nothing")
	}
	checkIdle(t, e)
}

func TestPrefixesAreTakenOver(t *testing.T) {
	e := open(t, nil)
	long := strings.Repeat("And the Lord spake unto Moses, saying, ", 15)
	n := len(tokenize(t, long))
	if r := start(t, e, params(t, long, 4)).Wait(); r.NCached != 0 {
		t.Errorf("%d tokens of the first prompt are cached", r.NCached)
	}
	for range 2 {
		if r := start(t, e, params(t, long, 4)).Wait(); r.NCached != n-1 {
			t.Errorf("%d of %d tokens are taken over, expected all but the last", r.NCached, n)
		}
	}
	p := params(t, long, 4)
	p.CachePrompt = false
	if r := start(t, e, p).Wait(); r.NCached != 0 {
		t.Errorf("%d tokens are taken over, against CachePrompt", r.NCached)
	}
	checkIdle(t, e)
}

// Of several that begin alike and come together, one evaluates the prefix and the others wait for it.
func TestPrefixesAreEvaluatedOnce(t *testing.T) {
	e := open(t, func(c *Config) { c.Piece = 32 })
	long := strings.Repeat("And the Lord spake unto Moses, saying, ", 15)
	shared := len(tokenize(t, long)) - 2 // the last token may join with what follows
	var gens []*Generation
	for _, text := range texts[:4] {
		gens = append(gens, start(t, e, params(t, long+text, 4)))
	}
	n := 0
	for i, g := range gens {
		if r := g.Wait(); r.NCached >= shared-sharedWorth {
			n++
		} else if r.NCached > 16 {
			t.Errorf("%q: %d of %d tokens", texts[i], r.NCached, shared)
		}
	}
	if n != len(gens)-1 {
		t.Errorf("%d of %d have taken the prefix over, expected all but one", n, len(gens))
	}
	checkIdle(t, e)
}

func TestStops(t *testing.T) {
	e := open(t, nil)
	whole, err := model().Detokenize(alone(t, texts[0], 40))
	if err != nil {
		t.Fatal(err)
	}
	word := strings.Fields(string(whole))[5]
	p := params(t, texts[0], 40)
	p.Stop = []string{"no such words", word}
	g := start(t, e, p)
	var text string
	for event, ok := g.Next(context.Background()); ok; event, ok = g.Next(context.Background()) {
		text += event.Text
	}
	r := g.Result()
	before, _, _ := strings.Cut(string(whole), word)
	if text+r.Tail != before || r.Reason != StopWord || r.StopWord != word {
		t.Errorf("%q, %v %q; expected %q", text+r.Tail, r.Reason, r.StopWord, before)
	}

	if r := start(t, e, params(t, texts[0], 0)).Wait(); r.Reason != StopLimit || r.NDecoded != 0 {
		t.Errorf("no tokens: %+v", r)
	}

	r = start(t, e, params(t, texts[0], -1)).Wait()
	if n := r.NPrompt + len(r.Tokens); r.Reason == StopLimit && (n != 256 || !r.Truncated) || r.Reason != StopLimit && r.Reason != StopEOS {
		t.Errorf("until the context is full: %d tokens, %+v", n, r)
	}

	// The model's own end, which a bias makes certain.
	p = params(t, texts[0], 40)
	end := endToken(t)
	if err := p.Sampler.AddLogitBias([]phd.Token{end}, []float32{1e9}); err != nil {
		t.Fatal(err)
	}
	g = start(t, e, p)
	if event, ok := g.Next(context.Background()); ok {
		t.Errorf("an end token came as an event: %+v", event)
	}
	if r := g.Result(); r.Reason != StopEOS || len(r.Tokens) != 0 || r.NDecoded != 1 {
		t.Errorf("%+v", r)
	}
	checkIdle(t, e)
}

func endToken(t *testing.T) phd.Token {
	t.Helper()
	for token := range phd.Token(model().Info().NVocab) {
		if model().IsEnd(token) {
			return token
		}
	}
	t.Fatal("the model has no end token")
	return 0
}

func TestContextShift(t *testing.T) {
	e := open(t, func(c *Config) { c.ContextShift, c.Slots, c.SlotContext, c.Context = true, 2, 96, 192 })
	var gens []*Generation
	for _, text := range texts[:4] {
		p := params(t, text, 250)
		p.Keep = 4
		// No end, so that the text outgrows its slot.
		if err := p.Sampler.AddLogitBias([]phd.Token{endToken(t)}, []float32{-1e9}); err != nil {
			t.Fatal(err)
		}
		gens = append(gens, start(t, e, p))
	}
	for _, g := range gens {
		if r := g.Wait(); r.Reason != StopLimit || len(r.Tokens) != 250 || !r.Truncated {
			t.Errorf("%d tokens, reason %v, truncated %v, %v", len(r.Tokens), r.Reason, r.Truncated, r.Err)
		}
	}
	checkIdle(t, e)
}

func TestWhatIsRefused(t *testing.T) {
	e := open(t, func(c *Config) { c.MaxQueue, c.Slots = 1, 1 })
	ctx := context.Background()
	refused := func(p Params) error {
		t.Helper()
		_, err := e.Start(ctx, p)
		if err == nil {
			t.Fatal("it was not refused")
		}
		return err
	}
	p := params(t, "a", 1)
	p.Prompt = slices.Repeat(p.Prompt[:1], 256)
	var long *TooLongError
	if err := refused(p); !errors.As(err, &long) || long.NPrompt != 256 || long.NContext != 256 {
		t.Error(err)
	}
	p = params(t, "a", 1)
	p.Prompt = nil
	refused(p)
	p = params(t, "a", 1)
	p.Prompt = []phd.Token{1, -1}
	if err := refused(p); !strings.Contains(err.Error(), "token 1 of the prompt is -1") {
		t.Error(err)
	}
	p = params(t, "a", 1)
	p.Slot = 1
	refused(p)
	p = params(t, "a", 1)
	p.Stop = []string{""}
	refused(p)
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := e.Start(ended, params(t, "a", 1)); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}

	// One that runs, held up between two batches, one that waits, and one too many.
	release := hold(t, e)
	runs := start(t, e, params(t, texts[0], 4))
	waits := start(t, e, params(t, texts[1], 4))
	if err := refused(params(t, texts[2], 4)); !errors.Is(err, ErrQueueFull) {
		t.Error(err)
	}
	release()
	for _, g := range []*Generation{runs, waits} {
		if r := g.Wait(); r.Reason != StopLimit {
			t.Errorf("%+v", r)
		}
	}
	checkIdle(t, e)
}

// hold stops the loop until the function that it returns is called.
func hold(t *testing.T, e *Engine) (release func()) {
	t.Helper()
	held, released := make(chan struct{}), make(chan struct{})
	go e.do(context.Background(), -1, func(*slot) error { //nolint:errcheck // it fails only when the engine ends
		close(held)
		<-released
		return nil
	})
	<-held
	return func() { close(released) }
}

func TestCancel(t *testing.T) {
	e := open(t, func(c *Config) { c.Slots = 2 })
	ctx, cancel := context.WithCancel(context.Background())
	release := hold(t, e)
	var gens []*Generation
	for _, text := range texts[:6] {
		g, err := e.Start(ctx, params(t, text, 200))
		if err != nil {
			t.Fatal(err)
		}
		gens = append(gens, g)
	}
	stays := start(t, e, params(t, texts[0], 30))
	release()
	if _, ok := gens[0].Next(context.Background()); !ok { // it runs
		t.Fatal(gens[0].Result().Err)
	}
	cancel()
	for i, g := range gens {
		if r := g.Wait(); r.Reason != StopCancelled {
			t.Errorf("%d: %+v", i, r)
		}
	}
	if r := stays.Wait(); !slices.Equal(r.Tokens, alone(t, texts[0], 30)) {
		t.Errorf("the one that stays: %+v", r)
	}
	checkIdle(t, e)
}

func TestDrain(t *testing.T) {
	e := open(t, func(c *Config) { c.Slots = 1 })
	release := hold(t, e)
	runs := start(t, e, params(t, texts[0], 8))
	waits := start(t, e, params(t, texts[1], 8))
	drained := make(chan error)
	go func() { drained <- e.Drain(context.Background()) }()
	release()
	if err := <-drained; err != nil {
		t.Error(err)
	}
	if _, err := e.Start(context.Background(), params(t, "a", 1)); !errors.Is(err, ErrDraining) {
		t.Error(err)
	}
	for _, g := range []*Generation{runs, waits} {
		if r := g.Wait(); r.Reason != StopLimit || r.NDecoded != 8 {
			t.Errorf("%+v", r)
		}
	}

	e = open(t, func(c *Config) { c.Slots = 1 })
	release = hold(t, e)
	runs = start(t, e, params(t, texts[0], 200))
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	go func() { drained <- e.Drain(ended) }()
	release()
	if err := <-drained; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if r := runs.Wait(); r.Reason != StopCancelled {
		t.Errorf("%+v", r)
	}
}

func TestSlots(t *testing.T) {
	e := open(t, nil)
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "slot")
	p := params(t, texts[1], 12)
	p.Slot = 2
	first := start(t, e, p).Wait()
	if first.Slot != 2 {
		t.Fatalf("slot %d", first.Slot)
	}
	saved, bytes, _, err := e.SaveSlot(ctx, 2, path)
	if err != nil || saved != first.NPrompt+len(first.Tokens)-1 || bytes == 0 {
		t.Fatalf("%d positions, %d bytes, %v", saved, bytes, err)
	}
	if n, err := e.EraseSlot(ctx, 2); n != saved || err != nil {
		t.Errorf("%d positions erased, %v", n, err)
	}
	if n, _, _, err := e.RestoreSlot(ctx, 0, path); n != saved || err != nil {
		t.Errorf("%d positions restored, %v", n, err)
	}
	p = params(t, texts[1], 12)
	again := start(t, e, p).Wait()
	if again.Slot != 0 || again.NCached != again.NPrompt-1 || !slices.Equal(again.Tokens, first.Tokens) {
		t.Errorf("%+v", again)
	}
	if _, _, _, err := e.RestoreSlot(ctx, 0, filepath.Join(t.TempDir(), "none")); !errors.Is(err, phd.ErrIO) {
		t.Error(err)
	}
	if _, err := e.EraseSlot(ctx, 4); err == nil {
		t.Error("slot 4 of 4 was erased")
	}
	infos := e.Slots()
	if len(infos) != 4 || infos[0].NPast == 0 || infos[0].Busy || infos[0].NContext != 256 {
		t.Errorf("%+v", infos)
	}
	checkIdle(t, e)
}

func TestEmbed(t *testing.T) {
	e := open(t, func(c *Config) { c.Slots = 1 })
	tokens := tokenize(t, texts[3])
	if r := start(t, e, params(t, texts[3], 4)).Wait(); r.Reason != StopLimit {
		t.Fatal(r.Err)
	}
	got, err := e.Embed(context.Background(), tokens, phd.PoolingMean, true)
	if err != nil {
		t.Fatal(err)
	}
	session, err := model().NewSession(&phd.SessionOptions{NPositions: 64, NSequences: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	want, err := session.Sequence(0).Embed(context.Background(), tokens, phd.PoolingMean, true)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; expected %v", got, err, want)
	}
	// The text that was in the slot is still cached.
	if r := start(t, e, params(t, texts[3], 4)).Wait(); r.NCached != r.NPrompt-1 {
		t.Errorf("%d of %d", r.NCached, r.NPrompt)
	}
	var long *TooLongError
	if _, err := e.Embed(context.Background(), make([]phd.Token, 257), phd.PoolingMean, true); !errors.As(err, &long) {
		t.Error(err)
	}
	checkIdle(t, e)
}

func TestProgressAndLogprobs(t *testing.T) {
	e := open(t, func(c *Config) { c.Piece = 32 })
	p := params(t, strings.Repeat(texts[6]+" ", 6), 3)
	p.Progress, p.Logprobs = true, 5
	g := start(t, e, p)
	last, nTokens := -1, 0
	for event, ok := g.Next(context.Background()); ok; event, ok = g.Next(context.Background()) {
		if event.Progress != nil {
			if nTokens > 0 || event.Progress.Processed < last || event.Progress.Total != len(p.Prompt) {
				t.Errorf("%+v after %d, %d tokens", event.Progress, last, nTokens)
			}
			last = event.Progress.Processed
			continue
		}
		nTokens++
		if len(event.Top) != 5 || event.Top[0].Token != event.Token || event.Top[0].Logprob != event.Logprob || event.Logprob > 0 {
			t.Errorf("%+v", event)
		}
	}
	if last != len(p.Prompt) || nTokens != 3 {
		t.Errorf("progress ended at %d of %d, %d tokens", last, len(p.Prompt), nTokens)
	}
	checkIdle(t, e)
}

func TestTriggers(t *testing.T) {
	e := open(t, nil)
	whole, err := model().Detokenize(alone(t, texts[0], 40))
	if err != nil {
		t.Fatal(err)
	}
	// A token of several letters whose text stands nowhere before it, nor does its beginning.
	var piece string
	at := 0
	for _, token := range alone(t, texts[0], 40) {
		bytes, err := model().TokenBytes(token, false)
		if err != nil {
			t.Fatal(err)
		}
		piece = string(bytes)
		if at > 0 && len(piece) >= 4 && strings.Index(string(whole), piece[:len(piece)-1]) == at {
			break
		}
		at += len(piece)
	}
	beginning, last := piece[:len(piece)-1], piece[len(piece)-1:]
	// Words that end with a token, and such that end within one: what the token says beyond them counts for the constraint.
	for _, c := range []struct{ word, regex, follows string }{
		{piece, `<[0-9]{3}>`, "<"},
		{beginning, last + `<[0-9]{3}>`, last + "<"},
	} {
		before, _, _ := strings.Cut(string(whole), c.word)
		p := params(t, texts[0], 40)
		n := 0
		p.Triggers = []Trigger{{Text: "never said"}, {Text: c.word, Constrain: func(s *phd.Sampler) error {
			n++
			return s.AddRegex(c.regex)
		}}}
		r := start(t, e, p).Wait()
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		text, err := model().Detokenize(r.Tokens)
		if err != nil {
			t.Fatal(err)
		}
		rest, found := strings.CutPrefix(string(text), before+c.word+c.follows)
		if !found || len(rest) < 4 || rest[3] != '>' {
			t.Errorf("%q: after %q there is not what the constraint allows", text, before+c.word)
			continue
		}
		if len(rest) <= 4 {
			t.Errorf("%q: nothing follows the constrained part", text)
		}
		if n != 1+strings.Count(rest[4:], c.word) {
			t.Errorf("%q: the trigger went off %d times", text, n)
		}
	}

	// What was said beyond the words is not what the constraint allows: the text goes on freely.
	p := params(t, texts[0], 40)
	p.Triggers = []Trigger{{Text: beginning, Constrain: func(s *phd.Sampler) error { return s.AddRegex(`<[0-9]{3}>`) }}}
	if r := start(t, e, p).Wait(); r.Err != nil || !slices.Equal(r.Tokens, alone(t, texts[0], 40)) {
		t.Errorf("%v, %v", r.Tokens, r.Err)
	}
	checkIdle(t, e)
}

// A bug in what runs in the loop ends the generations that run, and nothing else.
func TestPanics(t *testing.T) {
	e := open(t, nil)
	p := params(t, texts[0], 40)
	p.Triggers = []Trigger{{Text: "", Constrain: func(*phd.Sampler) error { panic("on purpose") }}}
	if r := start(t, e, p).Wait(); r.Reason != StopError || !strings.Contains(r.Err.Error(), "on purpose") {
		t.Errorf("%+v", r)
	}
	if r := start(t, e, params(t, texts[0], 20)).Wait(); !slices.Equal(r.Tokens, alone(t, texts[0], 20)) {
		t.Errorf("%+v", r)
	}
	checkIdle(t, e)
}

// Clients that come and go at random, more of them than there is room for.
func TestStorm(t *testing.T) {
	e := open(t, func(c *Config) { c.Context, c.SlotContext, c.MaxQueue = 320, 160, 20 })
	want := make(map[string][]phd.Token)
	for _, text := range texts {
		want[text] = alone(t, text, 60)
	}
	var clients sync.WaitGroup
	for client := range uint64(12) {
		clients.Add(1)
		go func() {
			defer clients.Done()
			random := rand.New(rand.NewPCG(client, 1))
			for range 20 {
				text := texts[random.IntN(len(texts))]
				n := 1 + random.IntN(60)
				ctx, cancel := context.WithCancel(context.Background())
				g, err := e.Start(ctx, params(t, text, n))
				if errors.Is(err, ErrQueueFull) {
					cancel()
					continue
				}
				if err != nil {
					t.Error(err)
					cancel()
					return
				}
				leaves := -1
				if random.IntN(3) == 0 {
					leaves = random.IntN(n + 1)
				}
				for i := 0; ; i++ {
					if i == leaves {
						cancel()
					}
					if _, ok := g.Next(context.Background()); !ok {
						break
					}
				}
				r := g.Result()
				isWhole := r.Reason == StopLimit || r.Reason == StopEOS
				if !isWhole && (r.Reason != StopCancelled || leaves < 0) {
					t.Errorf("%q: %+v", text, r)
				}
				expected := want[text][:min(n, len(want[text]))]
				if isWhole && !slices.Equal(r.Tokens, expected) || !slices.Equal(r.Tokens, expected[:len(r.Tokens)]) {
					t.Errorf("%q: %v, alone %v", text, r.Tokens, expected)
				}
				cancel()
			}
		}()
	}
	clients.Wait()
	checkIdle(t, e)
}
