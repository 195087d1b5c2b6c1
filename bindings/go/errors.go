package phd

// #include "shim.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"math"
)

// Status is what became of a call. Its values never change meaning.
type Status int

// The statuses of failed calls.
const (
	StatusOK              Status = C.PHD_OK
	StatusInvalidArgument Status = C.PHD_ERROR_INVALID_ARGUMENT
	StatusIO              Status = C.PHD_ERROR_IO
	StatusFormat          Status = C.PHD_ERROR_FORMAT
	StatusUnsupported     Status = C.PHD_ERROR_UNSUPPORTED
	StatusOutOfMemory     Status = C.PHD_ERROR_OUT_OF_MEMORY
	StatusCacheFull       Status = C.PHD_ERROR_CACHE_FULL
	StatusBackend         Status = C.PHD_ERROR_BACKEND
	StatusCancelled       Status = C.PHD_ERROR_CANCELLED
	StatusBufferTooSmall  Status = C.PHD_ERROR_BUFFER_TOO_SMALL
	StatusInternal        Status = C.PHD_ERROR_INTERNAL
)

// String returns the name that C has for s, such as "PHD_ERROR_IO".
func (s Status) String() string {
	if s < 0 || s > math.MaxInt32 {
		s = math.MaxInt32 // a number that is no status
	}
	return C.GoString(C.phd_status_name(C.phd_status(s)))
}

// An Error is what libphd says about a failed call. Use [errors.Is] with the Err variables, or [errors.As] for the
// message.
type Error struct {
	Status  Status
	Message string // one sentence that names the file, tensor or value

	cause error // the error of the context that ended the call
}

// Error returns the message.
func (e *Error) Error() string {
	message := e.Message
	if message == "" {
		message = e.Status.String()
	}
	if e.cause != nil {
		message += ": " + e.cause.Error()
	}
	return message
}

// Is reports whether target is the Err variable of e's status.
func (e *Error) Is(target error) bool {
	s, ok := target.(sentinel)
	return ok && Status(s) == e.Status
}

// Unwrap returns the error of the context that ended the call, if one did.
func (e *Error) Unwrap() error { return e.cause }

// sentinel is what the Err variables are made of: comparable, and of no other use.
type sentinel Status

func (s sentinel) Error() string { return "phd: " + Status(s).String() }

// What errors of this package are, for [errors.Is].
var (
	ErrInvalidArgument error = sentinel(StatusInvalidArgument) // a wrong value; the message says what was expected
	ErrIO              error = sentinel(StatusIO)              // the operating system failed to read or write
	ErrFormat          error = sentinel(StatusFormat)          // a file is not what it should be
	ErrUnsupported     error = sentinel(StatusUnsupported)     // valid, but not implemented
	ErrOutOfMemory     error = sentinel(StatusOutOfMemory)     // an allocation failed
	ErrCacheFull       error = sentinel(StatusCacheFull)       // a session has no room for the tokens
	ErrBackend         error = sentinel(StatusBackend)         // a device failed
	ErrCancelled       error = sentinel(StatusCancelled)       // ended by a context, Cancel or a progress function
	ErrInternal        error = sentinel(StatusInternal)        // a bug in libphd; the session is of no more use
)

// ErrClosed is the error of calls on an object that has been closed.
var ErrClosed = errors.New("phd: used after Close")

// cStatus is what C's functions return.
type cStatus = C.enum_phd_status

// check turns what a call of C returned into an error, and frees C's.
func check(status cStatus, e *C.phd_error) error {
	if status == C.PHD_OK {
		return nil
	}
	return newError(status, e)
}

// newError is apart from check so that the compiler inlines the good case.
func newError(status cStatus, e *C.phd_error) *Error {
	err := &Error{Status: Status(status)}
	if e != nil {
		err.Message = C.GoString(C.phd_error_message(e))
		C.phd_error_free(e)
	}
	return err
}

// contextError is the error of a call that ctx ended, or would have.
func contextError(ctx context.Context) *Error {
	return &Error{Status: StatusCancelled, Message: "cancelled", cause: ctx.Err()}
}

// checkContext is check for calls that end with ctx.
func checkContext(ctx context.Context, status cStatus, e *C.phd_error) error {
	if status == C.PHD_OK {
		return nil
	}
	err := newError(status, e)
	if status == C.PHD_ERROR_CANCELLED {
		err.cause = ctx.Err()
	}
	return err
}

func invalid(format string, arguments ...any) *Error {
	return &Error{Status: StatusInvalidArgument, Message: fmt.Sprintf(format, arguments...)}
}

// u32s converts several numbers for C and remembers the first that does not fit.
type u32s struct{ err error }

func (u *u32s) of(name string, value int) C.uint32_t {
	if value < 0 || uint64(value) > math.MaxUint32 {
		if u.err == nil {
			u.err = invalid("%s is %d, expected 0 to %d", name, value, uint32(math.MaxUint32))
		}
		return 0
	}
	return C.uint32_t(value)
}
