package phd

// #include "shim.h"
import "C"

import "unsafe"

// Pointers into Go's memory for the time of one call; nil if there is nothing.

func cString(s string) (*C.char, C.size_t) {
	if s == "" {
		return nil, 0
	}
	return (*C.char)(unsafe.Pointer(unsafe.StringData(s))), C.size_t(len(s))
}

func cChars(b []byte) (*C.char, C.size_t) {
	return (*C.char)(unsafe.Pointer(unsafe.SliceData(b))), C.size_t(len(b))
}

func cBytes(b []byte) (*C.uint8_t, C.size_t) {
	return (*C.uint8_t)(unsafe.SliceData(b)), C.size_t(len(b))
}

func cTokens(t []Token) (*C.int32_t, C.size_t) {
	return (*C.int32_t)(unsafe.SliceData(t)), C.size_t(len(t))
}

func cFloats(f []float32) (*C.float, C.size_t) {
	return (*C.float)(unsafe.SliceData(f)), C.size_t(len(f))
}

// fill calls C with a buffer of guess elements, and with a larger one for as long as C asks for it.
func fill[T any](guess int, call func(buffer []T, n *C.size_t, e **C.phd_error) cStatus) ([]T, error) {
	for {
		buffer := make([]T, guess)
		var n C.size_t
		var e *C.phd_error
		status := call(buffer, &n, &e)
		if status == C.PHD_OK {
			return buffer[:n], nil
		}
		err := newError(status, e)
		if status != C.PHD_ERROR_BUFFER_TOO_SMALL || int(n) <= guess {
			return nil, err
		}
		guess = int(n)
	}
}
