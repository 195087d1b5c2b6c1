package engine

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

// sharedWorth is how many tokens of a prefix, not cached but being evaluated for another generation, are worth waiting for.
const sharedWorth = 32

// leastShare is how many prompt tokens each of several prompts gets of a batch at least.
const leastShare = 16

// loop works as long as there is something to do, and sleeps until there is.
func (e *Engine) loop() {
	defer close(e.stopped)
	for {
		worked := e.safeRound()
		e.publish()
		e.deliver()
		if worked {
			continue
		}
		e.mu.Lock()
		closing := e.closing
		e.mu.Unlock()
		if closing {
			return
		}
		<-e.wake
	}
}

// safeRound is round, but that a bug in it ends the generations that run and not the process.
func (e *Engine) safeRound() (worked bool) {
	defer func() {
		if p := recover(); p != nil {
			e.log.Error("the engine panicked", "panic", p, "stack", string(debug.Stack()))
			e.reset(fmt.Errorf("internal error: %v", p))
			worked = true
		}
	}()
	return e.round()
}

// round does what there is to do once, and says whether there may be more.
func (e *Engine) round() bool {
	e.sweep()
	e.runTasks()
	e.admit()
	return e.decode()
}

// deliver tells those who wait what has come of their generations and tasks: last in a round, so that whoever has an answer
// finds the engine, as Slots and Snapshot show it, as it is after that.
func (e *Engine) deliver() {
	for _, answer := range e.answers {
		answer()
	}
	clear(e.answers)
	e.answers = e.answers[:0]
	e.mu.Lock()
	defer e.mu.Unlock()
	isIdle := len(e.queue) == 0 && len(e.tasks) == 0
	for _, s := range e.slots {
		isIdle = isIdle && s.gen == nil
	}
	e.setIdleLocked(isIdle)
}

// running are the generations that have slots.
func (e *Engine) running() []*Generation {
	var running []*Generation
	for _, s := range e.slots {
		if s.gen != nil {
			running = append(running, s.gen)
		}
	}
	return running
}

// sweep ends what is no longer wanted.
func (e *Engine) sweep() {
	var unwanted []*Generation
	e.mu.Lock()
	e.queue = slices.DeleteFunc(e.queue, func(g *Generation) bool {
		if g.cancelled {
			unwanted = append(unwanted, g)
		}
		return g.cancelled
	})
	for _, s := range e.slots {
		if s.gen != nil && s.gen.cancelled {
			unwanted = append(unwanted, s.gen)
		}
	}
	e.counters.Cancelled += uint64(len(unwanted))
	e.mu.Unlock()
	for _, g := range unwanted {
		e.finish(g, StopCancelled, nil)
	}
}

// finish ends a generation. Its text stays in the slot.
func (e *Engine) finish(g *Generation, reason StopReason, err error) {
	now := time.Now()
	result := Result{
		Reason: reason, Truncated: g.truncated, Err: err, Slot: -1,
		NPrompt: len(g.params.Prompt), NCached: g.nCached, NDecoded: g.nDecoded, Tokens: g.generated,
		HasNewLine: g.newLine,
	}
	if reason == StopWord {
		stop, _ := g.stream.Stopped()
		result.StopWord = g.params.Stop[stop]
	}
	if tail, err := g.stream.Finish(); err == nil {
		result.Tail = tail
	}
	switch {
	case !g.admitted:
		result.QueueTime = now.Sub(g.queued)
	case !g.predicts:
		result.QueueTime, result.PromptTime = g.started.Sub(g.queued), now.Sub(g.started)
	default:
		result.QueueTime, result.PromptTime = g.started.Sub(g.queued), g.predicted.Sub(g.started)
		result.PredictTime = now.Sub(g.predicted)
	}
	if s := g.slot; s != nil {
		result.Slot = s.seq.ID()
		e.mu.Lock()
		s.gen, g.slot = nil, nil
		e.mu.Unlock()
		s.used = e.tick()
		// Nobody cancels it any more; a request that came too late must not hit the next user of the sequence.
		s.seq.CancelClear()
	}
	e.mu.Lock()
	e.counters.Finished++
	if g.predicts {
		e.counters.PredictedTokens += uint64(g.nDecoded)
		e.counters.PredictTime += result.PredictTime
	}
	e.mu.Unlock()
	e.answers = append(e.answers, func() { g.end(result) })
}

// tick counts up, to order slots by when they were last used.
func (e *Engine) tick() int64 {
	e.ticks++
	return e.ticks
}

// runTasks runs the tasks whose slots are idle.
func (e *Engine) runTasks() {
	e.mu.Lock()
	tasks := e.tasks
	e.tasks = nil
	draining := e.draining
	e.mu.Unlock()
	var waiting []*task
	for _, t := range tasks {
		if err := t.ctx.Err(); err != nil {
			e.answer(t, err)
			continue
		}
		var s *slot
		if t.slot >= 0 {
			s = e.slots[t.slot]
		} else {
			s = e.leastUsed()
		}
		switch {
		case s != nil && s.gen == nil:
			e.runTask(t, s)
			s.used = e.tick()
		case draining:
			e.answer(t, ErrDraining)
		default:
			waiting = append(waiting, t)
		}
	}
	e.mu.Lock()
	e.tasks = append(waiting, e.tasks...)
	e.mu.Unlock()
}

// runTask runs one task. Whoever waits for it gets an answer whatever happens.
func (e *Engine) runTask(t *task, s *slot) {
	err := errors.New("internal error")
	defer func() { e.answer(t, err) }()
	err = t.run(s)
}

func (e *Engine) answer(t *task, err error) {
	e.answers = append(e.answers, func() { t.done <- err })
}

// leastUsed is the idle slot that was used last before all others, empty ones first; nil if none is idle.
func (e *Engine) leastUsed() *slot {
	var best *slot
	for _, s := range e.slots {
		if s.gen == nil && (best == nil || s.used < best.used) {
			best = s
		}
	}
	return best
}

// vacate empties an idle slot. Its text stays in the cache as long as nobody needs the room.
func (e *Engine) vacate(s *slot) error {
	if s.seq.Len() == 0 {
		return nil
	}
	return s.seq.Retain()
}

// makeRoom gives up texts of idle slots, as far as need be, so that n positions are free beside those that running generations
// are going to take for what they have to evaluate, and a block for each to grow; false if that is not enough.
func (e *Engine) makeRoom(n int) bool {
	for {
		usage := e.session.Usage()
		needed := uint64(n) + 2*usage.Block // a text begins in a block of its own, and may have to copy one that it shares
		for _, g := range e.running() {
			needed += uint64(len(g.tokens)-g.done) + usage.Block
		}
		if needed <= usage.Free+usage.Retained {
			return true
		}
		victim := e.idleText()
		if victim == nil {
			return false
		}
		if err := victim.seq.Retain(); err != nil {
			return false
		}
		victim.used = 0
	}
}

// idleText is the least recently used of the idle slots that have a text; nil if none has.
func (e *Engine) idleText() *slot {
	var oldest *slot
	for _, s := range e.slots {
		if s.gen == nil && s.seq.Len() > 0 && (oldest == nil || s.used < oldest.used) {
			oldest = s
		}
	}
	return oldest
}

// admit gives slots to those who wait, in their order; one that waits for a slot of its own or for a prefix lets others pass.
func (e *Engine) admit() {
	e.mu.Lock()
	queue := slices.Clone(e.queue)
	e.mu.Unlock()
	for _, g := range queue {
		if e.leastUsed() == nil {
			return
		}
		hasRoom, err := e.place(g)
		if !hasRoom {
			return // those behind must not take the room that it waits for
		}
		if err != nil {
			e.mu.Lock()
			e.unqueueLocked(g)
			e.mu.Unlock()
			e.finish(g, StopError, err)
		}
	}
}

func (e *Engine) unqueueLocked(g *Generation) {
	e.queue = slices.DeleteFunc(e.queue, func(other *Generation) bool { return other == g })
}

// place gives g a slot and takes it out of the queue, if it need not wait for a slot or a prefix, and if the cache has room for it.
func (e *Engine) place(g *Generation) (hasRoom bool, err error) {
	known := g.tokens[:len(g.tokens)-1] // the last token's logits are needed, so it is evaluated in any case
	var s *slot
	if g.params.Slot >= 0 {
		if s = e.slots[g.params.Slot]; s.gen != nil {
			return true, nil
		}
	}
	cached, free := 0, 0 // of the prefix: what is cached, and what of that takes no room as somebody who runs has it, too
	if g.params.CachePrompt || g.admitted {
		n, seq, err := e.session.MatchPrefix(known)
		if err != nil {
			return true, err
		}
		cached = n
		for _, other := range e.running() {
			if shared := commonPrefix(other.tokens, known); shared > cached+sharedWorth && other.done < shared {
				return true, nil
			}
		}
		if seq != nil && e.slots[seq.ID()].gen != nil {
			free = cached
		} else if seq != nil && s == nil {
			s = e.slots[seq.ID()]
		}
	}
	if s == nil {
		s = e.leastUsed()
	}
	if err := e.vacate(s); err != nil {
		return true, err
	}
	if !e.makeRoom(len(g.tokens)-free) && len(e.running()) > 0 {
		return false, nil
	}
	done := 0
	if cached > 0 {
		n, err := s.seq.TakePrefix(known)
		if err != nil {
			return true, err
		}
		done = n
	}
	if e.cfg.ContextShift {
		keep := g.params.Keep
		if keep < 0 {
			keep = len(g.params.Prompt)
		}
		policy := phd.Policy{DropMiddle: true, Keep: min(keep, e.maxKeep()), Limit: e.cfg.SlotContext}
		if err := s.seq.SetPolicy(&policy); err != nil {
			return true, err
		}
	}
	g.done, g.dropped = done, 0
	if !g.admitted {
		g.admitted = true
		g.nCached = done
		g.started = time.Now()
	}
	// At once: whoever counts those who wait and the free slots meanwhile must not find g among the one and miss it among the other.
	e.mu.Lock()
	s.gen, g.slot = g, s
	e.unqueueLocked(g)
	e.mu.Unlock()
	g.progress()
	return true, nil
}

func commonPrefix(a, b []phd.Token) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// progress tells the reader how much of the prompt is evaluated, if it asked.
func (g *Generation) progress() {
	if g.params.Progress && !g.predicts {
		g.send(Event{Progress: &Progress{
			Total: len(g.params.Prompt), Cached: g.nCached, Processed: g.done, Elapsed: time.Since(g.started),
		}})
	}
}

// decode runs one batch; false if there is nothing to run.
func (e *Engine) decode() bool {
	entries, gens := e.plan()
	if len(gens) == 0 {
		return false
	}
	e.mu.Lock()
	e.batch = gens
	wanted := slices.ContainsFunc(gens, func(g *Generation) bool { return !g.cancelled })
	if !wanted {
		e.batch = nil
	}
	e.mu.Unlock()
	if !wanted {
		return true
	}
	err := e.session.Decode(context.Background(), entries)
	e.mu.Lock()
	e.batch = nil
	if err == nil {
		e.counters.NDecode++
		e.counters.NBusy += uint64(len(gens))
	}
	e.mu.Unlock()
	switch {
	case err == nil:
		for i, g := range gens {
			e.advance(g, len(entries[i].Tokens))
		}
	case errors.Is(err, phd.ErrCancelled):
		// Nobody in it was wanted: the next round ends them.
	case errors.Is(err, phd.ErrCacheFull):
		e.reclaim(gens)
	default:
		e.log.Error("a batch failed", "error", err, "generations", len(gens))
		e.reset(err)
	}
	return true
}

// plan makes the next batch: the last token of every text that is complete but for that, and pieces of the others, of equal
// size, so that a short prompt does not wait for a long one.
func (e *Engine) plan() ([]phd.Entry, []*Generation) {
	var gens, prompts []*Generation
	for _, g := range e.running() {
		if len(g.tokens)-g.done > 1 {
			prompts = append(prompts, g)
		} else {
			gens = append(gens, g)
		}
	}
	budget := e.cfg.Piece
	if len(gens) > 0 {
		budget = e.cfg.PieceBeside
	}
	entries := make([]phd.Entry, 0, len(gens)+len(prompts))
	for _, g := range gens {
		entries = append(entries, phd.Entry{Sequence: g.slot.seq, Tokens: g.tokens[g.done:], Logits: true})
	}
	// Those with the least left first: what they leave of their share is for the others.
	slices.SortStableFunc(prompts, func(a, b *Generation) int { return (len(a.tokens) - a.done) - (len(b.tokens) - b.done) })
	for i, g := range prompts {
		share := max(budget/(len(prompts)-i), leastShare)
		piece := min(len(g.tokens)-g.done, share, budget)
		if piece <= 0 {
			break
		}
		budget -= piece
		end := g.done + piece
		entries = append(entries, phd.Entry{Sequence: g.slot.seq, Tokens: g.tokens[g.done:end], Logits: end == len(g.tokens)})
		gens = append(gens, g)
	}
	return entries, gens
}

// advance takes note of n tokens of g that a batch has appended, and chooses the next one when all are.
func (e *Engine) advance(g *Generation, n int) {
	g.done += n
	if !g.predicts {
		e.mu.Lock()
		e.counters.PromptTokens += uint64(n)
		e.mu.Unlock()
	}
	if e.cfg.ContextShift {
		if dropped := g.slot.seq.Dropped(); dropped != g.dropped {
			pending := g.tokens[g.done:]
			tokens, err := g.slot.seq.Tokens()
			if err != nil {
				e.finish(g, StopError, err)
				return
			}
			g.dropped, g.truncated = dropped, true
			g.done = len(tokens)
			g.tokens = append(tokens, pending...)
		}
	}
	if g.done < len(g.tokens) {
		g.progress()
		return
	}
	if !g.predicts {
		g.progress()
		g.predicts = true
		g.predicted = time.Now()
		e.mu.Lock()
		e.counters.PromptTime += g.predicted.Sub(g.started)
		e.mu.Unlock()
		if g.params.MaxTokens == 0 {
			e.finish(g, StopLimit, nil)
			return
		}
	}
	event, reason, ends, err := g.sample()
	if reason != StopEOS || !ends {
		if err == nil {
			g.send(event)
		}
	}
	if ends || err != nil {
		if err != nil {
			reason = StopError
		}
		e.finish(g, reason, err)
	}
}

// sample chooses the next token of g.
func (g *Generation) sample() (event Event, reason StopReason, ends bool, err error) {
	seq := g.slot.seq
	token, err := g.params.Sampler.Sample(seq)
	if err != nil {
		return event, StopError, true, err
	}
	event.Token = token
	if g.params.Logprobs >= 0 {
		logprobs, err := seq.Logprobs([]phd.Token{token})
		if err != nil {
			return event, StopError, true, err
		}
		event.Logprob = logprobs[0]
		if g.params.Logprobs > 0 {
			if event.Top, err = seq.TopLogprobs(g.params.Logprobs); err != nil {
				return event, StopError, true, err
			}
		}
	}
	event.Text, reason, ends, err = g.take(token)
	return event, reason, ends, err
}

// reclaim makes room after a batch that found none: an idle slot's text first; then the youngest generation gives way and
// waits, its text kept as long as there is room for it; one that is alone has filled the cache and ends.
func (e *Engine) reclaim(gens []*Generation) {
	if idle := e.idleText(); idle != nil {
		if err := idle.seq.Retain(); err != nil {
			e.reset(err)
		}
		return
	}
	running := e.running()
	youngest := running[0]
	for _, g := range running {
		if g.id > youngest.id {
			youngest = g
		}
	}
	if len(running) == 1 {
		youngest.truncated = true
		e.finish(youngest, StopLimit, nil)
		return
	}
	s := youngest.slot
	if err := s.seq.Retain(); err != nil {
		e.reset(err)
		return
	}
	e.mu.Lock()
	s.gen, youngest.slot = nil, nil
	e.queue = slices.Insert(e.queue, 0, youngest)
	e.counters.Preempted++
	e.mu.Unlock()
	s.used = 0
	s.seq.CancelClear()
}

// reset ends all that runs with an error and begins anew with a new session: after an internal error the old one answers
// nothing else.
func (e *Engine) reset(err error) {
	for _, g := range e.running() {
		e.finish(g, StopError, err)
	}
	old := e.session
	old.Close()
	if err := e.open(); err != nil {
		// Without a session nothing can run. Draining makes /health say so, and whoever watches it starts anew.
		e.log.Error("no new session", "error", err)
		e.mu.Lock()
		e.draining = true
		waiting := e.queue
		e.queue = nil
		e.mu.Unlock()
		for _, g := range waiting {
			e.finish(g, StopError, err)
		}
	}
}
