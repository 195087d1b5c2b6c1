package server

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

// Options say what a server serves, and how. DefaultOptions has useful values for most of them.
type Options struct {
	// The model.
	ModelPath    string
	ModelOptions phd.ModelOptions
	Aliases      []string // the first one is the model's name for clients; none: ModelPath
	Tags         []string

	// What it runs on.
	Context      int // positions of the cache; 0: as the model was trained for, within maxDefaultContext
	Slots        int // requests that are worked on at once; 0: 4, and then they share the cache freely
	Unified      bool
	Threads      int
	CacheType    phd.CacheType
	Piece        int // prompt tokens of a batch
	MaxQueue     int // requests that wait at most
	ContextShift bool

	// What requests ask for if they do not say it: fields of a request, in JSON.
	Defaults map[string]json.RawMessage

	// What is there.
	EndpointSlots   bool // GET /slots
	EndpointMetrics bool
	EndpointProps   bool         // POST /props
	Pooling         string       // of embeddings: last, mean or none
	SlotSavePath    string       // "": no saving and restoring
	UI              http.Handler // nil: none

	// Chat, for the routes that make prompts of conversations.
	Jinja              bool
	ChatTemplate       string // Jinja source; "": the model's
	ChatTemplateKwargs json.RawMessage
	ReasoningFormat    string
	Reasoning          string // on, off or auto
	PrefillAssistant   bool

	// HTTP.
	Hosts           []string // addresses, and paths of UNIX sockets, which end in .sock
	Port            int      // 0: any that is free
	APIPrefix       string
	APIKeys         []string
	TLSCert, TLSKey string // files; "": no TLS
	CORS            CORS
	MaxBody         int64
	MaxConnections  int           // 0: no bound
	Timeout         time.Duration // of a whole request; 0: none
	ReadTimeout     time.Duration // how long a client may take to send a request's body; 0: for ever
	WriteTimeout    time.Duration // how long a client may take to read what is written; 0: for ever
	DrainTimeout    time.Duration // how long requests may go on when the server is told to stop
	Logger          *slog.Logger  // nil: none
}

// CORS says which web pages may call.
type CORS struct {
	Origins     []string // "*": all; "localhost": pages of this machine
	Methods     string
	Headers     string
	Credentials bool
}

// maxDefaultContext bounds the context of models that were trained for very long ones, where the user has not asked for one.
const maxDefaultContext = 16384

// DefaultOptions are the defaults of phd-server's command line.
func DefaultOptions() Options {
	return Options{
		MaxQueue:         64,
		EndpointSlots:    true,
		Pooling:          "last",
		Jinja:            true,
		ReasoningFormat:  "deepseek",
		Reasoning:        "auto",
		PrefillAssistant: true,
		Hosts:            []string{"127.0.0.1"},
		Port:             8080,
		CORS: CORS{
			Origins:     []string{"*"},
			Methods:     "GET, POST, DELETE, OPTIONS",
			Headers:     "*",
			Credentials: true,
		},
		MaxBody:      8 << 20,
		Timeout:      time.Hour,
		ReadTimeout:  time.Minute,
		WriteTimeout: 30 * time.Second,
		DrainTimeout: 30 * time.Second,
	}
}

// Validate says what is wrong with the options, before anything is loaded.
func (o *Options) Validate() error {
	switch {
	case o.ModelPath == "":
		return fmt.Errorf("no model: give --model a GGUF file or a folder")
	case o.Context < 0 || o.Context > 1<<24:
		return fmt.Errorf("--ctx-size is %d, expected 0 to %d", o.Context, 1<<24)
	case o.Slots < 0 || o.Slots > 1024:
		return fmt.Errorf("--parallel is %d, expected 1 to 1024, or 0 for the default", o.Slots)
	case o.Context > 0 && o.Context < 2*max(o.Slots, 1):
		return fmt.Errorf("--ctx-size is %d, expected at least 2 positions for each of %d slots", o.Context, max(o.Slots, 1))
	case o.Threads < 0 || o.Threads > 4096:
		return fmt.Errorf("--threads is %d, expected 1 to 4096, or 0 for the default", o.Threads)
	case o.Piece < 0 || o.Piece > 1<<20:
		return fmt.Errorf("--batch-size is %d, expected 1 to %d", o.Piece, 1<<20)
	case o.MaxQueue < 0 || o.MaxQueue > 1<<20:
		return fmt.Errorf("--max-queue is %d, expected 0 to %d", o.MaxQueue, 1<<20)
	case o.Port < 0 || o.Port > 65535:
		return fmt.Errorf("--port is %d, expected 0 to 65535", o.Port)
	case len(o.Hosts) == 0:
		return fmt.Errorf("--host is empty, expected an address")
	case o.MaxBody < 1:
		return fmt.Errorf("--max-request-size is %d, expected at least 1 byte", o.MaxBody)
	case o.MaxConnections < 0:
		return fmt.Errorf("--max-connections is %d, expected at least 1, or 0 for no bound", o.MaxConnections)
	case o.Timeout < 0 || o.ReadTimeout < 0 || o.WriteTimeout < 0 || o.DrainTimeout < 0:
		return fmt.Errorf("a timeout is negative")
	case (o.TLSCert == "") != (o.TLSKey == ""):
		return fmt.Errorf("--ssl-cert-file and --ssl-key-file must be given together")
	case o.Pooling != "last" && o.Pooling != "mean" && o.Pooling != "none":
		return fmt.Errorf("--pooling is %q, expected last, mean or none", o.Pooling)
	case o.APIPrefix != "" && (!strings.HasPrefix(o.APIPrefix, "/") || strings.HasSuffix(o.APIPrefix, "/")):
		return fmt.Errorf("--api-prefix is %q, expected a path that begins with a slash and does not end with one", o.APIPrefix)
	}
	tcp := 0
	for _, host := range o.Hosts {
		if !isSocketPath(host) {
			tcp++
		}
	}
	if o.Port == 0 && tcp > 1 {
		return fmt.Errorf("--port 0 is not possible with several addresses: each would get its own")
	}
	if _, err := os.Stat(o.ModelPath); err != nil {
		return fmt.Errorf("--model: %w", err)
	}
	if o.SlotSavePath != "" {
		path, err := filepath.Abs(o.SlotSavePath)
		if err != nil {
			return fmt.Errorf("--slot-save-path: %w", err)
		}
		if info, err := os.Stat(path); err != nil || !info.IsDir() {
			return fmt.Errorf("--slot-save-path is %q, expected a folder", o.SlotSavePath)
		}
		o.SlotSavePath = path
	}
	defaults := defaultSettings()
	if _, err := parseSettings(&body{fields: o.Defaults}, &defaults, noVocabulary{}); err != nil {
		return err
	}
	return nil
}

// noVocabulary lets defaults be checked before there is a model.
type noVocabulary struct{}

func (noVocabulary) Tokenize(string, bool, bool) ([]phd.Token, error) { return nil, nil }
func (noVocabulary) NVocab() int                                      { return 0 }
func (noVocabulary) EndTokens() []phd.Token                           { return nil }

func isSocketPath(host string) bool { return strings.HasSuffix(host, ".sock") }
