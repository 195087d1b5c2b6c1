package server

import (
	"context"
	"net/http"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/engine"
)

// withTimeout bounds a request's context by the server's bound. It ends when the client goes away, too.
func (s *Server) withTimeout(r *http.Request) (context.Context, context.CancelFunc) {
	if s.opts.Timeout == 0 {
		return context.WithCancel(r.Context())
	}
	return context.WithTimeout(r.Context(), s.opts.Timeout)
}

// start begins one generation. Several to the same prompt are told apart by index, which varies their seeds.
func (s *Server) start(ctx context.Context, set *settings, prompt []phd.Token, index int) (*engine.Generation, error) {
	l := s.loaded()
	switch {
	case len(prompt) == 0:
		return nil, badRequest("the prompt is empty")
	case set.slot >= l.engine.NSlots():
		return nil, badRequest("Field 'id_slot': found %d, expected -1 to %d", set.slot, l.engine.NSlots()-1)
	case len(prompt) >= l.engine.SlotContext():
		return nil, &engine.TooLongError{NPrompt: len(prompt), NContext: l.engine.SlotContext()}
	}
	sampler, err := set.newSampler(l.model, index)
	if err != nil {
		return nil, err
	}
	return l.engine.Start(ctx, engine.Params{
		Prompt:       prompt,
		Slot:         set.slot,
		MaxTokens:    set.maxTokens,
		Sampler:      sampler,
		Stop:         set.stop,
		SpellSpecial: set.spellSpecial,
		Logprobs:     set.logprobs,
		CachePrompt:  set.cachePrompt,
		Keep:         set.keep,
		MaxTime:      set.maxTime,
		// Timings need to know when the prompt was done, and how much of it was cached.
		Progress: set.stream && (set.returnProgress || set.timingsPerToken),
		Triggers: set.triggers,
		Label:    set,
	})
}

// A follower is told of generations, by one goroutine.
type follower struct {
	event func(i int, event engine.Event) error
	end   func(i int, result engine.Result) error
	ping  func() error // nothing has happened for a while
}

// follow runs n generations, as many at once as there are slots, and passes on what they tell until all have ended. It ends
// early, and ends them, when one fails, when the follower does, and when ctx ends.
func (s *Server) follow(ctx context.Context, n int, pingInterval time.Duration,
	start func(ctx context.Context, i int) (*engine.Generation, error), f follower) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type news struct {
		i      int
		event  engine.Event
		result *engine.Result // not nil: the last of i
	}
	all := make(chan news)
	watch := func(i int, generation *engine.Generation) {
		tell := func(n news) bool {
			select {
			case all <- n:
				return true
			case <-ctx.Done():
				return false
			}
		}
		for {
			event, ok := generation.Next(ctx)
			if !ok {
				break
			}
			if !tell(news{i: i, event: event}) {
				return
			}
		}
		if ctx.Err() == nil {
			result := generation.Result()
			tell(news{i: i, result: &result})
		}
	}
	begun, running := 0, 0
	waiting := make(map[int]time.Time, n) // those without a token so far, and since when
	begin := func() error {
		for begun < n && running < s.loaded().engine.NSlots() {
			generation, err := start(ctx, begun)
			if err != nil {
				return err
			}
			go watch(begun, generation)
			waiting[begun] = time.Now()
			begun++
			running++
		}
		return nil
	}
	var ping <-chan time.Time
	var pings *time.Timer
	if pingInterval > 0 && f.ping != nil {
		pings = time.NewTimer(pingInterval)
		defer pings.Stop()
		ping = pings.C
	}
	for {
		if err := begin(); err != nil {
			return err
		}
		if running == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ping:
			if err := f.ping(); err != nil {
				return err
			}
		case told := <-all:
			if told.result == nil {
				if since, ok := waiting[told.i]; ok && told.event.Progress == nil {
					s.metrics.firstToken.Observe(time.Since(since).Seconds())
					delete(waiting, told.i)
				}
				if err := f.event(told.i, told.event); err != nil {
					return err
				}
				break
			}
			running--
			s.metrics.ended(told.result)
			switch told.result.Reason {
			case engine.StopError:
				return told.result.Err
			case engine.StopCancelled:
				if err := ctx.Err(); err != nil {
					return err
				}
				return errCancelledByServer
			}
			if err := f.end(told.i, *told.result); err != nil {
				return err
			}
		}
		if pings != nil {
			pings.Reset(pingInterval)
		}
	}
}

// errCancelledByServer is the end of what still runs when the server has waited long enough to stop.
var errCancelledByServer = unavailable(shuttingDownMessage)
