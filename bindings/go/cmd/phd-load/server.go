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
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// A server is the one that is loaded.
type server struct {
	cfg      config
	http     *http.Client
	address  string // host and port
	build    string
	slots    int
	context  int // tokens of one request at most
	prefixes []string
	probes   []probe
}

// A probe is a question whose answer is known.
type probe struct {
	prompt string
	answer string
}

const probeTokens = 16

func (p *probe) request(stream, cache bool) request {
	return request{path: completionPath, stream: stream, max: probeTokens,
		body: map[string]any{"prompt": p.prompt, "n_predict": probeTokens, "temperature": 0, "cache_prompt": cache}}
}

// newServer asks the server what it is and makes up the texts that many requests share.
func newServer(ctx context.Context, cfg config) (*server, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil || u.Scheme != "http" || u.Host == "" {
		return nil, fmt.Errorf("-url is %q, expected http://host:port", cfg.URL)
	}
	s := &server{cfg: cfg, address: u.Host, http: &http.Client{Transport: &http.Transport{
		MaxIdleConnsPerHost: cfg.Clients, DisableCompression: true,
	}}}
	var props struct {
		Slots    int    `json:"total_slots"`
		Build    string `json:"build_info"`
		Defaults struct {
			Context int `json:"n_ctx"`
		} `json:"default_generation_settings"`
	}
	if err := s.get(ctx, "/props", &props); err != nil {
		return nil, err
	}
	s.build, s.slots, s.context = props.Build, props.Slots, props.Defaults.Context
	if s.slots < 1 || s.context < 1024 {
		return nil, fmt.Errorf("the server has %d slots of %d tokens; the load needs at least 1024 each", s.slots, s.context)
	}
	random := rand.New(rand.NewPCG(cfg.Seed, 1<<32))
	for range 5 {
		s.prefixes = append(s.prefixes, text(random, s.context/16+random.IntN(s.context/16)))
	}
	for range 6 {
		s.probes = append(s.probes, probe{prompt: text(random, 2+random.IntN(s.context/16))})
	}
	return s, nil
}

// learnProbes asks the questions that are asked again under load.
func (s *server) learnProbes(ctx context.Context) error {
	c := &client{server: s}
	for i := range s.probes {
		p := &s.probes[i]
		r, text := c.generate(ctx, p.request(false, false), 0)
		if r.outcome != answered {
			return fmt.Errorf("a completion: %s %s", r.outcome, r.problem)
		}
		p.answer = text
	}
	return nil
}

func (s *server) authorization() string {
	if s.cfg.APIKey == "" {
		return ""
	}
	return "Authorization: Bearer " + s.cfg.APIKey + "\r\n"
}

func (s *server) do(client *http.Client, request *http.Request) (*http.Response, error) {
	if s.cfg.APIKey != "" {
		request.Header.Set("Authorization", "Bearer "+s.cfg.APIKey)
	}
	return client.Do(request)
}

// post sends a value as JSON, or a raw text as it is.
func (s *server) post(ctx context.Context, client *http.Client, path string, body any) (*http.Response, error) {
	var data []byte
	if text, ok := body.(raw); ok {
		data = []byte(text)
	} else {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.cfg.URL+path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/json")
	return s.do(client, request)
}

// get reads JSON; without a value it expects status 200 alone.
func (s *server) get(ctx context.Context, path string, value any) error {
	data, err := s.read(ctx, path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, value); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (s *server) read(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.cfg.URL+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := s.do(s.http, request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: status %d: %.200s", path, response.StatusCode, data)
	}
	return data, nil
}

// An accounting is what an idle server says of itself.
type accounting struct {
	metrics map[string]float64
}

// settled waits until nothing runs, empties all slots, and reads the counters. An error says what is still going on.
func (s *server) settled(ctx context.Context) (*accounting, error) {
	s.http.CloseIdleConnections()
	deadline := time.Now().Add(30 * time.Second)
	for {
		a, err := s.account(ctx)
		if err == nil || time.Now().After(deadline) || ctx.Err() != nil {
			return a, err
		}
		sleep(ctx, 100*time.Millisecond)
	}
}

func (s *server) account(ctx context.Context) (*accounting, error) {
	var health struct {
		Status string `json:"status"`
	}
	if err := s.get(ctx, "/health", &health); err != nil {
		return nil, err
	}
	if health.Status != "ok" {
		return nil, fmt.Errorf("/health says %q", health.Status)
	}
	var slots []struct {
		ID   int  `json:"id"`
		Busy bool `json:"is_processing"`
	}
	if err := s.get(ctx, "/slots", &slots); err != nil {
		return nil, err
	}
	if len(slots) != s.slots {
		return nil, fmt.Errorf("/slots lists %d slots of %d", len(slots), s.slots)
	}
	for _, slot := range slots {
		if slot.Busy {
			return nil, fmt.Errorf("slot %d is still busy", slot.ID)
		}
	}
	if !s.cfg.Peer {
		// What the slots keep for the next request is given up, so that all that is left in use has been lost.
		for _, slot := range slots {
			response, err := s.post(ctx, s.http, fmt.Sprintf("/slots/%d?action=erase", slot.ID), raw("{}"))
			if err != nil {
				return nil, err
			}
			response.Body.Close()
			if response.StatusCode != http.StatusOK {
				return nil, fmt.Errorf("erasing slot %d: status %d; the server needs --slot-save-path", slot.ID, response.StatusCode)
			}
		}
	}
	data, err := s.read(ctx, "/metrics")
	if err != nil {
		return nil, err
	}
	a := &accounting{}
	if a.metrics, err = parseMetrics(data); err != nil {
		return nil, err
	}
	for _, name := range []string{"llamacpp:requests_processing", "llamacpp:requests_deferred"} {
		switch n, ok := a.metrics[name]; {
		case !ok:
			return nil, fmt.Errorf("/metrics lacks %s", name)
		case n != 0:
			return nil, fmt.Errorf("%s is %v though all slots are idle", name, n)
		}
	}
	return a, nil
}

// The parts of phd-server's cache.
const (
	used     = `phd_cache_positions{state="used"}`
	shared   = `phd_cache_positions{state="shared"}`
	retained = `phd_cache_positions{state="retained"}`
	free     = `phd_cache_positions{state="free"}`
)

// check says what is wrong with the books of a phd-server that is idle, given what they were before.
func (a *accounting) check(before *accounting) error {
	var problems []error
	value := func(name string) float64 {
		v, ok := a.metrics[name]
		if !ok {
			problems = append(problems, fmt.Errorf("/metrics lacks %s", name))
		}
		return v
	}
	total := func(a *accounting) float64 { return a.metrics[used] + a.metrics[retained] + a.metrics[free] }
	if value(used) != 0 || value(shared) != 0 {
		problems = append(problems, fmt.Errorf("%v positions are used and %v shared, though all slots are empty", value(used), value(shared)))
	}
	if n := value(retained) + value(free); n != total(before) {
		problems = append(problems, fmt.Errorf("the cache had %v positions and has %v: used %v, retained %v, free %v", total(before), n,
			value(used), value(retained), value(free)))
	}
	if began, ended := value("phd_requests_started_total"), value("phd_requests_finished_total"); began != ended {
		problems = append(problems, fmt.Errorf("%v generations were begun, %v have ended", began, ended))
	}
	if n, m := before.metrics["go_goroutines"], value("go_goroutines"); m > n+16 {
		problems = append(problems, fmt.Errorf("there were %v goroutines before the load, and are %v after it", n, m))
	}
	if n, m := before.metrics["process_open_fds"], value("process_open_fds"); m > n+16 {
		problems = append(problems, fmt.Errorf("there were %v open files before the load, and are %v after it", n, m))
	}
	return errors.Join(problems...)
}

// parseMetrics reads the samples of Prometheus's text format, by name and labels.
func parseMetrics(data []byte) (map[string]float64, error) {
	metrics := make(map[string]float64)
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		line := lines.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if i < 0 || err != nil {
			return nil, fmt.Errorf("/metrics has a line that is no sample: %.100q", line)
		}
		metrics[line[:i]] = value
	}
	return metrics, lines.Err()
}
