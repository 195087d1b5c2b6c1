package server

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
)

// scraped is what /metrics shows, by name and labels.
func (ts *testServer) scraped() map[string]float64 {
	ts.t.Helper()
	response := ts.do("GET", "/metrics", nil)
	if response.StatusCode != http.StatusOK || response.Header.Get("Process-Start-Time-Unix") == "" ||
		!strings.HasPrefix(response.Header.Get("Content-Type"), "text/plain") {
		ts.t.Fatalf("%d %v", response.StatusCode, response.Header)
	}
	values := map[string]float64{}
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		line := lines.Text()
		if i := strings.LastIndexByte(line, ' '); i > 0 && line[0] != '#' {
			value, err := strconv.ParseFloat(line[i+1:], 64)
			if err != nil {
				ts.t.Errorf("%s: %v", line, err)
			}
			values[line[:i]] = value
		}
	}
	return values
}

func TestMetrics(t *testing.T) {
	ts := open(t, shifting)
	ts.post("/v1/embeddings", object{"input": []any{[]any{1, 2, 3}}})
	if m := ts.scraped(); m["llamacpp:n_decode_total"] != 1 || m["llamacpp:prompt_tokens_total"] != 3 || m["llamacpp:tokens_predicted_total"] != 0 {
		t.Errorf("after an embedding: %v", m)
	}
	evaluated, cached, predicted := 0.0, 0.0, 0.0
	longest := 0.0
	for _, n := range []int{1, 4, 16} {
		answer := ts.post("/completion", object{"prompt": genesis, "n_predict": n, "ignore_eos": true})
		timings := answer["timings"].(object)
		evaluated += timings["prompt_n"].(float64)
		cached += timings["cache_n"].(float64)
		predicted += timings["predicted_n"].(float64)
		longest = max(longest, answer["tokens_evaluated"].(float64)+answer["tokens_predicted"].(float64))
	}
	m := ts.scraped()
	for name, value := range map[string]float64{
		"llamacpp:prompt_tokens_total":                                              evaluated + 3,
		"llamacpp:prompt_tokens_cached_total":                                       cached,
		"llamacpp:tokens_predicted_total":                                           predicted,
		"llamacpp:n_tokens_max":                                                     longest,
		"llamacpp:requests_processing":                                              0,
		"llamacpp:requests_deferred":                                                0,
		"llamacpp:spec_decode_num_drafts_total":                                     0,
		"phd_requests_started_total":                                                3,
		"phd_requests_finished_total":                                               3,
		"phd_time_to_first_token_seconds_count":                                     3,
		`phd_cache_positions{state="used"}`:                                         m["phd_cache_size_positions"] - m[`phd_cache_positions{state="free"}`] - m[`phd_cache_positions{state="retained"}`],
		`phd_request_duration_seconds_count{route="POST /completion",status="200"}`: 3,
	} {
		if found, ok := m[name]; !ok || found != value {
			t.Errorf("%s is %v, expected %v", name, found, value)
		}
	}
	for _, name := range []string{"llamacpp:n_decode_total", "llamacpp:prompt_seconds_total", "llamacpp:tokens_predicted_seconds_total",
		"llamacpp:prompt_tokens_seconds", "llamacpp:predicted_tokens_seconds", "llamacpp:n_busy_slots_per_decode", "phd_passes_total",
		"phd_prefix_hits_total", "phd_prefix_tokens_total", "phd_memory_bytes{kind=\"weights\"}", "go_goroutines"} {
		if m[name] <= 0 {
			t.Errorf("%s is %v", name, m[name])
		}
	}

	ctx, cancel := context.WithCancel(context.Background())
	ts.begin(ctx, "/completion", endless(nil))
	if m := ts.scraped(); m["llamacpp:requests_processing"] != 1 {
		t.Errorf("processing: %v", m["llamacpp:requests_processing"])
	}
	cancel()
	ts.quiet()
	if m := ts.scraped(); m["phd_requests_cancelled_total"] != 1 {
		t.Errorf("cancelled: %v", m["phd_requests_cancelled_total"])
	}

	text, err := io.ReadAll(ts.do("GET", "/metrics", nil).Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"# TYPE llamacpp:n_tokens_max counter", "# HELP llamacpp:n_tokens_max ", "# TYPE llamacpp:requests_processing gauge"} {
		if !strings.Contains(string(text), line) {
			t.Errorf("%q is missing", line)
		}
	}
	without := open(t, func(o *Options) { o.EndpointMetrics = false })
	without.refuses("GET", "/metrics", nil, 501, typeNotSupported, "--metrics")
}
