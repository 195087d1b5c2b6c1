// Command standin serves the page and imitates the routes that it uses, without a model: what it answers is known beforehand,
// and tokens come when a test releases them. The page's tests and the load balancer's use it beside the real phd-server.
//
// The last user message, or the prompt, says what happens: "@say TEXT" answers with TEXT, "@count N" with the words 1 to N,
// "@error STATUS TYPE MESSAGE" is refused so, "@break N" loses the connection after N words; anything else is answered with
// "You said: " and itself. A prompt that begins with "@gate " waits for a token to be released before each word, and then does
// what the rest says. Further routes: POST /standin/release?n=N, GET /standin/log, POST /standin/loading?on=true or false.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/libphd/libphd/bindings/go/internal/web"
)

const slotContext = 512

type slot struct {
	ID              int     `json:"id"`
	Busy            bool    `json:"busy"`
	Context         int     `json:"n_context"`
	Past            int     `json:"n_past"`
	Prompt          int     `json:"n_prompt"`
	PromptDone      int     `json:"n_prompt_done"`
	Decoded         int     `json:"n_decoded"`
	TokensPerSecond float64 `json:"tokens_per_second"`
}

// A record is what a test wants to know of a request.
type record struct {
	Path    string          `json:"path"`
	Session string          `json:"session"`
	Body    json.RawMessage `json:"body"`
	Prompt  string          `json:"prompt"`
	Sent    int             `json:"sent"`
	Ended   string          `json:"ended"` // "", "done" or "cancelled"
}

type standin struct {
	name, key, template   string
	copies, window, chunk int
	interval              time.Duration
	queue                 int
	loading, draining     atomic.Bool
	gate                  chan struct{}
	free                  chan int

	mu        sync.Mutex
	slots     []slot
	queued    int
	predicted int
	records   []*record
}

func main() {
	var s standin
	addr := flag.String("addr", "127.0.0.1:0", "address to listen on")
	slots := flag.Int("slots", 2, "requests that are answered at the same time")
	drain := flag.Duration("drain-timeout", 10*time.Second, "how long running requests may go on after SIGTERM")
	loading := flag.Bool("loading", false, "answer 503 until told otherwise")
	flag.StringVar(&s.name, "name", "stand-in", "the model's name")
	flag.StringVar(&s.key, "api-key", "", "require this key")
	flag.StringVar(&s.template, "chat-template", "{{ messages }}", "the model's chat template; empty: none")
	flag.IntVar(&s.copies, "copies", 2, "K")
	flag.IntVar(&s.window, "window", 16, "W")
	flag.IntVar(&s.chunk, "chunk", 32, "C")
	flag.IntVar(&s.queue, "queue", 1, "requests that may wait for a slot")
	flag.DurationVar(&s.interval, "interval", 0, "time between tokens that are not gated")
	flag.Parse()

	s.gate = make(chan struct{}, 1<<20)
	s.free = make(chan int, *slots)
	s.loading.Store(*loading)
	for id := range *slots {
		s.slots = append(s.slots, slot{ID: id, Context: slotContext})
		s.free <- id
	}

	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("http://%s\n", listener.Addr())
	server := &http.Server{Handler: s.routes()}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		<-stop.Done()
		s.draining.Store(true)
		ctx, cancel := context.WithTimeout(context.Background(), *drain)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	}()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
	<-drained
}

func (s *standin) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", web.Handler())
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		if s.ready(w) {
			reply(w, 200, map[string]any{"status": "ok"})
		}
	})
	mux.HandleFunc("GET /props", s.authorized(func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 200, map[string]any{
			"model_alias": s.name, "model_path": "/models/" + s.name, "chat_template": s.template, "total_slots": len(s.slots),
			"default_generation_settings": map[string]any{"n_ctx": slotContext, "params": map[string]any{
				"temperature": 0.800000011920929, "top_k": 40, "top_p": 0.949999988079071, "min_p": 0.05000000074505806,
				"n_predict": -1, "seed": uint32(4294967295),
			}},
		})
	}))
	mux.HandleFunc("GET /phd/state", s.authorized(s.state))
	mux.HandleFunc("POST /tokenize", s.authorized(func(w http.ResponseWriter, _ *http.Request) {
		reply(w, 200, map[string]any{"tokens": []int{27, 91, 320, 62}}) // no special token is known
	}))
	mux.HandleFunc("POST /v1/chat/completions", s.authorized(s.complete))
	mux.HandleFunc("POST /completion", s.authorized(s.complete))
	mux.HandleFunc("POST /standin/release", func(_ http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.FormValue("n"))
		for range n {
			s.gate <- struct{}{}
		}
	})
	mux.HandleFunc("POST /standin/loading", func(_ http.ResponseWriter, r *http.Request) {
		s.loading.Store(r.FormValue("on") == "true")
	})
	mux.HandleFunc("GET /standin/log", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		reply(w, 200, s.records)
	})
	return mux
}

func reply(w http.ResponseWriter, status int, value any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(value)
}

func refuse(w http.ResponseWriter, status int, kind, message string, more map[string]any) {
	e := map[string]any{"code": status, "type": kind, "message": message}
	for name, value := range more {
		e[name] = value
	}
	reply(w, status, map[string]any{"error": e})
}

func (s *standin) ready(w http.ResponseWriter) bool {
	switch {
	case s.loading.Load():
		refuse(w, 503, "unavailable_error", "Loading model", nil)
	case s.draining.Load():
		refuse(w, 503, "unavailable_error", "shutting down", nil)
	default:
		return true
	}
	return false
}

func (s *standin) authorized(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Replica", s.name)
		if s.key != "" && r.Header.Get("Authorization") != "Bearer "+s.key {
			refuse(w, 401, "authentication_error", "Invalid API Key", nil)
		} else if s.ready(w) {
			next(w, r)
		}
	}
}

func (s *standin) state(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	total, used := len(s.slots)*slotContext, 0
	for _, slot := range s.slots {
		if slot.Busy {
			used += (slot.Past + 15) / 16 * 16
		}
	}
	shared, retained := used/8/16*16, min(160, total-used)
	reply(w, 200, map[string]any{
		"model":       map[string]any{"name": s.name, "copies": s.copies, "window": s.window, "chunk": s.chunk, "n_layers": 6},
		"n_positions": total,
		"usage":       map[string]any{"used": used, "shared": shared, "retained": retained, "free": total - used - retained, "block": 16},
		"memory":      map[string]any{"weights_bytes": 5557248, "cache_bytes": total * 1536, "hidden_bytes": 49152, "scratch_bytes": 3670016},
		"slots":       s.slots,
		"queue":       map[string]any{"waiting": s.queued, "capacity": s.queue},
		"totals":      map[string]any{"predicted_tokens": s.predicted, "predicted_seconds": float64(s.predicted) / 64},
	})
}

// admit waits for a slot; false: the queue is full, or the client has gone.
func (s *standin) admit(w http.ResponseWriter, r *http.Request) (int, bool) {
	select {
	case id := <-s.free:
		return id, true
	default:
	}
	s.mu.Lock()
	full := s.queued >= s.queue
	if !full {
		s.queued++
	}
	s.mu.Unlock()
	if full {
		w.Header().Set("Retry-After", "1")
		refuse(w, 429, "unavailable_error", "the queue is full", nil)
		return 0, false
	}
	defer func() {
		s.mu.Lock()
		s.queued--
		s.mu.Unlock()
	}()
	select {
	case id := <-s.free:
		return id, true
	case <-r.Context().Done():
		return 0, false
	}
}

// words cuts a text after each space, so that together they are the text.
func words(text string) []string { return strings.SplitAfter(text, " ") }

func (s *standin) complete(w http.ResponseWriter, r *http.Request) {
	var body struct {
		Prompt   string `json:"prompt"`
		Messages []struct {
			Role, Content string
		} `json:"messages"`
		NPredict  int `json:"n_predict"`
		MaxTokens int `json:"max_tokens"`
	}
	rec := &record{Path: r.URL.Path, Session: r.Header.Get("X-Session-Id")}
	s.mu.Lock()
	s.records = append(s.records, rec) // before the body is read: a test looks how long that takes
	s.mu.Unlock()
	raw := json.RawMessage{}
	if err := json.NewDecoder(r.Body).Decode(&raw); err != nil {
		refuse(w, 400, "invalid_request_error", err.Error(), nil)
		return
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		refuse(w, 400, "invalid_request_error", err.Error(), nil)
		return
	}
	chat := r.URL.Path == "/v1/chat/completions"
	prompt, limit := body.Prompt, body.NPredict
	if chat && len(body.Messages) > 0 {
		prompt, limit = body.Messages[len(body.Messages)-1].Content, body.MaxTokens
	}
	s.mu.Lock()
	rec.Body, rec.Prompt = raw, prompt
	s.mu.Unlock()

	if size := len(words(prompt)); size > slotContext {
		refuse(w, 400, "exceed_context_size_error", "the request exceeds the available context size",
			map[string]any{"n_prompt_tokens": size, "n_ctx": slotContext})
		return
	}
	what, gated := strings.CutPrefix(prompt, "@gate ")
	command, rest, _ := strings.Cut(what, " ")
	breakAfter := -1
	var answer []string
	switch command {
	case "@error":
		fields := strings.SplitN(rest, " ", 3)
		status, _ := strconv.Atoi(fields[0])
		refuse(w, status, fields[1], fields[2], nil)
		return
	case "@say":
		answer = words(rest)
	case "@count", "@break":
		n, _ := strconv.Atoi(rest)
		if command == "@break" {
			breakAfter, n = n, n+1
		}
		for i := range n {
			answer = append(answer, strconv.Itoa(i+1)+" ")
		}
	default:
		answer = words("You said: " + prompt)
	}

	id, ok := s.admit(w, r)
	if !ok {
		return
	}
	defer func() { s.free <- id }()
	nPrompt := len(words(prompt))
	s.update(id, func(sl *slot) {
		*sl = slot{ID: id, Busy: true, Context: slotContext, Past: nPrompt, Prompt: nPrompt, PromptDone: nPrompt}
	})
	defer s.update(id, func(sl *slot) { sl.Busy = false })

	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	control := http.NewResponseController(w)
	send := func(event any) {
		text, _ := json.Marshal(event)
		fmt.Fprintf(w, "data: %s\n\n", text)
		control.Flush()
	}
	delta := func(text string, finish any, n int) map[string]any {
		timings := map[string]any{"prompt_n": nPrompt, "cache_n": 0, "predicted_n": n, "predicted_per_second": 64.5}
		if !chat {
			stop := map[string]any{"content": text, "stop": finish != nil, "timings": timings}
			if finish == "length" {
				stop["stop_type"] = "limit"
			}
			return stop
		}
		d := map[string]any{"content": text}
		if finish != nil {
			d = map[string]any{}
		}
		return map[string]any{"object": "chat.completion.chunk", "timings": timings,
			"choices": []any{map[string]any{"index": 0, "delta": d, "finish_reason": finish}}}
	}
	finish := "stop"
	for i, word := range answer {
		if limit > 0 && i == limit {
			finish = "length"
			break
		}
		if !s.next(r.Context(), gated) {
			s.end(rec, "cancelled")
			return
		}
		if i == breakAfter {
			panic(http.ErrAbortHandler)
		}
		s.update(id, func(sl *slot) {
			sl.Decoded++
			sl.Past = nPrompt + sl.Decoded - 1 // the newest token has still to be read
			sl.TokensPerSecond = 64.5
			s.predicted++
			rec.Sent++
		})
		send(delta(word, nil, i+1))
	}
	send(delta("", finish, len(answer)))
	if chat {
		fmt.Fprint(w, "data: [DONE]\n\n")
	}
	s.end(rec, "done")
}

// next waits until the next word may go out; false: the client has gone.
func (s *standin) next(ctx context.Context, gated bool) bool {
	gate := s.gate
	if !gated {
		if s.interval == 0 {
			return ctx.Err() == nil
		}
		gate = nil
	}
	var tick <-chan time.Time
	if !gated {
		tick = time.After(s.interval)
	}
	select {
	case <-gate:
		return true
	case <-tick:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *standin) update(id int, change func(*slot)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.slots[id])
}

func (s *standin) end(rec *record, how string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec.Ended = how
}
