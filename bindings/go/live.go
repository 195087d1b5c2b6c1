package phd

import "sync/atomic"

// C objects that have not been freed, for tests.
var liveModels, liveSessions, liveSamplers, liveStreams, liveSpeculators atomic.Int64
