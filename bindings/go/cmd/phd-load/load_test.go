package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// A fake answers as phd-server does, without a model, and with one fault.
type fake struct {
	fault string
	mu    sync.Mutex
	began int // generations
	ended int
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/health":
		fmt.Fprint(w, `{"status": "ok"}`)
	case "/props":
		fmt.Fprint(w, `{"total_slots": 2, "build_info": "fake", "default_generation_settings": {"n_ctx": 1024}}`)
	case "/slots":
		fmt.Fprintf(w, `[{"id": 0, "is_processing": false}, {"id": 1, "is_processing": %v}]`, f.fault == "busy slot")
	case "/slots/0", "/slots/1":
		fmt.Fprint(w, `{}`)
	case "/metrics":
		f.metrics(w)
	case completionPath, textPath, chatPath:
		f.generate(w, r)
	default:
		f.refuse(w, http.StatusBadRequest, "")
	}
}

func (f *fake) metrics(w io.Writer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	inUse, unused := 0, 1000
	if f.began > 50 {
		switch f.fault {
		case "lost positions":
			unused -= 16
		case "lost sequence":
			inUse, unused = 16, unused-16
		case "lost generation":
			f.ended = f.began - 1
		}
	}
	fmt.Fprint(w, "go_goroutines 9\nprocess_open_fds 9\n")
	fmt.Fprintf(w, "# HELP x\nllamacpp:requests_processing 0\nllamacpp:requests_deferred 0\nphd_requests_started_total %d\n"+
		"phd_requests_finished_total %d\n", f.began, f.ended)
	fmt.Fprintf(w, "%s %d\n%s 0\n%s 24\n%s %d\n", used, inUse, shared, retained, free, unused)
}

func (f *fake) refuse(w http.ResponseWriter, status int, extra string) {
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"error": {"code": %d, "message": "no", "type": "invalid_request_error"%s}}`, status, extra)
}

func (f *fake) generate(w http.ResponseWriter, r *http.Request) {
	var body struct {
		Prompt   json.RawMessage `json:"prompt"`
		Messages []message       `json:"messages"`
		Max      *int            `json:"max_tokens"`
		Predict  *int            `json:"n_predict"`
		Stream   bool            `json:"stream"`
		Schema   any             `json:"json_schema"`
		Grammar  any             `json:"grammar"`
		Tools    any             `json:"tools"`
		Heat     float64         `json:"temperature"`
	}
	data, err := io.ReadAll(r.Body)
	prompt := ""
	valid := err == nil && json.Unmarshal(data, &body) == nil && strings.ToValidUTF8(string(data), "") == string(data) &&
		body.Schema == nil && body.Grammar == nil && body.Tools == nil &&
		(json.Unmarshal(body.Prompt, &prompt) == nil || len(body.Messages) > 0)
	words := len(strings.Fields(prompt))
	for _, m := range body.Messages {
		words += len(strings.Fields(m.Content))
	}
	switch {
	case !valid && f.fault == "accepts everything":
	case !valid && f.fault == "bad JSON is its own fault":
		f.refuse(w, http.StatusInternalServerError, "")
		return
	case !valid:
		f.refuse(w, http.StatusBadRequest, "")
		return
	case words > 1024 && f.fault == "no counts":
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"error": {"code": 400, "message": "no", "type": "exceed_context_size_error"}}`)
		return
	case words > 1024:
		f.refuse(w, http.StatusBadRequest, "")
		return
	case f.fault == "errors":
		f.refuse(w, http.StatusInternalServerError, "")
		return
	}
	f.mu.Lock()
	f.began++
	f.ended++
	n := f.began
	f.mu.Unlock()
	text := "word"
	if n > 50 && f.fault == "mixes up answers" {
		text = "another"
	}
	chat := r.URL.Path == chatPath
	object := func(text string, last bool) string {
		reason := "null"
		if last && f.fault != "no reason" {
			reason = `"stop"`
		}
		switch {
		case r.URL.Path == completionPath:
			return fmt.Sprintf(`{"content": %q, "stop": %v, "timings": {"predicted_n": 1, "prompt_n": 3, "cache_n": 2}}`, text, last && reason != "null")
		case !chat:
			return fmt.Sprintf(`{"choices": [{"text": %q, "finish_reason": %s}], "usage": {"completion_tokens": 1, "prompt_tokens": 5}}`, text, reason)
		case body.Stream:
			return fmt.Sprintf(`{"choices": [{"delta": {"content": %q}, "finish_reason": %s}]}`, text, reason)
		}
		return fmt.Sprintf(`{"choices": [{"message": {"role": "assistant", "content": %q}, "finish_reason": %s}], `+
			`"usage": {"completion_tokens": 1, "prompt_tokens": 5}}`, text, reason)
	}
	const pieces = 12
	if !body.Stream {
		fmt.Fprint(w, object(strings.Repeat(text, pieces), true))
		return
	}
	for range pieces {
		fmt.Fprintf(w, "data: %s\n\n", object(text, false))
	}
	if f.fault == "breaks off" {
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	fmt.Fprintf(w, ": a comment\n\ndata: %s\n\n", object("", true))
	if r.URL.Path != completionPath {
		fmt.Fprint(w, "data: [DONE]\n\n")
	}
}

// TestFaultsAreFound runs a short load against a server without a fault, and against servers with one.
func TestFaultsAreFound(t *testing.T) {
	// What takes long is left out: this is about what is found.
	all := kinds
	defer func() { kinds = all }()
	kinds = nil
	for _, k := range all {
		switch k.name {
		case "slow reader", "half a head", "half a body", "hang up in the prompt", "a huge body":
		default:
			kinds = append(kinds, k)
		}
	}
	for fault, expect := range map[string]string{
		"":                          "",
		"errors":                    "status 500",
		"accepts everything":        "for what must be refused",
		"bad JSON is its own fault": "for what must be refused",
		"no counts":                 "the counts do not say why",
		"no reason":                 "ended without saying why",
		"breaks off":                "broke off",
		"mixes up answers":          "another answer than alone",
		"lost positions":            "the cache had 1024 positions and has 1008",
		"lost sequence":             "16 positions are used",
		"lost generation":           "generations were begun",
	} {
		t.Run(fault, func(t *testing.T) {
			if fault == "errors" {
				expect = "before the load: a completion: failed status 500"
			}
			server := httptest.NewServer(&fake{fault: fault})
			defer server.Close()
			r, err := load(t, server, 200)
			var found string
			switch {
			case err != nil:
				found = err.Error()
			default:
				found = strings.Join(r.Failures, "\n")
			}
			if expect == "" && found != "" || !strings.Contains(found, expect) {
				t.Errorf("found %.2000q, expected %q", found, expect)
			}
			if expect == "" && (r.failed() || r.Outcomes[answered] == 0 || r.Outcomes[refused] == 0 || r.Outcomes[disconnected] == 0) {
				t.Errorf("outcomes of a server without a fault: %v", r.Outcomes)
			}
		})
	}
}

// load makes so many requests and no more.
func load(t *testing.T, server *httptest.Server, requests int) (*report, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cfg := config{URL: server.URL, Clients: 4, Duration: time.Hour, Timeout: 20 * time.Second, Seed: 1}
	s, err := newServer(ctx, cfg)
	if err != nil {
		return nil, err
	}
	r := newReport(cfg, s)
	before, err := s.account(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.learnProbes(ctx); err != nil {
		return nil, fmt.Errorf("before the load: %w", err)
	}
	results := make(chan result)
	go func() {
		runClients(ctx, cfg, s, results)
		close(results)
	}()
	for result := range results {
		r.add(result)
		if r.Requests == requests {
			cancel()
		}
	}
	after, err := s.account(context.Background())
	if err != nil {
		return nil, err
	}
	r.checkAccounting(before, after)
	r.elapsed = time.Second
	r.finish()
	r.print(io.Discard)
	if err := r.save(t.TempDir() + "/report.json"); err != nil {
		t.Error(err)
	}
	return r, nil
}

func TestBusySlotIsFound(t *testing.T) {
	server := httptest.NewServer(&fake{fault: "busy slot"})
	defer server.Close()
	if _, err := load(t, server, 1); err == nil || !strings.Contains(err.Error(), "slot 1 is still busy") {
		t.Errorf("found %v", err)
	}
}

func TestSameSeedSameLoad(t *testing.T) {
	names := func(seed uint64) (names []string) {
		random := rand.New(rand.NewPCG(seed, 1))
		for range 50 {
			names = append(names, choose(random).name)
		}
		return names
	}
	if a, b := fmt.Sprint(names(1)), fmt.Sprint(names(1)); a != b {
		t.Errorf("%s and %s", a, b)
	}
	if fmt.Sprint(names(1)) == fmt.Sprint(names(2)) {
		t.Error("two seeds give the same load")
	}
}

func TestQuantiles(t *testing.T) {
	var durations []time.Duration
	for i := range 200 {
		durations = append(durations, time.Duration(200-i)*time.Second)
	}
	if q := quantilesOf(durations); q != (quantiles{N: 200, P50: 100, P95: 190, P99: 198, Max: 200}) {
		t.Errorf("found %+v", q)
	}
	if q := quantilesOf([]time.Duration{time.Second}); q != (quantiles{N: 1, P50: 1, P95: 1, P99: 1, Max: 1}) {
		t.Errorf("found %+v", q)
	}
	if q := quantilesOf(nil); q != (quantiles{}) {
		t.Errorf("found %+v", q)
	}
}

func TestReadStream(t *testing.T) {
	const chunk = `data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}` + "\n\n"
	const end = `data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}` + "\n\n"
	const done = "data: [DONE]\n\n"
	for _, c := range []struct{ name, stream, text, err string }{
		{"whole", chunk + chunk + end + done, "aa", ""},
		{"comments", ":\n\n" + chunk + ": ping\n\n" + end + done, "a", ""},
		{"usage", chunk + end + `data: {"choices": [], "usage": {"completion_tokens": 1}}` + "\n\n" + done, "a", ""},
		{"no end", chunk + done, "a", "without saying why"},
		{"no done", chunk + end, "a", "without [DONE]"},
		{"after done", chunk + end + done + chunk, "a", "data after [DONE]"},
		{"error", chunk + `data: {"error": {"code": 500}}` + "\n\n", "a", "an error within"},
		{"no JSON", "data: {\n\n", "", "not as expected"},
		{"no event", "hello\n", "", "neither data nor a comment"},
		{"odd reason", `data: {"choices": [{"delta": {}, "finish_reason": "perhaps"}]}`, "", "finish reason"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := readStream(strings.NewReader(c.stream), chatPath, func(int) bool { return true })
			if a.text != c.text || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("found %q, %v", a.text, err)
			}
		})
	}
	a, err := readStream(strings.NewReader(chunk+chunk+chunk), chatPath, func(pieces int) bool { return pieces < 2 })
	if a.text != "aa" || !errors.Is(err, errHungUp) {
		t.Errorf("hung up: %q, %v", a.text, err)
	}
}

func TestParseMetrics(t *testing.T) {
	metrics, err := parseMetrics([]byte("# HELP a b\n# TYPE a gauge\na 1\nb{x=\"y z\"} 2.5e3\n"))
	if err != nil || metrics["a"] != 1 || metrics[`b{x="y z"}`] != 2500 {
		t.Errorf("found %v, %v", metrics, err)
	}
	for _, bad := range []string{"a", "a b", "a 1 2x"} {
		if _, err := parseMetrics([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
