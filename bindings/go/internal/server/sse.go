package server

import (
	"net/http"
	"time"
)

// setWriteDeadline bounds how long the client may take to read what is written next.
func (s *Server) setWriteDeadline(w http.ResponseWriter) {
	if s.opts.WriteTimeout > 0 {
		// Not all connections have one.
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.opts.WriteTimeout)) //nolint:errcheck
	}
}

// An eventWriter writes server-sent events, each at once. The status and headers go out with the first of them: until then
// the handler can still answer with an error.
type eventWriter struct {
	s       *Server
	w       http.ResponseWriter
	started bool
}

func (s *Server) newEventWriter(w http.ResponseWriter) *eventWriter {
	return &eventWriter{s: s, w: w}
}

// data writes an event that is a JSON value.
func (e *eventWriter) data(value any) error {
	data, err := encodeJSON(value)
	if err != nil {
		return err
	}
	return e.write("data: " + string(data) + "\n\n")
}

// event writes an event with a name.
func (e *eventWriter) event(name string, value any) error {
	data, err := encodeJSON(value)
	if err != nil {
		return err
	}
	return e.write("event: " + name + "\ndata: " + string(data) + "\n\n")
}

// done writes OpenAI's end of a stream.
func (e *eventWriter) done() error { return e.write("data: [DONE]\n\n") }

// ping writes a comment, which keeps the connection from looking dead.
func (e *eventWriter) ping() error { return e.write(":\n\n") }

// fail ends the stream with an error: as the response if nothing has been written yet, else as an event.
func (e *eventWriter) fail(err error) error {
	if !e.started {
		return err
	}
	api := e.s.apiErrorOf(err)
	if api.status != statusClientGone {
		e.s.log.Error("a stream failed", "error", err)
		e.data(map[string]any{"error": api.fields()}) //nolint:errcheck // it was the last
	}
	return nil
}

func (e *eventWriter) write(text string) error {
	if !e.started {
		e.started = true
		header := e.w.Header()
		header.Set("Content-Type", "text/event-stream")
		header.Set("Cache-Control", "no-cache")
		header.Set("X-Accel-Buffering", "no") // nginx passes events on at once
		e.w.WriteHeader(http.StatusOK)
	}
	e.s.setWriteDeadline(e.w)
	if _, err := e.w.Write([]byte(text)); err != nil {
		return clientGone(err)
	}
	if err := http.NewResponseController(e.w).Flush(); err != nil {
		return clientGone(err)
	}
	return nil
}
