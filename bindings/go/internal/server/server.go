// Package server is llama-server's HTTP interface over an engine.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/engine"
)

// A Server answers HTTP requests. Until Load has ended, it answers that it is loading.
type Server struct {
	opts    Options
	log     *slog.Logger
	started time.Time
	handler http.Handler
	keys    *keyring
	metrics *metrics

	state    atomic.Pointer[loaded]
	draining atomic.Bool
	closing  sync.Once
}

// loaded is what a server has once its model is loaded. Nothing in it changes.
type loaded struct {
	model    *phd.Model
	engine   *engine.Engine
	info     phd.ModelInfo
	ends     []phd.Token // the tokens that end a text
	defaults settings
	template string // the chat template's source, the model's own or the user's
	chat     *chatTemplates
}

// Tokenize, NVocab and EndTokens make it the vocabulary of parseSettings.
func (l *loaded) Tokenize(text string, addSpecial, parseSpecial bool) ([]phd.Token, error) {
	return l.model.Tokenize(text, addSpecial, parseSpecial)
}

func (l *loaded) NVocab() int            { return int(l.info.NVocab) }
func (l *loaded) EndTokens() []phd.Token { return l.ends }

// New makes a server of valid options. It answers at once; Load makes it useful.
func New(opts Options) *Server {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{opts: opts, log: log, started: time.Now(), keys: newKeyring(opts.APIKeys)}
	s.metrics = newMetrics(s)
	s.handler = s.newHandler()
	return s
}

// Handler answers all requests.
func (s *Server) Handler() http.Handler { return s.handler }

// Load loads the model and starts the engine. When ctx ends, so does loading.
func (s *Server) Load(ctx context.Context) error {
	start := time.Now()
	options := s.opts.ModelOptions
	if options.Progress == nil {
		options.Progress = s.logProgress()
	}
	s.log.Info("loading", "model", s.opts.ModelPath)
	model, err := phd.LoadModel(ctx, s.opts.ModelPath, &options)
	if err != nil {
		return err
	}
	l, err := s.prepare(model)
	if err != nil {
		return errors.Join(err, model.Close())
	}
	s.state.Store(l)
	info := l.info
	s.log.Info("ready", "model", s.modelName(), "took", time.Since(start).Round(time.Millisecond),
		"copies", info.Copies, "window", info.Window, "chunk", info.Chunk, "vocabulary", info.NVocab,
		"slots", l.engine.NSlots(), "context", l.engine.Context(), "slot_context", l.engine.SlotContext())
	return nil
}

// logProgress logs how far loading is, every other second.
func (s *Server) logProgress() func(float32) bool {
	last := time.Now()
	return func(fraction float32) bool {
		if now := time.Now(); now.Sub(last) >= 2*time.Second {
			s.log.Info("loading", "percent", int(fraction*100))
			last = now
		}
		return true
	}
}

func (s *Server) prepare(model *phd.Model) (*loaded, error) {
	l := &loaded{model: model, info: model.Info()}
	for token := range phd.Token(l.info.NVocab) {
		if model.IsEnd(token) {
			l.ends = append(l.ends, token)
		}
	}
	chat, err := newChatTemplates(model, &s.opts, s.log)
	if err != nil {
		return nil, err
	}
	l.chat, l.template = chat, chat.text()
	defaults := defaultSettings()
	set, err := parseSettings(&body{fields: s.opts.Defaults}, &defaults, l)
	if err != nil {
		return nil, err
	}
	set.reasoningFormat = s.opts.ReasoningFormat
	l.defaults = *set
	cfg := engine.Config{
		Model:        model,
		Slots:        s.opts.Slots,
		Context:      s.opts.Context,
		Threads:      s.opts.Threads,
		CacheType:    s.opts.CacheType,
		Piece:        s.opts.Piece,
		MaxQueue:     s.opts.MaxQueue,
		ContextShift: s.opts.ContextShift,
		Logger:       s.log,
	}
	unified := s.opts.Unified
	if cfg.Slots == 0 {
		cfg.Slots, unified = 4, true
	}
	if cfg.Context == 0 {
		cfg.Context = min(int(l.info.NCtxTrain), maxDefaultContext)
		if cfg.Context < int(l.info.NCtxTrain) {
			s.log.Info("the context is smaller than the model's own; --ctx-size makes it larger",
				"context", cfg.Context, "trained", l.info.NCtxTrain)
		}
	}
	cfg.SlotContext = cfg.Context
	if !unified {
		cfg.SlotContext = cfg.Context / cfg.Slots
	}
	if cfg.SlotContext > int(l.info.NCtxTrain) {
		s.log.Warn("the context of a request may exceed what the model was trained for",
			"slot_context", cfg.SlotContext, "trained", l.info.NCtxTrain)
	}
	l.engine, err = engine.New(cfg)
	return l, err
}

// loaded is nil before Load has ended; handlers, which are called after that, need not look.
func (s *Server) loaded() *loaded { return s.state.Load() }

// Close cancels what runs and frees the engine and the model.
func (s *Server) Close() error {
	var err error
	s.closing.Do(func() {
		s.draining.Store(true)
		if l := s.loaded(); l != nil {
			err = errors.Join(l.engine.Close(), l.model.Close())
		}
	})
	return err
}

// modelName is the model's name for clients.
func (s *Server) modelName() string {
	if len(s.opts.Aliases) > 0 {
		return slices.Min(s.opts.Aliases) // as llama-server does
	}
	return filepath.Base(s.opts.ModelPath)
}

// buildInfo begins like llama-server's, with a b, which clients look for.
func buildInfo() string { return "b0-libphd-" + phd.Version() }

// newHandler registers the routes.
func (s *Server) newHandler() http.Handler {
	mux := http.NewServeMux()
	for _, register := range []func(*http.ServeMux){
		s.registerInfo,
		s.registerCompletions,
		s.registerText,
		s.registerEmbeddings,
		s.registerSlots,
		s.registerChat,
	} {
		register(mux)
	}
	s.handle(mux, "/", func(w http.ResponseWriter, r *http.Request) error { return s.notFound(w, r, mux) })
	return s.middleware(mux)
}

// handle registers a handler whose errors become the response.
func (s *Server) handle(mux *http.ServeMux, pattern string, handler func(http.ResponseWriter, *http.Request) error) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		if err := handler(w, r); err != nil {
			s.writeError(w, r, err)
		}
	})
}

// handleAll registers one handler for several paths of the same method.
func (s *Server) handleAll(mux *http.ServeMux, method string, paths []string, handler func(http.ResponseWriter, *http.Request) error) {
	for _, path := range paths {
		s.handle(mux, method+" "+path, handler)
	}
}

// refuse registers paths that llama-server has and this server does not.
func (s *Server) refuse(mux *http.ServeMux, method string, paths []string, why string) {
	s.handleAll(mux, method, paths, func(http.ResponseWriter, *http.Request) error { return notSupported("%s", why) })
}

// notFound answers for paths that nothing is registered for, and for those where it is for another method.
func (s *Server) notFound(w http.ResponseWriter, r *http.Request, mux *http.ServeMux) error {
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodDelete} {
		other := r.Clone(r.Context())
		other.Method = method
		if _, pattern := mux.Handler(other); pattern != "/" && method != r.Method {
			w.Header().Set("Allow", method)
			return &apiError{status: http.StatusMethodNotAllowed, kind: typeInvalidRequest,
				message: fmt.Sprintf("%s is not possible here, %s is", r.Method, method)}
		}
	}
	return &apiError{status: http.StatusNotFound, kind: typeNotFound, message: "File Not Found"}
}
