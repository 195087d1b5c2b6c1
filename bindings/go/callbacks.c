#include "_cgo_export.h"
#include "shim.h"

/* Whose progress function runs on this thread: a goroutine that C has called stays on its thread until it returns, so a
 * call of it into the same session, which would wait for itself, can be told from a call of another goroutine. */
static _Thread_local uintptr_t inside;

uintptr_t phd_go_inside_progress(void) { return inside; }

bool phd_go_progress(float fraction, void *user) {
  uintptr_t before = inside;
  inside = (uintptr_t)user;
  bool go_on = goProgress(fraction, (uintptr_t)user);
  inside = before;
  return go_on;
}

void phd_go_log(uint32_t level, const char *message, size_t length, void *user) {
  (void)user;
  goLog(level, (char *)message, length);
}
