package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

func noEnv(string) string { return "" }

func parse(t *testing.T, args ...string) *config {
	t.Helper()
	c, err := parseArguments(args, noEnv)
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return c
}

func TestArguments(t *testing.T) {
	// As llama.cpp's own tests start their server.
	c := parse(t, "--port", "9000", "--temp", "0.8", "--seed", "42", "--host", "127.0.0.1,::1", "--offline", "--model", "m.gguf",
		"--batch-size", "32", "--ubatch-size", "16", "--threads", "3", "--n-gpu-layers", "99", "--cont-batching", "--embedding",
		"--metrics", "--kv-unified", "--swa-full", "--no-slots", "--pooling", "mean", "--alias", "b,a", "--tags", "x,y",
		"--ctx-size", "512", "--parallel", "2", "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on", "--n-predict", "-1",
		"--slot-save-path", "/tmp", "--verbose", "--context-shift", "--api-key", "k1,k2", "--no-ui", "--no-jinja",
		"--reasoning-format", "none", "--reasoning", "off", "--cache-ram", "100", "--no-cache-idle-slots")
	o := c.options
	if o.Port != 9000 || fmt.Sprint(o.Hosts) != "[127.0.0.1 ::1]" || o.ModelPath != "m.gguf" || o.Piece != 32 || o.Threads != 3 ||
		!o.EndpointMetrics || !o.Unified || o.EndpointSlots || o.Pooling != "mean" || fmt.Sprint(o.Aliases) != "[b a]" ||
		fmt.Sprint(o.Tags) != "[x y]" || o.Context != 512 || o.Slots != 2 || o.CacheType != phd.CacheQ8_0 || o.SlotSavePath != "/tmp" ||
		c.logLevel != slog.LevelDebug || !o.ContextShift || fmt.Sprint(o.APIKeys) != "[k1 k2]" || c.ui || o.Jinja ||
		o.ReasoningFormat != "none" || o.Reasoning != "off" {
		t.Errorf("%+v", o)
	}
	for name, value := range map[string]string{"temperature": "0.8", "seed": "42", "n_predict": "-1"} {
		if string(o.Defaults[name]) != value {
			t.Errorf("%s is %s", name, o.Defaults[name])
		}
	}
	notes := strings.Join(c.notes, "\n")
	for _, name := range []string{"--ubatch-size", "--n-gpu-layers", "--flash-attn", "--cache-ram", "--cache-idle-slots", "--swa-full"} {
		if !strings.Contains(notes, name+" changes nothing: ") {
			t.Errorf("nothing is said about %s: %s", name, notes)
		}
	}
	if strings.Contains(notes, "offline") {
		t.Errorf("something is said about --offline: %s", notes)
	}
}

func TestShortForms(t *testing.T) {
	c := parse(t, "-m", "m.gguf", "-c", "256", "-np", "3", "-t", "-1", "-b", "8", "-n", "5", "-s", "1", "-a", "x", "-cb", "-nocb",
		"-kvu", "-no-kvu", "-ub", "4", "-ngl", "9", "-to", "1.5", "-v", "--webui", "--no-webui", "--top-k=7", "-sps", "0.5")
	o := c.options
	if o.ModelPath != "m.gguf" || o.Context != 256 || o.Slots != 3 || o.Threads != 0 || o.Piece != 8 || string(o.Defaults["n_predict"]) != "5" ||
		o.Unified || o.Timeout != 1500*time.Millisecond || c.ui || string(o.Defaults["top_k"]) != "7" {
		t.Errorf("%+v", o)
	}
	// A value that looks like another option's short form stays what it is.
	if c := parse(t, "--chat-template", "-np", "--alias=-np"); c.options.ChatTemplate != "-np" || c.options.Aliases[0] != "-np" {
		t.Errorf("%+v", c.options)
	}
	// Of an option and its opposite the last one counts.
	if c := parse(t, "--no-slots", "--slots", "--ui", "--no-ui"); !c.options.EndpointSlots || c.ui {
		t.Errorf("%+v", c.options)
	}
}

func TestFiles(t *testing.T) {
	folder := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(folder, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	keys := write("keys", "# for the tests\nfirst\n\n  second \r\n")
	template := write("template", "{{ messages }}")
	c := parse(t, "--api-key-file", keys, "--api-key", "third", "--chat-template-file", template, "--chat-template-kwargs", `{"a": 1}`)
	if fmt.Sprint(c.options.APIKeys) != "[first second third]" || c.options.ChatTemplate != "{{ messages }}" || string(c.options.ChatTemplateKwargs) != `{"a": 1}` {
		t.Errorf("%+v", c.options)
	}
	empty := write("empty", "# none\n")
	if _, err := parseArguments([]string{"--api-key-file", empty}, noEnv); err == nil {
		t.Error("a file without keys leaves the server open")
	}
}

func TestEnvironment(t *testing.T) {
	env := map[string]string{"LLAMA_ARG_PORT": "7000", "LLAMA_ARG_HOST": "192.0.2.1", "LLAMA_API_KEY": "secret", "LLAMA_ARG_ENDPOINT_METRICS": "1",
		"LLAMA_ARG_UI": "off"}
	c, err := parseArguments([]string{"--host", "127.0.0.1"}, func(name string) string { return env[name] })
	if err != nil {
		t.Fatal(err)
	}
	if o := c.options; o.Port != 7000 || fmt.Sprint(o.Hosts) != "[127.0.0.1]" || fmt.Sprint(o.APIKeys) != "[secret]" || !o.EndpointMetrics || c.ui {
		t.Errorf("%+v", o)
	}
	env["LLAMA_ARG_PORT"] = "many"
	if _, err := parseArguments(nil, func(name string) string { return env[name] }); err == nil || !strings.Contains(err.Error(), "LLAMA_ARG_PORT") {
		t.Errorf("%v", err)
	}
}

func TestWrongArguments(t *testing.T) {
	for args, message := range map[string]string{
		"--nonsense":                 "unknown flag: --nonsense",
		"-x":                         "unknown shorthand",
		"model.gguf":                 `unexpected argument "model.gguf"`,
		"--port":                     "needs an argument",
		"--port many":                "--port",
		"--ctx-size 1.5":             "expected a whole number",
		"--temp hot":                 "expected a number",
		"--temp NaN":                 "expected a number",
		"-ctk f32 -ctv f16":          "the same type",
		"-ctk q4_0":                  "expected f32, f16, bf16 or q8_0",
		"--pooling rank":             "expected one of last, mean, none",
		"--backend tpu":              "expected auto, cpu, cuda or reference",
		"--timeout -1":               "expected seconds",
		"--log-format xml":           "expected one of text, json",
		"--log-level loud":           "expected debug, info, warn or error",
		"--chat-template-kwargs [1]": "expected a JSON object",
		"--chat-template-file /none": "no such file",
		"--api-key ,":                "expected at least one key",
		"--slots=maybe":              "expected on or off",
		"--hf-repo a/b":              "nothing is downloaded",
		"--lora a.gguf":              "LoRA",
		"--mmproj a.gguf":            "text only",
		"--reranking":                "rank documents",
	} {
		if _, err := parseArguments(strings.Fields(args), noEnv); err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: %v, expected %q", args, err, message)
		}
	}
	if _, err := parseArguments([]string{"--help"}, noEnv); !errors.Is(err, errHelp) {
		t.Error(err)
	}
	if _, err := parseArguments([]string{"--version"}, noEnv); !errors.Is(err, errVersion) {
		t.Error(err)
	}
}

// TestUsage makes sure that all that is shown has a description, and that nothing is shown that does nothing.
func TestUsage(t *testing.T) {
	c, _ := parseArguments([]string{"--help"}, noEnv)
	usage := c.usage()
	for _, i := range ignored {
		if name := strings.Fields(i.names)[0] + " "; strings.Contains(usage, name) {
			t.Errorf("%s is shown", name)
		}
	}
	for _, line := range strings.Split(usage, "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "-") && len(strings.Fields(line)) < 3 {
			t.Errorf("no description: %s", line)
		}
	}
	for name, env := range c.envs {
		if c.flags.Lookup(name) == nil {
			t.Errorf("%s is for --%s, which is none", env, name)
		}
	}
	for spelling, name := range c.aliases {
		if c.flags.Lookup(strings.TrimPrefix(name, "--")) == nil {
			t.Errorf("%s is for %s, which is none", spelling, name)
		}
	}
}
