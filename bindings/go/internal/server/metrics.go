package server

import (
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/libphd/libphd/bindings/go/internal/engine"
)

// metrics are what /metrics shows: llama-server's names for what it counts too, and more under phd_.
type metrics struct {
	s          *Server
	handler    http.Handler
	firstToken prometheus.Histogram
	durations  *prometheus.HistogramVec
	maxTokens  atomic.Int64 // the longest text so far
	cached     atomic.Int64 // prompt tokens that were not computed
	embedded   atomic.Int64 // texts that were embedded, each in a batch of its own
	requests   atomic.Int64 // generations that have ended, and the time they took
	busyNanos  atomic.Int64
}

func newMetrics(s *Server) *metrics {
	m := &metrics{
		s: s,
		firstToken: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "phd_time_to_first_token_seconds",
			Help:    "From the start of a generation, waiting included, to its first token.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 15),
		}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "phd_request_duration_seconds",
			Help:    "Duration of requests.",
			Buckets: prometheus.ExponentialBuckets(0.001, 3, 14),
		}, []string{"route", "status"}),
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(m, m.firstToken, m.durations, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.handler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	return m
}

func (s *Server) scrape(w http.ResponseWriter, r *http.Request) error {
	if !s.opts.EndpointMetrics {
		return notSupported("This server does not support metrics endpoint. Start it with `--metrics`")
	}
	w.Header().Set("Process-Start-Time-Unix", strconv.FormatInt(s.started.Unix(), 10))
	s.metrics.handler.ServeHTTP(w, r)
	return nil
}

// ended takes note of a generation.
func (m *metrics) ended(r *engine.Result) {
	m.cached.Add(int64(r.NCached))
	m.requests.Add(1)
	m.busyNanos.Add(int64(r.PromptTime + r.PredictTime))
	length := int64(r.NPrompt + r.NDecoded)
	for {
		longest := m.maxTokens.Load()
		if length <= longest || m.maxTokens.CompareAndSwap(longest, length) {
			return
		}
	}
}

// meanDuration is how long generations have taken so far, in seconds, without waiting.
func (m *metrics) meanDuration() float64 {
	n := m.requests.Load()
	if n == 0 {
		return 0
	}
	return time.Duration(m.busyNanos.Load() / n).Seconds()
}

func (m *metrics) uptime() time.Duration { return time.Since(m.s.started) }

// served takes note of a request.
func (m *metrics) served(pattern string, status int, took time.Duration) {
	if pattern == "" {
		pattern = "/"
	}
	m.durations.WithLabelValues(pattern, strconv.Itoa(status)).Observe(took.Seconds())
}

// Describe says nothing: what Collect sends is not checked against it.
func (m *metrics) Describe(chan<- *prometheus.Desc) {}

// Collect reads the engine's counters.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	l := m.s.loaded()
	if l == nil {
		return
	}
	send := func(kind prometheus.ValueType, name, help string, value float64, labels ...string) {
		var names, values []string
		for i := 0; i < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, names, nil), kind, value, values...)
	}
	counter := func(name, help string, value float64) { send(prometheus.CounterValue, name, help, value) }
	gauge := func(name, help string, value float64, labels ...string) {
		send(prometheus.GaugeValue, name, help, value, labels...)
	}
	s := l.engine.Snapshot()
	rate := func(n uint64, d time.Duration) float64 {
		if d <= 0 {
			return 0
		}
		return float64(n) / d.Seconds()
	}

	counter("llamacpp:prompt_tokens_total", "Prompt tokens evaluated, those from the cache not counted.", float64(s.PromptTokens))
	counter("llamacpp:prompt_tokens_cached_total", "Prompt tokens taken from the cache.", float64(m.cached.Load()))
	counter("llamacpp:prompt_seconds_total", "Time of evaluating prompts, summed over requests.", s.PromptTime.Seconds())
	counter("llamacpp:tokens_predicted_total", "Tokens generated.", float64(s.PredictedTokens))
	counter("llamacpp:tokens_predicted_seconds_total", "Time of generating, summed over requests.", s.PredictTime.Seconds())
	counter("llamacpp:n_decode_total", "Batches decoded.", float64(s.NDecode)+float64(m.embedded.Load()))
	counter("llamacpp:n_tokens_max", "The longest text so far, prompt included.", float64(m.maxTokens.Load()))
	for name, help := range map[string]string{
		"llamacpp:spec_decode_num_draft_tokens_total":    "Tokens drafted; the server does not draft.",
		"llamacpp:spec_decode_num_accepted_tokens_total": "Drafted tokens accepted; the server does not draft.",
		"llamacpp:spec_decode_num_drafts_total":          "Drafts verified; the server does not draft.",
	} {
		counter(name, help, 0)
	}
	gauge("llamacpp:prompt_tokens_seconds", "Prompt tokens evaluated in a second, on average.", rate(s.PromptTokens, s.PromptTime))
	gauge("llamacpp:predicted_tokens_seconds", "Tokens generated in a second, on average.", rate(s.PredictedTokens, s.PredictTime))
	gauge("llamacpp:requests_processing", "Requests that have a slot.", float64(s.Busy))
	gauge("llamacpp:requests_deferred", "Requests that wait for a slot.", float64(s.Queued))
	busy := 0.0
	if s.NDecode > 0 {
		busy = float64(s.NBusy) / float64(s.NDecode)
	}
	gauge("llamacpp:n_busy_slots_per_decode", "Slots in a batch, on average.", busy)

	counter("phd_requests_started_total", "Generations that were accepted.", float64(s.Started))
	counter("phd_requests_finished_total", "Generations that have ended.", float64(s.Finished))
	counter("phd_requests_cancelled_total", "Generations that were cancelled, by disconnects for example.", float64(s.Cancelled))
	counter("phd_requests_rejected_total", "Generations that were refused because the queue was full.", float64(s.Rejected))
	counter("phd_requests_preempted_total", "Times that a generation gave up its slot because the cache was full.", float64(s.Preempted))
	const help = "Positions of the cache: used by slots (shared: by several of them), retained for later, and free."
	gauge("phd_cache_positions", help, float64(s.Usage.Used), "state", "used")
	gauge("phd_cache_positions", help, float64(s.Usage.Shared), "state", "shared")
	gauge("phd_cache_positions", help, float64(s.Usage.Retained), "state", "retained")
	gauge("phd_cache_positions", help, float64(s.Usage.Free), "state", "free")
	gauge("phd_cache_size_positions", "Positions of the cache.", float64(s.Usage.Used+s.Usage.Retained+s.Usage.Free))
	counter("phd_prefix_lookups_total", "Prompts that were looked up in the cache.", float64(s.Stats.PrefixLookups))
	counter("phd_prefix_hits_total", "Prompts whose beginning was found there.", float64(s.Stats.PrefixHits))
	counter("phd_prefix_tokens_total", "Positions taken over from there.", float64(s.Stats.PrefixTokens))
	counter("phd_positions_dropped_total", "Positions dropped from the middle of texts that were too long.", float64(s.Stats.Dropped))
	counter("phd_positions_evicted_total", "Retained positions given up for others.", float64(s.Stats.Evicted))
	counter("phd_passes_total", "Passes over the weights.", float64(s.Stats.Passes))
	gauge("phd_memory_bytes", "Memory by what it holds.", float64(s.Memory.Weights), "kind", "weights")
	gauge("phd_memory_bytes", "Memory by what it holds.", float64(s.Memory.Cache), "kind", "cache")
	gauge("phd_memory_bytes", "Memory by what it holds.", float64(s.Memory.Hidden), "kind", "hidden")
	gauge("phd_memory_bytes", "Memory by what it holds.", float64(s.Memory.Scratch), "kind", "scratch")
}
