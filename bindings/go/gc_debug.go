//go:build phd_gc

package phd

import "runtime"

// maybeGC collects garbage before and after each call into C, so that an object which is freed while C still uses it, or
// a Go pointer that C has kept, shows at once and not once a month.
func maybeGC() { runtime.GC() }
