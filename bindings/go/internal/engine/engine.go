// Package engine runs many generations at once over one session: continuous batching, prefix reuse, a bounded queue.
//
// One goroutine, the loop, owns the session. Each round of it drops what nobody waits for any more, gives free slots to
// those who wait, and decodes one batch: the next token of every generation that has one, and pieces of prompts. A slot is a
// sequence of the session; when a generation ends its text stays there, for the next one that begins alike, until the room
// is needed.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

// Config says what an engine runs and how much of it at once. Zero values of the optional fields mean their defaults.
type Config struct {
	Model       *phd.Model
	Slots       int           // generations that run at once
	Context     int           // positions of the cache, for all slots together
	SlotContext int           // positions that one generation may have, prompt included
	Threads     int           // 0: one per physical core that the process may use
	CacheType   phd.CacheType //
	Piece       int           // prompt tokens of a batch when no generation waits for its next token; 0: 512
	PieceBeside int           // prompt tokens of a batch beside such generations; 0: 64
	MaxQueue    int           // generations that wait for a slot at most
	Retained    int           // texts kept beside those in the slots; 0: 64
	// ContextShift drops the older half of a text that has filled its slot, where otherwise the generation ends.
	ContextShift bool
	Logger       *slog.Logger // nil: none
}

// Errors of Start.
var (
	ErrQueueFull = errors.New("the queue is full")
	ErrDraining  = errors.New("the server is shutting down")
)

// A TooLongError says that a prompt does not fit into a slot with room for one more token.
type TooLongError struct {
	NPrompt, NContext int
}

func (e *TooLongError) Error() string {
	return fmt.Sprintf("the request (%d tokens) exceeds the available context size (%d tokens), try increasing it",
		e.NPrompt, e.NContext)
}

// An Engine serves generations from one model. Its methods may be called from any goroutine.
type Engine struct {
	cfg     Config
	log     *slog.Logger
	session *phd.Session // replaced by the loop alone, under mu
	slots   []*slot      // the loop's; what others may see is in infos
	stopped chan struct{}
	wake    chan struct{} // capacity 1: something changed that the loop may be waiting for
	ticks   int64         // the loop's
	answers []func()      // the loop's: what to tell when this round is over

	mu       sync.Mutex
	queue    []*Generation // in the order in which they are served
	tasks    []*task
	batch    []*Generation // those in the running batch; nil between batches
	infos    []SlotInfo
	usage    phd.Usage
	memory   phd.Memory
	counters Counters
	draining bool
	closing  bool
	nextID   int64
	idle     chan struct{} // closed while nothing runs or waits
	isIdle   bool
}

// A slot is a sequence and who uses it. The text of an idle slot stays in the sequence.
type slot struct {
	seq  *phd.Sequence
	gen  *Generation // nil: idle
	used int64       // when it became idle, by the engine's ticks: the smallest is the least recently used
	last SlotInfo    // of the generation that was here last
}

// A task is something short that the loop does between batches, with a slot that is idle.
type task struct {
	ctx  context.Context
	slot int // -1: any
	run  func(*slot) error
	done chan error
}

// New creates the session, with everything it will ever need, and starts the loop.
func New(cfg Config) (*Engine, error) {
	switch {
	case cfg.Model == nil:
		return nil, errors.New("engine: no model")
	case cfg.Slots < 1:
		return nil, fmt.Errorf("engine: %d slots, at least 1 is needed", cfg.Slots)
	case cfg.SlotContext < 2 || cfg.SlotContext > cfg.Context:
		return nil, fmt.Errorf("engine: %d positions for a slot, expected 2 to %d, the whole cache", cfg.SlotContext, cfg.Context)
	}
	if cfg.Piece == 0 {
		cfg.Piece = 512
	}
	if cfg.PieceBeside == 0 {
		cfg.PieceBeside = 64
	}
	if cfg.Retained == 0 {
		cfg.Retained = 64
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	e := &Engine{
		cfg:     cfg,
		log:     cfg.Logger,
		stopped: make(chan struct{}),
		wake:    make(chan struct{}, 1),
		idle:    make(chan struct{}),
		isIdle:  true,
	}
	close(e.idle)
	if err := e.open(); err != nil {
		return nil, err
	}
	e.publish()
	go e.loop()
	return e, nil
}

// open makes the session and its slots.
func (e *Engine) open() error {
	positions := e.cfg.Context
	if e.cfg.ContextShift {
		// While a text's middle is dropped, what is kept of it takes room twice: see phd_seq_set_policy.
		positions += e.maxKeep() + 2*16
	}
	session, err := e.cfg.Model.NewSession(&phd.SessionOptions{
		NPositions: positions,
		NSequences: e.cfg.Slots,
		NThreads:   e.cfg.Threads,
		CacheType:  e.cfg.CacheType,
		NRetained:  e.cfg.Retained,
	})
	if err != nil {
		return err
	}
	slots := make([]*slot, e.cfg.Slots)
	for i := range slots {
		slots[i] = &slot{seq: session.Sequence(i)}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.session, e.slots, e.memory = session, slots, session.Memory()
	return nil
}

// maxKeep is how many positions at the beginning a context shift can keep.
func (e *Engine) maxKeep() int { return e.cfg.SlotContext / 2 }

// Model is what the engine runs.
func (e *Engine) Model() *phd.Model { return e.cfg.Model }

// SlotContext is how many positions one generation may have, prompt included.
func (e *Engine) SlotContext() int { return e.cfg.SlotContext }

// Context is how many positions the cache has for all slots together.
func (e *Engine) Context() int { return e.cfg.Context }

// NSlots is how many generations run at once.
func (e *Engine) NSlots() int { return e.cfg.Slots }

// Drain refuses new generations and waits for those that run or wait. When ctx ends before they do, they are cancelled and
// its error is returned.
func (e *Engine) Drain(ctx context.Context) error {
	e.mu.Lock()
	e.draining = true
	idle := e.idle
	e.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
	}
	e.mu.Lock()
	for _, s := range e.slots {
		if s.gen != nil {
			e.cancelLocked(s.gen)
		}
	}
	for _, g := range e.queue {
		e.cancelLocked(g)
	}
	e.mu.Unlock()
	e.poke()
	select {
	case <-idle:
	case <-e.stopped:
	}
	return ctx.Err()
}

// Draining reports whether new generations are refused: after Drain, or when there is no session to run them in.
func (e *Engine) Draining() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.draining
}

// Close cancels everything, ends the loop and frees the session.
func (e *Engine) Close() error {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	e.Drain(ended) //nolint:errcheck // it says that ended has ended
	e.mu.Lock()
	e.closing = true
	e.mu.Unlock()
	e.poke()
	<-e.stopped
	return e.session.Close()
}

// Start puts a generation into the queue. It ends early when ctx does. The sampler is the engine's from here on, also when
// Start fails.
func (e *Engine) Start(ctx context.Context, p Params) (*Generation, error) {
	g, err := e.newGeneration(ctx, p)
	if err != nil {
		if p.Sampler != nil {
			p.Sampler.Close()
		}
		return nil, err
	}
	e.mu.Lock()
	free := len(e.slots) - len(e.running())
	switch {
	case e.draining:
		err = ErrDraining
	case len(e.queue) >= e.cfg.MaxQueue+free:
		err = ErrQueueFull
		e.counters.Rejected++
	default:
		e.nextID++
		g.id = e.nextID
		e.queue = append(e.queue, g)
		e.counters.Started++
		e.setIdleLocked(false)
	}
	e.mu.Unlock()
	if err != nil {
		g.free()
		return nil, err
	}
	// Registered last: from here on it may be called at any time, even at once.
	stop := context.AfterFunc(ctx, g.Cancel)
	g.mu.Lock()
	g.stopWatching = stop
	ended := g.ended
	g.mu.Unlock()
	if ended {
		stop()
	}
	e.poke()
	return g, nil
}

// poke tells the loop that something has changed.
func (e *Engine) poke() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// cancelLocked marks g as unwanted. A batch is broken off when all in it are: otherwise it goes on, since it would be undone
// for everybody, and clients that come and go could hold up those who stay. The size of a prompt's pieces bounds the wait.
func (e *Engine) cancelLocked(g *Generation) {
	g.cancelled = true
	for _, other := range e.batch {
		if !other.cancelled {
			return
		}
	}
	for _, other := range e.batch {
		other.slot.seq.Cancel()
	}
}

// setIdleLocked keeps the channel that Drain waits for.
func (e *Engine) setIdleLocked(isIdle bool) {
	if isIdle == e.isIdle {
		return
	}
	e.isIdle = isIdle
	if isIdle {
		close(e.idle)
	} else {
		e.idle = make(chan struct{})
	}
}

// do runs a task in the loop and waits for it.
func (e *Engine) do(ctx context.Context, slot int, run func(*slot) error) error {
	if slot >= e.cfg.Slots {
		return fmt.Errorf("slot %d does not exist: there are %d", slot, e.cfg.Slots)
	}
	t := &task{ctx: ctx, slot: slot, run: run, done: make(chan error, 1)}
	e.mu.Lock()
	if e.draining {
		e.mu.Unlock()
		return ErrDraining
	}
	if len(e.tasks) >= e.cfg.MaxQueue+e.cfg.Slots {
		e.counters.Rejected++
		e.mu.Unlock()
		return ErrQueueFull
	}
	e.tasks = append(e.tasks, t)
	e.setIdleLocked(false)
	e.mu.Unlock()
	e.poke()
	return <-t.done
}

// Embed computes an embedding of a text, in a slot that is idle.
func (e *Engine) Embed(ctx context.Context, tokens []phd.Token, pooling phd.Pooling, normalize bool) ([]float32, error) {
	if len(tokens) > e.cfg.SlotContext {
		return nil, &TooLongError{NPrompt: len(tokens), NContext: e.cfg.SlotContext}
	}
	var embedding []float32
	err := e.do(ctx, -1, func(s *slot) error {
		if err := e.vacate(s); err != nil {
			return err
		}
		e.makeRoom(len(tokens)) // if that is not enough, Embed says so
		start := time.Now()
		var err error
		embedding, err = s.seq.Embed(ctx, tokens, pooling, normalize)
		if err != nil {
			return err
		}
		e.mu.Lock()
		e.counters.PromptTokens += uint64(len(tokens))
		e.counters.PromptTime += time.Since(start)
		e.mu.Unlock()
		return s.seq.Truncate(0)
	})
	return embedding, err
}

// SaveSlot writes the text and cache of a slot to a file, once it is idle: the positions, the size of the file, the time.
func (e *Engine) SaveSlot(ctx context.Context, slotID int, path string) (n int, bytes int64, took time.Duration, err error) {
	err = e.do(ctx, slotID, func(s *slot) error {
		start := time.Now()
		n = s.seq.Len()
		if err := s.seq.SaveFile(path); err != nil {
			return err
		}
		took = time.Since(start)
		bytes, err = fileSize(path)
		return err
	})
	return n, bytes, took, err
}

// RestoreSlot makes a slot, once it is idle, what SaveSlot wrote. After a failure the slot is what it was.
func (e *Engine) RestoreSlot(ctx context.Context, slotID int, path string) (n int, bytes int64, took time.Duration, err error) {
	err = e.do(ctx, slotID, func(s *slot) error {
		start := time.Now()
		if err := s.seq.RestoreFile(path); err != nil {
			return err
		}
		took = time.Since(start)
		n = s.seq.Len()
		bytes, err = fileSize(path)
		return err
	})
	return n, bytes, took, err
}

// EraseSlot empties a slot, once it is idle, and returns how many positions it had. Prefixes kept elsewhere stay.
func (e *Engine) EraseSlot(ctx context.Context, slotID int) (n int, err error) {
	err = e.do(ctx, slotID, func(s *slot) error {
		n = s.seq.Len()
		return s.seq.Truncate(0)
	})
	return n, err
}
