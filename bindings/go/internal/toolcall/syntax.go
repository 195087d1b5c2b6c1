package toolcall

import (
	"slices"
	"strings"
)

// A syntax is a way to write calls:
//
//	first head {arguments} tail sep head {arguments} tail last
//
// From it come both the grammars that bind the model's output and the parser that reads it. The grammars know only its
// canonical form; the parser allows for white space and the like.
type syntax struct {
	name string
	// first begins the calls, head each of them; its last element is the brace that the arguments begin with.
	first, head pattern
	tail        pattern
	// sep stands between calls, last ends them; nil: nothing does.
	sep, last pattern
	// anchored calls can only be the whole answer: without that, what looks like one might be quoted.
	anchored bool
	// trigger is what, once it is written, must become a call; "": the head including the tool's name.
	trigger string
	// markers may be control tokens of the vocabulary.
	markers []string
	// sequential: models that write this write one call at a time.
	sequential bool
	// response is, in the syntax of our own, what an answer to the user begins with.
	response pattern
	// idLength is how long IDs must be; 0: any length.
	idLength int
}

// A pattern is a sequence of elements.
type pattern []element

type element struct {
	kind kind
	// The text of a literal; the canonical white space; of alternatives the canonical one.
	text string
	// Other alternatives, none of which is the beginning of another.
	others []string
	// What may be left out, and canonically is.
	inner pattern
}

type kind int

const (
	literal kind = iota
	space
	toolName
	identifier
	optional
)

func lit(text string) element { return element{kind: literal, text: text} }
func alt(text string, others ...string) element {
	return element{kind: literal, text: text, others: others}
}
func sp(canonical string) element      { return element{kind: space, text: canonical} }
func opt(inner ...element) element     { return element{kind: optional, inner: inner} }
func join(patterns ...pattern) pattern { return slices.Concat(patterns...) }

var (
	name = element{kind: toolName}
	id   = element{kind: identifier}
)

// object is the head of a call as a JSON object with a name and arguments, whose key is the first of keys.
func object(keys ...string) pattern {
	return pattern{
		lit(`{`), sp(""), lit(`"name"`), sp(""), lit(":"), sp(" "), lit(`"`), name, lit(`"`), sp(""), lit(","), sp(" "),
		alt(keys[0], keys[1:]...), sp(""), lit(":"), sp(" "), lit("{"),
	}
}

const (
	arguments  = `"arguments"`
	parameters = `"parameters"`
)

// syntaxes are those of templates, the more telling ones first.
var syntaxes = []*syntax{
	{
		name:    "Hermes 2 Pro",
		head:    join(pattern{lit("<tool_call>"), sp("\n")}, object(arguments, parameters)),
		tail:    pattern{sp(""), lit("}"), sp("\n"), lit("</tool_call>")},
		trigger: "<tool_call>",
		markers: []string{"<tool_call>", "</tool_call>"},
	},
	{
		name:    "DeepSeek R1",
		first:   pattern{lit("<｜tool▁calls▁begin｜>"), sp("")},
		head:    pattern{lit("<｜tool▁call▁begin｜>function<｜tool▁sep｜>"), name, lit("\n"), lit("```json"), sp("\n"), lit("{")},
		tail:    pattern{sp("\n"), lit("```"), sp(""), lit("<｜tool▁call▁end｜>")},
		sep:     pattern{sp("\n")},
		last:    pattern{sp(""), lit("<｜tool▁calls▁end｜>")},
		trigger: "<｜tool▁calls▁begin｜>",
		markers: deepSeekMarkers,
	},
	{
		name:    "DeepSeek V3.1",
		first:   pattern{lit("<｜tool▁calls▁begin｜>"), sp("")},
		head:    pattern{lit("<｜tool▁call▁begin｜>"), name, lit("<｜tool▁sep｜>"), sp(""), lit("{")},
		tail:    pattern{sp(""), lit("<｜tool▁call▁end｜>")},
		sep:     pattern{sp("")},
		last:    pattern{sp(""), lit("<｜tool▁calls▁end｜>")},
		trigger: "<｜tool▁calls▁begin｜>",
		markers: deepSeekMarkers,
	},
	{
		name:     "Mistral Nemo",
		first:    pattern{lit("[TOOL_CALLS]"), sp(""), lit("["), sp("")},
		head:     object(arguments),
		tail:     pattern{opt(sp(""), lit(","), sp(""), lit(`"id"`), sp(""), lit(":"), sp(""), lit(`"`), id, lit(`"`)), sp(""), lit("}")},
		sep:      pattern{sp(""), lit(","), sp(" ")},
		last:     pattern{sp(""), lit("]")},
		trigger:  "[TOOL_CALLS]",
		markers:  []string{"[TOOL_CALLS]"},
		idLength: 9, // their templates insist
	},
	{
		name:     "Mistral",
		head:     pattern{lit("[TOOL_CALLS]"), name, opt(lit("[CALL_ID]"), id), lit("[ARGS]"), sp(""), lit("{")},
		markers:  []string{"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"},
		trigger:  "[TOOL_CALLS]",
		idLength: 9,
	},
	{
		name:     "FireFunction v2",
		first:    pattern{sp(""), lit("functools["), sp("")},
		head:     object(arguments),
		tail:     pattern{sp(""), lit("}")},
		sep:      pattern{sp(""), lit(","), sp(" ")},
		last:     pattern{sp(""), lit("]")},
		trigger:  "functools[",
		anchored: true,
	},
	{
		name: "Functionary v3.1",
		head: pattern{lit("<function="), name, lit(">"), sp(""), lit("{")},
		tail: pattern{sp(""), lit("</function>")},
	},
	{
		name:       "Llama 3.x",
		first:      pattern{sp(""), opt(lit("<|python_tag|>")), sp("")},
		head:       join(pattern{lit("{"), sp(""), opt(lit(`"type"`), sp(""), lit(":"), sp(""), lit(`"function"`), sp(""), lit(","), sp(""))}, object(parameters)[2:]),
		tail:       pattern{sp(""), lit("}")},
		sep:        pattern{sp(""), lit(";"), sp(" ")},
		markers:    []string{"<|python_tag|>"},
		anchored:   true,
		sequential: true,
	},
}

var deepSeekMarkers = []string{
	"<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
}

// The syntax for templates that have none: the answer is a JSON object, either a call or a response. In the second one a
// response follows several calls.
var (
	genericOne = &syntax{
		name:       "Generic",
		first:      pattern{sp(""), lit("{"), sp(""), lit(`"tool_call"`), sp(""), lit(":"), sp(" ")},
		head:       object(arguments),
		tail:       pattern{sp(""), lit("}")},
		last:       pattern{sp(""), lit("}")},
		response:   pattern{sp(""), lit("{"), sp(""), lit(`"response"`), sp(""), lit(":"), sp(" ")},
		anchored:   true,
		sequential: true,
	}
	genericMany = &syntax{
		name:     "Generic",
		first:    pattern{sp(""), lit("{"), sp(""), lit(`"tool_calls"`), sp(""), lit(":"), sp(" "), lit("["), sp("")},
		head:     object(arguments),
		tail:     pattern{sp(""), lit("}")},
		sep:      pattern{sp(""), lit(","), sp(" ")},
		last:     pattern{sp(""), lit("]"), sp(""), lit("}")},
		response: genericOne.response,
		anchored: true,
	}
)

// text is the canonical form, with a tool's name in it.
func (p pattern) text(tool string) string {
	var b strings.Builder
	for _, e := range p {
		switch e.kind {
		case literal, space:
			b.WriteString(e.text)
		case toolName:
			b.WriteString(tool)
		}
	}
	return b.String()
}

// What comparing a text with a pattern says. yes and no stay true whatever text follows.
type verdict int

const (
	no verdict = iota
	more
	yes
)

// maxSpace bounds the white space at one place within a call, and so what is held back until it is clear whether it is one.
const maxSpace = 64

// match compares the beginning of a text with a pattern: how much of it matched, and the tool's name in it, which must be one of
// those known.
func (p pattern) match(text string, tools map[string]bool) (v verdict, n int, tool string) {
	for i, e := range p {
		var next byte // that a name ends before
		if e.kind == toolName && i+1 < len(p) {
			next = p[i+1].first()
		}
		v, length := e.match(text[n:], next, tools)
		if v != yes {
			return v, 0, ""
		}
		if e.kind == toolName {
			tool = text[n : n+length]
		}
		n += length
	}
	return yes, n, tool
}

// first is the byte that an element begins with.
func (e element) first() byte {
	if e.kind == optional {
		return e.inner[0].first()
	}
	return e.text[0]
}

func (e element) match(text string, next byte, tools map[string]bool) (verdict, int) {
	switch e.kind {
	case literal:
		best := matchLiteral(text, e.text)
		if best == yes {
			return yes, len(e.text)
		}
		for _, other := range e.others {
			v := matchLiteral(text, other)
			if v == yes {
				return yes, len(other)
			}
			best = max(best, v)
		}
		return best, 0
	case space:
		n := len(text) - len(strings.TrimLeft(text, white))
		switch {
		case n > maxSpace:
			return no, 0
		case n == len(text):
			return more, 0
		}
		return yes, n
	case toolName:
		if n := strings.IndexByte(text, next); n >= 0 {
			if tools[text[:n]] {
				return yes, n
			}
			return no, 0
		}
		for tool := range tools {
			if strings.HasPrefix(tool, text) {
				return more, 0
			}
		}
	case identifier:
		n := 0
		for n < len(text) && isIdentifier(text[n]) {
			n++
		}
		switch {
		case n > maxSpace:
			return no, 0
		case n == len(text):
			return more, 0
		}
		return yes, n
	case optional:
		v, n, _ := e.inner.match(text, tools)
		if v == no {
			return yes, 0
		}
		return v, n
	}
	return no, 0
}

func matchLiteral(text, literal string) verdict {
	switch {
	case strings.HasPrefix(text, literal):
		return yes
	case strings.HasPrefix(literal, text):
		return more
	}
	return no
}

const white = " \t\r\n"

func isIdentifier(b byte) bool {
	return 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || b == '_' || b == '-'
}
