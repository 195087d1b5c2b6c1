package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"strings"
	"time"
)

// maxDepth is how deeply arrays and objects of a request may be nested. Schemas and tool calls stay far below it.
const maxDepth = 100

// A body is a JSON object that is read field by field. The methods leave what they are to write to as it is when a field is
// missing or null; the first field that is not what it should be is remembered, with what was found and what was expected.
// Where a field has several names, the first that is there counts.
type body struct {
	fields map[string]json.RawMessage
	err    error
}

// readBody reads a request's JSON object.
func (s *Server) readBody(w http.ResponseWriter, r *http.Request) (*body, error) {
	data, err := s.readAll(w, r)
	if err != nil {
		return nil, err
	}
	return parseBody(data)
}

// readAll reads a request's body, within the limits of size and time.
func (s *Server) readAll(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	// Only while the body is read: the connection's deadline would otherwise end the request itself.
	if s.opts.ReadTimeout > 0 {
		deadline := http.NewResponseController(w)
		deadline.SetReadDeadline(time.Now().Add(s.opts.ReadTimeout)) //nolint:errcheck // not all connections have one
		defer deadline.SetReadDeadline(time.Time{})                  //nolint:errcheck
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, s.opts.MaxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
		return data, nil
	case errors.As(err, &tooLarge):
		return nil, err
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &apiError{status: http.StatusRequestTimeout, kind: typeTimeout,
			message: fmt.Sprintf("the request did not come within %v", s.opts.ReadTimeout)}
	}
	return nil, badRequest("the request could not be read: %v", err)
}

func parseBody(data []byte) (*body, error) {
	if err := checkDepth(data); err != nil {
		return nil, err
	}
	b := &body{}
	if err := json.Unmarshal(data, &b.fields); err != nil {
		return nil, badRequest("the request is not a JSON object: %v", err)
	}
	if b.fields == nil {
		return nil, badRequest("the request is not a JSON object: found null")
	}
	return b, nil
}

// checkDepth bounds the nesting of JSON, before anything recursive looks at it. It need not be well-formed.
func checkDepth(data []byte) error {
	depth := 0
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '"':
			for i++; i < len(data) && data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
		case '[', '{':
			if depth++; depth > maxDepth {
				return badRequest("the request is nested more than %d levels deep", maxDepth)
			}
		case ']', '}':
			depth--
		}
	}
	return nil
}

// get returns the first of the named fields that is there and not null, and its name.
func (b *body) get(names ...string) (raw json.RawMessage, name string) {
	for _, name := range names {
		if raw := b.fields[name]; raw != nil && string(raw) != "null" {
			return raw, name
		}
	}
	return nil, ""
}

// has says whether a field is there and not null.
func (b *body) has(name string) bool {
	raw, _ := b.get(name)
	return raw != nil
}

// fail remembers the first error.
func (b *body) fail(err error) {
	if b.err == nil {
		b.err = err
	}
}

// wrong is the error of a field that is not what it should be.
func wrong(name string, found json.RawMessage, expected string) *apiError {
	return badRequest("Field '%s': found %s, expected %s", name, excerpt(found), expected)
}

// excerpt is a JSON value for an error message: short, and on one line.
func excerpt(raw json.RawMessage) string {
	const longest = 60
	var compact bytes.Buffer
	text := string(raw)
	if len(raw) < 4096 && json.Compact(&compact, raw) == nil {
		text = compact.String()
	}
	if len(text) > longest {
		text = strings.ToValidUTF8(text[:longest], "") + "..."
	}
	return text
}

// integer reads a whole number from low to high.
func (b *body) integer(out *int, low, high int, names ...string) {
	raw, name := b.get(names...)
	if raw == nil {
		return
	}
	value, ok := wholeNumber(raw)
	if !ok || value < float64(low) || value > float64(high) {
		b.fail(wrong(name, raw, fmt.Sprintf("a whole number from %d to %d", low, high)))
		return
	}
	*out = int(value)
}

// clampedInteger is integer, but that a number below or above the range counts as its end.
func (b *body) clampedInteger(out *int, low, high int, names ...string) {
	raw, name := b.get(names...)
	if raw == nil {
		return
	}
	value, ok := wholeNumber(raw)
	if !ok {
		b.fail(wrong(name, raw, "a whole number"))
		return
	}
	*out = int(min(max(value, float64(low)), float64(high)))
}

// wholeNumber reads a number without a fraction: also one such as 40.0, as scripting languages write it.
func wholeNumber(raw json.RawMessage) (float64, bool) {
	var value float64
	if json.Unmarshal(raw, &value) != nil || value != math.Trunc(value) {
		return 0, false
	}
	return value, true
}

// number reads a number. One below or above the range counts as its end.
func (b *body) number(out *float32, low, high float64, names ...string) {
	raw, name := b.get(names...)
	if raw == nil {
		return
	}
	var value float64
	if json.Unmarshal(raw, &value) != nil || math.Abs(value) > math.MaxFloat32 {
		b.fail(wrong(name, raw, "a number"))
		return
	}
	*out = float32(min(max(value, low), high))
}

// positive is number, for one that must be above 0.
func (b *body) positive(out *float32, names ...string) {
	value := *out
	if b.number(&value, -math.MaxFloat32, math.MaxFloat32, names...); value <= 0 {
		raw, name := b.get(names...)
		b.fail(wrong(name, raw, "a number above 0"))
		return
	}
	*out = value
}

func (b *body) boolean(out *bool, names ...string) {
	read(b, out, "true or false", names...)
}

func (b *body) text(out *string, names ...string) {
	read(b, out, "a string", names...)
}

// texts reads an array of strings, of which there may be as many as limit says.
func (b *body) texts(out *[]string, limit int, names ...string) {
	raw, name := b.get(names...)
	if raw == nil {
		return
	}
	var values []*string
	expected := fmt.Sprintf("an array of at most %d strings", limit)
	if json.Unmarshal(raw, &values) != nil || len(values) > limit {
		b.fail(wrong(name, raw, expected))
		return
	}
	texts := make([]string, len(values))
	for i, value := range values {
		if value == nil {
			b.fail(wrong(name, raw, expected))
			return
		}
		texts[i] = *value
	}
	*out = texts
}

// read reads a field of any type, described for the error message.
func read[T any](b *body, out *T, expected string, names ...string) {
	raw, name := b.get(names...)
	if raw == nil {
		return
	}
	var value T
	if json.Unmarshal(raw, &value) != nil {
		b.fail(wrong(name, raw, expected))
		return
	}
	*out = value
}

// object reads a field that is an object; nil if there is none. Its errors are the caller's to look at.
func (b *body) object(name string) *body {
	raw, _ := b.get(name)
	if raw == nil {
		return nil
	}
	inner := &body{}
	if json.Unmarshal(raw, &inner.fields) != nil {
		b.fail(wrong(name, raw, "an object"))
		return nil
	}
	return inner
}
