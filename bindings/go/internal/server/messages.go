package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/libphd/libphd/bindings/go/internal/engine"
	"github.com/libphd/libphd/bindings/go/internal/toolcall"
)

// Anthropic's Messages API. A request becomes one for chat completions; the answer becomes a list of content blocks.

func (s *Server) registerMessages(mux *http.ServeMux) {
	s.handle(mux, "POST /v1/messages", s.messages)
	s.handle(mux, "POST /v1/messages/count_tokens", s.countTokens(s.chatOfMessages, map[string]any{}))
}

// defaultMessageTokens is how long an answer may be if the request does not say it, which Anthropic's must.
const defaultMessageTokens = "4096"

// chatOfMessages makes a request for chat completions of one for messages.
func (s *Server) chatOfMessages(b *body) (*body, error) {
	out := &body{fields: map[string]json.RawMessage{"max_tokens": json.RawMessage(defaultMessageTokens)}}
	for _, name := range []string{
		"max_tokens", "temperature", "top_p", "top_k", "stream", "chat_template_kwargs", "seed", "cache_prompt", "id_slot",
	} {
		if raw, _ := b.get(name); raw != nil {
			out.fields[name] = raw
		}
	}
	if raw, _ := b.get("stop_sequences"); raw != nil {
		out.fields["stop"] = raw
	}
	messages, err := anthropicMessages(b)
	if err != nil {
		return nil, err
	}
	if err := out.set("messages", messages); err != nil {
		return nil, err
	}
	if raw, _ := b.get("tools"); raw != nil {
		tools, err := s.anthropicTools(raw)
		if err != nil {
			return nil, err
		}
		if len(tools) > 0 {
			if err := out.set("tools", tools); err != nil {
				return nil, err
			}
		}
	}
	if choice := b.object("tool_choice"); choice != nil {
		kind, tool, single := "", "", false
		choice.text(&kind, "type")
		choice.text(&tool, "name")
		choice.boolean(&single, "disable_parallel_tool_use")
		var value any = kind
		switch kind {
		case "auto", "none":
		case "any":
			value = "required"
		case "tool":
			value = map[string]any{"type": "function", "function": map[string]any{"name": tool}}
		default:
			b.fail(badRequest("Field 'tool_choice.type': found %q, expected auto, any, tool or none", kind))
		}
		if choice.err != nil {
			return nil, inField("tool_choice", choice.err)
		}
		if err := out.set("tool_choice", value); err != nil {
			return nil, err
		}
		if single {
			out.fields["parallel_tool_calls"] = json.RawMessage("false")
		}
	}
	if thinking := b.object("thinking"); thinking != nil {
		kind := ""
		if thinking.text(&kind, "type"); thinking.err != nil {
			return nil, inField("thinking", thinking.err)
		}
		if kind == "disabled" {
			out.fields["reasoning_effort"] = json.RawMessage(`"none"`)
		}
	}
	return out, b.err
}

// anthropicTools makes tools of chat completions of Anthropic's. Those without a schema are services of Anthropic's, and left out.
func (s *Server) anthropicTools(raw json.RawMessage) ([]any, error) {
	var elements []json.RawMessage
	if json.Unmarshal(raw, &elements) != nil || len(elements) > maxTools {
		return nil, wrong("tools", raw, fmt.Sprintf("an array of at most %d tools", maxTools))
	}
	tools := []any{}
	for i, element := range elements {
		tool := &body{}
		if json.Unmarshal(element, &tool.fields) != nil || tool.fields == nil {
			return nil, wrong(fmt.Sprintf("tools[%d]", i), element, "an object")
		}
		kind := "custom"
		if tool.text(&kind, "type"); tool.err != nil {
			return nil, inField(fmt.Sprintf("tools[%d]", i), tool.err)
		}
		schema, _ := tool.get("input_schema")
		if kind != "custom" && schema == nil {
			s.log.Warn("a tool is left out: only tools of the client's own are supported", "type", kind)
			continue
		}
		function := map[string]any{"name": tool.fields["name"], "description": tool.fields["description"]}
		if schema != nil {
			function["parameters"] = schema
		}
		tools = append(tools, map[string]any{"type": "function", "function": function})
	}
	return tools, nil
}

// changingHeader is a number in what Anthropic's coding agent puts before its system prompt. It differs with each request and
// means nothing here, but all that follows it could not be taken from the cache.
var changingHeader = regexp.MustCompile(`^(x-anthropic-billing-header:[^\n]*?\bcch=)[0-9a-f]+`)

// anthropicMessages makes messages of chat completions of system and messages.
func anthropicMessages(b *body) ([]any, error) {
	out := []any{}
	if raw, _ := b.get("system"); raw != nil {
		var m toolcall.Message
		if err := parseContent("system", raw, &m); err != nil {
			return nil, err
		}
		text := changingHeader.ReplaceAllString(m.Text(""), "${1}0")
		out = append(out, map[string]any{"role": "system", "content": text})
	}
	raw, _ := b.get("messages")
	if raw == nil {
		return nil, badRequest("'messages' is required")
	}
	var elements []json.RawMessage
	if json.Unmarshal(raw, &elements) != nil {
		return nil, wrong("messages", raw, "an array")
	}
	for i, element := range elements {
		messages, err := anthropicMessage(fmt.Sprintf("messages[%d]", i), element)
		if err != nil {
			return nil, err
		}
		out = append(out, messages...)
	}
	if len(out) == 0 {
		out = append(out, map[string]any{"role": "user", "content": ""}) // llama-server answers, too
	}
	return out, nil
}

// anthropicMessage makes messages of one of Anthropic's: results of tools, which are part of the user's words there, become
// messages of their own.
func anthropicMessage(name string, raw json.RawMessage) ([]any, error) {
	b := &body{}
	if json.Unmarshal(raw, &b.fields) != nil || b.fields == nil {
		return nil, wrong(name, raw, "an object")
	}
	role, text := "", ""
	if b.text(&role, "role"); b.err != nil {
		return nil, inField(name, b.err)
	}
	content, _ := b.get("content")
	var blocks []json.RawMessage
	switch {
	case content == nil && role == "assistant":
		return nil, nil
	case content == nil:
		return nil, badRequest("Field '%s.content': found nothing, expected a string or an array of blocks", name)
	case json.Unmarshal(content, &text) == nil:
		return []any{map[string]any{"role": role, "content": text}}, nil
	case json.Unmarshal(content, &blocks) != nil:
		return nil, wrong(name+".content", content, "a string or an array of blocks")
	}
	message := map[string]any{"role": role, "content": ""}
	var parts, calls, results []any
	thoughts := ""
	for i, raw := range blocks {
		name := fmt.Sprintf("%s.content[%d]", name, i)
		block := &body{}
		if json.Unmarshal(raw, &block.fields) != nil || block.fields == nil {
			return nil, wrong(name, raw, "an object")
		}
		kind := ""
		block.text(&kind, "type")
		if err := refuseMedia(kind); err != nil {
			return nil, err
		}
		switch kind {
		case "text":
			parts = append(parts, block.fields) // parseContent looks at the rest
		case "thinking":
			text := ""
			block.text(&text, "thinking")
			thoughts += text
		case "redacted_thinking": // there is nothing to read in it
		case "tool_use":
			input := json.RawMessage("{}")
			if given, _ := block.get("input"); given != nil {
				input = given
			}
			calls = append(calls, map[string]any{"id": block.fields["id"], "type": "function",
				"function": map[string]any{"name": block.fields["name"], "arguments": string(input)}})
		case "tool_result":
			var result toolcall.Message
			if given, _ := block.get("content"); given != nil {
				if err := parseContent(name+".content", given, &result); err != nil {
					return nil, err
				}
			}
			results = append(results, map[string]any{"role": "tool", "tool_call_id": block.fields["tool_use_id"], "content": result.Text("")})
		default:
			block.fail(badRequest("Field 'type': found %q, expected text, thinking, tool_use or tool_result", kind))
		}
		if block.err != nil {
			return nil, inField(name, block.err)
		}
	}
	if parts != nil {
		message["content"] = parts
	}
	if calls != nil {
		message["tool_calls"] = calls
	}
	if thoughts != "" {
		message["reasoning_content"] = thoughts
	}
	var out []any
	// What the user says comes after the results: the model is to answer that.
	out = append(out, results...)
	if parts != nil || calls != nil || thoughts != "" || results == nil {
		out = append(out, message)
	}
	return out, nil
}

func (s *Server) messages(w http.ResponseWriter, r *http.Request) error {
	_, c, err := s.readChat(w, r, s.chatOfMessages)
	if err != nil {
		return err
	}
	c.set.timingsPerToken = true // for what was cached, which the first event tells
	ctx, cancel := s.withTimeout(r)
	defer cancel()
	message := &messageBuilder{chat: c, id: "msg_" + newID()}
	if c.set.stream {
		out := s.newEventWriter(w)
		message.emit = out.event
		ping := func() error { return out.event("ping", map[string]any{"type": "ping"}) }
		if err := c.run(ctx, message, ping); err != nil {
			return out.fail(err)
		}
		return nil
	}
	if err := c.run(ctx, message, nil); err != nil {
		return err
	}
	s.writeJSON(w, http.StatusOK, message.fields())
	return nil
}

// A messageBuilder makes a message of an answer, and tells of it event by event.
type messageBuilder struct {
	*chat
	id     string
	emit   func(event string, value any) error // nil: nobody listens
	begun  bool
	blocks []*messageBlock
	result *engine.Result
}

// A messageBlock is one block of a message's content.
type messageBlock struct {
	kind string // text, thinking or tool_use
	text strings.Builder
	call toolcall.Call
	open bool
}

func (b *messageBlock) fields() map[string]any {
	fields := map[string]any{"type": b.kind}
	switch b.kind {
	case "text":
		fields["text"] = b.text.String()
	case "thinking":
		fields["thinking"], fields["signature"] = b.text.String(), "" // nobody here signs
	default:
		fields["id"], fields["name"], fields["input"] = b.call.ID, b.call.Name, map[string]any{}
		if input := json.RawMessage(b.text.String()); json.Valid(input) {
			fields["input"] = input
		}
	}
	return fields
}

// usageFields counts tokens as Anthropic does: those from the cache are not input.
func usageFields(input, cached, output int) map[string]any {
	return map[string]any{
		"input_tokens": input - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0, "output_tokens": output,
	}
}

// fields is the whole message, or its beginning.
func (m *messageBuilder) fields() map[string]any {
	content := []any{}
	for _, block := range m.blocks {
		content = append(content, block.fields())
	}
	fields := map[string]any{
		"id": m.id, "type": "message", "role": "assistant", "content": content, "model": m.s.modelName(),
		"stop_reason": nil, "stop_sequence": nil,
	}
	if m.result == nil {
		fields["usage"] = usageFields(len(m.tokens), m.answers[0].clock.progress.Cached, 0)
		return fields
	}
	fields["usage"] = usageFields(m.result.NPrompt, m.result.NCached, m.result.NDecoded)
	reason, sequence := m.stopReason()
	fields["stop_reason"], fields["stop_sequence"] = reason, sequence
	return fields
}

func (m *messageBuilder) stopReason() (reason string, sequence any) {
	switch m.answers[0].finishReason() {
	case "length":
		return "max_tokens", nil
	case "tool_calls":
		return "tool_use", nil
	}
	if word := m.result.StopWord; word != "" && slices.Contains(m.set.stop, word) {
		return "stop_sequence", word
	}
	return "end_turn", nil
}

// tell sends an event.
func (m *messageBuilder) tell(event string, fields map[string]any) error {
	if m.emit == nil {
		return nil
	}
	fields["type"] = event
	return m.emit(event, fields)
}

func (m *messageBuilder) begin() error {
	if m.begun {
		return nil
	}
	m.begun = true
	return m.tell("message_start", map[string]any{"message": m.fields()})
}

func (m *messageBuilder) progress(*chatAnswer, *engine.Progress) error { return nil }

func (m *messageBuilder) token(_ *chatAnswer, _ *engine.Event, deltas []toolcall.Delta) error {
	if err := m.begin(); err != nil {
		return err
	}
	return m.add(deltas)
}

func (m *messageBuilder) end(a *chatAnswer, deltas []toolcall.Delta) error {
	if err := m.begin(); err != nil {
		return err
	}
	if err := m.add(deltas); err != nil {
		return err
	}
	if len(m.blocks) == 0 {
		if err := m.open(&messageBlock{kind: "text"}); err != nil { // clients expect one
			return err
		}
	}
	if err := m.close(); err != nil {
		return err
	}
	m.result = a.result
	reason, sequence := m.stopReason()
	if err := m.tell("message_delta", map[string]any{
		"delta": map[string]any{"stop_reason": reason, "stop_sequence": sequence},
		"usage": usageFields(m.result.NPrompt, m.result.NCached, m.result.NDecoded),
	}); err != nil {
		return err
	}
	return m.tell("message_stop", map[string]any{})
}

func (m *messageBuilder) add(deltas []toolcall.Delta) error {
	for _, d := range deltas {
		var err error
		switch {
		case d.Reasoning != "":
			err = m.addText("thinking", "thinking_delta", "thinking", d.Reasoning)
		case d.Content != "":
			err = m.addText("text", "text_delta", "text", d.Content)
		case d.Call.ID != "":
			err = m.open(&messageBlock{kind: "tool_use", call: toolcall.Call{ID: d.Call.ID, Name: d.Call.Name}})
		default:
			err = m.addText("tool_use", "input_json_delta", "partial_json", d.Call.Arguments)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// addText adds to the block at hand, or to a new one if that is of another kind.
func (m *messageBuilder) addText(kind, delta, field, text string) error {
	if n := len(m.blocks); n == 0 || m.blocks[n-1].kind != kind {
		if err := m.open(&messageBlock{kind: kind}); err != nil {
			return err
		}
	}
	m.blocks[len(m.blocks)-1].text.WriteString(text)
	return m.delta(map[string]any{"type": delta, field: text})
}

func (m *messageBuilder) delta(delta map[string]any) error {
	return m.tell("content_block_delta", map[string]any{"index": len(m.blocks) - 1, "delta": delta})
}

// open begins a block; the one before it is complete.
func (m *messageBuilder) open(block *messageBlock) error {
	if err := m.close(); err != nil {
		return err
	}
	block.open = true
	m.blocks = append(m.blocks, block)
	return m.tell("content_block_start", map[string]any{"index": len(m.blocks) - 1, "content_block": block.fields()})
}

// close ends the block at hand.
func (m *messageBuilder) close() error {
	n := len(m.blocks)
	if n == 0 || !m.blocks[n-1].open {
		return nil
	}
	m.blocks[n-1].open = false
	if m.blocks[n-1].kind == "thinking" {
		if err := m.delta(map[string]any{"type": "signature_delta", "signature": ""}); err != nil {
			return err
		}
	}
	return m.tell("content_block_stop", map[string]any{"index": n - 1})
}
