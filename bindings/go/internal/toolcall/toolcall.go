// Package toolcall makes chat templates, tools and structured answers fit together: what a template is given, what the
// model's output is bound to, and how that output is read. It knows the ways in which models write calls of tools, and has one
// of its own for templates that know none. It computes on texts alone and needs no model.
package toolcall

import (
	"bytes"
	"encoding/json"
	"strings"
)

// A Tool is a function that the model may call.
type Tool struct {
	Name        string
	Description string
	Parameters  json.RawMessage // a JSON schema; nil: none
	Strict      bool            // arguments that the schema does not bind are an error
}

// A Call is a call of a tool.
type Call struct {
	ID        string
	Name      string
	Arguments string // JSON
}

// A Message is one turn of a conversation.
type Message struct {
	Role      string
	Content   string
	Parts     []string // instead of Content, if that came in parts
	Reasoning string
	Calls     []Call
	Name      string // of the tool, or of who speaks
	CallID    string // of a tool's result: the call
}

// Text is the content, parts joined by separator.
func (m *Message) Text(separator string) string {
	if m.Parts != nil {
		return strings.Join(m.Parts, separator)
	}
	return m.Content
}

// A Choice says whether tools are called.
type Choice int

// The values of tool_choice.
const (
	Auto     Choice = iota // the model decides
	None                   // it calls none
	Required               // it calls at least one
)

// A Delta is something that has come to a message: one of the fields is set.
type Delta struct {
	Reasoning string
	Content   string
	Call      *CallDelta
}

// A CallDelta is a call that begins, which then has an ID and a name, or more of its arguments.
type CallDelta struct {
	Index     int
	ID        string
	Name      string
	Arguments string
}

// encode is JSON as models have seen it in training: no escapes for HTML's sake.
func encode(value any) []byte {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		panic("toolcall: " + err.Error()) // only strings, and JSON that was checked, get here
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}
