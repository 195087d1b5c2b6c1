package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/libphd/libphd/bindings/go/internal/toolcall"
)

// Bounds of a conversation; the size of the request bounds the rest.
const (
	maxTools    = 256
	maxToolName = 256
)

// parseMessages reads a conversation in OpenAI's form.
func parseMessages(raw json.RawMessage) ([]toolcall.Message, error) {
	if raw == nil {
		return nil, badRequest("'messages' is required")
	}
	var elements []json.RawMessage
	if json.Unmarshal(raw, &elements) != nil {
		return nil, wrong("messages", raw, "an array")
	}
	messages := make([]toolcall.Message, len(elements))
	for i, element := range elements {
		if err := parseMessage(fmt.Sprintf("messages[%d]", i), element, &messages[i]); err != nil {
			return nil, err
		}
	}
	return messages, nil
}

func parseMessage(name string, raw json.RawMessage, m *toolcall.Message) error {
	b := &body{}
	if json.Unmarshal(raw, &b.fields) != nil || b.fields == nil {
		return wrong(name, raw, "an object")
	}
	if !b.has("role") {
		return badRequest("Field '%s.role': found nothing, expected a string", name)
	}
	b.text(&m.Role, "role")
	b.text(&m.Reasoning, "reasoning_content", "reasoning")
	b.text(&m.Name, "name")
	b.text(&m.CallID, "tool_call_id")
	if b.err != nil {
		return inField(name, b.err)
	}
	_, hasContent := b.fields["content"] // null counts
	calls, _ := b.get("tool_calls")
	switch {
	case !hasContent && m.Role != "assistant":
		return badRequest("Field '%s.content': found nothing, expected a string or an array of parts", name)
	case !hasContent && calls == nil && m.Reasoning == "":
		return badRequest("Field '%s': found neither content nor tool_calls, expected one of them", name)
	}
	if content, _ := b.get("content"); content != nil {
		if err := parseContent(name+".content", content, m); err != nil {
			return err
		}
	}
	if calls == nil {
		return nil
	}
	var elements []json.RawMessage
	if json.Unmarshal(calls, &elements) != nil {
		return wrong(name+".tool_calls", calls, "an array")
	}
	for i, element := range elements {
		call, err := parseCall(fmt.Sprintf("%s.tool_calls[%d]", name, i), element)
		if err != nil {
			return err
		}
		m.Calls = append(m.Calls, call)
	}
	return nil
}

// inField puts the name of what a field is part of before it.
func inField(name string, err error) error {
	if api, ok := err.(*apiError); ok {
		if rest, ok := strings.CutPrefix(api.message, "Field '"); ok {
			api.message = "Field '" + name + "." + rest
		}
	}
	return err
}

// parseContent reads a text, or parts that are texts.
func parseContent(name string, raw json.RawMessage, m *toolcall.Message) error {
	if json.Unmarshal(raw, &m.Content) == nil {
		return nil
	}
	var parts []json.RawMessage
	if json.Unmarshal(raw, &parts) != nil {
		return wrong(name, raw, "a string or an array of parts")
	}
	m.Parts = make([]string, 0, len(parts))
	for i, raw := range parts {
		name := fmt.Sprintf("%s[%d]", name, i)
		part := &body{}
		if json.Unmarshal(raw, &part.fields) != nil || part.fields == nil {
			return wrong(name, raw, "an object")
		}
		kind, text := "", ""
		part.text(&kind, "type")
		if part.err == nil {
			if err := refuseMedia(kind); err != nil {
				return err
			}
		}
		if kind == "refusal" {
			part.text(&text, "refusal")
		} else {
			part.text(&text, "text")
		}
		switch {
		case part.err != nil:
			return inField(name, part.err)
		case kind != "text" && kind != "refusal":
			return badRequest("Field '%s.type': found %q, expected \"text\": unsupported content[].type", name, kind)
		case !part.has(kind):
			return badRequest("Field '%s.%s': found nothing, expected a string", name, kind)
		}
		m.Parts = append(m.Parts, text)
	}
	return nil
}

// refuseMedia refuses parts of a message that are no text. The status is the one that llama-server has for this, which clients
// look for; the request is in order, it is the model that cannot see or hear.
func refuseMedia(kind string) error {
	for _, media := range []struct{ what, kinds string }{
		{"image", "image image_url input_image"},
		{"audio", "audio input_audio"},
		{"video", "video video_url input_video"},
		{"file", "file input_file document"},
	} {
		for _, k := range strings.Fields(media.kinds) {
			if k == kind {
				return &apiError{status: http.StatusInternalServerError, kind: typeNotSupported,
					message: media.what + " input is not supported: the model reads text only"}
			}
		}
	}
	return nil
}

func parseCall(name string, raw json.RawMessage) (call toolcall.Call, err error) {
	b := &body{}
	if json.Unmarshal(raw, &b.fields) != nil || b.fields == nil {
		return call, wrong(name, raw, "an object")
	}
	kind := "function"
	b.text(&kind, "type")
	b.text(&call.ID, "id")
	function := b.object("function")
	switch {
	case b.err != nil:
		return call, inField(name, b.err)
	case kind != "function":
		return call, badRequest("Field '%s.type': found %q, expected \"function\"", name, kind)
	case function == nil:
		return call, badRequest("Field '%s.function': found nothing, expected an object", name)
	case !function.has("name"):
		return call, badRequest("Field '%s.function.name': found nothing, expected a string", name)
	}
	function.text(&call.Name, "name")
	if arguments, _ := function.get("arguments"); arguments != nil && json.Unmarshal(arguments, &call.Arguments) != nil {
		call.Arguments = string(arguments) // an object instead of its text
	}
	if call.Arguments == "" {
		call.Arguments = "{}"
	}
	if function.err != nil {
		return call, inField(name+".function", function.err)
	}
	return call, nil
}

// parseTools reads the tools of a request, and whether they are to be called.
func parseTools(b *body, options *toolcall.Options) error {
	if raw, _ := b.get("tools"); raw != nil {
		var elements []json.RawMessage
		if json.Unmarshal(raw, &elements) != nil || len(elements) > maxTools {
			return wrong("tools", raw, fmt.Sprintf("an array of at most %d tools", maxTools))
		}
		names := make(map[string]bool, len(elements))
		for i, element := range elements {
			name := fmt.Sprintf("tools[%d]", i)
			tool, err := parseTool(name, element)
			if err != nil {
				return err
			}
			if names[tool.Name] {
				return badRequest("Field '%s.function.name': found %q a second time, expected different names", name, tool.Name)
			}
			names[tool.Name] = true
			options.Tools = append(options.Tools, tool)
		}
	}
	if b.has("parallel_tool_calls") {
		options.Parallel = new(bool)
		b.boolean(options.Parallel, "parallel_tool_calls")
	}
	return parseToolChoice(b, options)
}

func parseTool(name string, raw json.RawMessage) (tool toolcall.Tool, err error) {
	b := &body{}
	if json.Unmarshal(raw, &b.fields) != nil || b.fields == nil {
		return tool, wrong(name, raw, "an object")
	}
	kind := ""
	b.text(&kind, "type")
	function := b.object("function")
	switch {
	case b.err != nil:
		return tool, inField(name, b.err)
	case kind != "function":
		return tool, badRequest("Field '%s.type': found %q, expected \"function\"", name, kind)
	case function == nil:
		return tool, badRequest("Field '%s.function': found nothing, expected an object", name)
	}
	function.text(&tool.Name, "name")
	function.text(&tool.Description, "description")
	function.boolean(&tool.Strict, "strict")
	if function.err != nil {
		return tool, inField(name+".function", function.err)
	}
	if !isToolName(tool.Name) {
		raw, _ := encodeJSON(tool.Name)
		return tool, wrong(name+".function.name", raw, fmt.Sprintf("1 to %d letters, digits and such as _-.:/", maxToolName))
	}
	if parameters, _ := function.get("parameters"); parameters != nil {
		var object map[string]json.RawMessage
		if json.Unmarshal(parameters, &object) != nil {
			return tool, wrong(name+".function.parameters", parameters, "a JSON schema, which is an object")
		}
		tool.Parameters = parameters
	}
	return tool, nil
}

// isToolName says whether a name can stand in all the ways in which models write calls.
func isToolName(name string) bool {
	if name == "" || len(name) > maxToolName {
		return false
	}
	for _, r := range name {
		if r <= ' ' || r == 0x7f || r == 0xFFFD || strings.ContainsRune("\"\\<>[]{}'`", r) {
			return false
		}
	}
	return true
}

func parseToolChoice(b *body, options *toolcall.Options) error {
	const expected = `"auto", "none", "required" or a function`
	raw, _ := b.get("tool_choice")
	if raw == nil {
		return nil
	}
	var choice string
	if json.Unmarshal(raw, &choice) == nil {
		switch choice {
		case "auto":
		case "none":
			options.Choice = toolcall.None
		case "required", "any":
			options.Choice = toolcall.Required
		default:
			return wrong("tool_choice", raw, expected)
		}
	} else {
		var object struct {
			Type     string `json:"type"`
			Name     string `json:"name"`
			Function struct {
				Name string `json:"name"`
			} `json:"function"`
		}
		if json.Unmarshal(raw, &object) != nil || object.Type != "function" || object.Name == "" && object.Function.Name == "" {
			return wrong("tool_choice", raw, expected)
		}
		options.Choice, options.Named = toolcall.Required, object.Function.Name
		if options.Named == "" {
			options.Named = object.Name
		}
		for _, tool := range options.Tools {
			if tool.Name == options.Named {
				return nil
			}
		}
		return badRequest("Field 'tool_choice': found the function %q, expected one of 'tools'", options.Named)
	}
	if options.Choice == toolcall.Required && len(options.Tools) == 0 {
		return badRequest("Field 'tool_choice': found %s without 'tools'", excerpt(raw))
	}
	return nil
}

// parseFormat reads response_format: the schema of the answer, or nil if there is none. That of json_schema is given.
func parseFormat(b *body, schema json.RawMessage) (json.RawMessage, error) {
	format := b.object("response_format")
	if format == nil {
		return schema, b.err
	}
	kind, name := "", "response_format.schema"
	format.text(&kind, "type")
	inner, _ := format.get("schema")
	switch kind {
	case "", "text":
		return schema, format.err
	case "json_object":
		if inner == nil && schema != nil {
			return schema, nil
		}
	case "json_schema":
		if wrapper := format.object("json_schema"); wrapper != nil {
			inner, _ = wrapper.get("schema")
			name = "response_format.json_schema.schema"
		}
	default:
		return nil, badRequest("Field 'response_format.type': found %q, expected \"text\", \"json_object\" or \"json_schema\"", kind)
	}
	if format.err != nil {
		return nil, inField("response_format", format.err)
	}
	if inner == nil {
		inner = json.RawMessage("{}")
	}
	var object map[string]json.RawMessage
	if json.Unmarshal(inner, &object) != nil {
		return nil, wrong(name, inner, "a JSON schema, which is an object")
	}
	return json.RawMessage(schemaText(inner)), nil
}
