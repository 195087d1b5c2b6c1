package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/netutil"
)

// Bounds of a connection that says nothing.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 64 << 10
)

// Run listens, loads, and serves until ctx ends. Then it takes nothing new, lets what runs come to its end within
// Options.DrainTimeout, and frees everything.
func (s *Server) Run(ctx context.Context) error {
	listeners, err := s.listen()
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler:           s.handler,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // faulty handshakes and the like
	}
	if s.opts.TLSCert != "" {
		certificate, err := tls.LoadX509KeyPair(s.opts.TLSCert, s.opts.TLSKey)
		if err != nil {
			closeAll(listeners)
			return fmt.Errorf("--ssl-cert-file, --ssl-key-file: %w", err)
		}
		server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
	}
	failed := make(chan error, len(listeners)+1)
	for _, listener := range listeners {
		s.log.Info("listening", "address", s.address(listener))
		go func() {
			if s.opts.TLSCert != "" {
				failed <- server.ServeTLS(listener, "", "")
			} else {
				failed <- server.Serve(listener)
			}
		}()
	}
	loading := make(chan struct{})
	loadContext, stopLoading := context.WithCancel(ctx)
	go func() {
		defer close(loading)
		if err := s.Load(loadContext); err != nil {
			failed <- err
		}
	}()
	select {
	case err = <-failed:
		server.Close()
	case <-ctx.Done():
		err = s.drain(server)
	}
	stopLoading()
	<-loading
	if errors.Is(err, context.Canceled) {
		err = nil // it was told to stop
	}
	return errors.Join(err, s.Close())
}

// drain ends a running server.
func (s *Server) drain(server *http.Server) error {
	s.log.Info("stopping", "at_most", s.opts.DrainTimeout)
	s.draining.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), s.opts.DrainTimeout)
	defer cancel()
	if l := s.loaded(); l != nil {
		go l.engine.Drain(ctx) //nolint:errcheck // it cancels what has not ended in time
	}
	// Closes the listeners at once, and waits for the connections that have a request.
	err := server.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		s.log.Warn("requests were cancelled: they took too long to end")
		// Their handlers still say so to their clients.
		last, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if server.Shutdown(last) != nil {
			server.Close()
		}
		return nil
	}
	return err
}

// listen opens all addresses, or none.
func (s *Server) listen() ([]net.Listener, error) {
	var listeners []net.Listener
	tcp := 0
	for _, host := range s.opts.Hosts {
		if !isSocketPath(host) {
			tcp++
		}
	}
	for _, host := range s.opts.Hosts {
		var listener net.Listener
		var err error
		switch host = strings.Trim(host, "[]"); {
		case isSocketPath(host):
			listener, err = listenUnix(host)
		case tcp > 1 && strings.Contains(host, ":"):
			// Beside 0.0.0.0, :: is for IPv6 alone.
			listener, err = net.Listen("tcp6", net.JoinHostPort(host, strconv.Itoa(s.opts.Port)))
		default:
			listener, err = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(s.opts.Port)))
		}
		if err != nil {
			closeAll(listeners)
			return nil, fmt.Errorf("cannot listen: %w", err)
		}
		if s.opts.MaxConnections > 0 {
			listener = netutil.LimitListener(listener, s.opts.MaxConnections)
		}
		listeners = append(listeners, listener)
	}
	return listeners, nil
}

// listenUnix listens at a path. A socket there that nobody listens at is left from a server that was killed.
func listenUnix(path string) (net.Listener, error) {
	listener, err := net.Listen("unix", path)
	if err == nil {
		return listener, nil
	}
	if info, statErr := os.Lstat(path); statErr != nil || info.Mode().Type() != os.ModeSocket {
		return nil, err
	}
	if connection, dialErr := net.Dial("unix", path); dialErr == nil {
		connection.Close()
		return nil, err
	}
	if os.Remove(path) != nil {
		return nil, err
	}
	return net.Listen("unix", path)
}

func closeAll(listeners []net.Listener) {
	for _, listener := range listeners {
		listener.Close()
	}
}

// address is where clients find a listener.
func (s *Server) address(listener net.Listener) string {
	if listener.Addr().Network() == "unix" {
		return listener.Addr().String()
	}
	scheme := "http"
	if s.opts.TLSCert != "" {
		scheme = "https"
	}
	return scheme + "://" + listener.Addr().String() + s.opts.APIPrefix
}
