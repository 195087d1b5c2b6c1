package toolcall

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

var conversationForTests = []Message{
	{Role: "developer", Content: "Be brief."},
	{Role: "user", Parts: []string{"a", "b"}},
	{Role: "assistant", Calls: []Call{{ID: "call_0123456789", Name: "get", Arguments: `{"n":1}`}, {ID: "abcdef123", Name: "now", Arguments: "{"}}},
	{Role: "tool", CallID: "call_0123456789", Content: "one"},
	{Role: "tool", CallID: "abcdef123", Content: "two"},
	{Role: "user", Content: "thanks"},
}

func TestMessages(t *testing.T) {
	const first = `{"role":"system","content":"Be brief."},{"role":"user","content":"a\nb"},`
	for _, test := range []struct {
		name     string
		template Template
		want     string
	}{
		{"calls as text", Template{SystemRole: true, StringContent: true}, `[` + first +
			`{"role":"assistant","content":"{\"tool_calls\":[{\"name\":\"get\",\"arguments\":{\"n\":1}},{\"name\":\"now\",\"arguments\":\"{\"}]}"},` +
			`{"role":"user","content":"{\"tool_response\":{\"name\":\"get\",\"content\":\"one\"}}\n` +
			`{\"tool_response\":{\"name\":\"now\",\"content\":\"two\"}}\n\nthanks"}]`},
		{"calls as objects", Template{SystemRole: true, StringContent: true, ToolCalls: true, objectArguments: true, syntax: syntaxes[0]}, `[` + first +
			`{"role":"assistant","content":"","tool_calls":[{"id":"call_0123456789","type":"function","function":{"name":"get","arguments":{"n":1}}},` +
			`{"id":"abcdef123","type":"function","function":{"name":"now","arguments":"{"}}]},` +
			`{"role":"tool","content":"one","tool_call_id":"call_0123456789"},{"role":"tool","content":"two","tool_call_id":"abcdef123"},` +
			`{"role":"user","content":"thanks"}]`},
		{"no system role, parts only", Template{TypedContent: true, ToolCalls: true, syntax: syntaxes[0]},
			`[{"role":"user","content":[{"type":"text","text":"Be brief.\n\na\nb"}]},` +
				`{"role":"assistant","content":[{"type":"text","text":""}],"tool_calls":[{"id":"call_0123456789","type":"function","function":` +
				`{"name":"get","arguments":"{\"n\":1}"}},{"id":"abcdef123","type":"function","function":{"name":"now","arguments":"{"}}]},` +
				`{"role":"tool","content":[{"type":"text","text":"one"}],"tool_call_id":"call_0123456789"},` +
				`{"role":"tool","content":[{"type":"text","text":"two"}],"tool_call_id":"abcdef123"},` +
				`{"role":"user","content":[{"type":"text","text":"thanks"}]}]`},
	} {
		if got := string(test.template.Plan(Options{}).Messages(conversationForTests)); got != test.want {
			t.Errorf("%s:\n%s\nexpected\n%s", test.name, got, test.want)
		}
	}
	nemo := Template{SystemRole: true, StringContent: true, ToolCalls: true, syntax: syntaxes[3]}
	var messages []struct {
		CallID string `json:"tool_call_id"`
		Calls  []struct{ ID string }
	}
	if err := json.Unmarshal(nemo.Plan(Options{}).Messages(conversationForTests), &messages); err != nil {
		t.Fatal(err)
	}
	if id := messages[3].CallID; len(id) != 9 || id == "call_0123" || messages[4].CallID != "abcdef123" {
		t.Errorf("IDs: %v", messages)
	}
	if only := (&Template{}).Plan(Options{}).Messages([]Message{{Role: "system", Content: "x"}}); !strings.Contains(string(only), `"user"`) {
		t.Errorf("a system message alone becomes %s", only)
	}
}

func TestPlans(t *testing.T) {
	yes, no := true, false
	template := templateOf("Hermes 2 Pro")
	for _, test := range []struct {
		name    string
		options Options
		calls   bool
		stops   []string
		grammar bool
		schema  bool
		trigger bool
	}{
		{"nothing", Options{}, false, nil, false, false, false},
		{"a schema", Options{Schema: json.RawMessage("{}")}, false, nil, false, true, false},
		{"no calls wanted", Options{Tools: testTools, Choice: None}, false, nil, false, false, false},
		{"free", Options{Tools: testTools}, true, nil, false, false, true},
		{"free, one call", Options{Tools: testTools, Parallel: &no}, true, []string{"</tool_call>"}, false, false, true},
		{"free, several", Options{Tools: testTools, Parallel: &yes}, true, nil, false, false, true},
		{"required", Options{Tools: testTools, Choice: Required, Parallel: &no}, true, nil, true, false, false},
		{"free, by a schema", Options{Tools: testTools, Schema: json.RawMessage("{}")}, true, nil, true, false, false},
	} {
		plan := template.Plan(test.options)
		constraint := plan.Constraint(func(string) (int32, bool) { return 0, false }, HasThought)
		if plan.Calls() != test.calls || !slices.Equal(plan.Stops(), test.stops) || (constraint.Grammar != "") != test.grammar ||
			(constraint.Schema != "") != test.schema || (len(constraint.Triggers) > 0) != test.trigger || (plan.RenderTools() != nil) != test.calls {
			t.Errorf("%s: %v %v %+v", test.name, plan.Calls(), plan.Stops(), constraint)
		}
	}
}

// Control tokens stand in a grammar as themselves: no text matches them.
func TestGrammarNamesControlTokens(t *testing.T) {
	vocabulary := func(word string) (int32, bool) {
		token, ok := map[string]int32{"[TOOL_CALLS]": 5, "</think>": 7}[word]
		return token, ok
	}
	plan := templateOf("Mistral Nemo").Plan(Options{Tools: testTools, Choice: Required})
	grammar := plan.Constraint(vocabulary, MayThink).Grammar
	for _, part := range []string{`<[5]> "["`, `("<think>" thoughts)?`, "thoughts: /(?s:.*)/ <[7]>", `"{\"name\": \"get\", \"arguments\": "`} {
		if !strings.Contains(grammar, part) {
			t.Errorf("no %s in\n%s", part, grammar)
		}
	}
	if plan.Thinking("x <think>\n") != Thinks || plan.Thinking("<think></think>\n\n") != HasThought || plan.Thinking("x") != MayThink {
		t.Error("where the model is in its thinking")
	}
}

func TestArgumentSchema(t *testing.T) {
	for given, want := range map[string]string{
		"":                                   `{"type":"object","additionalProperties":false}`,
		" { } ":                              `{"type":"object","additionalProperties":false}`,
		`{"type":"object"}`:                  `{"type":"object"}`,
		`{"type":"object","properties":{}}`:  `{"additionalProperties":false,"type":"object","properties":{}}`,
		`{"type":"object","required":["a"]}`: `{"type":"object","required":["a"]}`,
		`{"properties":{"a":{}},"additionalProperties":true}`: `{"properties":{"a":{}},"additionalProperties":true}`,
		`{"properties":{"a":{}},"anyOf":[]}`:                  `{"properties":{"a":{}},"anyOf":[]}`,
		`{"$ref":"#/a"}`:                                      `{"$ref":"#/a"}`,
	} {
		tool := Tool{Parameters: json.RawMessage(given)}
		if given == "" {
			tool.Parameters = nil
		}
		if got := string(tool.ArgumentSchema()); got != want {
			t.Errorf("%s becomes %s, expected %s", given, got, want)
		}
	}
}
