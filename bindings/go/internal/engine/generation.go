package engine

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

// Params say what to generate.
type Params struct {
	Prompt    []phd.Token  // at least one
	Slot      int          // -1: any
	MaxTokens int          // -1: until the context is full; 0: the prompt is evaluated and no more
	Sampler   *phd.Sampler // closed by the engine
	Stop      []string
	// SpellSpecial writes control tokens out; otherwise they have no text.
	SpellSpecial bool
	// Logprobs is how many of the best tokens are reported with each generated one, and their log-probabilities; -1: no
	// log-probabilities at all.
	Logprobs    int
	CachePrompt bool          // take over what is cached of the prompt
	Keep        int           // tokens at the beginning that a context shift keeps; -1: the prompt
	MaxTime     time.Duration // of generating, from the first token on; 0: no bound
	Progress    bool          // send events while the prompt is evaluated
	Triggers    []Trigger
	Label       any // shown by Slots
}

// A Trigger binds the text after some words of it: as soon as Text has been generated, Constrain is called with the sampler.
// When the constraint that it adds has come to its end it is removed, and the text goes on freely.
type Trigger struct {
	Text      string
	Constrain func(*phd.Sampler) error
}

// An Event is a token, or progress with the prompt.
type Event struct {
	Progress *Progress // the prompt is still being evaluated; nothing else is set
	Token    phd.Token
	Text     string // the whole characters that this token has completed
	Logprob  float32
	Top      []phd.TokenLogprob
}

// Progress counts prompt tokens. Processed includes Cached.
type Progress struct {
	Total, Cached, Processed int
	Elapsed                  time.Duration
}

// A StopReason says why a generation ended.
type StopReason int

// Why a generation ended.
const (
	StopEOS       StopReason = iota // the model ended it
	StopWord                        // one of Params.Stop
	StopLimit                       // Params.MaxTokens, Params.MaxTime, or the context
	StopCancelled                   // its context, Cancel, or the end of the engine
	StopError                       // Result.Err
)

// A Result says how a generation went.
type Result struct {
	Reason      StopReason
	StopWord    string
	Truncated   bool   // the context was too small: the generation ended there, or has lost its middle
	Err         error  // for StopError
	Tail        string // text after that of the last event: what was held back until it was clear that no stop string came
	Slot        int    // -1: it has never run
	NPrompt     int
	NCached     int         // prompt tokens that did not have to be evaluated
	NDecoded    int         // generated tokens, an end token included
	Tokens      []phd.Token // generated ones without the end token
	QueueTime   time.Duration
	PromptTime  time.Duration
	PredictTime time.Duration
	HasNewLine  bool
}

// A Generation is one text being made. Its methods may be called from any goroutine, Next from one at a time.
type Generation struct {
	engine *Engine
	params Params
	id     int64

	// Guarded by engine.mu.
	cancelled bool

	// The loop's own.
	slot      *slot
	stream    *phd.Stream
	tokens    []phd.Token // the text: prompt, then what was generated
	done      int         // of these, in the sequence
	generated []phd.Token
	nDecoded  int
	nCached   int
	dropped   int  // positions that a context shift has dropped
	predicts  bool // the prompt is evaluated
	admitted  bool // at least once
	truncated bool
	newLine   bool
	recent    string // the end of the generated text, as long as the longest trigger
	bound     bool   // a trigger's constraint is in force
	queued    time.Time
	started   time.Time // the prompt's evaluation
	predicted time.Time // the first token

	mu           sync.Mutex
	events       []Event
	ended        bool
	result       Result
	changed      chan struct{} // capacity 1
	stopWatching func() bool
}

func (e *Engine) newGeneration(ctx context.Context, p Params) (*Generation, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	switch {
	case p.Sampler == nil:
		return nil, fmt.Errorf("engine: no sampler")
	case len(p.Prompt) == 0:
		return nil, fmt.Errorf("the prompt is empty")
	case p.Slot < -1 || p.Slot >= e.cfg.Slots:
		return nil, fmt.Errorf("slot %d does not exist: there are %d", p.Slot, e.cfg.Slots)
	case len(p.Prompt) >= e.cfg.SlotContext:
		return nil, &TooLongError{NPrompt: len(p.Prompt), NContext: e.cfg.SlotContext}
	}
	n := uint32(e.cfg.Model.Info().NVocab)
	for i, t := range p.Prompt {
		if uint32(t) >= n {
			return nil, fmt.Errorf("token %d of the prompt is %d, expected 0 to %d", i, t, n-1)
		}
	}
	if err := p.Sampler.AcceptPrompt(p.Prompt); err != nil {
		return nil, err
	}
	stream, err := e.cfg.Model.NewStream()
	if err != nil {
		return nil, err
	}
	g := &Generation{
		engine:  e,
		params:  p,
		stream:  stream,
		tokens:  append(make([]phd.Token, 0, len(p.Prompt)+64), p.Prompt...),
		queued:  time.Now(),
		changed: make(chan struct{}, 1),
	}
	if p.SpellSpecial {
		err = stream.SetSpecial(true)
	}
	for _, stop := range p.Stop {
		if err == nil {
			err = stream.AddStop(stop)
		}
	}
	if err != nil {
		stream.Close()
		return nil, err
	}
	return g, nil
}

// ID numbers the generations of an engine.
func (g *Generation) ID() int64 { return g.id }

// Next waits for the next event. It returns false when there is none left, or when ctx ends before there is one: Result says
// which. Events wait for the reader, however slow it is, and never hold up the engine.
func (g *Generation) Next(ctx context.Context) (Event, bool) {
	for {
		g.mu.Lock()
		if len(g.events) > 0 {
			event := g.events[0]
			g.events = g.events[1:]
			g.mu.Unlock()
			return event, true
		}
		ended := g.ended
		g.mu.Unlock()
		if ended {
			return Event{}, false
		}
		select {
		case <-g.changed:
		case <-ctx.Done():
			return Event{}, false
		}
	}
}

// Wait discards the events that are left and returns the result.
func (g *Generation) Wait() Result {
	for {
		if _, ok := g.Next(context.Background()); !ok {
			return g.Result()
		}
	}
}

// Result says how the generation went. Before its end, only that it has not ended: StopCancelled.
func (g *Generation) Result() Result {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.ended {
		return Result{Reason: StopCancelled, Slot: -1, NPrompt: len(g.params.Prompt)}
	}
	return g.result
}

// Cancel ends the generation soon: after the batch that is running, or in the middle of that if nobody else is in it.
func (g *Generation) Cancel() {
	g.engine.mu.Lock()
	g.engine.cancelLocked(g)
	g.engine.mu.Unlock()
	g.engine.poke()
}

// send hands an event to whoever reads.
func (g *Generation) send(event Event) {
	g.mu.Lock()
	g.events = append(g.events, event)
	g.mu.Unlock()
	g.signal()
}

func (g *Generation) signal() {
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

// end frees what the generation holds and publishes its result. The loop's, or Start's before the loop has seen it.
func (g *Generation) end(result Result) {
	g.free()
	g.mu.Lock()
	g.result = result
	g.ended = true
	stop := g.stopWatching
	g.mu.Unlock()
	if stop != nil {
		stop()
	}
	g.signal()
}

func (g *Generation) free() {
	g.params.Sampler.Close()
	g.stream.Close()
}

// take passes a token that was sampled: the text that it completes, and whether the generation ends with it.
func (g *Generation) take(token phd.Token) (text string, reason StopReason, ends bool, err error) {
	g.nDecoded++
	if err := g.params.Sampler.Accept(token); err != nil {
		return "", StopError, true, err
	}
	if g.engine.cfg.Model.IsEnd(token) {
		return "", StopEOS, true, nil
	}
	g.generated = append(g.generated, token)
	g.tokens = append(g.tokens, token)
	text, err = g.stream.Push(token)
	if err != nil {
		return "", StopError, true, err
	}
	g.newLine = g.newLine || strings.Contains(text, "\n")
	if stop, _ := g.stream.Stopped(); stop >= 0 {
		return text, StopWord, true, nil
	}
	if err := g.trigger(text); err != nil {
		return text, StopError, true, err
	}
	if g.params.MaxTokens >= 0 && g.nDecoded >= g.params.MaxTokens {
		return text, StopLimit, true, nil
	}
	if g.params.MaxTime > 0 && time.Since(g.predicted) > g.params.MaxTime {
		return text, StopLimit, true, nil
	}
	if !g.engine.cfg.ContextShift && len(g.tokens) >= g.engine.cfg.SlotContext {
		g.truncated = true
		return text, StopLimit, true, nil
	}
	return text, 0, false, nil
}

// trigger looks for the triggers' words at the end of the text, and for the end of the constraint of one.
func (g *Generation) trigger(text string) error {
	if len(g.params.Triggers) == 0 {
		return nil
	}
	if g.bound {
		return g.unbind()
	}
	// A trigger may end within what a token has added: it begins no earlier than a trigger's length before that.
	longest := 0
	for _, t := range g.params.Triggers {
		longest = max(longest, len(t.Text))
	}
	before := g.recent
	g.recent = before[max(0, len(before)-max(0, longest-1)):] + text
	first, which := len(g.recent), -1 // where the first trigger's words end
	for i, t := range g.params.Triggers {
		if at := strings.Index(g.recent, t.Text); at >= 0 && (which < 0 || at+len(t.Text) < first) {
			first, which = at+len(t.Text), i
		}
	}
	if which < 0 {
		return nil
	}
	sampler := g.params.Sampler
	beyond := g.recent[first:]
	g.recent = ""
	if err := g.params.Triggers[which].Constrain(sampler); err != nil {
		return err
	}
	if beyond != "" && sampler.ConstraintAccept(beyond) != nil {
		return sampler.RemoveConstraint() // the model has gone another way already
	}
	g.bound = true
	return g.unbind()
}

// unbind removes a trigger's constraint that has come to its end.
func (g *Generation) unbind() error {
	done, err := g.params.Sampler.ConstraintDone()
	if err != nil || !done {
		return err
	}
	g.bound = false
	return g.params.Sampler.RemoveConstraint()
}

func fileSize(path string) (int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
