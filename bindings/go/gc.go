//go:build !phd_gc

package phd

// maybeGC does nothing; see gc_debug.go.
func maybeGC() {}
