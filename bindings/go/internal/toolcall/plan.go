package toolcall

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
)

// Options say what a request wants of the answer.
type Options struct {
	Tools    []Tool
	Choice   Choice
	Named    string          // with Required: the tool that is called
	Parallel *bool           // several calls may stand in one answer; nil: if the model is used to that
	Schema   json.RawMessage // a JSON schema of the answer; nil: it is free
	Separate bool            // thinking is told apart from the answer
}

// A Plan is how one request is put to a model and how its answer is read.
type Plan struct {
	template *Template
	options  Options
	syntax   *syntax // nil: there are no calls
	parallel bool
	describe bool // the tools are described by us: the template does not do it
}

// Plan decides how to put a request to the model.
func (t *Template) Plan(o Options) *Plan {
	p := &Plan{template: t, options: o}
	if len(o.Tools) == 0 || o.Choice == None {
		return p
	}
	p.options.Tools = slices.Clone(o.Tools)
	p.syntax = t.syntax
	p.parallel = t.syntax != nil && !t.syntax.sequential
	if o.Parallel != nil {
		p.parallel = *o.Parallel
	}
	if p.syntax == nil {
		p.syntax = genericOne
		if p.parallel {
			p.syntax = genericMany
		}
	}
	p.describe = t.syntax == nil || !t.Tools
	return p
}

// Format is a name for the way in which the answer is written.
func (p *Plan) Format() string {
	if p.syntax == nil {
		return "Content-only"
	}
	return p.syntax.name
}

// Calls says whether the answer may have calls.
func (p *Plan) Calls() bool { return p.syntax != nil }

// Tools are those that may be called.
func (p *Plan) Tools() []Tool { return p.options.Tools }

// Markers are words that mean something in the answer, and in some vocabularies are control tokens.
func (p *Plan) Markers() []string {
	var markers []string
	if p.syntax != nil {
		markers = append(markers, p.syntax.markers...)
	}
	if think := p.template.Think; think.Open != "" {
		markers = append(markers, think.Open, think.Close)
	}
	return markers
}

// Stops are further words that end the answer: after a call, if there is to be one only.
func (p *Plan) Stops() []string {
	if p.syntax == nil || p.parallel || p.options.Choice == Required || len(p.syntax.tail) == 0 {
		return nil
	}
	if last := p.syntax.tail[len(p.syntax.tail)-1]; slices.Contains(p.syntax.markers, last.text) {
		return []string{last.text}
	}
	return nil
}

// Thinking says where in its thinking a model is when it begins to write.
type Thinking int

// Where a model is in its thinking.
const (
	MayThink Thinking = iota
	Thinks
	HasThought // or never does
)

// Thinking says where the model is at the end of a prompt.
func (p *Plan) Thinking(prompt string) Thinking {
	think := p.template.Think
	end := strings.TrimRight(prompt, white)
	switch {
	case think.Open == "" || strings.HasSuffix(end, think.Close):
		return HasThought
	case strings.HasSuffix(end, think.Open):
		return Thinks
	}
	return MayThink
}

// NewParser makes a parser of an answer. Calls get the IDs that newID makes.
func (p *Plan) NewParser(thinking Thinking, newID func(length int) string) *Parser {
	parser := &Parser{syntax: p.syntax, single: p.syntax != nil && !p.parallel, rawResponse: p.options.Schema != nil}
	if p.syntax != nil {
		parser.tools = make(map[string]bool, len(p.options.Tools))
		for _, tool := range p.options.Tools {
			parser.tools[tool.Name] = true
		}
		length := p.syntax.idLength
		parser.newID = func() string { return newID(length) }
	}
	if p.options.Separate {
		switch thinking {
		case MayThink:
			parser.think = p.template.Think
		case Thinks:
			parser.think = p.template.Think
			parser.state, parser.trim = inThinking, true
		}
	}
	return parser
}

// Messages is the conversation as the template gets it.
func (p *Plan) Messages(messages []Message) json.RawMessage {
	t := p.template
	w := conversation{template: t, calls: t.syntax != nil && t.ToolCalls}
	for _, m := range messages {
		if m.Role == "developer" && !t.Developer {
			m.Role = "system"
		}
		if t.syntax != nil && t.syntax.idLength > 0 {
			m.CallID = shortID(m.CallID, t.syntax.idLength)
			m.Calls = slices.Clone(m.Calls)
			for i := range m.Calls {
				m.Calls[i].ID = shortID(m.Calls[i].ID, t.syntax.idLength)
			}
		}
		w.messages = append(w.messages, m)
	}
	if p.describe {
		w.instruct(p.instructions())
	}
	if !t.SystemRole {
		w.mergeSystem()
	}
	return w.render()
}

// shortID makes an ID one of n letters and digits, the same each time. Conversations come with the IDs of other servers.
func shortID(id string, n int) string {
	isShort := len(id) == n
	for i := 0; i < len(id); i++ {
		isShort = isShort && isIdentifier(id[i]) && id[i] != '_' && id[i] != '-'
	}
	if id == "" || isShort {
		return id
	}
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:])[:n]
}

// RenderTools is what the template gets of the tools; nil: nothing.
func (p *Plan) RenderTools() json.RawMessage {
	if p.syntax == nil || p.describe {
		return nil
	}
	tools := make([]json.RawMessage, len(p.options.Tools))
	for i, tool := range p.options.Tools {
		tools[i] = tool.json()
	}
	return encode(tools)
}

func (t *Tool) json() json.RawMessage {
	type function struct {
		Name        string          `json:"name"`
		Description string          `json:"description"`
		Parameters  json.RawMessage `json:"parameters"`
	}
	parameters := t.Parameters
	if isEmptyObject(parameters) {
		parameters = json.RawMessage(`{"type":"object","properties":{}}`)
	}
	return encode(struct {
		Type     string   `json:"type"`
		Function function `json:"function"`
	}{"function", function{t.Name, t.Description, parameters}})
}

func isEmptyObject(raw json.RawMessage) bool {
	return raw == nil || string(raw) == "null" || string(bytes.Trim(raw, white+"{}")) == ""
}

// instructions tell a model of the tools in words, if its template does not.
func (p *Plan) instructions() string {
	var b strings.Builder
	b.WriteString("You can call these functions:\n")
	for _, tool := range p.options.Tools {
		b.Write(tool.json())
		b.WriteByte('\n')
	}
	call := join(p.syntax.first, p.syntax.head).text("NAME") + `"ARGUMENT": VALUE}` + join(p.syntax.tail, p.syntax.last).text("")
	answer := `"ANSWER"`
	if p.options.Schema != nil {
		answer = "ANSWER"
	}
	switch {
	case p.syntax.response == nil:
		b.WriteString("To call a function, write:\n" + call)
	case p.options.Choice == Required:
		b.WriteString("Answer with a JSON object and nothing else, and call a function: " + call)
	default:
		b.WriteString("Answer with a JSON object and nothing else. To call a function: " + call +
			` To answer the user: ` + p.syntax.response.text("") + answer + `}`)
	}
	return b.String()
}

// A conversation is changed until the template can take it.
type conversation struct {
	template *Template
	calls    bool // the template takes calls and their results
	messages []Message
}

// instruct adds to what the system says at the beginning.
func (c *conversation) instruct(text string) {
	if len(c.messages) > 0 && c.messages[0].Role == "system" {
		first := &c.messages[0]
		first.Content, first.Parts = first.Text("\n")+"\n\n"+text, nil
		return
	}
	c.messages = slices.Insert(c.messages, 0, Message{Role: "system", Content: text})
}

// mergeSystem puts what the system says before the user's next words.
func (c *conversation) mergeSystem() {
	var out []Message
	said := ""
	for _, m := range c.messages {
		switch {
		case m.Role == "system":
			said += m.Text("\n") + "\n\n"
			continue
		case said != "" && m.Role == "user":
			m.Content, m.Parts = said+m.Text("\n"), nil
			said = ""
		}
		out = append(out, m)
	}
	if said != "" {
		out = append(out, Message{Role: "user", Content: strings.TrimRight(said, "\n")})
	}
	c.messages = out
}

// spell writes calls and results as text, as the model writes calls in the syntax of our own. Results are the user's words,
// several of them those of one turn.
func (c *conversation) spell() {
	type callText struct {
		Name      string          `json:"name"`
		Arguments json.RawMessage `json:"arguments"`
	}
	var out []Message
	names := map[string]string{}
	for _, m := range c.messages {
		switch {
		case len(m.Calls) > 0:
			calls := make([]callText, len(m.Calls))
			for i, call := range m.Calls {
				calls[i] = callText{call.Name, json.RawMessage(call.Arguments)}
				if !json.Valid(calls[i].Arguments) {
					calls[i].Arguments = encode(call.Arguments)
				}
				names[call.ID] = call.Name
			}
			var text []byte
			if len(calls) == 1 {
				text = encode(map[string]callText{"tool_call": calls[0]})
			} else {
				text = encode(map[string][]callText{"tool_calls": calls})
			}
			content := m.Text("\n")
			if content != "" {
				content += "\n"
			}
			m.Content, m.Parts, m.Calls = content+string(text), nil, nil
		case m.Role == "tool":
			name := m.Name
			if name == "" {
				name = names[m.CallID]
			}
			type result struct {
				Name    string `json:"name,omitempty"`
				Content string `json:"content"`
			}
			text := string(encode(map[string]result{"tool_response": {name, m.Text("\n")}}))
			if n := len(out); n > 0 && out[n-1].Role == "user" && out[n-1].Name == fromTool {
				out[n-1].Content += "\n" + text
				continue
			}
			m = Message{Role: "user", Content: text, Name: fromTool}
		case m.Role == "user" && len(out) > 0 && out[len(out)-1].Name == fromTool:
			// Many templates insist that the user and the model take turns.
			last := &out[len(out)-1]
			last.Content, last.Name = last.Content+"\n\n"+m.Text("\n"), ""
			continue
		}
		out = append(out, m)
	}
	for i := range out {
		if out[i].Name == fromTool {
			out[i].Name = ""
		}
	}
	c.messages = out
}

// fromTool marks results that spell has made the user's words.
const fromTool = "\x00tool"

func (c *conversation) render() json.RawMessage {
	if !c.calls {
		c.spell()
	}
	type part struct {
		Type string `json:"type"`
		Text string `json:"text"`
	}
	type function struct {
		Name      string          `json:"name"`
		Arguments json.RawMessage `json:"arguments"`
	}
	type call struct {
		ID       string   `json:"id,omitempty"`
		Type     string   `json:"type"`
		Function function `json:"function"`
	}
	type message struct {
		Role      string `json:"role"`
		Content   any    `json:"content"`
		Reasoning string `json:"reasoning_content,omitempty"`
		Name      string `json:"name,omitempty"`
		CallID    string `json:"tool_call_id,omitempty"`
		Calls     []call `json:"tool_calls,omitempty"`
	}
	t := c.template
	out := make([]message, len(c.messages))
	for i, m := range c.messages {
		out[i] = message{Role: m.Role, Reasoning: m.Reasoning, Name: m.Name, CallID: m.CallID}
		switch {
		case m.Parts != nil && t.TypedContent:
			parts := make([]part, len(m.Parts))
			for j, text := range m.Parts {
				parts[j] = part{"text", text}
			}
			out[i].Content = parts
		case !t.StringContent:
			out[i].Content = []part{{"text", m.Text("\n")}}
		default:
			out[i].Content = m.Text("\n")
		}
		for _, called := range m.Calls {
			arguments := json.RawMessage(called.Arguments)
			if !t.objectArguments || !json.Valid(arguments) {
				arguments = encode(called.Arguments)
			}
			out[i].Calls = append(out[i].Calls, call{called.ID, "function", function{called.Name, arguments}})
		}
	}
	return encode(out)
}
