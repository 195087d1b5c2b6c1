package server

import (
	"fmt"
	"net/http"
	"reflect"
	"testing"
)

func TestTokenize(t *testing.T) {
	ts := open(t, nil)
	const text = "In the beginning 媽 🤗"
	tokens := ts.post("/tokenize", object{"content": text})["tokens"].([]any)
	if back := ts.post("/detokenize", object{"tokens": tokens}); back["content"] != text || len(tokens) < 5 {
		t.Errorf("%v became %v", text, back)
	}
	pieces := ts.post("/tokenize", object{"content": text, "with_pieces": true})["tokens"].([]any)
	var bytes []byte
	for i, p := range pieces {
		piece := p.(object)
		if piece["id"] != tokens[i] {
			t.Errorf("piece %d: %v", i, piece)
		}
		switch value := piece["piece"].(type) {
		case string:
			bytes = append(bytes, value...)
		case []any:
			for _, b := range value {
				bytes = append(bytes, byte(b.(float64)))
			}
		}
	}
	if string(bytes) != text {
		t.Errorf("the pieces are %q", bytes)
	}
	special := ts.post("/tokenize", object{"content": "<|endoftext|>"})["tokens"]
	plain := ts.post("/tokenize", object{"content": "<|endoftext|>", "parse_special": false})["tokens"].([]any)
	if !reflect.DeepEqual(special, []any{0.0}) || len(plain) < 2 {
		t.Errorf("special: %v, plain: %v", special, plain)
	}
	mixed := ts.post("/tokenize", object{"content": []any{5, "In", 6}})["tokens"].([]any)
	if mixed[0] != 5.0 || mixed[len(mixed)-1] != 6.0 || len(mixed) < 3 {
		t.Errorf("mixed: %v", mixed)
	}
	for _, path := range []string{"/tokenize", "/detokenize"} {
		if status, value := ts.call("POST", path, object{}); status != http.StatusOK {
			t.Errorf("%s without a text: %d %v", path, status, value)
		}
	}
	ts.refuses("POST", "/tokenize", object{"content": 5}, 400, typeInvalidRequest, "Field 'content': found 5")
	ts.refuses("POST", "/tokenize", object{"content": "a", "add_special": 1}, 400, typeInvalidRequest, "Field 'add_special'")
	ts.refuses("POST", "/detokenize", object{"tokens": "a"}, 400, typeInvalidRequest, "Field 'tokens'")
	ts.refuses("POST", "/detokenize", object{"tokens": []any{1, 99999}}, 400, typeInvalidRequest, "found token 99999")
	ts.refuses("POST", "/detokenize", object{"tokens": []any{"1"}}, 400, typeInvalidRequest, "found token")
}

func TestBeginToken(t *testing.T) {
	// SmolLM2's tokenizer adds none; the small model's neither. What add_special does is the library's, and tested there.
	ts := open(t, nil)
	with := ts.post("/tokenize", object{"content": "In", "add_special": true})["tokens"]
	without := ts.post("/tokenize", object{"content": "In"})["tokens"]
	if fmt.Sprint(with) != fmt.Sprint(without) {
		t.Errorf("%v and %v", with, without)
	}
}
