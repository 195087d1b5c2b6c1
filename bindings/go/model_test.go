package phd

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestInfo(t *testing.T) {
	info := demo(t).Info()
	want := ModelInfo{
		Architecture: "llama", WeightType: info.WeightType, Backend: info.Backend,
		NVocab: 2048, NLayers: 6, NEmbd: 192, NCtxTrain: 2048, NHeads: 6, NKVHeads: 2, HeadDim: 32, NFF: 512,
		NParams: info.NParams, NBytes: info.NBytes, HasTokenizer: true, Copies: 2, Window: 16, Chunk: 32,
	}
	if info != want {
		t.Errorf("info is %+v, expected %+v", info, want)
	}
	if info.WeightType == "" || info.Backend == "" || info.NParams < 2_000_000 || info.NBytes < info.NParams {
		t.Errorf("info is %+v", info)
	}
	if Version() == "" || ABIVersion() == 0 {
		t.Errorf("version is %q, ABI version %d", Version(), ABIVersion())
	}
}

func TestOwnRules(t *testing.T) {
	m, err := LoadModel(background, demoPath, &ModelOptions{Backend: BackendReference, Copies: 1, NoMmap: true})
	must(t, err)
	defer m.Close()
	if info := m.Info(); info.Copies != 1 || info.Window != 0 {
		t.Errorf("info is %+v, expected a vanilla model", info)
	}
}

func TestText(t *testing.T) {
	m := demo(t)
	for _, text := range []string{"", "a", verse, "naïve 🐪 \x00 text", strings.Repeat("begat ", 200)} {
		tokens := value[[]Token](t)(m.Tokenize(text, false, false))
		back := value[[]byte](t)(m.Detokenize(tokens))
		if string(back) != text {
			t.Errorf("%.40q comes back as %.40q", text, back)
		}
		var pieces []byte
		for _, token := range tokens {
			pieces = append(pieces, value[[]byte](t)(m.TokenBytes(token, false))...)
		}
		if string(pieces) != text {
			t.Errorf("the pieces of %.40q are %.40q", text, pieces)
		}
	}
	end, ok := m.SpecialToken(SpecialEOS)
	if !ok || !m.IsEnd(end) || m.IsEnd(end+1) || m.IsEnd(-1) || m.IsEnd(1<<30) {
		t.Errorf("the end token is %d, %v", end, ok)
	}
	if got := value[[]Token](t)(m.Tokenize("<|endoftext|>", false, true)); len(got) != 1 || got[0] != end {
		t.Errorf("the spelling of the end token has the tokens %v", got)
	}
	if got := value[[]byte](t)(m.TokenBytes(end, true)); string(got) != "<|endoftext|>" {
		t.Errorf("the end token is spelled %q", got)
	}
	if token, ok := m.SpecialToken(SpecialFIMPrefix); ok || token != -1 {
		t.Errorf("a model without it has a FIM token, %d", token)
	}
	if _, ok := m.SpecialToken(99); ok {
		t.Error("there is a token of a kind that does not exist")
	}
	_, err := m.Tokenize("\xff", false, false)
	wantError(t, err, ErrInvalidArgument)
	_, err = m.Detokenize([]Token{1, -1})
	wantError(t, err, ErrInvalidArgument)
	_, err = m.TokenBytes(1<<30, false)
	wantError(t, err, ErrInvalidArgument)
}

func TestChat(t *testing.T) {
	m := demo(t)
	if source, ok, err := m.ChatTemplate(""); ok || err != nil {
		t.Errorf("template %q, %v, %v, expected none", source, ok, err)
	}
	o := ChatOptions{
		Messages:  json.RawMessage(`[{"role":"user","content":"Where is Ur?"}]`),
		Tools:     json.RawMessage(`[{"name":"map"}]`),
		Documents: json.RawMessage(`[{"title":"Genesis","text":"..."}]`),
		Variables: json.RawMessage(`{"mood":"calm"}`),
		Template: `{{ messages[0].content }}|{{ tools[0].name }}|{{ documents[0].title }}|{{ mood }}|` +
			`{{ add_generation_prompt }}|{{ strftime_now("%H:%M") }}`,
		Now:                 time.Date(2024, 5, 6, 7, 8, 9, 0, time.FixedZone("here", 3600)),
		AddGenerationPrompt: true,
	}
	text := value[string](t)(m.RenderChat(o))
	if want := "Where is Ur?|map|Genesis|calm|true|07:08"; !strings.EqualFold(text, want) {
		t.Errorf("rendered %q, expected %q", text, want)
	}
	o.Template = strings.Repeat("x", 10_000) // more than the first guess
	if text := value[string](t)(m.RenderChat(o)); text != o.Template {
		t.Errorf("rendered %d bytes", len(text))
	}
	for _, broken := range []ChatOptions{{}, {Messages: json.RawMessage(`{`), Template: "x"}, {Messages: o.Messages, Template: "{{"}} {
		if text, err := m.RenderChat(broken); err == nil {
			t.Errorf("rendered %q", text)
		}
	}
}

func TestChatOfModel(t *testing.T) {
	m := chat(t)
	source, ok, err := m.ChatTemplate("")
	if !ok || err != nil || !strings.Contains(source, "<|im_start|>") {
		t.Errorf("template %q, %v, %v", source, ok, err)
	}
	if _, ok, err := m.ChatTemplate("nonesuch"); ok || err != nil {
		t.Errorf("a template nonesuch: %v, %v", ok, err)
	}
	messages := json.RawMessage(`[{"role":"user","content":"Hello"}]`)
	text := value[string](t)(m.RenderChat(ChatOptions{Messages: messages, AddGenerationPrompt: true}))
	if !strings.HasSuffix(text, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n") {
		t.Errorf("rendered %q", text)
	}
	if end, ok := m.SpecialToken(SpecialEOS); !ok || !m.IsEnd(end) {
		t.Errorf("the end token is %d, %v", end, ok)
	}
}

func TestLoadErrors(t *testing.T) {
	_, err := LoadModel(background, "/nonesuch", nil)
	wantError(t, err, ErrIO)
	if !strings.Contains(err.Error(), "/nonesuch") {
		t.Errorf("%v does not name the file", err)
	}
	garbage := filepath.Join(t.TempDir(), "model.gguf")
	for content, want := range map[string]error{"not a model": ErrFormat, "GGUFgarbage": ErrUnsupported} {
		must(t, os.WriteFile(garbage, []byte(content), 0o600))
		_, err = LoadModel(background, garbage, nil)
		wantError(t, err, want)
	}
	_, err = LoadModel(background, "a\x00b", nil)
	wantError(t, err, ErrInvalidArgument)
	for _, o := range []ModelOptions{{Backend: 77}, {Copies: -1}, {Window: 1 << 40}, {Device: -1 << 40}} {
		_, err := LoadModel(background, demoPath, &o)
		wantError(t, err, ErrInvalidArgument)
	}
	_, err = LoadModel(background, demoPath, &ModelOptions{Device: 1})
	wantError(t, err, ErrUnsupported)
}

func TestLoadProgress(t *testing.T) {
	last, calls := float32(0), 0
	m, err := LoadModel(background, demoPath, &ModelOptions{Progress: func(fraction float32) bool {
		if fraction < last || fraction > 1 {
			t.Errorf("progress goes from %v to %v", last, fraction)
		}
		last = fraction
		calls++
		return true
	}})
	must(t, err)
	must(t, m.Close())
	if calls == 0 {
		t.Error("no progress")
	}
	_, err = LoadModel(background, demoPath, &ModelOptions{Progress: func(float32) bool { return false }})
	wantError(t, err, ErrCancelled)
	if errors.Is(err, context.Canceled) {
		t.Errorf("%v is of a context", err)
	}
}

func TestLoadContext(t *testing.T) {
	ctx, cancel := context.WithCancel(background)
	_, err := LoadModel(ctx, demoPath, &ModelOptions{Progress: func(float32) bool { cancel(); return true }})
	wantError(t, err, ErrCancelled, context.Canceled)
	_, err = LoadModel(ctx, "/nonesuch", nil) // not even looked at
	wantError(t, err, ErrCancelled, context.Canceled)
}

func TestLoadPanic(t *testing.T) {
	defer func() {
		if r := recover(); r != "on purpose" {
			t.Errorf("recovered %v", r)
		}
	}()
	_, err := LoadModel(background, demoPath, &ModelOptions{Progress: func(float32) bool { panic("on purpose") }})
	t.Errorf("returned %v, expected a panic", err)
}

func TestConvert(t *testing.T) {
	folder := t.TempDir()
	full, small := filepath.Join(folder, "full.gguf"), filepath.Join(folder, "small.gguf")
	must(t, Convert(background, demoPath, full, &ConvertOptions{WeightType: WeightF16}))
	must(t, Quantize(background, full, small, &ConvertOptions{WeightType: WeightQ8_0, Pure: true, NThreads: 1}))
	m, err := LoadModel(background, small, nil)
	must(t, err)
	defer m.Close()
	if info := m.Info(); info.WeightType != "Q8_0" || info.Copies != 2 {
		t.Errorf("the converted model is %+v", info)
	}

	before, err := os.ReadFile(small)
	must(t, err)
	ctx, cancel := context.WithCancel(background)
	err = Quantize(ctx, full, small, &ConvertOptions{WeightType: WeightQ4_0, Progress: func(float32) bool { cancel(); return true }})
	wantError(t, err, ErrCancelled, context.Canceled)
	after, err := os.ReadFile(small)
	must(t, err)
	if string(before) != string(after) {
		t.Error("a cancelled conversion has changed its output")
	}
	wantError(t, Convert(ctx, demoPath, full, nil), ErrCancelled)
	wantError(t, Convert(background, folder, full, &ConvertOptions{Pre: "a\x00"}), ErrInvalidArgument)
	wantError(t, Convert(background, folder, full, &ConvertOptions{NThreads: -1}), ErrInvalidArgument)
	wantError(t, Quantize(background, full, small, &ConvertOptions{WeightType: 99}), ErrInvalidArgument)
}
