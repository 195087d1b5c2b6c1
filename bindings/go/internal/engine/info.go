package engine

import (
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

// A SlotInfo says what a slot does.
type SlotInfo struct {
	ID              int
	Busy            bool
	Task            int64 // the generation's number; 0: none yet
	NContext        int
	NPast           int // positions in the cache
	NPrompt         int // tokens of the prompt
	NPromptDone     int // of these, evaluated or taken over
	NCached         int // of these, taken over
	NDecoded        int
	NRemain         int // tokens that it may still generate; -1: as many as there is room for
	TokensPerSecond float64
	Label           any
}

// Counters are totals since the engine was made.
type Counters struct {
	Started, Finished, Cancelled, Rejected, Preempted uint64
	PromptTokens, PredictedTokens                     uint64
	PromptTime, PredictTime                           time.Duration // summed over generations
	NDecode, NBusy                                    uint64        // batches, and generations in them
}

// A Snapshot says how the engine is doing.
type Snapshot struct {
	Counters
	Usage  phd.Usage
	Memory phd.Memory
	Stats  phd.Stats
	Queued int // generations that wait for a slot
	Busy   int // those that have one
}

// publish makes what others may see, without touching the session while a batch runs.
func (e *Engine) publish() {
	infos := make([]SlotInfo, len(e.slots))
	for i, s := range e.slots {
		info := SlotInfo{ID: i, NContext: e.cfg.SlotContext, NPast: s.seq.Len()}
		if g := s.gen; g != nil {
			info.Busy = true
			info.Task = g.id
			info.NPrompt = len(g.params.Prompt)
			info.NPromptDone = min(g.done, info.NPrompt)
			info.NCached = g.nCached
			info.NDecoded = g.nDecoded
			info.NRemain = -1
			if g.params.MaxTokens >= 0 {
				info.NRemain = max(0, g.params.MaxTokens-g.nDecoded)
			}
			if seconds := time.Since(g.predicted).Seconds(); g.predicts && seconds > 0 {
				info.TokensPerSecond = float64(g.nDecoded) / seconds
			}
			info.Label = g.params.Label
			s.last = info
		} else if s.last.Task != 0 {
			info.Task, info.Label = s.last.Task, s.last.Label
		}
		infos[i] = info
	}
	usage := e.session.Usage()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.infos, e.usage = infos, usage
}

// Slots says what each slot did when the last batch ended.
func (e *Engine) Slots() []SlotInfo {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.infos // never changed, but replaced
}

// Snapshot says how the engine was doing when the last batch ended.
func (e *Engine) Snapshot() Snapshot {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := Snapshot{Counters: e.counters, Usage: e.usage, Memory: e.memory, Queued: len(e.queue)}
	for _, info := range e.infos {
		if info.Busy {
			s.Busy++
		}
	}
	if e.session != nil {
		s.Stats = e.session.Stats() // does not wait for a running batch
	}
	return s
}
