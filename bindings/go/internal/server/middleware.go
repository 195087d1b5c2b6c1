package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// newID is a random name for a request or a response.
func newID() string { return rand.Text() }

// publicPaths need no key: what load balancers ask for, and the page, which asks for the key itself.
var publicPaths = []string{"/", "/index.html", "/health", "/v1/health", "/models", "/v1/models"}

// quietPaths are asked for so often that they are logged only when somebody looks for faults.
var quietPaths = []string{"/health", "/v1/health", "/models", "/v1/models", "/props", "/metrics", "/slots", "/phd/state"}

// middleware is what happens to every request before its handler: it gets a number and a line in the log, CORS headers, a
// check of the server's state, and one of its key.
func (s *Server) middleware(next http.Handler) http.Handler {
	if s.opts.APIPrefix != "" {
		next = http.StripPrefix(s.opts.APIPrefix, next)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		id := requestID(r)
		w.Header().Set("X-Request-Id", id)
		w.Header().Set("Server", "phd-server")
		recorder := &recorder{ResponseWriter: w, status: http.StatusOK}
		r = r.WithContext(context.WithValue(r.Context(), requestIDKey{}, id))
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler { //nolint:errorlint // as net/http compares it
					panic(p)
				}
				s.log.ErrorContext(r.Context(), "a handler panicked", "panic", p, "stack", string(debug.Stack()))
				if !recorder.wrote {
					s.writeError(recorder, r, &apiError{status: http.StatusInternalServerError, kind: typeServer, message: "internal error"})
				}
			}
			s.finish(r, recorder, time.Since(start))
		}()
		s.serve(recorder, r, next)
	})
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	s.setCORS(w, r)
	if r.Method == http.MethodOptions {
		w.WriteHeader(http.StatusOK)
		return
	}
	path := strings.TrimPrefix(r.URL.Path, s.opts.APIPrefix)
	isPage := s.opts.UI != nil && (path == "/" || path == "/index.html")
	switch {
	case s.loaded() == nil && !isPage:
		s.writeError(w, r, unavailable(loadingMessage))
	case !slices.Contains(publicPaths, path) && !s.keys.allow(r):
		s.writeError(w, r, &apiError{status: http.StatusUnauthorized, kind: typeAuthentication, message: "Invalid API Key"})
	default:
		next.ServeHTTP(w, r)
	}
}

// finish logs a request and counts it. Nothing that the client has written is logged but its method and path.
func (s *Server) finish(r *http.Request, recorder *recorder, took time.Duration) {
	if r.Context().Err() != nil && !recorder.wrote {
		recorder.status = statusClientGone
	}
	s.metrics.served(r.Pattern, recorder.status, took)
	level := slog.LevelInfo
	if slices.Contains(quietPaths, strings.TrimPrefix(r.URL.Path, s.opts.APIPrefix)) {
		level = slog.LevelDebug
	}
	s.log.LogAttrs(r.Context(), level, "request",
		slog.String("id", requestIDOf(r.Context())), slog.String("method", r.Method), slog.String("path", r.URL.Path),
		slog.Int("status", recorder.status), slog.Int64("bytes", recorder.bytes),
		slog.Duration("took", took.Round(time.Microsecond)), slog.String("remote", r.RemoteAddr))
}

type requestIDKey struct{}

func requestIDOf(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

var sane = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// requestID is the number that a proxy has given the request, or a new one.
func requestID(r *http.Request) string {
	if id := r.Header.Get("X-Request-Id"); sane.MatchString(id) {
		return id
	}
	return newID()
}

// A recorder remembers what was answered.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
	wrote  bool
}

func (r *recorder) WriteHeader(status int) {
	if !r.wrote {
		r.status, r.wrote = status, true
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(data []byte) (int, error) {
	r.wrote = true
	n, err := r.ResponseWriter.Write(data)
	r.bytes += int64(n)
	return n, err
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// A keyring knows the keys, as hashes: comparing those takes the same time whatever a client sends.
type keyring struct {
	hashes [][sha256.Size]byte
}

func newKeyring(keys []string) *keyring {
	k := &keyring{}
	for _, key := range keys {
		k.hashes = append(k.hashes, sha256.Sum256([]byte(key)))
	}
	return k
}

// allow looks for a key where OpenAI's clients send it, and where Anthropic's do.
func (k *keyring) allow(r *http.Request) bool {
	if len(k.hashes) == 0 {
		return true
	}
	key := r.Header.Get("Authorization")
	if key == "" {
		key = r.Header.Get("X-Api-Key")
	}
	key = strings.TrimPrefix(key, "Bearer ")
	hash := sha256.Sum256([]byte(key))
	found := 0
	for i := range k.hashes {
		found |= subtle.ConstantTimeCompare(hash[:], k.hashes[i][:])
	}
	return found == 1
}

// setCORS tells browsers which pages may call.
func (s *Server) setCORS(w http.ResponseWriter, r *http.Request) {
	c := &s.opts.CORS
	origin := r.Header.Get("Origin")
	if origin != "" && c.allows(origin) {
		allowed := origin
		if slices.Contains(c.Origins, "*") && !c.Credentials {
			allowed = "*"
		} else {
			w.Header().Add("Vary", "Origin")
		}
		w.Header().Set("Access-Control-Allow-Origin", allowed)
	}
	if r.Method == http.MethodOptions {
		credentials := "false"
		if c.Credentials {
			credentials = "true"
		}
		w.Header().Set("Access-Control-Allow-Credentials", credentials)
		w.Header().Set("Access-Control-Allow-Methods", c.Methods)
		w.Header().Set("Access-Control-Allow-Headers", c.Headers)
	}
}

func (c *CORS) allows(origin string) bool {
	for _, allowed := range c.Origins {
		switch allowed {
		case "*", origin:
			return true
		case "localhost":
			u, err := url.Parse(origin)
			if err == nil && slices.Contains([]string{"localhost", "127.0.0.1", "::1"}, u.Hostname()) {
				return true
			}
		}
	}
	return false
}
