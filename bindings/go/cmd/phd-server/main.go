// Command phd-server serves a model over HTTP, with llama-server's routes and options. See docs/server.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/server"
	"github.com/libphd/libphd/bindings/go/internal/web"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "phd-server:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	c, err := parseArguments(args, os.Getenv)
	switch {
	case errors.Is(err, errHelp):
		fmt.Print(c.usage())
		return nil
	case errors.Is(err, errVersion):
		fmt.Printf("phd-server %s (ABI %d)\n", phd.Version(), phd.ABIVersion())
		return nil
	case err != nil:
		return err
	}
	log := newLogger(os.Stderr, c.logFormat, c.logLevel)
	phd.SetLogger(log)
	for _, note := range c.notes {
		log.Warn(note)
	}
	c.options.Logger = log
	if c.ui {
		c.options.UI = web.Handler()
	}
	if err := c.options.Validate(); err != nil {
		return err
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // from here on a second signal ends the process at once
	return server.New(c.options).Run(ctx)
}

func newLogger(out io.Writer, format string, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(out, options))
	}
	return slog.New(slog.NewTextHandler(out, options))
}
