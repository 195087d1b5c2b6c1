package server

import (
	"encoding/json"
	"net/http"
	"strings"

	phd "github.com/libphd/libphd/bindings/go"
)

// An extra is context of an infill request: a piece of another file.
type extra struct {
	filename, text string
}

// infill completes between two texts, with a model that was trained to.
func (s *Server) infill(w http.ResponseWriter, r *http.Request) error {
	b, err := s.readBody(w, r)
	if err != nil {
		return err
	}
	c, err := s.newCompletion(b, false)
	if err != nil {
		return err
	}
	var missing []string
	for _, token := range []struct {
		kind phd.SpecialKind
		name string
	}{{phd.SpecialFIMPrefix, "prefix"}, {phd.SpecialFIMSuffix, "suffix"}, {phd.SpecialFIMMiddle, "middle"}} {
		if _, ok := c.l.model.SpecialToken(token.kind); !ok {
			missing = append(missing, token.name)
		}
	}
	if len(missing) > 0 {
		return notSupported("Infill is not supported by this model: it has no token for %s", strings.Join(missing, ", "))
	}
	prompt := ""
	b.text(&prompt, "prompt")
	for _, name := range []string{"input_prefix", "input_suffix"} {
		if !b.has(name) {
			b.fail(badRequest("\"%s\" is required", name))
		}
	}
	extras := b.extras()
	if b.err != nil {
		return b.err
	}
	tokens, err := c.l.infillPrompt(b.fields["input_prefix"], b.fields["input_suffix"], extras, prompt)
	if err != nil {
		return err
	}
	c.ask([][]phd.Token{tokens}, false)
	return c.serve(w, r)
}

func (b *body) extras() []extra {
	raw, name := b.get("input_extra")
	if raw == nil {
		return nil
	}
	var elements []json.RawMessage
	if json.Unmarshal(raw, &elements) != nil {
		b.fail(wrong(name, raw, "an array of objects with text and filename"))
		return nil
	}
	extras := make([]extra, len(elements))
	for i, element := range elements {
		chunk := &body{}
		if json.Unmarshal(element, &chunk.fields) != nil || !chunk.has("text") {
			b.fail(wrong(name, element, "an object with text and filename"))
			return nil
		}
		extras[i].filename = "tmp"
		chunk.text(&extras[i].text, "text")
		chunk.text(&extras[i].filename, "filename")
		if chunk.err != nil {
			b.fail(chunk.err)
			return nil
		}
	}
	return extras
}

// infillPrompt puts the parts in the order of models that know repositories:
//
//	<repo>myproject <separator>name text ... <separator>filename <prefix>... <suffix>... <middle>prompt
//
// or, for a model without those tokens, the extras before the prefix. What does not fit goes: of the prefix the beginning, of
// the suffix the end, of the extras the beginning, so that a quarter of the context is left for the answer.
func (l *loaded) infillPrompt(prefix, suffix json.RawMessage, extras []extra, prompt string) ([]phd.Token, error) {
	parse := func(text string) []phd.Token {
		tokens, err := l.tokenize(text, false, false)
		if err != nil {
			return nil // texts that came as JSON can be tokenized
		}
		return tokens
	}
	special := func(kind phd.SpecialKind) []phd.Token {
		if token, ok := l.model.SpecialToken(kind); ok {
			return []phd.Token{token}
		}
		return nil
	}
	before, err := l.parseTokens("input_prefix", prefix, false, false)
	if err != nil {
		return nil, err
	}
	after, err := l.parseTokens("input_suffix", suffix, false, false)
	if err != nil {
		return nil, err
	}
	begun, err := l.tokenize(prompt, false, true)
	if err != nil {
		return nil, err
	}
	var others []phd.Token
	if repo := special(phd.SpecialFIMRepo); repo != nil {
		others = append(append(others, repo...), parse("myproject\n")...)
	}
	separator := special(phd.SpecialFIMSeparator)
	for _, e := range extras {
		if separator != nil {
			others = append(append(others, separator...), parse(e.filename+"\n")...)
		} else {
			others = append(others, parse("\n\n--- snippet ---\n\n")...)
		}
		others = append(others, parse(e.text)...)
	}
	if separator != nil {
		others = append(append(others, separator...), parse("filename\n")...)
	}

	const markers = 4 // prefix, suffix, middle, and the begin token
	room := max(l.engine.SlotContext()*3/4-markers-len(begun), 0)
	after = after[:min(len(after), room/4)]
	before = before[len(before)-min(len(before), room-len(after)):]
	others = others[len(others)-min(len(others), room-len(after)-len(before)):]

	tokens, err := l.tokenize("", true, false) // the begin token, of models that want one
	if err != nil {
		return nil, err
	}
	for _, part := range [][]phd.Token{
		others,
		special(phd.SpecialFIMPrefix), before,
		special(phd.SpecialFIMSuffix), after,
		special(phd.SpecialFIMMiddle), begun,
	} {
		tokens = append(tokens, part...)
	}
	return tokens, nil
}
