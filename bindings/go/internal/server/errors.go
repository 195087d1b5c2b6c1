package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/engine"
)

// Types of errors, as clients of llama-server know them.
const (
	typeInvalidRequest  = "invalid_request_error"
	typeAuthentication  = "authentication_error"
	typeNotFound        = "not_found_error"
	typeNotSupported    = "not_supported_error"
	typeExceedContext   = "exceed_context_size_error"
	typeUnavailable     = "unavailable_error"
	typeRateLimit       = "rate_limit_error"
	typeTimeout         = "timeout_error"
	typeServer          = "server_error"
	statusClientGone    = 499 // nobody reads it; for the log, as nginx has it
	loadingMessage      = "Loading model"
	shuttingDownMessage = "The server is shutting down"
)

// An apiError is an error as a client sees it.
type apiError struct {
	status     int
	kind       string
	message    string
	extra      map[string]any // further fields beside code, message and type
	retryAfter int            // seconds; 0: none
}

func (e *apiError) Error() string { return e.message }

// fields is the object that stands under "error".
func (e *apiError) fields() map[string]any {
	fields := map[string]any{"code": e.status, "message": e.message, "type": e.kind}
	for name, value := range e.extra {
		fields[name] = value
	}
	return fields
}

// badRequest says what is wrong with a request.
func badRequest(format string, args ...any) *apiError {
	return &apiError{status: http.StatusBadRequest, kind: typeInvalidRequest, message: fmt.Sprintf(format, args...)}
}

// notSupported says that a request is in order but asks for what this server or this model does not have.
func notSupported(format string, args ...any) *apiError {
	return &apiError{status: http.StatusNotImplemented, kind: typeNotSupported, message: fmt.Sprintf(format, args...)}
}

func unavailable(message string) *apiError {
	return &apiError{status: http.StatusServiceUnavailable, kind: typeUnavailable, message: message, retryAfter: 1}
}

// apiErrorOf is how any error of a handler appears to the client.
func (s *Server) apiErrorOf(err error) *apiError {
	var api *apiError
	var tooLong *engine.TooLongError
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &api):
		return api
	case errors.As(err, &tooLong):
		return &apiError{
			status: http.StatusBadRequest,
			kind:   typeExceedContext,
			message: fmt.Sprintf("request (%d tokens) exceeds the available context size (%d tokens), try increasing it "+
				"(context_length_exceeded)", tooLong.NPrompt, tooLong.NContext),
			extra: map[string]any{"n_prompt_tokens": tooLong.NPrompt, "n_ctx": tooLong.NContext},
		}
	case errors.As(err, &tooLarge):
		return &apiError{status: http.StatusRequestEntityTooLarge, kind: typeInvalidRequest,
			message: fmt.Sprintf("the request is larger than %d bytes", tooLarge.Limit)}
	case errors.Is(err, engine.ErrQueueFull):
		return &apiError{status: http.StatusTooManyRequests, kind: typeRateLimit,
			message: "too many requests are waiting already", retryAfter: s.retryAfter()}
	case errors.Is(err, engine.ErrDraining):
		return unavailable(shuttingDownMessage)
	case errors.Is(err, context.DeadlineExceeded):
		return &apiError{status: http.StatusGatewayTimeout, kind: typeTimeout,
			message: fmt.Sprintf("the request took longer than %v", s.opts.Timeout)}
	case errors.Is(err, context.Canceled):
		return &apiError{status: statusClientGone, kind: typeServer, message: "the request was cancelled"}
	case errors.Is(err, phd.ErrInvalidArgument), errors.Is(err, phd.ErrUnsupported):
		return badRequest("%v", err)
	case errors.Is(err, phd.ErrCacheFull):
		return &apiError{status: http.StatusInternalServerError, kind: typeServer,
			message: fmt.Sprintf("context size has been exceeded: %v", err)}
	}
	return &apiError{status: http.StatusInternalServerError, kind: typeServer, message: err.Error()}
}

// clientGone is the error of a write that the client did not take.
func clientGone(err error) error { return fmt.Errorf("%w: %w", context.Canceled, err) }

// retryAfter guesses in how many seconds a request that finds the queue full may find room: as long as the queue takes, by
// what requests have taken so far.
func (s *Server) retryAfter() int {
	l := s.loaded()
	if l == nil {
		return 1
	}
	queued := float64(l.engine.Snapshot().Queued + 1)
	seconds := s.metrics.meanDuration() * queued / float64(l.engine.NSlots())
	return int(math.Ceil(min(max(seconds, 1), 60)))
}

// writeError answers with an error in llama-server's shape.
func (s *Server) writeError(w http.ResponseWriter, r *http.Request, err error) {
	e := s.apiErrorOf(err)
	if e.status >= http.StatusInternalServerError && e.kind == typeServer {
		s.log.ErrorContext(r.Context(), "request failed", "path", r.URL.Path, "error", err)
	}
	if e.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(e.retryAfter))
	}
	s.writeJSON(w, e.status, map[string]any{"error": e.fields()})
}

// writeJSON answers with a value as JSON.
func (s *Server) writeJSON(w http.ResponseWriter, status int, value any) {
	data, err := encodeJSON(value)
	if err != nil {
		// Only a value that this program made up can get here, such as a NaN.
		s.log.Error("a response is not JSON", "error", err)
		status, data = http.StatusInternalServerError,
			[]byte(`{"error":{"code":500,"message":"the response could not be encoded","type":"server_error"}}`)
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(status)
	s.setWriteDeadline(w)
	w.Write(data) //nolint:errcheck // the client has gone, and nothing is left to be done
}

// encodeJSON is json.Marshal without the escapes that are for HTML.
func encodeJSON(value any) ([]byte, error) {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
