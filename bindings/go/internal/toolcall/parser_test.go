package toolcall

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

var testTools = []Tool{
	{Name: "get_weather", Description: "Tells the weather", Parameters: json.RawMessage(
		`{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}`)},
	{Name: "get", Parameters: json.RawMessage(`{"type":"object","properties":{"n":{"type":"integer"}}}`)},
	{Name: "now"},
}

// templateOf is a template that thinks and calls in some syntax; "Generic": in our own.
func templateOf(format string) *Template {
	t := &Template{Think: thinkingTags[0], SystemRole: true, StringContent: true, Tools: true, ToolCalls: true, objectArguments: true}
	for _, s := range syntaxes {
		if s.name == format {
			t.syntax = s
		}
	}
	return t
}

func counter() func(int) string {
	n := 0
	return func(int) string { n++; return "call" + strconv.Itoa(n) }
}

func newParser(format string, o Options, thinking Thinking) *Parser {
	if o.Tools == nil && format != "Content-only" {
		o.Tools = testTools
	}
	return templateOf(format).Plan(o).NewParser(thinking, counter())
}

// assemble makes a message of deltas as a client does, and fails where the deltas are not in order.
func assemble(t *testing.T, deltas []Delta) Message {
	t.Helper()
	m := Message{Role: "assistant"}
	for _, d := range deltas {
		if (d.Reasoning != "") == (d.Content != "" || d.Call != nil) || (d.Content != "" && d.Call != nil) {
			t.Fatalf("a delta has not one of its fields: %+v", d)
		}
		m.Reasoning += d.Reasoning
		m.Content += d.Content
		switch c := d.Call; {
		case c == nil:
		case c.ID != "":
			if c.Index != len(m.Calls) || c.Name == "" {
				t.Fatalf("call %+v begins when there are %d", c, len(m.Calls))
			}
			m.Calls = append(m.Calls, Call{ID: c.ID, Name: c.Name, Arguments: c.Arguments})
		default:
			if c.Index != len(m.Calls)-1 {
				t.Fatalf("arguments of call %d come when there are %d calls", c.Index, len(m.Calls))
			}
			m.Calls[c.Index].Arguments += c.Arguments
		}
	}
	return m
}

func parse(t *testing.T, p *Parser, pieces ...string) Message {
	t.Helper()
	var deltas []Delta
	for _, piece := range pieces {
		deltas = append(deltas, p.Push(piece)...)
	}
	deltas = append(deltas, p.Finish()...)
	m := assemble(t, deltas)
	if whole := p.Message(); !reflect.DeepEqual(m, whole) {
		t.Fatalf("the deltas make\n%+v\nthe message is\n%+v", m, whole)
	}
	return m
}

func calls(pairs ...string) []Call {
	var calls []Call
	for i := 0; i < len(pairs); i += 2 {
		calls = append(calls, Call{ID: fmt.Sprintf("call%d", i/2+1), Name: pairs[i], Arguments: pairs[i+1]})
	}
	return calls
}

func TestParser(t *testing.T) {
	const paris = `{"city": "Paris"}`
	yes, no := true, false
	separate := Options{Separate: true}
	tests := []struct {
		name, format string
		options      Options
		thinking     Thinking
		text         string
		want         Message
	}{
		{"plain", "Content-only", Options{}, HasThought, " Hello {\"name\": \"get\"}\n", Message{Content: " Hello {\"name\": \"get\"}\n"}},
		{"no call", "Hermes 2 Pro", Options{}, HasThought, "Hello\n\n", Message{Content: "Hello\n\n"}},
		{"hermes", "Hermes 2 Pro", Options{}, HasThought,
			"Let me see.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": " + paris + "}\n</tool_call>\n",
			Message{Content: "Let me see.", Calls: calls("get_weather", paris)}},
		{"hermes, two calls", "Hermes 2 Pro", Options{}, HasThought,
			"<tool_call>{\"name\":\"get\",\"arguments\":{\"n\":1}}</tool_call>\n<tool_call>\n{\"name\": \"now\", \"parameters\": {}}\n</tool_call>\n and more",
			Message{Content: "and more", Calls: calls("get", `{"n":1}`, "now", "{}")}},
		{"hermes, one call only", "Hermes 2 Pro", Options{Parallel: &no}, HasThought,
			"<tool_call>{\"name\":\"get\",\"arguments\":{\"n\":1}}</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
			Message{Calls: calls("get", `{"n":1}`)}},
		{"hermes, unknown tool", "Hermes 2 Pro", Options{}, HasThought,
			"<tool_call>\n{\"name\": \"rm\", \"arguments\": {}}\n</tool_call>",
			Message{Content: "<tool_call>\n{\"name\": \"rm\", \"arguments\": {}}\n</tool_call>"}},
		{"hermes, arguments are no object", "Hermes 2 Pro", Options{}, HasThought,
			"<tool_call>{\"name\": \"now\", \"arguments\": 5}</tool_call>", Message{Content: "<tool_call>{\"name\": \"now\", \"arguments\": 5}</tool_call>"}},
		{"hermes, cut off in the head", "Hermes 2 Pro", Options{}, HasThought,
			"I call <tool_call>\n{\"name\": \"no", Message{Content: "I call <tool_call>\n{\"name\": \"no"}},
		{"hermes, cut off in the arguments", "Hermes 2 Pro", Options{}, HasThought,
			"<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Par", Message{Calls: calls("get_weather", `{"city": "Par`)}},
		{"hermes, cut off at the end", "Hermes 2 Pro", Options{}, HasThought,
			"<tool_call>{\"name\": \"now\", \"arguments\": {}}\n</tool_", Message{Calls: calls("now", `{}`)}},
		{"hermes, a field too many", "Hermes 2 Pro", Options{}, HasThought,
			"<tool_call>{\"name\": \"now\", \"arguments\": {}, \"x\": 1}\n</tool_call>",
			Message{Content: ", \"x\": 1}\n</tool_call>", Calls: calls("now", `{}`)}},
		{"brackets in strings", "Hermes 2 Pro", Options{}, HasThought,
			`<tool_call>{"name": "get_weather", "arguments": {"city": "}]\"}\\", "n": [{"a": "{"}]}}</tool_call>!`,
			Message{Content: "!", Calls: calls("get_weather", `{"city": "}]\"}\\", "n": [{"a": "{"}]}`)}},
		{"too much white space", "Hermes 2 Pro", Options{}, HasThought,
			"<tool_call>" + strings.Repeat(" ", 65) + "{\"name\": \"now\", \"arguments\": {}}",
			Message{Content: "<tool_call>" + strings.Repeat(" ", 65) + "{\"name\": \"now\", \"arguments\": {}}"}},
		{"false starts", "Hermes 2 Pro", Options{}, HasThought, "<<tool_call<tool_call>x< \n", Message{Content: "<<tool_call<tool_call>x< \n"}},
		{"thinking", "Hermes 2 Pro", separate, MayThink,
			"\n<think>\nHm, <tool_call>?\n</think>\n\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
			Message{Reasoning: "Hm, <tool_call>?", Calls: calls("now", "{}")}},
		{"thinking, begun by the prompt", "Content-only", separate, Thinks, "\nHm </thin </think>\n\nYes \n",
			Message{Reasoning: "Hm </thin", Content: "Yes \n"}},
		{"thinking, cut off", "Content-only", separate, MayThink, "<think>Hm\n</thi", Message{Reasoning: "Hm\n</thi"}},
		{"thinking, not told apart", "Content-only", Options{}, MayThink, "<think>Hm</think> Yes", Message{Content: "<think>Hm</think> Yes"}},
		{"no thinking", "Content-only", separate, MayThink, "\n <thin", Message{Content: "\n <thin"}},
		{"no thinking, later a tag", "Content-only", separate, MayThink, "Use <think>x</think>", Message{Content: "Use <think>x</think>"}},
		{"llama", "Llama 3.x", Options{}, HasThought, `{"name": "get_weather", "parameters": ` + paris + `}`, Message{Calls: calls("get_weather", paris)}},
		{"llama, tag and type", "Llama 3.x", Options{}, HasThought,
			`<|python_tag|>{"type": "function", "name": "now", "parameters": {}}`, Message{Calls: calls("now", "{}")}},
		{"llama, two calls", "Llama 3.x", Options{Parallel: &yes}, HasThought,
			`{"name": "now", "parameters": {}}; {"name": "get", "parameters": {"n": 2}}`, Message{Calls: calls("now", "{}", "get", `{"n": 2}`)}},
		{"llama, not at the beginning", "Llama 3.x", Options{}, HasThought, `So: {"name": "now", "parameters": {}}`, Message{Content: `So: {"name": "now", "parameters": {}}`}},
		{"llama, other JSON", "Llama 3.x", Options{}, HasThought, "\n" + `{"name": "Alice"}`, Message{Content: "\n" + `{"name": "Alice"}`}},
		{"mistral nemo", "Mistral Nemo", Options{}, HasThought,
			`[TOOL_CALLS][{"name": "get_weather", "arguments": ` + paris + `, "id": "abcdef123"}, {"name": "now", "arguments": {}}]`,
			Message{Calls: calls("get_weather", paris, "now", "{}")}},
		{"mistral nemo, text around", "Mistral Nemo", Options{}, HasThought,
			`Well [TOOL_CALLS] [{"name":"now","arguments":{}}] bye`, Message{Content: "Wellbye", Calls: calls("now", "{}")}},
		{"mistral", "Mistral", Options{}, HasThought,
			`[TOOL_CALLS]get_weather[CALL_ID]abcdef123[ARGS]` + paris + `[TOOL_CALLS]now[ARGS]{}`, Message{Calls: calls("get_weather", paris, "now", "{}")}},
		{"functionary", "Functionary v3.1", Options{}, HasThought,
			`Well: <function=get_weather>` + paris + `</function><function=now>{}</function> <function=what>{}</function>`,
			Message{Content: "Well:<function=what>{}</function>", Calls: calls("get_weather", paris, "now", "{}")}},
		{"firefunction", "FireFunction v2", Options{}, HasThought,
			` functools[{"name": "now", "arguments": {}}, {"name": "get", "arguments": {"n": 1}}]`, Message{Calls: calls("now", "{}", "get", `{"n": 1}`)}},
		{"deepseek r1", "DeepSeek R1", separate, Thinks,
			"Hm\n</think>\n\nI call\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + paris +
				"\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
			Message{Reasoning: "Hm", Content: "I call", Calls: calls("get_weather", paris, "now", "{}")}},
		{"deepseek v3.1", "DeepSeek V3.1", Options{}, HasThought,
			"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>" + paris + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
			Message{Calls: calls("get_weather", paris)}},
		{"generic, response", "Generic", Options{}, HasThought,
			`{"response": "Say \"hi\" \u00e9\ud83d\ude00\ud83d!\n\q"}`, Message{Content: "Say \"hi\" é😀\uFFFD!\n\\q"}},
		{"generic, response cut off", "Generic", Options{}, HasThought, `{"response": "Hi \ud83`, Message{Content: `Hi \ud83`}},
		{"generic, call", "Generic", Options{}, HasThought,
			`{"tool_call": {"name": "get_weather", "arguments": ` + paris + `}}`, Message{Calls: calls("get_weather", paris)}},
		{"generic, calls", "Generic", Options{Parallel: &yes}, HasThought,
			`{"tool_calls": [{"name": "now", "arguments": {}}, {"name": "get", "arguments": {"n": 1}}]}`, Message{Calls: calls("now", "{}", "get", `{"n": 1}`)}},
		{"generic, response by a schema", "Generic", Options{Schema: json.RawMessage(`{"type":"object"}`)}, HasThought,
			`{"response": {"a": "\n\"}"}}`, Message{Content: `{"a": "\n\"}"}`}},
		{"generic, a number by a schema", "Generic", Options{Schema: json.RawMessage(`{"type":"number"}`)}, HasThought, `{"response": 12.5}`, Message{Content: `12.5`}},
		{"generic, neither", "Generic", Options{}, HasThought, `{"respond": "no"}`, Message{Content: `{"respond": "no"}`}},
		{"empty", "Generic", separate, MayThink, "", Message{}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			test.want.Role = "assistant"
			if got := parse(t, newParser(test.format, test.options, test.thinking), test.text); !reflect.DeepEqual(got, test.want) {
				t.Fatalf("whole:\n%+v\nwant\n%+v", got, test.want)
			}
			if got := parse(t, newParser(test.format, test.options, test.thinking), strings.Split(test.text, "")...); !reflect.DeepEqual(got, test.want) {
				t.Fatalf("by characters:\n%+v\nwant\n%+v", got, test.want)
			}
			for i := range len(test.text) {
				if got := parse(t, newParser(test.format, test.options, test.thinking), test.text[:i], test.text[i:]); !reflect.DeepEqual(got, test.want) {
					t.Fatalf("cut at %d:\n%+v\nwant\n%+v", i, got, test.want)
				}
			}
		})
	}
}

// What a grammar allows at its plainest is what the parser takes for calls: both come of one description.
func TestCanonicalFormsParse(t *testing.T) {
	for _, s := range append(syntaxes[:len(syntaxes):len(syntaxes)], genericOne, genericMany) {
		text := join(s.first, s.head).text("get") + `"n": 1}` + s.tail.text("")
		want := calls("get", `{"n": 1}`)
		parallel := s != genericOne
		if parallel {
			text += join(s.sep, s.head).text("now") + "}" + s.tail.text("")
			want = append(want, calls("", "", "now", "{}")[1])
		}
		text += s.last.text("")
		p := newParser(s.name, Options{Parallel: &parallel}, HasThought)
		if m := parse(t, p, text); !reflect.DeepEqual(m.Calls, want) || m.Content != "" {
			t.Errorf("%s: %q gives %+v", s.name, text, m)
		}
	}
}

// The words from which the fuzzers' texts are made.
var words = []string{
	"<tool_call>", "</tool_call>", "{", "}", "\"name\"", ":", "\"get\"", "\"now\"", "get", "now", ",", "\"arguments\"", "\"parameters\"", "[", "]",
	"<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<function=", ">", "</function>", "functools[", "<|python_tag|>", "\"response\"",
	"\"tool_call\"", "\"tool_calls\"", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
	"function", "```json", "```", "\n", " ", "\"", "\\", "\\u00e9", "\\ud83d", "\\ude00", "é", "x", ";", "\"id\"",
	"{\"name\": \"get\", \"arguments\": {", "{\"name\": \"now\", \"parameters\": {}}", "{\"response\": \"", "{\"tool_call\": ", "{\"tool_calls\": [", "\xff",
}

func formats() []string {
	formats := []string{"Content-only", "Generic"}
	for _, s := range syntaxes {
		formats = append(formats, s.name)
	}
	return formats
}

// checkSplits compares the message of a text with that of the same text in pieces, and looks whether text was lost.
func checkSplits(t *testing.T, text string, r *rand.Rand) {
	t.Helper()
	formats := formats()
	format := formats[r.IntN(len(formats))]
	options := []Options{{}, {Separate: true, Parallel: new(bool)}, {Schema: json.RawMessage(`{}`)}}[r.IntN(3)]
	thinking := Thinking(r.IntN(3))
	whole := parse(t, newParser(format, options, thinking), text)
	var pieces []string
	for rest := text; rest != ""; {
		n := 1 + r.IntN(min(len(rest), 1+r.IntN(12)))
		pieces = append(pieces, rest[:n])
		rest = rest[n:]
	}
	if cut := parse(t, newParser(format, options, thinking), pieces...); !reflect.DeepEqual(whole, cut) {
		t.Fatalf("%s, %v: %q gives\n%+v\nin the pieces %q\n%+v", format, thinking, text, whole, pieces, cut)
	}
	if len(whole.Calls) == 0 && whole.Reasoning == "" && (format == "Content-only" || !strings.Contains(text, "response")) &&
		strings.Join(strings.Fields(text), "") != strings.Join(strings.Fields(whole.Content), "") &&
		!(options.Separate && strings.Contains(text, "think>")) {
		t.Fatalf("%s: of %q is left %q", format, text, whole.Content)
	}
}

func FuzzParser(f *testing.F) {
	f.Add("<tool_call>\n{\"name\": \"get\", \"arguments\": {\"n\": 1}}\n</tool_call>", uint64(1))
	f.Add("{\"response\": \"\\ud83d\\ude00\"}", uint64(2))
	f.Fuzz(func(t *testing.T, text string, seed uint64) {
		if len(text) > 1<<12 {
			return
		}
		checkSplits(t, text, rand.New(rand.NewPCG(seed, 0)))
	})
}

// TestParserOnWords is a fuzzer that knows the words that matter.
func TestParserOnWords(t *testing.T) {
	for seed := range uint64(40000) {
		r := rand.New(rand.NewPCG(seed, 1))
		var text strings.Builder
		for range r.IntN(20) {
			text.WriteString(words[r.IntN(len(words))])
		}
		checkSplits(t, text.String(), r)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// A text that seems to begin calls again and again must not cost more than its length.
func TestParserIsLinear(t *testing.T) {
	for _, format := range formats() {
		p := newParser(format, Options{Separate: true}, MayThink)
		for range 20000 {
			p.Push("<tool_call>\n{\"name\": \"get")
			p.Push("[TOOL_CALLS]<function=<｜tool▁calls▁begin｜> \n")
		}
		p.Finish()
		if n := len(p.Message().Content); n < 20000*40 {
			t.Errorf("%s: %d bytes are left", format, n)
		}
	}
}
