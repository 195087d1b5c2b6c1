package server

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/libphd/libphd/bindings/go/internal/engine"
	"github.com/libphd/libphd/bindings/go/internal/toolcall"
)

// OpenAI's Responses API. A request becomes one for chat completions; the answer becomes a list of items.

func (s *Server) registerResponses(mux *http.ServeMux) {
	s.handleAll(mux, "POST", []string{"/responses", "/v1/responses"}, s.responses)
	s.handleAll(mux, "POST", []string{"/responses/input_tokens", "/v1/responses/input_tokens"},
		s.countTokens(s.chatOfResponses, inputTokens))
}

// chatOfResponses makes a request for chat completions of one for responses.
func (s *Server) chatOfResponses(b *body) (*body, error) {
	for name, why := range map[string]string{
		"previous_response_id": "responses are not stored: send the conversation so far as 'input'",
		"conversation":         "conversations are not stored: send the conversation so far as 'input'",
		"prompt":               "there are no prompt templates here",
	} {
		if raw, _ := b.get(name); raw != nil && string(raw) != `""` {
			return nil, badRequest("Field '%s': found %s; %s", name, excerpt(raw), why)
		}
	}
	background := false
	if b.boolean(&background, "background"); background {
		return nil, badRequest("Field 'background': found true; responses are not stored")
	}
	messages, err := responsesInput(b)
	if err != nil {
		return nil, err
	}
	out := &body{fields: maps.Clone(b.fields)}
	for _, name := range []string{
		"input", "instructions", "max_output_tokens", "text", "reasoning", "include", "n", "n_cmpl", "stream_options", "tools", "top_logprobs",
	} {
		delete(out.fields, name)
	}
	if err := out.set("messages", messages); err != nil {
		return nil, err
	}
	if raw, _ := b.get("max_output_tokens"); raw != nil {
		maximum := 0
		b.integer(&maximum, 1, 1<<31-1, "max_output_tokens")
		out.fields["max_tokens"] = raw
	}
	if reasoning := b.object("reasoning"); reasoning != nil {
		if raw, _ := reasoning.get("effort"); raw != nil {
			out.fields["reasoning_effort"] = raw
		}
	}
	if text := b.object("text"); text != nil {
		if format := text.object("format"); format != nil {
			if raw, _ := format.get("schema"); raw != nil {
				format.fields["json_schema"] = json.RawMessage(`{"schema":` + string(raw) + `}`)
			}
			if err := out.set("response_format", format.fields); err != nil {
				return nil, err
			}
		}
		if text.err != nil {
			return nil, inField("text", text.err)
		}
	}
	var include []string
	if b.texts(&include, 100, "include"); slices.Contains(include, "message.output_text.logprobs") {
		out.fields["logprobs"] = json.RawMessage("true")
		out.fields["top_logprobs"] = json.RawMessage("0")
		if raw, _ := b.get("top_logprobs"); raw != nil {
			out.fields["top_logprobs"] = raw
		}
	}
	if raw, _ := b.get("tools"); raw != nil {
		tools, err := s.responsesTools(raw)
		if err != nil {
			return nil, err
		}
		if len(tools) > 0 {
			if err := out.set("tools", tools); err != nil {
				return nil, err
			}
		}
	}
	return out, b.err
}

// set puts a value into a field.
func (b *body) set(name string, value any) error {
	raw, err := encodeJSON(value)
	b.fields[name] = raw
	return err
}

// responsesTools makes tools of chat completions of those of responses. What is no function is a service of OpenAI's, which
// clients may offer to any model: it is left out, as llama-server does.
func (s *Server) responsesTools(raw json.RawMessage) ([]any, error) {
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
		kind := ""
		if tool.text(&kind, "type"); tool.err != nil {
			return nil, inField(fmt.Sprintf("tools[%d]", i), tool.err)
		}
		if kind != "function" {
			s.log.Warn("a tool is left out: only functions are supported", "type", kind)
			continue
		}
		delete(tool.fields, "type")
		tools = append(tools, map[string]any{"type": "function", "function": tool.fields})
	}
	return tools, nil
}

// responsesInput makes messages of instructions and input.
func responsesInput(b *body) ([]map[string]any, error) {
	var messages []map[string]any
	instructions, text := "", ""
	if b.text(&instructions, "instructions"); instructions != "" {
		messages = append(messages, map[string]any{"role": "system", "content": instructions})
	}
	raw, _ := b.get("input")
	switch {
	case b.err != nil:
		return nil, b.err
	case raw == nil:
		return nil, badRequest("'input' is required")
	case json.Unmarshal(raw, &text) == nil:
		return append(messages, map[string]any{"role": "user", "content": text}), nil
	}
	var items []json.RawMessage
	if json.Unmarshal(raw, &items) != nil {
		return nil, wrong("input", raw, "a string or an array of items")
	}
	for i, item := range items {
		message, err := responsesItem(fmt.Sprintf("input[%d]", i), item)
		if err != nil {
			return nil, err
		}
		if n := len(messages); message["role"] == "assistant" && n > 0 && messages[n-1]["role"] == "assistant" {
			mergeTurn(messages[n-1], message)
		} else if message != nil {
			messages = append(messages, message)
		}
	}
	return messages, nil
}

// mergeTurn adds what an item says to a message: thinking, text and calls of one turn are items of their own.
func mergeTurn(turn, item map[string]any) {
	parts := func(m map[string]any) []any { p, _ := m["content"].([]any); return p }
	calls := func(m map[string]any) []any { c, _ := m["tool_calls"].([]any); return c }
	if all := append(parts(turn), parts(item)...); len(all) > 0 {
		turn["content"] = all
	}
	if all := append(calls(turn), calls(item)...); len(all) > 0 {
		turn["tool_calls"] = all
	}
	if text, _ := item["reasoning_content"].(string); text != "" {
		before, _ := turn["reasoning_content"].(string)
		turn["reasoning_content"] = before + text
	}
}

// responsesItem makes a message of an item; nil: there is nothing in it.
func responsesItem(name string, raw json.RawMessage) (map[string]any, error) {
	item := &body{}
	if json.Unmarshal(raw, &item.fields) != nil || item.fields == nil {
		return nil, wrong(name, raw, "an object")
	}
	kind, role := "message", ""
	item.text(&kind, "type")
	item.text(&role, "role")
	if item.err != nil {
		return nil, inField(name, item.err)
	}
	switch kind {
	case "message":
		content, _ := item.get("content")
		if content == nil || role == "" {
			return nil, badRequest("Field '%s': found no role or no content, expected both", name)
		}
		parts, err := responsesContent(name+".content", content)
		return map[string]any{"role": role, "content": parts}, err
	case "function_call":
		call := map[string]string{"call_id": "", "name": "", "arguments": ""}
		for field := range call {
			value := ""
			item.text(&value, field)
			if item.err == nil && !item.has(field) {
				item.err = badRequest("Field '%s': found nothing, expected a string", field)
			}
			call[field] = value
		}
		return map[string]any{"role": "assistant", "content": []any{}, "tool_calls": []any{map[string]any{
			"id":       strings.TrimPrefix(call["call_id"], callPrefix),
			"type":     "function",
			"function": map[string]any{"name": call["name"], "arguments": call["arguments"]},
		}}}, inField(name, item.err)
	case "function_call_output":
		id := ""
		item.text(&id, "call_id")
		output, _ := item.get("output")
		if item.err != nil {
			return nil, inField(name, item.err)
		}
		if id == "" || output == nil {
			return nil, badRequest("Field '%s': found no call_id or no output, expected both", name)
		}
		parts, err := responsesContent(name+".output", output)
		return map[string]any{"role": "tool", "tool_call_id": strings.TrimPrefix(id, callPrefix), "content": parts}, err
	case "reasoning":
		// Its text, or else the summary of it. OpenAI's own are encrypted: there is nothing to read in them.
		for _, field := range []string{"content", "summary"} {
			var parts []struct {
				Text string `json:"text"`
			}
			if read(item, &parts, "an array of parts", field); item.err != nil {
				return nil, inField(name, item.err)
			}
			text := ""
			for _, part := range parts {
				text += part.Text
			}
			if text != "" {
				return map[string]any{"role": "assistant", "content": []any{}, "reasoning_content": text}, nil
			}
		}
		return nil, nil
	}
	return nil, badRequest("Field '%s.type': found %q, expected message, function_call, function_call_output or reasoning", name, kind)
}

// callPrefix is before the IDs of calls, where clients see them.
const callPrefix = "call_"

// responsesContent makes parts of a message of a text or of parts of an item.
func responsesContent(name string, raw json.RawMessage) ([]any, error) {
	text := ""
	if json.Unmarshal(raw, &text) == nil {
		return []any{map[string]any{"type": "text", "text": text}}, nil
	}
	var elements []json.RawMessage
	if json.Unmarshal(raw, &elements) != nil {
		return nil, wrong(name, raw, "a string or an array of parts")
	}
	parts := []any{}
	for i, element := range elements {
		part := &body{}
		if json.Unmarshal(element, &part.fields) != nil || part.fields == nil {
			return nil, wrong(fmt.Sprintf("%s[%d]", name, i), element, "an object")
		}
		kind := ""
		if part.text(&kind, "type"); part.err != nil {
			return nil, inField(fmt.Sprintf("%s[%d]", name, i), part.err)
		}
		switch kind {
		case "input_text", "output_text", "text":
			part.fields["type"] = json.RawMessage(`"text"`)
		}
		parts = append(parts, part.fields) // parseContent looks at the rest
	}
	return parts, nil
}

func (s *Server) responses(w http.ResponseWriter, r *http.Request) error {
	b, c, err := s.readChat(w, r, s.chatOfResponses)
	if err != nil {
		return err
	}
	ctx, cancel := s.withTimeout(r)
	defer cancel()
	response := &responseBuilder{chat: c, id: "resp_" + newID(), request: b}
	if c.set.stream {
		out := s.newEventWriter(w)
		response.emit = out.event
		if err := c.run(ctx, response, out.ping); err != nil {
			return out.fail(err)
		}
		return nil
	}
	if err := c.run(ctx, response, nil); err != nil {
		return err
	}
	s.writeJSON(w, http.StatusOK, response.object())
	return nil
}

// A responseBuilder makes a response of an answer, and tells of it event by event.
type responseBuilder struct {
	*chat
	id       string
	request  *body
	emit     func(event string, value any) error // nil: nobody listens
	begun    bool
	sequence int
	output   []*responseItem
	result   *engine.Result
	probs    []tokenProbs // of the event at hand
	timings  *timings
}

// A responseItem is one item of a response.
type responseItem struct {
	kind      string // message, reasoning or function_call
	id        string
	text      strings.Builder // or the arguments
	call      toolcall.Call
	probs     []tokenProbs
	completed bool
}

func (i *responseItem) fields() map[string]any {
	status := "in_progress"
	if i.completed {
		status = "completed"
	}
	fields := map[string]any{"id": i.id, "type": i.kind, "status": status}
	switch i.kind {
	case "message":
		fields["role"], fields["content"] = "assistant", []any{}
		if i.completed {
			fields["content"] = []any{i.part()}
		}
	case "reasoning":
		fields["summary"], fields["content"], fields["encrypted_content"] = []any{}, []any{}, ""
		if i.completed {
			fields["content"] = []any{i.part()}
		}
	default:
		fields["call_id"], fields["name"], fields["arguments"] = callPrefix+i.call.ID, i.call.Name, i.text.String()
	}
	return fields
}

// part is the one part of a message's or a reasoning's content.
func (i *responseItem) part() map[string]any {
	if i.kind == "reasoning" {
		return map[string]any{"type": "reasoning_text", "text": i.text.String()}
	}
	return map[string]any{
		"type": "output_text", "annotations": []any{}, "logprobs": append([]tokenProbs{}, i.probs...), "text": i.text.String(),
	}
}

// object is the response so far.
func (r *responseBuilder) object() map[string]any {
	output := []any{}
	for _, item := range r.output {
		output = append(output, item.fields())
	}
	fields := map[string]any{
		"id":                   r.id,
		"object":               "response",
		"created_at":           r.created,
		"model":                r.s.modelName(),
		"status":               "in_progress",
		"output":               output,
		"error":                nil,
		"incomplete_details":   nil,
		"instructions":         nil,
		"max_output_tokens":    nil,
		"metadata":             map[string]any{},
		"parallel_tool_calls":  true,
		"previous_response_id": nil,
		"reasoning":            map[string]any{"effort": nil, "summary": nil},
		"store":                false,
		"temperature":          r.set.sampling.Temperature,
		"text":                 map[string]any{"format": map[string]any{"type": "text"}},
		"tool_choice":          "auto",
		"tools":                []any{},
		"top_p":                r.set.sampling.TopP,
		"truncation":           "disabled",
		"usage":                nil,
	}
	for _, name := range []string{
		"instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "reasoning", "text", "tool_choice", "tools", "user",
	} {
		if raw, _ := r.request.get(name); raw != nil {
			fields[name] = raw
		}
	}
	if r.result == nil {
		return fields
	}
	fields["status"], fields["completed_at"] = "completed", time.Now().Unix()
	if r.answers[0].finishReason() == "length" {
		fields["status"], fields["incomplete_details"] = "incomplete", map[string]any{"reason": "max_output_tokens"}
	}
	fields["usage"] = map[string]any{
		"input_tokens":          r.result.NPrompt,
		"input_tokens_details":  map[string]any{"cached_tokens": r.result.NCached},
		"output_tokens":         r.result.NDecoded,
		"output_tokens_details": map[string]any{"reasoning_tokens": 0},
		"total_tokens":          r.result.NPrompt + r.result.NDecoded,
	}
	return fields
}

// tell sends an event.
func (r *responseBuilder) tell(event string, fields map[string]any) error {
	if r.emit == nil {
		return nil
	}
	fields["type"], fields["sequence_number"] = event, r.sequence
	r.sequence++
	return r.emit(event, fields)
}

// begin says that there is a response.
func (r *responseBuilder) begin(progress map[string]any) error {
	if !r.begun {
		r.begun = true
		if err := r.tell("response.created", map[string]any{"response": r.object()}); err != nil {
			return err
		}
	} else if progress == nil {
		return nil
	}
	fields := map[string]any{"response": r.object()}
	if progress != nil {
		fields["prompt_progress"] = progress
	}
	return r.tell("response.in_progress", fields)
}

func (r *responseBuilder) progress(_ *chatAnswer, p *engine.Progress) error {
	return r.begin(progressFields(p))
}

func (r *responseBuilder) token(a *chatAnswer, event *engine.Event, deltas []toolcall.Delta) error {
	if err := r.begin(nil); err != nil {
		return err
	}
	if r.set.logprobs >= 0 {
		r.probs = append(r.probs, r.l.tokenProbs(event))
	}
	if r.set.timingsPerToken {
		r.timings = a.timings()
	}
	return r.add(deltas)
}

func (r *responseBuilder) end(a *chatAnswer, deltas []toolcall.Delta) error {
	if err := r.begin(nil); err != nil {
		return err
	}
	if err := r.add(deltas); err != nil {
		return err
	}
	if err := r.complete(); err != nil {
		return err
	}
	r.result = a.result
	// Also for a response that was cut off, which its status tells: this is the event that clients wait for.
	return r.tell("response.completed", map[string]any{"response": r.object(), "timings": timingsOf(a.result)})
}

// last is the item at hand, if it is of that kind.
func (r *responseBuilder) last(kind string) *responseItem {
	if n := len(r.output); n > 0 && r.output[n-1].kind == kind && !r.output[n-1].completed {
		return r.output[n-1]
	}
	return nil
}

func (r *responseBuilder) add(deltas []toolcall.Delta) error {
	for _, d := range deltas {
		var err error
		switch {
		case d.Reasoning != "":
			err = r.addText("reasoning", "rs_", "response.reasoning_text.delta", d.Reasoning)
		case d.Content != "":
			err = r.addText("message", "msg_", "response.output_text.delta", d.Content)
		case d.Call.ID != "":
			err = r.open(&responseItem{
				kind: "function_call", id: "fc_" + d.Call.ID, call: toolcall.Call{ID: d.Call.ID, Name: d.Call.Name},
			})
		}
		if err == nil && d.Call != nil && d.Call.Arguments != "" {
			item := r.last("function_call")
			item.text.WriteString(d.Call.Arguments)
			err = r.tell("response.function_call_arguments.delta", r.of(item, map[string]any{"delta": d.Call.Arguments}))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// of adds to an event which item it is of, and the timings.
func (r *responseBuilder) of(item *responseItem, fields map[string]any) map[string]any {
	fields["item_id"], fields["output_index"] = item.id, len(r.output)-1
	if item.kind != "function_call" {
		fields["content_index"] = 0
	}
	if _, isDelta := fields["delta"]; isDelta && r.timings != nil {
		fields["timings"] = r.timings
	}
	return fields
}

func (r *responseBuilder) addText(kind, prefix, event, text string) error {
	item := r.last(kind)
	if item == nil {
		item = &responseItem{kind: kind, id: prefix + newID()}
		if err := r.open(item); err != nil {
			return err
		}
		if err := r.tell("response.content_part.added", r.of(item, map[string]any{"part": item.part()})); err != nil {
			return err
		}
	}
	item.text.WriteString(text)
	fields := map[string]any{"delta": text}
	if kind == "message" {
		fields["logprobs"] = append([]tokenProbs{}, r.probs...)
		item.probs = append(item.probs, r.probs...)
	}
	r.probs = nil
	return r.tell(event, r.of(item, fields))
}

// open begins a new item; the one before it is complete.
func (r *responseBuilder) open(item *responseItem) error {
	if err := r.complete(); err != nil {
		return err
	}
	r.output = append(r.output, item)
	return r.tell("response.output_item.added", map[string]any{"output_index": len(r.output) - 1, "item": item.fields()})
}

// complete says that the item at hand is complete.
func (r *responseBuilder) complete() error {
	n := len(r.output)
	if n == 0 || r.output[n-1].completed {
		return nil
	}
	item := r.output[n-1]
	item.completed = true
	text := item.text.String()
	var err error
	switch item.kind {
	case "message":
		err = r.tell("response.output_text.done", r.of(item, map[string]any{"text": text, "logprobs": append([]tokenProbs{}, item.probs...)}))
	case "reasoning":
		err = r.tell("response.reasoning_text.done", r.of(item, map[string]any{"text": text}))
	default:
		err = r.tell("response.function_call_arguments.done", r.of(item, map[string]any{"name": item.call.Name, "arguments": text}))
	}
	if err == nil && item.kind != "function_call" {
		err = r.tell("response.content_part.done", r.of(item, map[string]any{"part": item.part()}))
	}
	if err != nil {
		return err
	}
	return r.tell("response.output_item.done", map[string]any{"output_index": n - 1, "item": item.fields()})
}
