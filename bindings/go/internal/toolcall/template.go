package toolcall

import (
	"encoding/json"
	"fmt"
	"strings"
)

// Tags are what stands around a model's thinking; empty for models that do not think.
type Tags struct{ Open, Close string }

var thinkingTags = []Tags{
	{"<think>", "</think>"},
	{"<|START_THINKING|>", "<|END_THINKING|>"},
	{"[THINK]", "[/THINK]"},
}

// A Template is what must be known of a chat template to use it.
type Template struct {
	Think Tags
	// What the template can be given.
	SystemRole    bool
	StringContent bool // text as a string
	TypedContent  bool // text in parts
	Tools         bool // descriptions of tools
	ToolCalls     bool // calls, and their results
	Developer     bool // the role of that name

	syntax          *syntax // nil: the model's way to call is not known
	objectArguments bool    // a call's arguments are to be an object, not a string of JSON
}

// Render renders a conversation with a template. The arguments are JSON; tools may be nil.
type Render func(messages, tools json.RawMessage) (string, error)

// Analyze finds out what a template can do by what it makes of small conversations.
func Analyze(source string, render Render) *Template {
	t := &Template{Developer: strings.Contains(source, `"developer"`) || strings.Contains(source, `'developer'`)}
	for _, tags := range thinkingTags {
		if strings.Contains(source, tags.Open) || strings.Contains(source, tags.Close) {
			t.Think = tags
			break
		}
	}
	// All that is looked for is in no template.
	const (
		system = `{"role":"system","content":"probe-system"}`
		user   = `{"role":"user","content":"probe-user"}`
		parts  = `{"role":"user","content":[{"type":"text","text":"probe-user"}]}`
		answer = `{"role":"assistant","content":"probe-answer"}`
		calls  = `{"role":"assistant","content":"","tool_calls":[{"id":"probe1234","type":"function","function":{"name":"probe_tool","arguments":%s}}]}`
		result = `{"role":"tool","tool_call_id":"probe1234","name":"probe_tool","content":"probe-result"}`
		object = `{"probe_argument":1}`
		tool   = `[{"type":"function","function":{"name":"probe_tool","description":"probe-description","parameters":` +
			`{"type":"object","properties":{"probe_argument":{"type":"integer"}},"required":["probe_argument"]}}}]`
	)
	// text is what the template makes of messages; "" if it refuses them.
	text := func(tools string, messages ...string) string {
		var raw json.RawMessage
		if tools != "" {
			raw = json.RawMessage(tools)
		}
		text, err := render(json.RawMessage("["+strings.Join(messages, ",")+"]"), raw)
		if err != nil {
			return ""
		}
		return text
	}
	has := strings.Contains
	t.SystemRole = has(text("", system, user), "probe-system")
	t.StringContent = has(text("", user), "probe-user")
	// A template that expects a string may print the list, quotes and all.
	typed := text("", parts)
	t.TypedContent = has(typed, "probe-user") && !has(typed, `"text"`) && !has(typed, `'text'`)
	if !t.StringContent && !t.TypedContent {
		t.StringContent = true // it refuses conversations as short as these
	}
	t.Tools = has(text(tool, user), "probe-description")

	for _, form := range []string{object, string(encode(object))} {
		call := text(tool, user, fmt.Sprintf(calls, form), result, answer, user)
		if has(call, "probe_tool") && has(call, `"probe_argument"`) && has(call, "probe-result") {
			t.ToolCalls = true
			t.objectArguments = form == object
			t.syntax = syntaxOf(call, "probe_tool")
			break
		}
	}
	return t
}

// syntaxOf finds the syntax in which a tool is called somewhere in a text; nil if none is known.
func syntaxOf(text, tool string) *syntax {
	tools := map[string]bool{tool: true}
	for _, s := range syntaxes {
		lead := join(s.first, s.head)
		for i := range text {
			if v, _, _ := lead.match(text[i:], tools); v == yes {
				return s
			}
		}
	}
	return nil
}

// Format is a name for how the model calls tools.
func (t *Template) Format() string {
	if t.syntax == nil {
		return genericOne.name
	}
	return t.syntax.name
}

// Capabilities lists what the template can do, in llama-server's terms.
func (t *Template) Capabilities() map[string]any {
	return map[string]any{
		"supports_system_role":         t.SystemRole,
		"supports_string_content":      t.StringContent,
		"supports_typed_content":       t.TypedContent,
		"supports_tools":               t.Tools,
		"supports_tool_calls":          t.ToolCalls,
		"supports_parallel_tool_calls": t.syntax != nil && !t.syntax.sequential,
		"supports_object_arguments":    t.objectArguments,
		"supports_preserve_reasoning":  t.Think.Open != "",
	}
}
