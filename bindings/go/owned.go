package phd

import (
	"runtime"
	"sync"
)

// An owned is C's pointer of an object that one call at a time may use. P is the type of the pointer; its zero value stands
// for a closed object.
type owned[P comparable] struct {
	mu      sync.Mutex
	ptr     P
	cleanup runtime.Cleanup
}

// enter locks the object and returns its pointer for C; then leave must follow.
func (o *owned[P]) enter() (P, error) {
	var closed P
	o.mu.Lock()
	if o.ptr == closed {
		o.mu.Unlock()
		return closed, ErrClosed
	}
	ptr := o.ptr
	maybeGC()
	return ptr, nil
}

// leave ends what enter began. As it writes into the object, the object is reachable until here.
func (o *owned[P]) leave() {
	o.mu.Unlock()
}

// close frees the object, once, when no call is inside.
func (o *owned[P]) close(free func(P)) {
	var closed P
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ptr != closed {
		o.cleanup.Stop()
		free(o.ptr)
		o.ptr = closed
	}
}
