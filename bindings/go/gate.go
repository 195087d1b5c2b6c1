package phd

import (
	"sync"
	"sync/atomic"
)

// A gate counts the calls inside an object, so that it is freed when the last one has left. Unlike with a
// [sync.RWMutex], a call within a call (from a progress function) never waits for a Close that waits for the outer one.
// The zero gate is open.
type gate struct {
	state   atomic.Int64 // calls inside, and closedBit
	once    sync.Once
	mu      sync.Mutex
	drained *sync.Cond
}

const closedBit = 1 << 62

// enter reports whether the object is open; then leave must follow.
func (g *gate) enter() bool {
	if g.state.Add(1)&closedBit != 0 {
		g.leave()
		return false
	}
	return true
}

// leave ends what enter began. As it writes into the object, the object is reachable until here.
func (g *gate) leave() {
	if g.state.Add(-1) == closedBit {
		g.mu.Lock()
		g.drained.Broadcast()
		g.mu.Unlock()
	}
}

func (g *gate) isClosed() bool { return g.state.Load()&closedBit != 0 }

// close refuses new calls, waits for those inside and calls free, once; who comes later waits until it has been.
func (g *gate) close(free func()) {
	g.once.Do(func() {
		g.mu.Lock()
		g.drained = sync.NewCond(&g.mu)
		g.state.Add(closedBit)
		for g.state.Load() != closedBit {
			g.drained.Wait()
		}
		g.mu.Unlock()
		free()
	})
}
