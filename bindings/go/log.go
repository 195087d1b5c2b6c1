package phd

// #include "shim.h"
import "C"

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
)

var (
	logMutex sync.Mutex // of SetLogger
	logger   atomic.Pointer[slog.Logger]
)

// slog's levels by C's phd_log_level.
var logLevels = [...]slog.Level{1: slog.LevelError, 2: slog.LevelWarn, 3: slog.LevelInfo, 4: slog.LevelDebug}

// SetLogger hands what the library says from now on to l, for the whole process; nil, as at first, is silence. How much
// is said is decided here, by what l has enabled: models and sessions at [slog.LevelInfo], what happens within calls at
// [slog.LevelDebug]. The handler may be called from any goroutine, while calls run; it must not use this package.
func SetLogger(l *slog.Logger) {
	logMutex.Lock()
	defer logMutex.Unlock()
	level := 0
	if l != nil {
		for i := len(logLevels) - 1; i > 0 && level == 0; i-- {
			if l.Enabled(context.Background(), logLevels[i]) {
				level = i
			}
		}
	}
	logger.Store(l)
	// It fails only where a Rust program has a logger of its own, or in a handler, which is told not to.
	C.phd_go_log_set(C.bool(level > 0), C.uint32_t(level), nil)
}

func logLine(level uint32, line []byte) {
	// A handler's panic must not unwind through C, and there is nobody to hand it to.
	defer func() { _ = recover() }()
	if l := logger.Load(); l != nil && level > 0 && level < uint32(len(logLevels)) {
		l.Log(context.Background(), logLevels[level], string(line))
	}
}
