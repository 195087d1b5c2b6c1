package toolcall

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// A Vocabulary tells which words are control tokens of the model. Those match no text, and text does not match them.
type Vocabulary func(word string) (token int32, ok bool)

// A Constraint is what binds the model's output. At most one of Schema and Grammar is set.
type Constraint struct {
	Schema   string    // a JSON schema
	Grammar  string    // Lark, as llguidance has it
	Triggers []Trigger // the output is free until one of them comes
}

// A Trigger is a word after which the output is bound, until the grammar has come to its end.
type Trigger struct {
	Text    string
	Grammar string
}

// Constraint is what binds the output of this plan.
func (p *Plan) Constraint(v Vocabulary, thinking Thinking) Constraint {
	schema := p.options.Schema
	switch {
	case p.syntax == nil && schema == nil:
		return Constraint{}
	case p.syntax == nil && thinking == HasThought:
		return Constraint{Schema: string(schema)}
	case p.syntax != nil && p.syntax.response == nil && p.options.Choice == Auto && schema == nil:
		return Constraint{Triggers: p.triggers(v)}
	}
	g := p.grammar(v)
	var answers []string
	if p.syntax != nil {
		answers = append(answers, "calls")
		g.calls("calls", nil)
	}
	if p.options.Choice != Required || p.syntax == nil {
		if schema == nil {
			schema = json.RawMessage(`{"type":"string"}`) // only our own syntax gets here
		}
		answers = append(answers, "answer")
		value := "%json " + string(schema)
		if p.syntax != nil && p.syntax.response != nil {
			g.rule("answer", g.literal(p.syntax.response.text("")), "value", g.literal("}"))
			g.rule("value", value)
		} else {
			g.rule("answer", value)
		}
	}
	g.rule("body", strings.Join(answers, " | "))
	g.rule("start", g.thoughts(thinking), "body")
	return Constraint{Grammar: g.String()}
}

// A grammar is written rule by rule.
type grammar struct {
	strings.Builder
	plan    *Plan
	control map[string]int32 // markers that are control tokens
	tools   []Tool           // those that may be called
}

func (p *Plan) grammar(v Vocabulary) *grammar {
	g := &grammar{plan: p, control: map[string]int32{}}
	for _, marker := range p.Markers() {
		if token, ok := v(marker); ok {
			g.control[marker] = token
		}
	}
	for _, tool := range p.options.Tools {
		if p.options.Named == "" || p.options.Named == tool.Name {
			g.tools = append(g.tools, tool)
		}
	}
	return g
}

func (g *grammar) rule(name string, parts ...string) {
	fmt.Fprintf(g, "%s: %s\n", name, strings.Join(parts, " "))
}

// literal is a text as the grammar spells it; control tokens in it stand for themselves.
func (g *grammar) literal(text string) string {
	var parts []string
	for text != "" {
		at, marker := len(text), ""
		for m := range g.control {
			// Of markers at the same place, the longest.
			if i := strings.Index(text, m); i >= 0 && (i < at || i == at && len(m) > len(marker)) {
				at, marker = i, m
			}
		}
		if at > 0 {
			parts = append(parts, string(encode(text[:at])))
		}
		if marker != "" {
			parts = append(parts, "<["+strconv.Itoa(int(g.control[marker]))+"]>")
		}
		text = text[at+len(marker):]
	}
	return strings.Join(parts, " ")
}

const (
	optionalSpace = `/[ \t\r\n]{0,4}/`
	anyText       = `/(?s:.*)/`
)

// thoughts is what may or must come before the answer.
func (g *grammar) thoughts(thinking Thinking) string {
	think := g.plan.template.Think
	if thinking == HasThought {
		return ""
	}
	if _, ok := g.control[think.Close]; ok {
		g.rule("thoughts", anyText, g.literal(think.Close), optionalSpace)
	} else {
		g.rule("thoughts", "thought", optionalSpace)
		fmt.Fprintf(g, "thought[suffix=%s]: %s\n", encode(think.Close), anyText)
	}
	if thinking == Thinks {
		return "thoughts"
	}
	return "(" + g.literal(think.Open) + " thoughts)?"
}

// calls writes a rule for all calls of an answer. A beginning that has been written already is left out of the first of
// them: cut makes the text of a head what is left of it.
func (g *grammar) calls(rule string, cut func(string) string) {
	s := g.plan.syntax
	first := s.first.text("")
	lead := rule + "_first"
	if cut == nil {
		if first != "" {
			g.rule(lead, g.literal(first), "call")
		} else {
			lead = "call"
		}
	} else {
		g.call(lead, func(head string) string { return cut(first + head) })
	}
	rest := ""
	switch {
	case !g.plan.parallel:
	case s.sep != nil:
		rest = "(" + g.literal(s.sep.text("")) + " call)*"
		if s.sep.text("") == "" {
			rest = "call*"
		}
	case s.last == nil && cut == nil:
		rest = "(" + optionalSpace + " call)*"
	}
	if cut == nil || rest != "" {
		g.call("call", func(head string) string { return head })
	}
	g.rule(rule, lead, rest, g.literal(s.last.text("")))
	for i, tool := range g.tools {
		g.rule(fmt.Sprintf("arguments_%d", i), "%json "+string(tool.ArgumentSchema()))
	}
}

// call writes a rule for a call of any tool.
func (g *grammar) call(rule string, head func(string) string) {
	s := g.plan.syntax
	alternatives := make([]string, len(g.tools))
	for i, tool := range g.tools {
		text := strings.TrimSuffix(s.head.text(tool.Name), "{")
		alternatives[i] = strings.Join([]string{g.literal(head(text)), fmt.Sprintf("arguments_%d", i), g.literal(s.tail.text(""))}, " ")
	}
	g.rule(rule, strings.Join(alternatives, "\n  | "))
}

// ArgumentSchema is what binds a tool's arguments: its schema, but that properties which it does not name are left out.
func (t *Tool) ArgumentSchema() json.RawMessage {
	if isEmptyObject(t.Parameters) {
		return json.RawMessage(`{"type":"object","additionalProperties":false}`)
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal(t.Parameters, &fields) != nil || fields["properties"] == nil {
		return t.Parameters
	}
	for _, other := range []string{"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref", "if", "not"} {
		if fields[other] != nil {
			return t.Parameters
		}
	}
	text := strings.TrimLeft(string(t.Parameters), white)
	return json.RawMessage(`{"additionalProperties":false,` + text[1:])
}

// Loosen lets a tool's arguments be any object: for schemas that cannot be enforced.
func (p *Plan) Loosen(tool int) {
	p.options.Tools[tool].Parameters = json.RawMessage(`{"type":"object","additionalProperties":true}`)
}

// triggers are the words that begin calls.
func (p *Plan) triggers(v Vocabulary) []Trigger {
	s := p.syntax
	if s.trigger != "" {
		g := p.grammar(v)
		g.calls("calls", func(text string) string { return strings.TrimLeft(text[len(s.trigger):], white) })
		g.rule("start", optionalSpace, "calls")
		return []Trigger{{Text: s.trigger, Grammar: g.String()}}
	}
	// What begins like a call of a tool might be an example in JSON; with the tool's name in it, it is none.
	var triggers []Trigger
	for i, tool := range p.options.Tools {
		g := p.grammar(v)
		g.tools = p.options.Tools[i : i+1]
		head := s.first.text("") + s.head.text(tool.Name)
		n := strings.IndexByte(s.first.text("")+s.head.text("\x00"), 0) + len(tool.Name) + 1
		g.calls("calls", func(text string) string { return text[n:] })
		g.rule("start", "calls")
		triggers = append(triggers, Trigger{Text: head[:n], Grammar: g.String()})
		if compact := strings.ReplaceAll(head[:n], ": ", ":"); compact != head[:n] {
			triggers = append(triggers, Trigger{Text: compact, Grammar: g.String()})
		}
	}
	return triggers
}
