//go:build phd_gc

package phd

import "runtime"

// maybeGC collects garbage when a call has its pointer for C and before C gets it, so that an object which is freed while
// C still uses it, or a Go pointer that C has kept, shows at once and not once a month.
func maybeGC() {
	runtime.GC()
	runtime.Gosched() // to the goroutine that runs cleanups
}
