package server

import (
	"encoding/json"
	"net/http"
	"strings"
	"unicode/utf8"

	phd "github.com/libphd/libphd/bindings/go"
)

func (s *Server) registerText(mux *http.ServeMux) {
	s.handle(mux, "POST /tokenize", s.tokenize)
	s.handle(mux, "POST /detokenize", s.detokenize)
}

func (s *Server) tokenize(w http.ResponseWriter, r *http.Request) error {
	b, err := s.readBody(w, r)
	if err != nil {
		return err
	}
	addSpecial, parseSpecial, withPieces := false, true, false
	b.boolean(&addSpecial, "add_special")
	b.boolean(&parseSpecial, "parse_special")
	b.boolean(&withPieces, "with_pieces")
	if b.err != nil {
		return b.err
	}
	l := s.loaded()
	tokens := []phd.Token{}
	if content, _ := b.get("content"); content != nil {
		if tokens, err = l.parseTokens("content", content, addSpecial, parseSpecial); err != nil {
			return err
		}
	}
	if !withPieces {
		s.writeJSON(w, http.StatusOK, map[string]any{"tokens": append([]phd.Token{}, tokens...)})
		return nil
	}
	pieces := make([]map[string]any, len(tokens))
	for i, token := range tokens {
		piece, err := l.model.TokenBytes(token, true)
		if err != nil {
			return err
		}
		pieces[i] = map[string]any{"id": token, "piece": textOrBytes(piece)}
	}
	s.writeJSON(w, http.StatusOK, map[string]any{"tokens": pieces})
	return nil
}

// textOrBytes is a string if the bytes are one, or else an array of numbers.
func textOrBytes(piece []byte) any {
	if utf8.Valid(piece) {
		return string(piece)
	}
	numbers := make([]int, len(piece))
	for i, b := range piece {
		numbers[i] = int(b)
	}
	return numbers
}

func (s *Server) detokenize(w http.ResponseWriter, r *http.Request) error {
	b, err := s.readBody(w, r)
	if err != nil {
		return err
	}
	l := s.loaded()
	var elements []json.RawMessage
	read(b, &elements, "an array of tokens", "tokens")
	if b.err != nil {
		return b.err
	}
	tokens := make([]phd.Token, len(elements))
	for i, element := range elements {
		if tokens[i], err = l.parseToken("tokens", element); err != nil {
			return err
		}
	}
	s.writeJSON(w, http.StatusOK, map[string]any{"content": strings.ToValidUTF8(l.promptText(tokens), "\uFFFD")})
	return nil
}
