package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

const (
	modelPath = "../../../../models/kjv-phd-cswa-2-16-32"
	genesis   = "In the beginning God created the heaven and the earth."
)

// patience is how long a test waits for what must happen anyhow, before it fails.
const patience = time.Minute

// A testServer is a server with the small model, and a client.
type testServer struct {
	*Server
	http   *httptest.Server // nil: url is somebody else's
	url    string
	client *http.Client
	t      testing.TB
}

// open starts a server of 4 slots that share 1,024 positions, or what change makes of that.
func open(t testing.TB, change func(*Options)) *testServer {
	t.Helper()
	opts := DefaultOptions()
	opts.ModelPath = modelPath
	opts.Context = 1024
	opts.Slots = 4
	opts.Unified = true
	opts.Threads = 2
	opts.EndpointMetrics = true
	if change != nil {
		change(&opts)
	}
	if err := opts.Validate(); err != nil {
		t.Fatal(err)
	}
	s := New(opts)
	if err := s.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	ts := &testServer{Server: s, http: httptest.NewServer(s.Handler()), t: t}
	ts.url, ts.client = ts.http.URL, ts.http.Client()
	t.Cleanup(func() {
		ts.http.Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return ts
}

// object is any JSON object.
type object = map[string]any

// do sends a request whose body is JSON, unless it is a string already.
func (ts *testServer) do(method, path string, body any, headers ...string) *http.Response {
	ts.t.Helper()
	response, err := ts.client.Do(ts.request(context.Background(), method, path, body, headers...))
	if err != nil {
		ts.t.Fatal(err)
	}
	ts.t.Cleanup(func() { response.Body.Close() })
	return response
}

func (ts *testServer) request(ctx context.Context, method, path string, body any, headers ...string) *http.Request {
	ts.t.Helper()
	var reader io.Reader
	switch body := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(body)
	default:
		data, err := json.Marshal(body)
		if err != nil {
			ts.t.Fatal(err)
		}
		reader = bytes.NewReader(data)
	}
	request, err := http.NewRequestWithContext(ctx, method, ts.url+path, reader)
	if err != nil {
		ts.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	return request
}

// call sends a request and returns the status and the JSON of the answer.
func (ts *testServer) call(method, path string, body any, headers ...string) (int, any) {
	ts.t.Helper()
	response := ts.do(method, path, body, headers...)
	data, err := io.ReadAll(response.Body)
	if err != nil {
		ts.t.Fatal(err)
	}
	var value any
	if err := json.Unmarshal(data, &value); err != nil {
		ts.t.Fatalf("%s %s: status %d: %v: %s", method, path, response.StatusCode, err, data)
	}
	return response.StatusCode, value
}

// post expects an object in answer, with status 200.
func (ts *testServer) post(path string, body any) object {
	ts.t.Helper()
	status, value := ts.call("POST", path, body)
	if status != http.StatusOK {
		ts.t.Fatalf("POST %s: status %d: %v", path, status, value)
	}
	return value.(object)
}

// refuses expects an error of a status and a type, whose message contains some text.
func (ts *testServer) refuses(method, path string, body any, status int, kind, message string, headers ...string) object {
	ts.t.Helper()
	found, value := ts.call(method, path, body, headers...)
	fields, _ := value.(object)["error"].(object)
	text, _ := fields["message"].(string)
	if found != status || fields["type"] != kind || fields["code"] != float64(status) || !strings.Contains(text, message) {
		ts.t.Errorf("%s %s with %.200v: status %d: %v, expected %d, %s, %q", method, path, body, found, value, status, kind, message)
	}
	return fields
}

// stream sends a request and returns its events; what is not JSON comes as a string.
func (ts *testServer) stream(path string, body any) []any {
	ts.t.Helper()
	s := ts.openStream(context.Background(), path, body)
	var events []any
	for {
		event, ok := s.next()
		if !ok {
			return events
		}
		events = append(events, event)
	}
}

// An eventStream is an answer that is still being made.
type eventStream struct {
	t        testing.TB
	response *http.Response
	lines    *bufio.Reader
}

func (ts *testServer) openStream(ctx context.Context, path string, body any) *eventStream {
	ts.t.Helper()
	response, err := ts.client.Do(ts.request(ctx, "POST", path, body))
	if err != nil {
		ts.t.Fatal(err)
	}
	ts.t.Cleanup(func() { response.Body.Close() })
	s := &eventStream{t: ts.t, response: response, lines: bufio.NewReader(response.Body)}
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(response.Body)
		ts.t.Fatalf("POST %s: status %d: %s", path, response.StatusCode, text)
	}
	if kind := response.Header.Get("Content-Type"); kind != "text/event-stream" {
		ts.t.Errorf("POST %s: content type %q", path, kind)
	}
	return s
}

// begin is openStream, and waits until the request shows in what the server says of itself: that is when the batch of the first
// event has ended.
func (ts *testServer) begin(ctx context.Context, path string, body any) *eventStream {
	ts.t.Helper()
	s := ts.openStream(ctx, path, body)
	for range 2 {
		if _, ok := s.next(); !ok {
			ts.t.Fatal("the stream has ended")
		}
	}
	return s
}

// next waits for an event, and returns false at the end of the stream. Comments are passed over.
func (s *eventStream) next() (any, bool) {
	for {
		line, err := s.lines.ReadString('\n')
		if err != nil {
			return nil, false
		}
		line = strings.TrimSuffix(line, "\n")
		if line == "" || strings.HasPrefix(line, ":") || strings.HasPrefix(line, "event: ") {
			continue
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			s.t.Errorf("a line of the stream is %q", line)
		}
		var value any
		if json.Unmarshal([]byte(data), &value) != nil {
			return data, true
		}
		return value, true
	}
}

// quiet waits until nothing runs or waits any more, which must come about by itself.
func (ts *testServer) quiet() {
	ts.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := ts.loaded().engine.Drain(ctx); err != nil {
		ts.t.Fatalf("something still runs: %v", err)
	}
}

// endless is a request that goes on until somebody ends it; the server needs a context shift for it.
func endless(more object) object {
	request := object{"prompt": genesis, "stream": true, "n_predict": -1, "ignore_eos": true}
	for name, value := range more {
		request[name] = value
	}
	return request
}

func shifting(o *Options) {
	o.ContextShift = true
	o.Unified = false
}

func TestLoading(t *testing.T) {
	opts := DefaultOptions()
	opts.ModelPath = modelPath
	opts.UI = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "the page") })
	s := New(opts)
	for _, path := range []string{"/health", "/v1/health", "/models", "/completion", "/nothing"} {
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		const expected = `{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}`
		if w.Code != http.StatusServiceUnavailable || w.Body.String() != expected || w.Header().Get("Retry-After") == "" {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if w.Code != http.StatusOK || w.Body.String() != "the page" {
		t.Errorf("the page: %d %s", w.Code, w.Body)
	}

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Load(ctx); err == nil {
		t.Error("loading goes on after its context has ended")
	}
	if err := s.Load(context.Background()); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	w = httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/health", nil))
	if w.Code != http.StatusOK || w.Body.String() != `{"status":"ok"}` {
		t.Errorf("after loading: %d %s", w.Code, w.Body)
	}
	s.draining.Store(true)
	w = httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/health", nil))
	if w.Code != http.StatusServiceUnavailable {
		t.Errorf("while stopping: %d %s", w.Code, w.Body)
	}
}

func TestModelThatCannotBeLoaded(t *testing.T) {
	opts := DefaultOptions()
	opts.ModelPath = t.TempDir()
	s := New(opts)
	if err := s.Load(context.Background()); err == nil {
		t.Error("an empty folder was loaded")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestUnknownPathsAndMethods(t *testing.T) {
	ts := open(t, nil)
	ts.refuses("GET", "/nothing", nil, 404, typeNotFound, "File Not Found")
	ts.refuses("GET", "/", nil, 404, typeNotFound, "") // without a page
	ts.refuses("GET", "/completion", nil, 405, typeInvalidRequest, "GET is not possible")
	ts.refuses("PUT", "/health", nil, 405, typeInvalidRequest, "GET is")
	for _, path := range []string{"/rerank", "/v1/reranking", "/v1/audio/transcriptions", "/v1/systemone", "/lora-adapters"} {
		ts.refuses("POST", path, object{}, 501, typeNotSupported, "")
	}
	ts.refuses("GET", "/cors-proxy", nil, 403, "feature_disabled", "")
	ts.refuses("POST", "/tools", object{}, 403, "feature_disabled", "")
	if response := ts.do("DELETE", "/completion", nil); response.Header.Get("Allow") != "POST" {
		t.Errorf("Allow is %q", response.Header.Get("Allow"))
	}
}

func TestModelsAndProps(t *testing.T) {
	ts := open(t, func(o *Options) {
		o.Aliases = []string{"zebra", "ant"}
		o.Tags = []string{"small"}
		o.Unified = false
		o.Defaults = map[string]json.RawMessage{"seed": json.RawMessage("42"), "temperature": json.RawMessage("0.5")}
	})
	for _, path := range []string{"/models", "/v1/models"} {
		_, value := ts.call("GET", path, nil)
		data := value.(object)["data"].([]any)
		model := data[0].(object)
		meta := model["meta"].(object)
		if len(data) != 1 || model["id"] != "ant" || fmt.Sprint(model["aliases"]) != "[zebra ant]" ||
			fmt.Sprint(model["tags"]) != "[small]" || meta["n_ctx_train"] != 2048.0 || meta["copies"] != 2.0 ||
			meta["n_params"].(float64) < 2e6 {
			t.Errorf("%s: %v", path, value)
		}
	}
	_, value := ts.call("GET", "/props", nil)
	props := value.(object)
	defaults := props["default_generation_settings"].(object)
	params := defaults["params"].(object)
	if props["total_slots"] != 4.0 || props["model_path"] != modelPath || defaults["n_ctx"] != 256.0 ||
		params["seed"] != 42.0 || params["temperature"] != 0.5 || props["bos_token"] != "<|endoftext|>" {
		t.Errorf("props: %v", props)
	}
	ts.refuses("POST", "/props", object{}, 501, typeNotSupported, "--props")

	ts = open(t, func(o *Options) { o.EndpointProps = true })
	if answer := ts.post("/props", object{}); answer["success"] != true {
		t.Errorf("POST /props: %v", answer)
	}
}

func TestState(t *testing.T) {
	ts := open(t, shifting)
	ts.begin(context.Background(), "/completion", endless(nil))
	_, value := ts.call("GET", "/phd/state", nil)
	state := value.(object)
	usage := state["usage"].(object)
	model := state["model"].(object)
	if model["copies"] != 2.0 || model["window"] != 16.0 || model["chunk"] != 32.0 || state["n_positions"] != 1024.0 ||
		len(state["slots"].([]any)) != 4 || state["memory"].(object)["hidden_bytes"].(float64) <= 0 {
		t.Errorf("state: %v", state)
	}
	if state["rows_per_step"] != 2.0 || state["queue"].(object)["busy"] != 1.0 || usage["used"].(float64) < 10 {
		t.Errorf("state of a server with one request: %v", state)
	}
}

func TestKeys(t *testing.T) {
	ts := open(t, func(o *Options) {
		o.APIKeys = []string{"first", "second"}
		o.UI = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "the page") })
	})
	for _, path := range []string{"/health", "/v1/health", "/models", "/v1/models", "/"} {
		if response := ts.do("GET", path, nil); response.StatusCode != http.StatusOK {
			t.Errorf("%s without a key: %d", path, response.StatusCode)
		}
	}
	for _, path := range []string{"/props", "/slots", "/metrics", "/phd/state", "/nothing", "/v1/../props"} {
		ts.refuses("GET", path, nil, 401, typeAuthentication, "Invalid API Key")
	}
	tests := []struct {
		header, value string
		ok            bool
	}{
		{"Authorization", "Bearer first", true},
		{"Authorization", "Bearer second", true},
		{"Authorization", "first", true},
		{"X-Api-Key", "second", true},
		{"Authorization", "Bearer third", false},
		{"Authorization", "Bearer ", false},
		{"Authorization", "Bearer firstsecond", false},
		{"X-Api-Key", "firs", false},
	}
	for _, test := range tests {
		response := ts.do("POST", "/tokenize", object{"content": "a"}, test.header, test.value)
		if (response.StatusCode == http.StatusOK) != test.ok {
			t.Errorf("%s: %s: %d", test.header, test.value, response.StatusCode)
		}
	}
}

func TestCORS(t *testing.T) {
	tests := []struct {
		origins []string
		origin  string
		allowed string
	}{
		{[]string{"*"}, "http://web.example", "http://web.example"},
		{[]string{"*"}, "", ""},
		{[]string{"http://a.example", "http://b.example"}, "http://b.example", "http://b.example"},
		{[]string{"http://a.example"}, "http://b.example", ""},
		{[]string{"localhost"}, "http://localhost:3000", "http://localhost:3000"},
		{[]string{"localhost"}, "http://[::1]:3000", "http://[::1]:3000"},
		{[]string{"localhost"}, "http://localhost.evil.example", ""},
		{[]string{"localhost"}, "http://notlocalhost", ""},
	}
	for _, test := range tests {
		opts := DefaultOptions()
		opts.CORS.Origins = test.origins
		opts.APIKeys = []string{"secret"} // browsers send none with the question
		s := New(opts)
		r := httptest.NewRequest("OPTIONS", "/completions", nil)
		if test.origin != "" {
			r.Header.Set("Origin", test.origin)
		}
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		if w.Code != http.StatusOK || w.Header().Get("Access-Control-Allow-Origin") != test.allowed {
			t.Errorf("%v, %s: %d %v", test.origins, test.origin, w.Code, w.Header())
		}
		if w.Header().Get("Access-Control-Allow-Credentials") != "true" ||
			w.Header().Get("Access-Control-Allow-Methods") != "GET, POST, DELETE, OPTIONS" ||
			w.Header().Get("Access-Control-Allow-Headers") != "*" {
			t.Errorf("headers: %v", w.Header())
		}
	}
	opts := DefaultOptions()
	opts.CORS.Credentials = false
	w := httptest.NewRecorder()
	r := httptest.NewRequest("GET", "/health", nil)
	r.Header.Set("Origin", "http://web.example")
	New(opts).Handler().ServeHTTP(w, r)
	if w.Header().Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("without credentials: %v", w.Header())
	}
}

func TestPrefix(t *testing.T) {
	ts := open(t, func(o *Options) { o.APIPrefix = "/llm"; o.APIKeys = []string{"secret"} })
	if status, _ := ts.call("GET", "/llm/health", nil); status != http.StatusOK {
		t.Errorf("with the prefix: %d", status)
	}
	ts.refuses("GET", "/llm/props", nil, 401, typeAuthentication, "")
	ts.refuses("GET", "/props", nil, 401, typeAuthentication, "")
}

func TestPrefixIsNeeded(t *testing.T) {
	ts := open(t, func(o *Options) { o.APIPrefix = "/llm" })
	if response := ts.do("GET", "/props", nil); response.StatusCode != http.StatusNotFound {
		t.Errorf("without the prefix: %d", response.StatusCode)
	}
}

func TestRequestIDs(t *testing.T) {
	var log bytes.Buffer
	ts := open(t, func(o *Options) { o.Logger = slog.New(slog.NewJSONHandler(&log, nil)) })
	if id := ts.do("POST", "/tokenize", object{"content": "secret text"}, "X-Request-Id", "from-proxy.1").Header.Get("X-Request-Id"); id != "from-proxy.1" {
		t.Errorf("the proxy's number became %q", id)
	}
	if id := ts.do("POST", "/tokenize", object{}, "X-Request-Id", "two words").Header.Get("X-Request-Id"); id == "two words" || id == "" {
		t.Errorf("a number that is none became %q", id)
	}
	ts.http.Close() // the line is written after the answer
	text := log.String()
	if !strings.Contains(text, `"id":"from-proxy.1","method":"POST","path":"/tokenize","status":200`) {
		t.Errorf("the log lacks the request: %s", text)
	}
	if strings.Contains(text, "secret text") {
		t.Error("the log has the text of a request")
	}
}

func TestPanicInHandler(t *testing.T) {
	s := New(DefaultOptions())
	s.state.Store(&loaded{})
	handler := s.middleware(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("a bug") }))
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest("GET", "/x", nil))
	if w.Code != http.StatusInternalServerError || strings.Contains(w.Body.String(), "a bug") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func TestRequestsThatAreNone(t *testing.T) {
	ts := open(t, func(o *Options) { o.MaxBody = 10000 })
	for _, path := range []string{"/completion", "/v1/completions", "/infill", "/tokenize", "/detokenize", "/v1/embeddings"} {
		for body, expected := range map[string]string{
			"":           "not a JSON object",
			"{":          "not a JSON object",
			"null":       "not a JSON object",
			"[]":         "not a JSON object",
			`"text"`:     "not a JSON object",
			"{\"a\":1}x": "not a JSON object",
			"\xff\xfe":   "not a JSON object",
			strings.Repeat("[", 5000) + strings.Repeat("]", 5000):          "nested more than 100",
			`{"prompt":` + strings.Repeat(`{"a":`, 200) + "1":              "nested more than 100",
			`{"prompt":"` + strings.Repeat("[", 200) + `", "content": 1x}`: "not a JSON object",
		} {
			ts.refuses("POST", path, body, 400, typeInvalidRequest, expected)
		}
		ts.refuses("POST", path, `{"prompt":"`+strings.Repeat("x", 20000)+`"}`, 413, typeInvalidRequest, "larger than 10000 bytes")
	}
}

func TestSlowSender(t *testing.T) {
	ts := open(t, func(o *Options) { o.ReadTimeout = 20 * time.Millisecond })
	reader, writer := io.Pipe()
	defer writer.Close()
	go io.WriteString(writer, `{"prompt": "`) //nolint:errcheck // and no more than that
	request, err := http.NewRequest("POST", ts.url+"/completion", reader)
	if err != nil {
		t.Fatal(err)
	}
	response, err := ts.client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusRequestTimeout {
		t.Errorf("status %d", response.StatusCode)
	}
}

func TestOptions(t *testing.T) {
	valid := func() Options {
		o := DefaultOptions()
		o.ModelPath = modelPath
		return o
	}
	o := valid()
	if err := o.Validate(); err != nil {
		t.Fatal(err)
	}
	for message, change := range map[string]func(*Options){
		"no model":         func(o *Options) { o.ModelPath = "" },
		"no such file":     func(o *Options) { o.ModelPath = "/nowhere/model.gguf" },
		"--ctx-size":       func(o *Options) { o.Context = 1 },
		"--ctx-size is -5": func(o *Options) { o.Context = -5 },
		"each of 8 slots":  func(o *Options) { o.Context, o.Slots = 15, 8 },
		"--parallel":       func(o *Options) { o.Slots = 5000 },
		"--threads":        func(o *Options) { o.Threads = -1 },
		"--batch-size":     func(o *Options) { o.Piece = -1 },
		"--max-queue":      func(o *Options) { o.MaxQueue = -1 },
		"--port is":        func(o *Options) { o.Port = 65536 },
		"--port 0":         func(o *Options) { o.Port, o.Hosts = 0, []string{"127.0.0.1", "::1"} },
		"--host":           func(o *Options) { o.Hosts = nil },
		"--max-request":    func(o *Options) { o.MaxBody = 0 },
		"--max-conn":       func(o *Options) { o.MaxConnections = -1 },
		"timeout":          func(o *Options) { o.Timeout = -time.Second },
		"together":         func(o *Options) { o.TLSCert = "cert.pem" },
		"--pooling":        func(o *Options) { o.Pooling = "rank" },
		"--api-prefix":     func(o *Options) { o.APIPrefix = "llm" },
		"--slot-save-path": func(o *Options) { o.SlotSavePath = "/nowhere" },
		"'temperature'":    func(o *Options) { o.Defaults = map[string]json.RawMessage{"temperature": json.RawMessage(`"hot"`)} },
	} {
		o := valid()
		change(&o)
		if err := o.Validate(); err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: %v", message, err)
		}
	}
}

// near says whether two floats are the same but for rounding.
func near(a, b float64) bool { return math.Abs(a-b) <= 1e-5*max(1, math.Abs(a), math.Abs(b)) }
