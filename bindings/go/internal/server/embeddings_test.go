package server

import (
	"encoding/base64"
	"encoding/binary"
	"math"
	"net/http"
	"strings"
	"testing"
)

// vector is the embedding in an answer to /v1/embeddings.
func vector(t *testing.T, answer object, i int) []float64 {
	t.Helper()
	data := answer["data"].([]any)[i].(object)
	if data["index"] != float64(i) || data["object"] != "embedding" {
		t.Errorf("embedding %d: %v, %v", i, data["index"], data["object"])
	}
	var v []float64
	for _, x := range data["embedding"].([]any) {
		v = append(v, x.(float64))
	}
	return v
}

func same(a, b []float64) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !near(a[i], b[i]) {
			return false
		}
	}
	return true
}

func TestEmbeddings(t *testing.T) {
	ts := open(t, nil)
	answer := ts.post("/v1/embeddings", object{"model": "mine", "input": []any{genesis, "And God said", genesis,
		object{"content": []object{{"type": "text", "text": "And God "}, {"type": "text", "text": "said"}}}}})
	first := vector(t, answer, 0)
	length := 0.0
	for _, x := range first {
		length += x * x
	}
	if len(first) != 192 || !near(length, 1) {
		t.Errorf("%d dimensions, length %v", len(first), length)
	}
	if !same(first, vector(t, answer, 2)) || !same(vector(t, answer, 1), vector(t, answer, 3)) || same(first, vector(t, answer, 1)) {
		t.Error("embeddings of the same text differ, or those of different ones do not")
	}
	n := 0
	for _, text := range []string{genesis, "And God said", genesis, "And God said"} {
		n += len(ts.post("/tokenize", object{"content": text})["tokens"].([]any))
	}
	if usage := answer["usage"].(object); usage["prompt_tokens"] != float64(n) || usage["total_tokens"] != float64(n) || answer["model"] != "mine" {
		t.Errorf("usage: %v of %d tokens; model %v", usage, n, answer["model"])
	}

	encoded := ts.post("/v1/embeddings", object{"input": genesis, "encoding_format": "base64"})["data"].([]any)[0].(object)
	bytes, err := base64.StdEncoding.DecodeString(encoded["embedding"].(string))
	if err != nil {
		t.Fatal(err)
	}
	var decoded []float64
	for ; len(bytes) >= 4; bytes = bytes[4:] {
		decoded = append(decoded, float64(math.Float32frombits(binary.LittleEndian.Uint32(bytes))))
	}
	if !same(first, decoded) {
		t.Error("base64 is another embedding")
	}

	for _, path := range []string{"/embedding", "/embeddings"} {
		_, value := ts.call("POST", path, object{"content": genesis})
		plain := value.([]any)[0].(object)["embedding"].([]any)[0].([]any)
		if len(plain) != 192 || !near(plain[0].(float64), first[0]) {
			t.Errorf("%s: %v", path, plain[:3])
		}
	}
}

func TestNormalization(t *testing.T) {
	ts := open(t, func(o *Options) { o.Pooling = "mean" })
	raw := vector(t, ts.post("/v1/embeddings", object{"input": genesis, "embd_normalize": -1}), 0)
	for norm, size := range map[int]func([]float64) float64{
		0: func(v []float64) (most float64) {
			for _, x := range v {
				most = max(most, math.Abs(x)/32760)
			}
			return most
		},
		1: func(v []float64) (sum float64) {
			for _, x := range v {
				sum += math.Abs(x)
			}
			return sum
		},
		3: func(v []float64) (sum float64) {
			for _, x := range v {
				sum += math.Pow(math.Abs(x), 3)
			}
			return math.Cbrt(sum)
		},
	} {
		v := vector(t, ts.post("/v1/embeddings", object{"input": genesis, "embd_normalize": norm}), 0)
		if !near(size(v), 1) || !near(v[0]*size(raw), raw[0]) {
			t.Errorf("norm %d: %v", norm, size(v))
		}
	}
	last := open(t, nil)
	if same(raw, vector(t, last.post("/v1/embeddings", object{"input": genesis, "embd_normalize": -1}), 0)) {
		t.Error("the mean of all positions is the last one")
	}
}

func TestEmbeddingShapes(t *testing.T) {
	ts := open(t, nil)
	for _, input := range []any{
		"text", []any{12, 34, 56}, []any{12, "text", 56}, []any{"a", "b"}, []any{"a", []any{12, 34}},
		[]any{[]any{12, 34}, []any{12, "text"}}, object{"prompt_string": "a"},
	} {
		if status, value := ts.call("POST", "/v1/embeddings", object{"input": input}); status != http.StatusOK {
			t.Errorf("%v: %d %v", input, status, value)
		}
	}
	for _, input := range []any{
		[]any{}, true, object{}, "", object{"content": "text"}, object{"content": []object{{"type": "unknown"}}},
		object{"content": []object{{"type": "image_url", "image_url": object{"url": "data:image/png;base64,AAAA"}}}},
		[]any{"a", nil}, []any{1, 99999},
	} {
		ts.refuses("POST", "/v1/embeddings", object{"input": input}, 400, typeInvalidRequest, "")
	}
	ts.refuses("POST", "/v1/embeddings", object{"input": make([]string, 3000)}, 400, typeInvalidRequest, "found 3000 texts")
	ts.refuses("POST", "/v1/embeddings", object{}, 400, typeInvalidRequest, "must be provided")
	ts.refuses("POST", "/v1/embeddings", object{"input": "a", "encoding_format": 1}, 400, typeInvalidRequest, "'encoding_format'")
	ts.refuses("POST", "/v1/embeddings", object{"input": "a", "encoding_format": "hex"}, 400, typeInvalidRequest, "'encoding_format'")
	ts.refuses("POST", "/v1/embeddings", object{"input": "a", "embd_normalize": -2}, 400, typeInvalidRequest, "'embd_normalize'")
	fields := ts.refuses("POST", "/v1/embeddings", object{"input": []string{"a", strings.Repeat("the ", 2000)}}, 400, typeExceedContext, "input 1")
	if fields["n_ctx"] != 1024.0 {
		t.Errorf("%v", fields)
	}
}

func TestNoPooling(t *testing.T) {
	ts := open(t, func(o *Options) { o.Pooling = "none" })
	ts.refuses("POST", "/v1/embeddings", object{"input": "a"}, 400, typeInvalidRequest, "Pooling type 'none'")
	ts.refuses("POST", "/embeddings", object{"input": "a"}, 501, typeNotSupported, "--pooling")
}
