package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// A report is what a run has found.
type report struct {
	Server       string                    `json:"server"`
	Machine      string                    `json:"machine"`
	Clients      int                       `json:"clients"`
	Slots        int                       `json:"slots"`
	SlotContext  int                       `json:"slot_context"`
	Seed         uint64                    `json:"seed"`
	Seconds      float64                   `json:"seconds"`
	Requests     int                       `json:"requests"`
	Outcomes     map[string]int            `json:"outcomes"`
	Kinds        map[string]map[string]int `json:"kinds"`
	Statuses     map[string]int            `json:"statuses"`
	FirstToken   quantiles                 `json:"time_to_first_token"`
	Whole        quantiles                 `json:"time_of_whole_answers"`
	Tokens       int                       `json:"tokens"` // that clients have received
	TokensPerSec float64                   `json:"tokens_per_second"`
	PromptTokens int                       `json:"prompt_tokens"`
	CachedTokens int                       `json:"prompt_tokens_cached"`
	OtherAnswers int                       `json:"probes_answered_otherwise"`
	Failures     []string                  `json:"failures"` // the first ones
	NFailures    int                       `json:"n_failures"`
	Accounting   map[string]float64        `json:"accounting"`

	elapsed     time.Duration
	firstTokens []time.Duration
	wholes      []time.Duration
	peer        bool
}

// Quantiles of durations, in seconds.
type quantiles struct {
	N   int     `json:"n"`
	P50 float64 `json:"p50"`
	P95 float64 `json:"p95"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// quantilesOf takes, for each, the smallest duration that so many are not above.
func quantilesOf(durations []time.Duration) quantiles {
	n := len(durations)
	if n == 0 {
		return quantiles{}
	}
	slices.Sort(durations)
	at := func(percent int) float64 { return durations[(n*percent+99)/100-1].Seconds() }
	return quantiles{N: n, P50: at(50), P95: at(95), P99: at(99), Max: at(100)}
}

func newReport(cfg config, s *server) *report {
	return &report{Server: s.build, Clients: cfg.Clients, Slots: s.slots, SlotContext: s.context, Seed: cfg.Seed,
		Outcomes: map[string]int{}, Kinds: map[string]map[string]int{}, Statuses: map[string]int{}, peer: cfg.Peer}
}

func (r *report) add(result result) {
	r.Requests++
	r.Outcomes[result.outcome]++
	if r.Kinds[result.kind] == nil {
		r.Kinds[result.kind] = map[string]int{}
	}
	r.Kinds[result.kind][result.outcome]++
	status := "none"
	if result.status != 0 {
		status = strconv.Itoa(result.status)
	}
	r.Statuses[status]++
	r.Tokens += result.tokens
	r.PromptTokens += result.prompt
	r.CachedTokens += result.cached
	if result.firstToken > 0 {
		r.firstTokens = append(r.firstTokens, result.firstToken)
	}
	switch {
	case result.outcome == failed:
		r.fail(result.kind, result.problem)
	case result.problem != "":
		r.OtherAnswers++
	case result.outcome == answered:
		r.wholes = append(r.wholes, result.took)
	}
}

func (r *report) fail(what, problem string) {
	r.NFailures++
	if len(r.Failures) < 50 {
		r.Failures = append(r.Failures, what+": "+problem)
	}
}

func (r *report) failed() bool { return r.NFailures > 0 }

// checkAccounting compares an idle server's counters with those before the load.
func (r *report) checkAccounting(before, after *accounting) {
	r.Accounting = map[string]float64{}
	for name, value := range after.metrics {
		if strings.HasPrefix(name, "llamacpp:") || strings.HasPrefix(name, "phd_cache") || strings.HasPrefix(name, "phd_requests_") ||
			strings.HasPrefix(name, "phd_prefix") || strings.HasPrefix(name, "phd_positions") {
			r.Accounting[name] = value
		}
	}
	for _, name := range []string{"go_goroutines", "process_open_fds", "process_resident_memory_bytes"} {
		if value, ok := after.metrics[name]; ok {
			r.Accounting[name+" before"] = before.metrics[name]
			r.Accounting[name+" after"] = value
		}
	}
	if r.peer {
		return
	}
	if err := after.check(before); err != nil {
		for _, problem := range strings.Split(err.Error(), "\n") {
			r.fail("accounting", problem)
		}
	}
}

func (r *report) finish() {
	r.Seconds = r.elapsed.Seconds()
	r.TokensPerSec = float64(r.Tokens) / r.Seconds
	r.FirstToken = quantilesOf(r.firstTokens)
	r.Whole = quantilesOf(r.wholes)
}

func (r *report) save(file string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}

func (r *report) print(out io.Writer) {
	fmt.Fprintf(out, "%s, %d slots of %d tokens; %d clients for %.0f s, seed %d\n\n", r.Server, r.Slots, r.SlotContext, r.Clients,
		r.Seconds, r.Seed)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	outcomes := []string{answered, busy, refused, disconnected, failed}
	fmt.Fprintf(table, "\t%s\t\n", strings.Join(outcomes, "\t"))
	line := func(name string, counts map[string]int) {
		fmt.Fprint(table, name)
		for _, outcome := range outcomes {
			fmt.Fprintf(table, "\t%d", counts[outcome])
		}
		fmt.Fprint(table, "\t\n")
	}
	for i := range kinds {
		line(kinds[i].name, r.Kinds[kinds[i].name])
	}
	line("all", r.Outcomes)
	table.Flush()
	fmt.Fprintf(out, "\nstatuses: %s\n", counts(r.Statuses))
	for _, q := range []struct {
		name string
		of   quantiles
	}{{"time to first token", r.FirstToken}, {"time of whole answers", r.Whole}} {
		fmt.Fprintf(out, "%s: p50 %.3f s, p95 %.3f s, p99 %.3f s, at most %.3f s (%d)\n", q.name, q.of.P50, q.of.P95, q.of.P99,
			q.of.Max, q.of.N)
	}
	fmt.Fprintf(out, "tokens received: %d, %.1f/s; prompt tokens of whole answers: %d, %d of them cached\n", r.Tokens, r.TokensPerSec,
		r.PromptTokens, r.CachedTokens)
	if r.OtherAnswers > 0 {
		fmt.Fprintf(out, "probes with another answer than alone: %d\n", r.OtherAnswers)
	}
	for _, name := range sortedKeys(r.Accounting) {
		if !strings.HasPrefix(name, "llamacpp:") {
			fmt.Fprintf(out, "%s: %s\n", name, strconv.FormatFloat(r.Accounting[name], 'f', -1, 64))
		}
	}
	fmt.Fprintf(out, "failures: %d\n", r.NFailures)
	for _, failure := range r.Failures {
		fmt.Fprintf(out, "  %s\n", failure)
	}
}

func counts(of map[string]int) string {
	var parts []string
	for _, name := range sortedKeys(of) {
		parts = append(parts, fmt.Sprintf("%s: %d", name, of[name]))
	}
	return strings.Join(parts, ", ")
}

func sortedKeys[V any](of map[string]V) []string {
	names := make([]string, 0, len(of))
	for name := range of {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
