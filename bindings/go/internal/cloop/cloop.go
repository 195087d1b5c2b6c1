// Package cloop makes calls from C, for benchmarks that compare them with calls from Go: tests cannot use cgo.
package cloop

// #include <phd.h>
//
// static enum phd_status steps(phd_session *session, int32_t seq, int32_t token, size_t n) {
//   for (size_t i = 0; i < n; i++) {
//     enum phd_status status = phd_step(session, seq, token, NULL);
//     if (status != PHD_OK) return status;
//   }
//   return PHD_OK;
// }
import "C"

import "unsafe"

// Steps appends token n times to a sequence of a phd_session and returns the first status that is not PHD_OK.
func Steps(session unsafe.Pointer, seq, token int32, n int) int {
	return int(C.steps((*C.phd_session)(session), C.int32_t(seq), C.int32_t(token), C.size_t(n)))
}
