package server

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/engine"
)

func (s *Server) registerEmbeddings(mux *http.ServeMux) {
	s.handleAll(mux, "POST", []string{"/embedding", "/embeddings"}, func(w http.ResponseWriter, r *http.Request) error {
		return s.embeddings(w, r, false)
	})
	s.handle(mux, "POST /v1/embeddings", func(w http.ResponseWriter, r *http.Request) error {
		return s.embeddings(w, r, true)
	})
	s.refuse(mux, "POST", []string{"/rerank", "/reranking", "/v1/rerank", "/v1/reranking"},
		"This server does not rank documents: its models generate text")
}

func (s *Server) embeddings(w http.ResponseWriter, r *http.Request, openAI bool) error {
	b, err := s.readBody(w, r)
	if err != nil {
		return err
	}
	pooling := phd.PoolingLast
	switch s.opts.Pooling {
	case "mean":
		pooling = phd.PoolingMean
	case "none":
		if openAI {
			return badRequest("Pooling type 'none' is not OAI compatible. Please use a different pooling type")
		}
		return notSupported("Embeddings of single tokens are not available: start the server with --pooling last or mean")
	}
	raw, name := b.get("input")
	if raw == nil {
		if raw, name = b.get("content"); raw == nil {
			return badRequest("\"input\" or \"content\" must be provided")
		}
		openAI = false
	}
	format, norm := "float", 2
	b.text(&format, "encoding_format")
	b.integer(&norm, -1, 100, "embd_normalize")
	switch {
	case b.err != nil:
		return b.err
	case format != "float" && format != "base64":
		return badRequest("Field 'encoding_format': found %q, expected float or base64", format)
	}
	l := s.loaded()
	texts, err := l.parseInputs(name, raw)
	if err != nil {
		return err
	}
	ctx, cancel := s.withTimeout(r)
	defer cancel()
	data := make([]map[string]any, len(texts))
	total := 0
	for i, tokens := range texts {
		embedding, err := l.engine.Embed(ctx, tokens, pooling, false)
		var tooLong *engine.TooLongError
		if errors.As(err, &tooLong) {
			e := s.apiErrorOf(err)
			e.message = fmt.Sprintf("input %d (%d tokens) is too large to process: the context size is %d tokens",
				i, tooLong.NPrompt, tooLong.NContext)
			return e
		}
		if err != nil {
			return err
		}
		s.metrics.embedded.Add(1)
		normalize(embedding, norm)
		total += len(tokens)
		if openAI {
			data[i] = map[string]any{"object": "embedding", "index": i, "embedding": embedding}
			if format == "base64" {
				data[i]["embedding"] = floatsToBase64(embedding)
				data[i]["encoding_format"] = "base64"
			}
		} else {
			data[i] = map[string]any{"index": i, "embedding": [][]float32{embedding}}
		}
	}
	if !openAI {
		s.writeJSON(w, http.StatusOK, data)
		return nil
	}
	model := s.modelName()
	b.text(&model, "model")
	s.writeJSON(w, http.StatusOK, map[string]any{
		"object": "list",
		"model":  model,
		"usage":  map[string]any{"prompt_tokens": total, "total_tokens": total},
		"data":   data,
	})
	return nil
}

// parseInputs reads what is to be embedded: prompts, and OpenAI's content parts of texts.
func (l *loaded) parseInputs(name string, raw json.RawMessage) ([][]phd.Token, error) {
	var elements []json.RawMessage
	if json.Unmarshal(raw, &elements) != nil || containsNumber(elements) {
		elements = []json.RawMessage{raw}
	}
	if len(elements) == 0 {
		return nil, badRequest("\"%s\" must not be empty", name)
	}
	if len(elements) > maxPrompts {
		return nil, badRequest("Field '%s': found %d texts, expected at most %d", name, len(elements), maxPrompts)
	}
	texts := make([][]phd.Token, len(elements))
	for i, element := range elements {
		var object map[string]json.RawMessage
		var tokens []phd.Token
		var err error
		if json.Unmarshal(element, &object) == nil && object["content"] != nil {
			var text string
			if text, err = contentText(object["content"]); err == nil {
				tokens, err = l.tokenize(text, true, true)
			}
		} else {
			tokens, err = l.parsePrompt(name, element)
		}
		if err != nil {
			return nil, err
		}
		if len(tokens) == 0 {
			// A model without a begin token has nothing to embed of an empty text.
			return nil, badRequest("Input content cannot be empty")
		}
		texts[i] = tokens
	}
	return texts, nil
}

// contentText joins OpenAI's content parts, which must be texts.
func contentText(raw json.RawMessage) (string, error) {
	var parts []struct {
		Type string  `json:"type"`
		Text *string `json:"text"`
	}
	if json.Unmarshal(raw, &parts) != nil {
		return "", wrong("content", raw, "an array of parts")
	}
	text := ""
	for _, part := range parts {
		if part.Type != "text" || part.Text == nil {
			return "", badRequest("Field 'content': found a part of type %q, expected text", part.Type)
		}
		text += *part.Text
	}
	return text, nil
}

// normalize scales an embedding: -1 not at all; 0 to the largest value of an int16; 1 by the sum of absolute values; 2 to
// length 1; p > 2 by the p-norm.
func normalize(v []float32, norm int) {
	sum := 0.0
	for _, x := range v {
		a := math.Abs(float64(x))
		switch norm {
		case -1:
			return
		case 0:
			sum = max(sum, a/32760)
		default:
			sum += math.Pow(a, float64(norm))
		}
	}
	if norm > 1 {
		sum = math.Pow(sum, 1/float64(norm))
	}
	if sum == 0 {
		return
	}
	for i := range v {
		v[i] = float32(float64(v[i]) / sum)
	}
}

func floatsToBase64(v []float32) string {
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, v) //nolint:errcheck // a buffer takes all
	return base64.StdEncoding.EncodeToString(b.Bytes())
}
