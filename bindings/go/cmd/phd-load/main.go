// Command phd-load puts an HTTP server with llama-server's interface under load: many clients at once that ask for short and
// long texts with shared beginnings, streaming and not, and among them clients that hang up, ask for too much, send what is
// no JSON, read slowly, or stop in the middle of a request. At the end it checks that the server is idle and, of phd-server,
// that nothing was lost: no sequence, no position of the cache, no goroutine.
//
//	phd-load -url http://127.0.0.1:8080 -clients 64 -duration 10m -json report.json
//
// What is asked depends on -seed alone, and on how fast the server answers. The exit status is 1 if anything was not as it
// must be. With -peer, the same load is for llama-server itself: what only phd-server promises is then counted, not required.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"time"
)

// A config is what the flags say.
type config struct {
	URL      string
	APIKey   string
	Clients  int
	Duration time.Duration
	Timeout  time.Duration
	Seed     uint64
	Peer     bool
}

func main() {
	var cfg config
	var jsonFile string
	flag.StringVar(&cfg.URL, "url", "http://127.0.0.1:8080", "`address` of the server")
	flag.StringVar(&cfg.APIKey, "api-key", "", "`key` to send")
	flag.IntVar(&cfg.Clients, "clients", 64, "clients at once")
	flag.DurationVar(&cfg.Duration, "duration", 10*time.Minute, "how long new requests are begun")
	flag.DurationVar(&cfg.Timeout, "timeout", 3*time.Minute, "a request that takes longer counts as not answered")
	flag.Uint64Var(&cfg.Seed, "seed", 1, "seed of all choices")
	flag.BoolVar(&cfg.Peer, "peer", false, "the server is llama-server")
	flag.StringVar(&jsonFile, "json", "", "`file` for the report as JSON")
	flag.Parse()
	if flag.NArg() > 0 || cfg.Clients < 1 || cfg.Duration <= 0 || cfg.Timeout <= 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	report, err := run(ctx, cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, "phd-load:", err)
		os.Exit(1)
	}
	report.print(os.Stdout)
	if jsonFile != "" {
		if err := report.save(jsonFile); err != nil {
			fmt.Fprintln(os.Stderr, "phd-load:", err)
			os.Exit(1)
		}
	}
	if report.failed() {
		os.Exit(1)
	}
}

// run asks the server what it is, loads it for the time, waits until it is idle, and checks it.
func run(ctx context.Context, cfg config) (*report, error) {
	s, err := newServer(ctx, cfg)
	if err != nil {
		return nil, err
	}
	r := newReport(cfg, s)
	r.Machine = fmt.Sprintf("%s/%s, %d CPUs", runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	before, err := s.settled(ctx)
	if err != nil {
		return nil, fmt.Errorf("before the load: %w", err)
	}
	if err := s.learnProbes(ctx); err != nil {
		return nil, fmt.Errorf("before the load: %w", err)
	}

	start := time.Now()
	results := make(chan result)
	loading, done := context.WithTimeout(ctx, cfg.Duration)
	defer done()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for result := range results {
			r.add(result)
		}
	}()
	runClients(loading, cfg, s, results)
	r.elapsed = time.Since(start)
	close(results)
	<-ended

	after, err := s.settled(ctx)
	if err != nil {
		r.fail("after the load", err.Error())
	} else {
		r.checkAccounting(before, after)
	}
	r.finish()
	return r, nil
}
