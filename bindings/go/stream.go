package phd

// #include "shim.h"
import "C"

import (
	"runtime"
)

// A Stream turns tokens into text as they come. It holds back the bytes of a character that later tokens complete, and
// text that can be the beginning of a stop string.
type Stream struct {
	owned[*C.phd_stream]
	model  *Model // a child keeps its owner alive
	buffer []byte
}

// NewStream creates a stream.
func (m *Model) NewStream() (*Stream, error) {
	model, err := m.enter()
	if err != nil {
		return nil, err
	}
	defer m.gate.leave()
	var ptr *C.phd_stream
	var e *C.phd_error
	if err := check(C.phd_stream_create(model, &ptr, &e), e); err != nil {
		return nil, err
	}
	s := &Stream{owned: owned[*C.phd_stream]{ptr: ptr}, model: m, buffer: make([]byte, 64)}
	liveStreams.Add(1)
	s.cleanup = runtime.AddCleanup(s, freeStream, ptr)
	return s, nil
}

func freeStream(ptr *C.phd_stream) {
	C.phd_stream_free(ptr)
	liveStreams.Add(-1)
}

// Close frees the stream.
func (s *Stream) Close() error {
	s.owned.close(freeStream)
	return nil
}

// AddStop adds a stop string, 1 to 1024 bytes of UTF-8; 64 at most. The text ends before the stop string that is complete
// first; of several that end together, before the longest. Between texts only; stop strings stay when a text ends.
func (s *Stream) AddStop(stop string) error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	chars, length := cString(stop)
	var e *C.phd_error
	return check(C.phd_stream_add_stop(ptr, chars, length, &e), e)
}

// SetSpecial spells control tokens out, or leaves them out, as at first. Between texts only.
func (s *Stream) SetSpecial(special bool) error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	var e *C.phd_error
	return check(C.phd_stream_set_special(ptr, C.bool(special), &e), e)
}

// text is what C has put into the buffer, unless it failed.
func (s *Stream) text(status cStatus, n C.size_t, e *C.phd_error) (string, error) {
	if err := check(status, e); err != nil {
		return "", err
	}
	return string(s.buffer[:n]), nil
}

// grow makes the buffer what C asked for, in an error that is none.
func (s *Stream) grow(n C.size_t, e *C.phd_error) {
	C.phd_error_free(e)
	s.buffer = make([]byte, n)
}

// Push passes one token and returns the text that it completes: whole characters, or none. After a stop string there is
// no more text.
func (s *Stream) Push(t Token) (string, error) {
	ptr, err := s.enter()
	if err != nil {
		return "", err
	}
	defer s.leave()
	for {
		to, capacity := cChars(s.buffer)
		var n C.size_t
		var e *C.phd_error
		status := C.phd_stream_push(ptr, C.int32_t(t), to, capacity, &n, &e)
		if status != C.PHD_ERROR_BUFFER_TOO_SMALL {
			return s.text(status, n, e)
		}
		s.grow(n, e)
	}
}

// Finish ends the text: an incomplete character becomes U+FFFD, and what was held back for a stop string is returned.
// The stream can then begin another text.
func (s *Stream) Finish() (string, error) {
	ptr, err := s.enter()
	if err != nil {
		return "", err
	}
	defer s.leave()
	for {
		to, capacity := cChars(s.buffer)
		var n C.size_t
		var e *C.phd_error
		status := C.phd_stream_finish(ptr, to, capacity, &n, &e)
		if status != C.PHD_ERROR_BUFFER_TOO_SMALL {
			return s.text(status, n, e)
		}
		s.grow(n, e)
	}
}

// Stopped returns which stop string ended the text, counted in the order in which they were added, or -1, and the bytes
// of text returned so far, which after a stop string are those before it. After Close it returns -1 and 0.
func (s *Stream) Stopped() (index int, n uint64) {
	ptr, err := s.enter()
	if err != nil {
		return -1, 0
	}
	defer s.leave()
	var stop C.int32_t
	var bytes C.uint64_t
	if C.phd_stream_stop(ptr, &stop, &bytes, nil) != C.PHD_OK {
		return -1, 0
	}
	return int(stop), uint64(bytes)
}
