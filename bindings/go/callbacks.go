package phd

// #include "shim.h"
import "C"

import (
	"context"
	"runtime/cgo"
	"unsafe"
)

// progress is what a cgo.Handle that C has stands for: a progress function, a context, or both.
type progress struct {
	ctx      context.Context // may be nil
	function func(fraction float32) bool
	panicked any // what function panicked with: a panic must not unwind through C
}

func (p *progress) report(fraction float32) (goOn bool) {
	defer func() {
		if r := recover(); r != nil {
			p.panicked = r
			goOn = false
		}
	}()
	if p.ctx != nil && p.ctx.Err() != nil {
		return false
	}
	return p.function == nil || p.function(fraction)
}

// reporter finds a progress from what a handle holds: itself, or a weak pointer to a session.
type reporter interface{ report(fraction float32) bool }

//export goProgress
func goProgress(fraction C.float, handle C.uintptr_t) C.bool {
	return C.bool(cgo.Handle(handle).Value().(reporter).report(float32(fraction)))
}

//export goLog
func goLog(level C.uint32_t, message *C.char, length C.size_t) {
	logLine(uint32(level), unsafe.Slice((*byte)(unsafe.Pointer(message)), length))
}

// callWithProgress hands call a handle for a progress function and a context, or 0 if there is neither, and makes an error
// of what C returned. If the function has panicked, which cancels the call, so does this.
func callWithProgress(ctx context.Context, function func(float32) bool,
	call func(handle C.uintptr_t, e **C.phd_error) cStatus) error {
	p := &progress{ctx: ctx, function: function}
	var handle cgo.Handle
	if function != nil || ctx.Done() != nil {
		handle = cgo.NewHandle(p)
		defer handle.Delete()
	}
	var e *C.phd_error
	err := checkContext(ctx, call(C.uintptr_t(handle), &e), e)
	if p.panicked != nil {
		panic(p.panicked)
	}
	return err
}
