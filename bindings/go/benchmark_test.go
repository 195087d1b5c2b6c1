package phd

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/libphd/libphd/bindings/go/internal/cloop"
)

// writeTinyModel writes a checkpoint of token ids whose steps take next to no time, so that what a call costs shows.
func writeTinyModel(t testing.TB) string {
	t.Helper()
	const vocab, width, ff = 64, 32, 32
	folder := t.TempDir()
	config := value[[]byte](t)(json.Marshal(map[string]any{
		"architectures": []string{"LlamaForCausalLM"}, "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
		"hidden_size": width, "intermediate_size": ff, "num_hidden_layers": 1, "num_attention_heads": 1,
		"num_key_value_heads": 1, "head_dim": width, "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
		"max_position_embeddings": 4096, "tie_word_embeddings": true,
	}))
	must(t, os.WriteFile(filepath.Join(folder, "config.json"), config, 0o600))
	header := map[string]any{}
	var data bytes.Buffer
	for _, tensor := range []struct {
		name  string
		shape []int
	}{
		{"model.embed_tokens.weight", []int{vocab, width}},
		{"model.norm.weight", []int{width}},
		{"model.layers.0.input_layernorm.weight", []int{width}},
		{"model.layers.0.post_attention_layernorm.weight", []int{width}},
		{"model.layers.0.self_attn.q_proj.weight", []int{width, width}},
		{"model.layers.0.self_attn.k_proj.weight", []int{width, width}},
		{"model.layers.0.self_attn.v_proj.weight", []int{width, width}},
		{"model.layers.0.self_attn.o_proj.weight", []int{width, width}},
		{"model.layers.0.mlp.gate_proj.weight", []int{ff, width}},
		{"model.layers.0.mlp.up_proj.weight", []int{ff, width}},
		{"model.layers.0.mlp.down_proj.weight", []int{width, ff}},
	} {
		begin, n := data.Len(), 1
		for _, d := range tensor.shape {
			n *= d
		}
		for i := range n {
			must(t, binary.Write(&data, binary.LittleEndian, float32(math.Sin(float64(begin+i)))/4))
		}
		header[tensor.name] = map[string]any{"dtype": "F32", "shape": tensor.shape, "data_offsets": []int{begin, data.Len()}}
	}
	head := value[[]byte](t)(json.Marshal(header))
	file := binary.LittleEndian.AppendUint64(nil, uint64(len(head)))
	file = append(append(file, head...), data.Bytes()...)
	must(t, os.WriteFile(filepath.Join(folder, "model.safetensors"), file, 0o600))
	return folder
}

func newTinySequence(t testing.TB) *Sequence {
	t.Helper()
	m := value[*Model](t)(LoadModel(background, writeTinyModel(t), nil))
	t.Cleanup(func() { must(t, m.Close()) })
	return newSession(t, m, &SessionOptions{NThreads: 1}).Sequence(0)
}

// BenchmarkStepOverhead compares steps through Go with steps in a loop of C, in turn, and fails if Go's cost 2
// microseconds more. An operation is a block of 100 steps of each.
func BenchmarkStepOverhead(b *testing.B) {
	const block, bar = 100, 2 * time.Microsecond
	q := newTinySequence(b)
	s := q.Session()
	ctx, cancel := context.WithCancel(background)
	defer cancel()
	ways := []struct {
		name  string
		steps func()
	}{
		{"C", func() {
			if status := cloop.Steps(unsafe.Pointer(s.ptr), 0, 5, block); status != 0 {
				b.Fatal(Status(status))
			}
		}},
		{"Go", func() {
			for range block {
				must(b, q.Step(background, 5))
			}
		}},
		{"Go-context", func() {
			for range block {
				must(b, q.Step(ctx, 5))
			}
		}},
		{"Go-Decode", func() {
			token := []Token{5}
			entries := []Entry{{Sequence: q, Tokens: token, Logits: true}}
			for range block {
				must(b, s.Decode(background, entries))
			}
		}},
	}
	times := make([][]float64, len(ways))
	for b.Loop() {
		for i, way := range ways {
			must(b, q.Truncate(0))
			begin := time.Now()
			way.steps()
			times[i] = append(times[i], float64(time.Since(begin).Nanoseconds())/block)
		}
	}
	b.ReportMetric(0, "ns/op")
	for i, way := range ways {
		slices.Sort(times[i])
		median := times[i][len(times[i])/2]
		b.ReportMetric(median, fmt.Sprintf("ns/step-%s", way.name))
		// The least is compared: what else the machine does only adds.
		if more := times[i][0] - times[0][0]; more > float64(bar.Nanoseconds()) {
			b.Errorf("a step through %s costs %.0f ns more than through C", way.name, more)
		}
	}
}

// BenchmarkGenerate is a step, sampling and the token's text, on the demo model.
func BenchmarkGenerate(b *testing.B) {
	m := demo(b)
	q := newSession(b, m, nil).Sequence(0)
	sampler, stream := newSamplerOf(b, m, nil), newStream(b, m)
	must(b, q.Prefill(background, tokensOf(b, m, verse)))
	start := q.Len()
	b.ReportAllocs()
	for b.Loop() {
		if q.Len() > 500 {
			must(b, q.Truncate(start))
			must(b, q.Step(background, 5))
		}
		token := value[Token](b)(sampler.Sample(q))
		must(b, sampler.Accept(token))
		value[string](b)(stream.Push(token))
		must(b, q.Step(background, token))
	}
}
