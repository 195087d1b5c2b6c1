package phd

import (
	"context"
	"errors"
	"testing"
)

func TestErrors(t *testing.T) {
	all := []error{ErrInvalidArgument, ErrIO, ErrFormat, ErrUnsupported, ErrOutOfMemory, ErrCacheFull, ErrBackend, ErrCancelled, ErrInternal}
	statuses := []Status{StatusInvalidArgument, StatusIO, StatusFormat, StatusUnsupported, StatusOutOfMemory, StatusCacheFull,
		StatusBackend, StatusCancelled, StatusInternal}
	for i, status := range statuses {
		err := error(&Error{Status: status, Message: "why"})
		for j, target := range all {
			if errors.Is(err, target) != (i == j) {
				t.Errorf("errors.Is(%v, %v) is %v", status, target, i != j)
			}
		}
		if errors.Is(err, ErrClosed) || err.Error() != "why" {
			t.Errorf("%v is %q", status, err)
		}
	}
	if got := StatusCacheFull.String(); got != "PHD_ERROR_CACHE_FULL" {
		t.Errorf("StatusCacheFull is %q", got)
	}
	for _, s := range []Status{-1, 99, 1 << 32} {
		if got := s.String(); got != "PHD_ERROR_UNKNOWN" {
			t.Errorf("status %d is %q", int(s), got)
		}
	}
	if got := (&Error{Status: StatusIO}).Error(); got != "PHD_ERROR_IO" {
		t.Errorf("an error without a message is %q", got)
	}
	ctx, cancel := context.WithCancel(background)
	cancel()
	err := error(contextError(ctx))
	wantError(t, err, ErrCancelled, context.Canceled)
	var e *Error
	if !errors.As(err, &e) || e.Status != StatusCancelled {
		t.Errorf("%v is no Error", err)
	}
}
