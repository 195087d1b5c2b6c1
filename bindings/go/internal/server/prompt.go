package server

import (
	"encoding/json"
	"math"
	"strings"

	phd "github.com/libphd/libphd/bindings/go"
)

// maxPrompts is how many prompts one request may have.
const maxPrompts = 2048

// promptShapes is what a prompt may be, for error messages.
const promptShapes = "a string, an array of tokens and strings, or an object with prompt_string"

// parsePrompts reads one prompt or several:
//
//	"text"   [12, 34]   [12, "text", 34]   {"prompt_string": "text"}
//	["text", [12, 34], {"prompt_string": "text"}]
//
// An array that contains a number is one prompt.
func (l *loaded) parsePrompts(name string, raw json.RawMessage) (prompts [][]phd.Token, several bool, err error) {
	var elements []json.RawMessage
	if json.Unmarshal(raw, &elements) != nil || containsNumber(elements) {
		prompt, err := l.parsePrompt(name, raw)
		return [][]phd.Token{prompt}, false, err
	}
	if len(elements) == 0 {
		return nil, false, badRequest("\"%s\" must not be empty", name)
	}
	if len(elements) > maxPrompts {
		return nil, false, badRequest("Field '%s': found %d prompts, expected at most %d", name, len(elements), maxPrompts)
	}
	for _, element := range elements {
		prompt, err := l.parsePrompt(name, element)
		if err != nil {
			return nil, false, err
		}
		prompts = append(prompts, prompt)
	}
	return prompts, true, nil
}

func containsNumber(elements []json.RawMessage) bool {
	for _, element := range elements {
		if isNumber(element) {
			return true
		}
	}
	return false
}

func isNumber(raw json.RawMessage) bool {
	return len(raw) > 0 && (raw[0] == '-' || '0' <= raw[0] && raw[0] <= '9')
}

// parsePrompt reads one prompt. Special tokens are parsed, and the begin token is added to a text that is at the beginning.
func (l *loaded) parsePrompt(name string, raw json.RawMessage) ([]phd.Token, error) {
	return l.parseTokens(name, raw, true, true)
}

// parseTokens reads one text, token list, or mix of both.
func (l *loaded) parseTokens(name string, raw json.RawMessage, addSpecial, parseSpecial bool) ([]phd.Token, error) {
	var text string
	var elements []json.RawMessage
	var object map[string]json.RawMessage
	switch {
	case json.Unmarshal(raw, &text) == nil && string(raw) != "null":
		return l.tokenize(text, addSpecial, parseSpecial)
	case json.Unmarshal(raw, &elements) == nil && elements != nil:
		tokens := make([]phd.Token, 0, len(elements))
		for i, element := range elements {
			if isNumber(element) {
				token, err := l.parseToken(name, element)
				if err != nil {
					return nil, err
				}
				tokens = append(tokens, token)
				continue
			}
			if json.Unmarshal(element, &text) != nil || string(element) == "null" {
				return nil, wrong(name, element, "a token or a string")
			}
			piece, err := l.tokenize(text, addSpecial && i == 0, parseSpecial)
			if err != nil {
				return nil, err
			}
			tokens = append(tokens, piece...)
		}
		return tokens, nil
	case json.Unmarshal(raw, &object) == nil && object["prompt_string"] != nil:
		if data := object["multimodal_data"]; data != nil && string(data) != "null" {
			return nil, notSupported("Field 'multimodal_data': the model reads text only")
		}
		inner := object["prompt_string"]
		if json.Unmarshal(inner, &object) == nil {
			return nil, wrong("prompt_string", inner, "a string")
		}
		return l.parseTokens("prompt_string", inner, addSpecial, parseSpecial)
	}
	return nil, wrong(name, raw, promptShapes)
}

func (l *loaded) parseToken(name string, raw json.RawMessage) (phd.Token, error) {
	id, ok := wholeNumber(raw)
	if !ok || id < 0 || id >= math.MaxInt32 || int(id) >= l.NVocab() {
		return 0, badRequest("Field '%s': found token %s, expected 0 to %d", name, excerpt(raw), l.NVocab()-1)
	}
	return phd.Token(id), nil
}

func (l *loaded) tokenize(text string, addSpecial, parseSpecial bool) ([]phd.Token, error) {
	return l.model.Tokenize(text, addSpecial, parseSpecial)
}

// promptText is a prompt as text, special tokens spelled out.
func (l *loaded) promptText(prompt []phd.Token) string {
	var b strings.Builder
	for _, token := range prompt {
		piece, err := l.model.TokenBytes(token, true)
		if err == nil {
			b.Write(piece)
		}
	}
	return strings.ToValidUTF8(b.String(), "\uFFFD")
}
