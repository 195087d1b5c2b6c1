package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Outcomes of a request. All but failed are as they must be.
const (
	answered     = "answered"
	busy         = "busy"         // the server said that it has too much to do
	refused      = "refused"      // as the request deserved
	disconnected = "disconnected" // the client hung up, as it meant to
	failed       = "failed"
)

// A result is what became of a request.
type result struct {
	kind       string
	outcome    string
	status     int // 0: none came
	problem    string
	took       time.Duration
	firstToken time.Duration // of streams; 0: none came
	tokens     int           // generated, as far as the client has seen
	prompt     int           // tokens of the prompt, as far as the client was told
	cached     int           // of those, not computed anew
}

func (r *result) failf(format string, args ...any) {
	r.outcome = failed
	if r.problem == "" {
		r.problem = fmt.Sprintf(format, args...)
	}
}

// runClients runs all clients until ctx ends and their last requests have ended.
func runClients(ctx context.Context, cfg config, s *server, results chan<- result) {
	var all sync.WaitGroup
	for i := range cfg.Clients {
		all.Add(1)
		go func() {
			defer all.Done()
			c := &client{server: s, random: rand.New(rand.NewPCG(cfg.Seed, uint64(i)))}
			for ctx.Err() == nil {
				kind := choose(c.random)
				// A request that has begun is not cut short by the end of the load.
				timed, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.Timeout)
				start := time.Now()
				r := kind.run(timed, c)
				cancel()
				r.kind, r.took = kind.name, time.Since(start)
				results <- r
				if r.outcome == busy {
					sleep(ctx, time.Duration(500+c.random.IntN(1500))*time.Millisecond)
				}
			}
		}()
	}
	all.Wait()
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// A client asks for one thing after the other.
type client struct {
	server  *server
	random  *rand.Rand
	history []message // the conversation so far
}

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// Routes that generate.
const (
	completionPath = "/completion"
	textPath       = "/v1/completions"
	chatPath       = "/v1/chat/completions"
)

// A request to generate.
type request struct {
	path   string
	body   map[string]any
	stream bool
	max    int // tokens at most
}

// generate sends a request and reads its whole answer. With hangUpAfter > 0, the client hangs up after that many pieces of
// the stream.
func (c *client) generate(ctx context.Context, q request, hangUpAfter int) (r result, text string) {
	q.body["stream"] = q.stream
	if q.stream && q.path != completionPath {
		q.body["stream_options"] = map[string]any{"include_usage": true}
	}
	start := time.Now()
	response, err := c.server.post(ctx, c.server.http, q.path, q.body)
	if err != nil {
		r.failf("no answer: %v", err)
		return r, ""
	}
	defer response.Body.Close()
	r.status = response.StatusCode
	switch {
	case r.status == http.StatusTooManyRequests || r.status == http.StatusServiceUnavailable:
		r.outcome = busy
		if err := checkError(response); err != nil {
			r.failf("status %d: %v", r.status, err)
		} else if r.status == http.StatusTooManyRequests && response.Header.Get("Retry-After") == "" && !c.server.cfg.Peer {
			r.failf("status %d without Retry-After", r.status)
		}
		return r, ""
	case r.status != http.StatusOK:
		body, _ := io.ReadAll(io.LimitReader(response.Body, 1000))
		r.failf("status %d: %.300s", r.status, body)
		return r, ""
	}
	r.outcome = answered
	var a answer
	if q.stream {
		a, err = readStream(response.Body, q.path, func(pieces int) bool {
			if pieces == 1 {
				r.firstToken = time.Since(start)
			}
			return hangUpAfter == 0 || pieces < hangUpAfter
		})
		if errors.Is(err, errHungUp) {
			r.outcome, err = disconnected, nil
		}
	} else {
		a, err = readAnswer(response.Body, q.path)
	}
	r.tokens, r.prompt, r.cached = a.tokens, a.prompt, a.cached
	if err != nil {
		r.failf("%v", err)
	} else if r.outcome == answered && a.tokens > q.max {
		r.failf("%d tokens were generated, %d were asked for", a.tokens, q.max)
	}
	return r, a.text
}

// refusal sends what must be refused.
func (c *client) refusal(ctx context.Context, path string, body any) (r result) {
	response, err := c.server.post(ctx, c.server.http, path, body)
	if err != nil {
		r.failf("no answer: %v", err)
		return r
	}
	defer response.Body.Close()
	r.status, r.outcome = response.StatusCode, refused
	err = checkError(response)
	switch {
	case c.server.cfg.Peer:
		// llama-server accepts some of it, and says 500 to some.
		if r.status == http.StatusOK {
			r.outcome = answered
		}
	case r.status < 400 || r.status >= 500:
		r.failf("status %d for what must be refused: %s %.200v", r.status, path, body)
	case err != nil:
		r.failf("status %d: %v", r.status, err)
	}
	return r
}

// slowRead asks for a stream and reads a few bytes of it at a time, for so long.
func (c *client) slowRead(ctx context.Context, q request, patience time.Duration) (r result) {
	q.body["stream"] = true
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	// A small buffer, so that the server feels it.
	dialer := &net.Dialer{}
	transport := &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			connection, err := dialer.DialContext(ctx, network, address)
			if tcp, ok := connection.(*net.TCPConn); ok {
				err = tcp.SetReadBuffer(4096)
			}
			return connection, err
		}}
	defer transport.CloseIdleConnections()
	response, err := c.server.post(ctx, &http.Client{Transport: transport}, q.path, q.body)
	if err != nil {
		r.outcome = disconnected // it waited for a slot longer than the patience
		if ctx.Err() == nil {
			r.failf("no answer: %v", err)
		}
		return r
	}
	defer response.Body.Close()
	r.status, r.outcome = response.StatusCode, answered
	switch r.status {
	case http.StatusOK:
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		r.outcome = busy
		return r
	default:
		r.failf("status %d", r.status)
		return r
	}
	buffer := make([]byte, 48)
	for {
		_, err := response.Body.Read(buffer)
		switch {
		case err == io.EOF:
			return r
		case err != nil:
			// It lost patience, or the server did.
			r.outcome = disconnected
			return r
		}
		sleep(ctx, 100*time.Millisecond)
	}
}

// fragment opens a connection, sends part of a request, waits, and hangs up.
func (c *client) fragment(ctx context.Context, data string, wait time.Duration) (r result) {
	connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.server.address)
	if err != nil {
		r.failf("cannot connect: %v", err)
		return r
	}
	defer connection.Close()
	r.outcome = disconnected
	if _, err := io.WriteString(connection, data); err != nil {
		return r // the server may hang up first
	}
	connection.SetReadDeadline(time.Now().Add(wait)) //nolint:errcheck // it is then closed sooner
	response, err := http.ReadResponse(bufio.NewReader(connection), nil)
	if err != nil {
		return r
	}
	response.Body.Close()
	r.status, r.outcome = response.StatusCode, refused
	if (r.status < 400 || r.status >= 500) && !c.server.cfg.Peer {
		r.failf("status %d for half a request", r.status)
	}
	return r
}

// hangUpInPrompt sends a request and hangs up before an answer is likely.
func (c *client) hangUpInPrompt(ctx context.Context, q request, after time.Duration) (r result) {
	impatient, cancel := context.WithTimeout(ctx, after)
	defer cancel()
	r, _ = c.generate(impatient, q, 0)
	if impatient.Err() != nil && ctx.Err() == nil && r.outcome == failed {
		return result{outcome: disconnected, status: r.status}
	}
	return r
}

// An answer is what was generated, with or without a stream.
type answer struct {
	text                   string
	tokens, prompt, cached int
	ended                  bool
}

// A piece is any object of an answer, of any of the routes.
type piece struct {
	Content *string `json:"content"`
	Stop    *bool   `json:"stop"`
	Choices []struct {
		Text    *string `json:"text"`
		Message *struct {
			Role    string  `json:"role"`
			Content *string `json:"content"`
		} `json:"message"`
		Delta *struct {
			Content *string `json:"content"`
		} `json:"delta"`
		FinishReason *string `json:"finish_reason"`
	} `json:"choices"`
	Usage *struct {
		PromptTokens     int `json:"prompt_tokens"`
		CompletionTokens int `json:"completion_tokens"`
		Details          struct {
			CachedTokens int `json:"cached_tokens"`
		} `json:"prompt_tokens_details"`
	} `json:"usage"`
	Timings *struct {
		CacheN     int `json:"cache_n"`
		PromptN    int `json:"prompt_n"`
		PredictedN int `json:"predicted_n"`
	} `json:"timings"`
	Error json.RawMessage `json:"error"`
}

// take adds a piece to the answer and says whether it has text.
func (a *answer) take(p *piece, path string) (hasText bool, err error) {
	if p.Error != nil {
		return false, fmt.Errorf("an error within the answer: %.300s", p.Error)
	}
	if p.Timings != nil {
		a.tokens, a.cached, a.prompt = p.Timings.PredictedN, p.Timings.CacheN, p.Timings.PromptN+p.Timings.CacheN
	}
	if p.Usage != nil {
		a.tokens, a.cached, a.prompt = p.Usage.CompletionTokens, p.Usage.Details.CachedTokens, p.Usage.PromptTokens
	}
	var text *string
	var reason *string
	switch {
	case path == completionPath:
		text = p.Content
		if text == nil {
			return false, errors.New("no content")
		}
		a.ended = a.ended || p.Stop != nil && *p.Stop
	case len(p.Choices) == 0:
		if p.Usage == nil {
			return false, errors.New("neither choices nor usage")
		}
		return false, nil
	default:
		choice := &p.Choices[0]
		reason = choice.FinishReason
		switch {
		case path == textPath:
			text = choice.Text
		case choice.Message != nil:
			if choice.Message.Role != "assistant" {
				return false, fmt.Errorf("the role is %q", choice.Message.Role)
			}
			text = choice.Message.Content
		case choice.Delta != nil:
			text = choice.Delta.Content
		default:
			return false, errors.New("a choice without message and delta")
		}
	}
	if reason != nil {
		if *reason != "stop" && *reason != "length" {
			return false, fmt.Errorf("the finish reason is %q", *reason)
		}
		a.ended = true
	}
	if text != nil {
		a.text += *text
	}
	return text != nil && *text != "", nil
}

func (a *answer) check() error {
	if !a.ended {
		return errors.New("the answer ended without saying why")
	}
	return nil
}

func readAnswer(body io.Reader, path string) (a answer, err error) {
	data, err := io.ReadAll(body)
	if err != nil {
		return a, fmt.Errorf("the answer broke off: %w", err)
	}
	var p piece
	if err := json.Unmarshal(data, &p); err != nil {
		return a, fmt.Errorf("the answer is not as expected: %w: %.200s", err, data)
	}
	if _, err := a.take(&p, path); err != nil {
		return a, fmt.Errorf("%w: %.200s", err, data)
	}
	return a, a.check()
}

var errHungUp = errors.New("the client hung up")

// readStream reads server-sent events. After each piece of text it asks whether to go on.
func readStream(body io.Reader, path string, goOn func(pieces int) bool) (a answer, err error) {
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	pieces := 0
	done := false
	for lines.Scan() {
		line := lines.Bytes()
		data, isData := bytes.CutPrefix(line, []byte("data: "))
		switch {
		case len(line) == 0 || line[0] == ':': // the end of an event; a comment
			continue
		case bytes.HasPrefix(line, []byte("error: ")): // as older servers of this kind do
			return a, fmt.Errorf("an error within the answer: %.300s", line)
		case !isData:
			return a, fmt.Errorf("neither data nor a comment: %.200q", line)
		case string(data) == "[DONE]":
			done = true
			continue
		case done:
			return a, errors.New("data after [DONE]")
		}
		var p piece
		if err := json.Unmarshal(data, &p); err != nil {
			return a, fmt.Errorf("an event is not as expected: %w: %.200s", err, data)
		}
		hasText, err := a.take(&p, path)
		if err != nil {
			return a, fmt.Errorf("%w: %.200s", err, data)
		}
		if hasText {
			pieces++
			if !goOn(pieces) {
				a.tokens = max(a.tokens, pieces)
				return a, errHungUp
			}
		}
	}
	if err := lines.Err(); err != nil {
		return a, fmt.Errorf("the stream broke off after %d pieces: %w", pieces, err)
	}
	if !done && path != completionPath {
		return a, errors.New("the stream ended without [DONE]")
	}
	return a, a.check()
}

// checkError says what is wrong with an answer that must be an error in llama-server's shape.
func checkError(response *http.Response) error {
	data, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return fmt.Errorf("the answer broke off: %w", err)
	}
	var body struct {
		Error *struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
			Type    string `json:"type"`
			Prompt  int    `json:"n_prompt_tokens"`
			Context int    `json:"n_ctx"`
		} `json:"error"`
	}
	e := &body.Error
	switch {
	case json.Unmarshal(data, &body) != nil || *e == nil:
		return fmt.Errorf("no error object: %.200s", data)
	case (*e).Code != response.StatusCode:
		return fmt.Errorf("the code is %d", (*e).Code)
	case (*e).Message == "" || (*e).Type == "":
		return fmt.Errorf("no message or no type: %.200s", data)
	case strings.HasPrefix((*e).Type, "exceed_context") && ((*e).Context == 0 || (*e).Prompt < (*e).Context):
		return fmt.Errorf("the counts do not say why: %.200s", data)
	}
	return nil
}
