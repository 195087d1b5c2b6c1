package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/server"
)

var (
	errHelp    = errors.New("help was asked for")
	errVersion = errors.New("the version was asked for")
)

// A config is what the command line says.
type config struct {
	flags     *pflag.FlagSet
	options   server.Options
	ui        bool
	logFormat string
	logLevel  slog.Level
	notes     []string // about options that were given and do nothing
	envs      map[string]string
	aliases   map[string]string // other spellings, with their dashes, of options
}

// ignored are options of llama-server that change nothing here, and why.
var ignored = []struct {
	names string // the first is the one that is registered
	value bool   // takes one
	why   string
}{
	{"--offline", false, ""}, // nothing is ever downloaded
	{"--cont-batching -cb --no-cont-batching -nocb", false, ""},
	{"--embeddings --embedding", false, ""},
	{"--warmup --no-warmup", false, "there is nothing to warm up"},
	{"--ubatch-size -ub", true, "--batch-size says how many prompt tokens a batch has"},
	{"--flash-attn -fa", true, "attention has one implementation"},
	{"--n-gpu-layers -ngl --gpu-layers", true, "a model runs on one backend as a whole"},
	{"--threads-batch -tb", true, "--threads holds for prompts, too"},
	{"--threads-http", true, "requests need no threads of their own"},
	{"--mlock", false, "weights are not locked"},
	{"--numa", true, "threads are not bound to nodes"},
	{"--prio", true, "the process keeps its priority"},
	{"--poll", true, "waiting threads choose themselves"},
	{"--swa-full", false, "the cache keeps all positions in any case"},
	{"--cache-reuse", true, "prefixes are reused, pieces from within a text are not"},
	{"--cache-ram -cram", true, "texts are kept in the cache itself"},
	{"--cache-idle-slots --no-cache-idle-slots", false, "texts are kept in the cache itself"},
	{"--ctx-checkpoints -ctxcp --swa-checkpoints", true, "prefixes need no checkpoints"},
	{"--slot-prompt-similarity -sps", true, "the longest common prefix decides"},
	{"--model-draft -md --spec-draft-model", true, "the server does not draft; answers are the same without"},
	{"--spec-type", true, "the server does not draft; answers are the same without"},
	{"--spec-draft-n-max", true, "the server does not draft"},
	{"--spec-draft-n-min", true, "the server does not draft"},
	{"--backend-sampling --backend_sampling -bs", false, "the backend does not sample"},
	{"--perf --no-perf", false, ""},
	{"--log-disable", false, "use --log-level error"},
	{"--log-colors", true, ""},
	{"--log-timestamps", false, ""},
	{"--log-prefix", false, ""},
}

// refused are options of llama-server that would change what the user gets, and are not there.
var refused = []struct {
	names string
	value bool
	why   string
}{
	{"--hf-repo -hf -hfr --hf-file -hff", true, "nothing is downloaded: give --model a file or folder"},
	{"--model-url -mu", true, "nothing is downloaded: give --model a file or folder"},
	{"--lora --lora-scaled", true, "LoRA adapters are not supported"},
	{"--mmproj -mm --mmproj-url -mmu", true, "models read text only"},
	{"--models-dir --models-preset", true, "a server has one model: run several, and a proxy before them"},
	{"--reranking --rerank", false, "models that rank documents are not supported"},
	{"--tools", true, "the server runs no tools: its clients do"},
	{"--path", true, "no files are served but the built-in page"},
}

// parseArguments reads the command line, and the environment for what is not in it. With an error that is not nil the config
// can still tell how it is used.
func parseArguments(args []string, getenv func(string) string) (*config, error) {
	c := &config{
		flags:     pflag.NewFlagSet("phd-server", pflag.ContinueOnError),
		options:   server.DefaultOptions(),
		ui:        true,
		logFormat: "text",
		envs:      map[string]string{},
		aliases:   map[string]string{},
	}
	c.options.Defaults = map[string]json.RawMessage{}
	c.flags.SortFlags = false
	c.flags.Usage = func() {}
	help, version := false, false
	c.flags.BoolVarP(&help, "help", "h", false, "show this and exit")
	c.flags.BoolVar(&version, "version", false, "show the version and exit")
	c.register()
	args, err := c.spell(args)
	if err == nil {
		err = c.flags.Parse(args)
	}
	switch {
	case help || errors.Is(err, pflag.ErrHelp):
		return c, errHelp
	case version:
		return c, errVersion
	case err != nil:
		return c, fmt.Errorf("%w (--help lists all options)", err)
	case c.flags.NArg() > 0:
		return c, fmt.Errorf("unexpected argument %q", c.flags.Arg(0))
	}
	for name, env := range c.envs {
		if value := getenv(env); value != "" && !c.flags.Changed(name) {
			if err := c.flags.Set(name, value); err != nil {
				return c, fmt.Errorf("%s: %w", env, err)
			}
		}
	}
	return c, nil
}

func (c *config) usage() string {
	return "Usage: phd-server --model PATH [options]\n\nServes a model with llama-server's interface; docs/server.md says more.\n\n" +
		c.flags.FlagUsages()
}

// register says which options there are.
func (c *config) register() {
	o := &c.options
	f := c.flags

	f.StringVarP(&o.ModelPath, "model", "m", "", "GGUF file or Hub `folder`")
	c.env("model", "LLAMA_ARG_MODEL")
	c.list(&o.Aliases, "alias", "a", "`names` of the model for clients, separated by commas")
	c.env("alias", "LLAMA_ARG_ALIAS")
	c.list(&o.Tags, "tags", "", "`words` about the model for clients, separated by commas")
	f.Func("backend", "what computes: auto, cpu, cuda or reference", func(value string) error {
		backends := map[string]phd.Backend{"auto": phd.BackendAuto, "cpu": phd.BackendCPU, "cuda": phd.BackendCUDA,
			"reference": phd.BackendReference}
		backend, ok := backends[value]
		o.ModelOptions.Backend = backend
		return expect(ok, "auto, cpu, cuda or reference")
	})
	f.IntVar(&o.ModelOptions.Copies, "copies", 0, "K, how often each token is read, instead of what the model says")
	f.IntVar(&o.ModelOptions.Window, "window", 0, "W, with --copies")
	f.IntVar(&o.ModelOptions.Chunk, "chunk", 0, "C, with --copies")
	c.toggle("mmap", "map the file instead of reading it (default on)", func(on bool) { o.ModelOptions.NoMmap = !on })

	c.number(&o.Context, "ctx-size", "c", "positions of the cache, for all slots together; 0: as the model was trained for")
	c.env("ctx-size", "LLAMA_ARG_CTX_SIZE")
	c.number(&o.Slots, "parallel", "", "requests that are worked on at once (default 4, sharing the cache)")
	c.alias("parallel", "-np")
	c.env("parallel", "LLAMA_ARG_N_PARALLEL")
	c.toggle("kv-unified", "one request may use the whole cache instead of its slot's part", func(on bool) { o.Unified = on })
	c.alias("kv-unified", "-kvu")
	c.alias("no-kv-unified", "-no-kvu")
	c.number(&o.Threads, "threads", "t", "threads that compute; 0: one per physical core that the process may use")
	c.env("threads", "LLAMA_ARG_THREADS")
	c.number(&o.Piece, "batch-size", "b", "prompt tokens that are evaluated at once (default 512)")
	c.env("batch-size", "LLAMA_ARG_BATCH")
	var k, v string
	for _, side := range []struct {
		out               *string
		name, short, what string
	}{{&k, "cache-type-k", "-ctk", "keys"}, {&v, "cache-type-v", "-ctv", "values"}} {
		f.Func(side.name, "`type` of cached "+side.what+": f32, f16, bf16 or q8_0, the same for keys and values (default f16)", func(value string) error {
			*side.out = value
			if k != "" && v != "" && k != v {
				return errors.New("keys and values must have the same type")
			}
			types := map[string]phd.CacheType{"f32": phd.CacheF32, "f16": phd.CacheF16, "bf16": phd.CacheBF16, "q8_0": phd.CacheQ8_0}
			cacheType, ok := types[value]
			o.CacheType = cacheType
			return expect(ok, "f32, f16, bf16 or q8_0")
		})
		c.alias(side.name, side.short)
	}
	c.toggle("context-shift", "drop the older half of a text that has filled its slot", func(on bool) { o.ContextShift = on })
	c.env("context-shift", "LLAMA_ARG_CONTEXT_SHIFT")
	f.IntVar(&o.MaxQueue, "max-queue", o.MaxQueue, "requests that may wait for a slot; more get status 429")

	c.field("n_predict", "predict", "n", "tokens of an answer; -1: until the context is full")
	c.alias("predict", "--n-predict")
	c.env("predict", "LLAMA_ARG_N_PREDICT")
	c.field("n_keep", "keep", "", "tokens at the beginning that a context shift keeps; -1: the prompt")
	for _, s := range [][3]string{
		{"temperature", "temp", "0: always the most probable token (default 0.8)"},
		{"top_k", "top-k", "0: off (default 40)"},
		{"top_p", "top-p", "1: off (default 0.95)"},
		{"min_p", "min-p", "0: off (default 0.05)"},
		{"top_n_sigma", "top-nsigma", "-1: off (default)"},
		{"typical_p", "typical", "1: off (default)"},
		{"xtc_probability", "xtc-probability", "0: off (default)"},
		{"xtc_threshold", "xtc-threshold", "above 0.5: off (default 0.1)"},
		{"repeat_last_n", "repeat-last-n", "tokens that the penalties look at (default 64)"},
		{"repeat_penalty", "repeat-penalty", "1: off (default)"},
		{"presence_penalty", "presence-penalty", "0: off (default)"},
		{"frequency_penalty", "frequency-penalty", "0: off (default)"},
		{"dry_multiplier", "dry-multiplier", "0: off (default)"},
		{"dry_base", "dry-base", "(default 1.75)"},
		{"dry_allowed_length", "dry-allowed-length", "(default 2)"},
		{"dry_penalty_last_n", "dry-penalty-last-n", "(default 64)"},
		{"dynatemp_range", "dynatemp-range", "0: off (default)"},
		{"dynatemp_exponent", "dynatemp-exp", "(default 1)"},
		{"mirostat", "mirostat", "2: Mirostat 2.0; 0: off (default)"},
		{"mirostat_eta", "mirostat-lr", "(default 0.1)"},
		{"mirostat_tau", "mirostat-ent", "(default 5)"},
	} {
		c.field(s[0], s[1], "", s[0]+" of requests that do not say it: "+s[2])
	}
	c.alias("temp", "--temperature")
	c.field("seed", "seed", "s", "seed of requests that do not say it; -1: any (default)")
	f.Func("samplers", "stages of sampling in their order, separated by semicolons", func(value string) error {
		o.Defaults["samplers"] = jsonOf(strings.Split(value, ";"))
		return nil
	})
	f.Func("sampling-seq", "the same as letters, such as edskypmxt", func(value string) error {
		o.Defaults["samplers"] = jsonOf(value)
		return nil
	})
	c.flag("ignore-eos", "go on after the end of the text", func(on bool) { o.Defaults["ignore_eos"] = jsonOf(on) })
	c.toggle("cache-prompt", "take over what is cached of a prompt (default on)", func(on bool) { o.Defaults["cache_prompt"] = jsonOf(on) })
	c.field("sse_ping_interval", "sse-ping-interval", "", "seconds of silence after which a stream gets a comment; -1: never (default 30)")

	c.toggle("jinja", "render chats by the model's own template (default on)", func(on bool) { o.Jinja = on })
	c.env("jinja", "LLAMA_ARG_JINJA")
	f.StringVar(&o.ChatTemplate, "chat-template", "", "`Jinja` source instead of the model's chat template")
	c.env("chat-template", "LLAMA_ARG_CHAT_TEMPLATE")
	f.Func("chat-template-file", "the same from a `file`", func(path string) error {
		source, err := os.ReadFile(path)
		o.ChatTemplate = string(source)
		return err
	})
	c.env("chat-template-file", "LLAMA_ARG_CHAT_TEMPLATE_FILE")
	f.Func("chat-template-kwargs", "`JSON` object of variables for the chat template", func(value string) error {
		o.ChatTemplateKwargs = json.RawMessage(value)
		var object map[string]any
		return expect(json.Unmarshal([]byte(value), &object) == nil && object != nil, "a JSON object")
	})
	c.choice(&o.ReasoningFormat, "reasoning-format", []string{"none", "deepseek", "deepseek-legacy", "auto"}, "where thoughts go")
	c.choice(&o.Reasoning, "reasoning", []string{"on", "off", "auto"}, "whether models that can think do")
	c.alias("reasoning", "-rea")
	c.toggle("prefill-assistant", "go on with a last message that is the assistant's (default on)", func(on bool) { o.PrefillAssistant = on })

	c.toggle("slots", "show what the slots do at /slots (default on)", func(on bool) { o.EndpointSlots = on })
	c.env("slots", "LLAMA_ARG_ENDPOINT_SLOTS")
	c.flag("metrics", "show counters for Prometheus at /metrics", func(on bool) { o.EndpointMetrics = on })
	c.env("metrics", "LLAMA_ARG_ENDPOINT_METRICS")
	c.flag("props", "allow POST /props", func(on bool) { o.EndpointProps = on })
	c.env("props", "LLAMA_ARG_ENDPOINT_PROPS")
	c.choice(&o.Pooling, "pooling", []string{"last", "mean", "none"}, "what an embedding is of")
	f.StringVar(&o.SlotSavePath, "slot-save-path", "", "`folder` in which clients may save slots, and restore them from")
	c.toggle("ui", "show a page at / (default on)", func(on bool) { c.ui = on })
	c.alias("ui", "--webui")
	c.alias("no-ui", "--no-webui")
	c.env("ui", "LLAMA_ARG_UI")

	c.list(&o.Hosts, "host", "", "`addresses` to listen at, separated by commas; paths that end in .sock are UNIX sockets (default 127.0.0.1)")
	c.env("host", "LLAMA_ARG_HOST")
	f.IntVar(&o.Port, "port", o.Port, "0: any that is free")
	c.env("port", "LLAMA_ARG_PORT")
	f.StringVar(&o.APIPrefix, "api-prefix", "", "`path` before all routes, such as /llm")
	c.env("api-prefix", "LLAMA_ARG_API_PREFIX")
	f.Func("api-key", "`keys` that clients may use, separated by commas", func(value string) error { return c.addKeys(strings.Split(value, ",")) })
	c.env("api-key", "LLAMA_API_KEY")
	f.Func("api-key-file", "`file` of such keys, one a line", func(path string) error {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		lines := slices.DeleteFunc(strings.Split(string(text), "\n"), func(line string) bool {
			line = strings.TrimSpace(line)
			return line == "" || strings.HasPrefix(line, "#")
		})
		return c.addKeys(lines)
	})
	c.env("api-key-file", "LLAMA_ARG_API_KEY_FILE")
	f.StringVar(&o.TLSCert, "ssl-cert-file", "", "PEM `file` of the certificate, for HTTPS")
	c.env("ssl-cert-file", "LLAMA_ARG_SSL_CERT_FILE")
	f.StringVar(&o.TLSKey, "ssl-key-file", "", "PEM `file` of its key")
	c.env("ssl-key-file", "LLAMA_ARG_SSL_KEY_FILE")
	c.list(&o.CORS.Origins, "cors-origins", "", "web `pages` that may call, separated by commas; localhost: those of this machine (default *)")
	c.env("cors-origins", "LLAMA_ARG_CORS_ORIGINS")
	f.StringVar(&o.CORS.Methods, "cors-methods", o.CORS.Methods, "`methods` that they may use")
	f.StringVar(&o.CORS.Headers, "cors-headers", o.CORS.Headers, "`headers` that they may send")
	c.toggle("cors-credentials", "whether they may send credentials (default on)", func(on bool) { o.CORS.Credentials = on })
	f.Int64Var(&o.MaxBody, "max-request-size", o.MaxBody, "`bytes` of a request")
	f.IntVar(&o.MaxConnections, "max-connections", 0, "connections at once; 0: no bound")
	c.seconds(&o.Timeout, "timeout", "`seconds` that a request may take; 0: no bound (default 3600)")
	c.alias("timeout", "-to")
	c.env("timeout", "LLAMA_ARG_TIMEOUT")
	c.seconds(&o.ReadTimeout, "read-timeout", "`seconds` that a client may take to send a request; 0: no bound (default 60)")
	c.seconds(&o.WriteTimeout, "write-timeout", "`seconds` that a client may take to read what is written; 0: no bound (default 30)")
	c.seconds(&o.DrainTimeout, "drain-timeout", "`seconds` that requests may go on when the server is told to stop (default 30)")

	c.choice(&c.logFormat, "log-format", []string{"text", "json"}, "how the log looks")
	f.Func("log-level", "debug, info, warn or error (default info)", func(value string) error {
		return expect(c.logLevel.UnmarshalText([]byte(value)) == nil, "debug, info, warn or error")
	})
	c.flag("verbose", "the same as --log-level debug", func(on bool) {
		if on {
			c.logLevel = slog.LevelDebug
		}
	})
	c.alias("verbose", "-v")

	for _, i := range ignored {
		c.foreign(i.names, i.value, func(name string) error {
			if i.why != "" {
				c.notes = append(c.notes, fmt.Sprintf("--%s changes nothing: %s", name, i.why))
			}
			return nil
		})
	}
	for _, r := range refused {
		c.foreign(r.names, r.value, func(string) error { return errors.New(r.why) })
	}
}

// env lets an environment variable stand for an option that is not given.
func (c *config) env(name, variable string) { c.envs[name] = variable }

// alias makes another spelling, with its dashes, stand for an option.
func (c *config) alias(name, spelling string) { c.aliases[spelling] = "--" + name }

// foreign registers an option of llama-server's that is known and not shown.
func (c *config) foreign(names string, takesValue bool, set func(name string) error) {
	spellings := strings.Fields(names)
	name := strings.TrimPrefix(spellings[0], "--")
	if takesValue {
		c.flags.Func(name, "", func(string) error { return set(name) })
	} else {
		c.flags.BoolFunc(name, "", func(string) error { return set(name) })
	}
	c.flags.Lookup(name).Hidden = true
	for _, spelling := range spellings[1:] {
		c.alias(name, spelling)
	}
}

func (c *config) flag(name, usage string, set func(bool)) {
	c.flags.BoolFunc(name, usage, func(value string) error {
		on, err := parseBool(value)
		if err == nil {
			set(on)
		}
		return err
	})
}

// toggle registers an option and its opposite; the one that is given last counts.
func (c *config) toggle(name, usage string, set func(bool)) {
	c.flag(name, usage, set)
	c.flag("no-"+name, "the opposite", func(on bool) { set(!on) })
}

// parseBool reads what llama-server takes in the environment.
func parseBool(value string) (bool, error) {
	switch strings.ToLower(value) {
	case "1", "true", "on", "enabled":
		return true, nil
	case "0", "false", "off", "disabled":
		return false, nil
	}
	return false, errors.New("expected on or off")
}

// number registers a whole number for which llama-server's -1, like 0, stands for the default.
func (c *config) number(out *int, name, short, usage string) {
	c.flags.VarP(funcValue(func(value string) error {
		n, err := strconv.Atoi(value)
		if *out = n; n == -1 {
			*out = 0
		}
		return expect(err == nil, "a whole number")
	}), name, short, usage)
}

// field registers an option that is a number and stands for a field of requests.
func (c *config) field(field, name, short, usage string) {
	c.flags.VarP(funcValue(func(value string) error {
		_, err := strconv.ParseFloat(value, 64)
		if err != nil || !json.Valid([]byte(value)) {
			return errors.New("expected a number")
		}
		c.options.Defaults[field] = json.RawMessage(value)
		return nil
	}), name, short, usage)
}

func (c *config) list(out *[]string, name, short, usage string) {
	c.flags.VarP(funcValue(func(value string) error {
		*out = nil
		for _, item := range strings.Split(value, ",") {
			if item = strings.TrimSpace(item); item != "" {
				*out = append(*out, item)
			}
		}
		return nil
	}), name, short, usage)
}

func (c *config) choice(out *string, name string, choices []string, usage string) {
	expected := strings.Join(choices, ", ")
	c.flags.Func(name, fmt.Sprintf("%s: %s (default %s)", usage, expected, *out), func(value string) error {
		*out = value
		return expect(slices.Contains(choices, value), "one of "+expected)
	})
}

func (c *config) seconds(out *time.Duration, name, usage string) {
	c.flags.Func(name, usage, func(value string) error {
		n, err := strconv.ParseFloat(value, 64)
		if err != nil || n < 0 || n > 1e9 {
			return errors.New("expected seconds")
		}
		*out = time.Duration(n * float64(time.Second))
		return nil
	})
}

func (c *config) addKeys(keys []string) error {
	for _, key := range keys {
		if key = strings.TrimSpace(key); key != "" {
			c.options.APIKeys = append(c.options.APIKeys, key)
		}
	}
	return expect(len(c.options.APIKeys) > 0, "at least one key")
}

// spell replaces llama-server's short options of several letters, which no Unix library reads, and its second spellings.
func (c *config) spell(args []string) ([]string, error) {
	spelled := make([]string, 0, len(args))
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			return append(spelled, args[i:]...), nil
		}
		name, _, hasValue := strings.Cut(arg, "=")
		if replacement, ok := c.aliases[name]; ok {
			arg = replacement + strings.TrimPrefix(arg, name)
			name = replacement
		}
		spelled = append(spelled, arg)
		var flag *pflag.Flag
		if rest, ok := strings.CutPrefix(name, "--"); ok {
			flag = c.flags.Lookup(rest)
		} else if len(name) == 2 && name[0] == '-' {
			flag = c.flags.ShorthandLookup(name[1:])
		}
		if flag != nil && flag.NoOptDefVal == "" && !hasValue && i+1 < len(args) {
			i++
			spelled = append(spelled, args[i]) // a value, whatever it looks like
		}
	}
	return spelled, nil
}

// funcValue is an option with a short form whose value is read by a function.
type funcValue func(string) error

func (f funcValue) Set(value string) error { return f(value) }
func (f funcValue) String() string         { return "" }
func (f funcValue) Type() string           { return "value" }

func expect(ok bool, what string) error {
	if !ok {
		return errors.New("expected " + what)
	}
	return nil
}

// jsonOf is a value as JSON; all that are used here have one.
func jsonOf(value any) json.RawMessage {
	data, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return data
}
