package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestCompletion(t *testing.T) {
	ts := open(t, nil)
	answer := ts.post("/completion", object{"prompt": genesis, "n_predict": 8, "temperature": 0, "seed": 7, "return_tokens": true,
		"cache_prompt": false})
	text := answer["content"].(string)
	tokens := answer["tokens"].([]any)
	timings := answer["timings"].(object)
	expected := object{
		"index": 0.0, "stop": true, "tokens_predicted": 8.0, "stop_type": "limit", "stopping_word": "", "truncated": false,
		"has_new_line": strings.Contains(text, "\n"), "model": "kjv-phd-cswa-2-16-32", "prompt": genesis,
	}
	for name, expected := range expected {
		if answer[name] != expected {
			t.Errorf("%s is %v, expected %v", name, answer[name], expected)
		}
	}
	n := answer["tokens_evaluated"].(float64)
	if text == "" || len(tokens) != 8 || timings["prompt_n"] != n || timings["cache_n"] != 0.0 || timings["predicted_n"] != 8.0 ||
		timings["prompt_ms"].(float64) <= 0 || timings["predicted_per_second"].(float64) <= 0 ||
		answer["tokens_cached"] != n+7 {
		t.Errorf("answer: %v", answer)
	}
	if back := ts.post("/detokenize", object{"tokens": tokens}); back["content"] != text {
		t.Errorf("the tokens are %q, the text is %q", back["content"], text)
	}
	settings := answer["generation_settings"].(object)
	if settings["n_predict"] != 8.0 || settings["max_tokens"] != 8.0 || settings["seed"] != 7.0 || settings["temperature"] != 0.0 {
		t.Errorf("settings: %v", settings)
	}

	for _, path := range []string{"/completions", "/completion"} {
		if again := ts.post(path, object{"prompt": genesis, "n_predict": 8, "temperature": 0}); again["content"] != text {
			t.Errorf("%s: %q, expected %q", path, again["content"], text)
		}
	}
	if cached := ts.post("/completion", object{"prompt": genesis, "n_predict": 1})["timings"].(object); cached["cache_n"].(float64) == 0 {
		t.Errorf("nothing was taken from the cache: %v", cached)
	}
	one := ts.post("/completion", object{"prompt": genesis, "n_predict": 1})["timings"].(object)
	if one["predicted_n"] != 1.0 || one["predicted_per_second"] != 0.0 || one["predicted_per_token_ms"] != 0.0 {
		t.Errorf("timings of one token: %v", one)
	}
	none := ts.post("/completion", object{"prompt": genesis, "n_predict": 0})
	if none["tokens_predicted"] != 0.0 || none["content"] != "" || none["stop_type"] != "limit" {
		t.Errorf("no token: %v", none)
	}
}

func TestStreamIsTheSameText(t *testing.T) {
	ts := open(t, nil)
	request := object{"prompt": genesis, "n_predict": 24, "temperature": 0.9, "seed": 3}
	whole := ts.post("/completion", request)
	request["stream"] = true
	events := ts.stream("/completion", request)
	text := ""
	var tokens []any
	for i, event := range events {
		e := event.(object)
		text += e["content"].(string)
		tokens = append(tokens, e["tokens"].([]any)...)
		if last := i == len(events)-1; e["stop"] != last {
			t.Errorf("event %d of %d: stop is %v", i, len(events), e["stop"])
		}
	}
	last := events[len(events)-1].(object)
	if text != whole["content"] || len(tokens) != 24 {
		t.Errorf("the stream is %q of %d tokens, the whole is %q", text, len(tokens), whole["content"])
	}
	if last["content"] != "" || last["stop_type"] != "limit" || last["tokens_predicted"] != 24.0 || last["generation_settings"] == nil {
		t.Errorf("the last event: %v", last)
	}
}

func TestPromptShapes(t *testing.T) {
	ts := open(t, nil)
	tokens := ts.post("/tokenize", object{"content": genesis, "add_special": true})["tokens"].([]any)
	expected := ts.post("/completion", object{"prompt": genesis, "n_predict": 4, "temperature": 0})["content"]
	mixed := []any{tokens[0], " the beginning God created", " the heaven and the earth."}
	for _, prompt := range []any{genesis, tokens, mixed, object{"prompt_string": genesis}} {
		answer := ts.post("/completion", object{"prompt": prompt, "n_predict": 4, "temperature": 0})
		if answer["content"] != expected {
			t.Errorf("%v: %q, expected %q", prompt, answer["content"], expected)
		}
	}
	status, value := ts.call("POST", "/completion", object{"n_predict": 4, "temperature": 0,
		"prompt": []any{genesis, tokens, mixed, object{"prompt_string": genesis}}})
	answers, _ := value.([]any)
	if status != http.StatusOK || len(answers) != 4 {
		t.Fatalf("several prompts: %d %v", status, value)
	}
	for i, answer := range answers {
		if a := answer.(object); a["content"] != expected || a["index"] != float64(i) {
			t.Errorf("prompt %d: %v", i, a)
		}
	}

	for _, test := range []struct {
		prompt  any
		status  int
		kind    string
		message string
	}{
		{nil, 400, typeInvalidRequest, `"prompt" is required`},
		{[]any{}, 400, typeInvalidRequest, "must not be empty"},
		{"", 400, typeInvalidRequest, "the prompt is empty"},
		{true, 400, typeInvalidRequest, "Field 'prompt': found true, expected a string"},
		{object{}, 400, typeInvalidRequest, "Field 'prompt'"},
		{make([]string, 3000), 400, typeInvalidRequest, "found 3000 prompts"},
		{[]any{1, 2048}, 400, typeInvalidRequest, "found token 2048, expected 0 to 2047"},
		{[]any{1, -1}, 400, typeInvalidRequest, "found token -1"},
		{[]any{1, 1.5}, 400, typeInvalidRequest, "found token 1.5"},
		{[]any{1, 1e300}, 400, typeInvalidRequest, "found token"},
		{[]any{1, nil}, 400, typeInvalidRequest, "found null"},
		{[]any{"a", []any{}}, 400, typeInvalidRequest, "the prompt is empty"},
		{[]any{[]any{[]any{1}}}, 400, typeInvalidRequest, "expected a token or a string"},
		{object{"prompt_string": object{"prompt_string": "a"}}, 400, typeInvalidRequest, "Field 'prompt_string'"},
		{object{"prompt_string": "a", "multimodal_data": []string{"AAAA"}}, 501, typeNotSupported, "text only"},
	} {
		ts.refuses("POST", "/completion", object{"prompt": test.prompt, "n_predict": 1}, test.status, test.kind, test.message)
	}
}

func TestTooLongPrompt(t *testing.T) {
	ts := open(t, func(o *Options) { o.Unified = false })
	for _, path := range []string{"/completion", "/v1/completions"} {
		for _, stream := range []bool{false, true} {
			fields := ts.refuses("POST", path, object{"prompt": strings.Repeat("the ", 300), "stream": stream},
				400, typeExceedContext, "exceeds the available context size")
			if fields["n_ctx"] != 256.0 || fields["n_prompt_tokens"].(float64) < 300 {
				t.Errorf("%s: %v", path, fields)
			}
		}
	}
	// As much as fits is generated, and no more.
	answer := ts.post("/completion", object{"prompt": genesis, "n_predict": -1, "ignore_eos": true})
	if answer["truncated"] != true || answer["stop_type"] != "limit" ||
		answer["tokens_evaluated"].(float64)+answer["tokens_predicted"].(float64) != 256 {
		t.Errorf("a full context: %v", answer)
	}
}

func TestContextShift(t *testing.T) {
	ts := open(t, shifting)
	answer := ts.post("/completion", object{"prompt": genesis, "n_predict": 400, "ignore_eos": true})
	if answer["truncated"] != true || answer["tokens_predicted"] != 400.0 {
		t.Errorf("%v", answer)
	}
}

func TestStops(t *testing.T) {
	ts := open(t, nil)
	request := object{"prompt": genesis, "n_predict": 40, "temperature": 0, "ignore_eos": true}
	whole := ts.post("/completion", request)["content"].(string)
	word := strings.Fields(whole)[5]
	before, _, _ := strings.Cut(whole, word)
	for _, stop := range []any{word, []string{word}, []any{"", word, "never said"}} {
		request["stop"] = stop
		answer := ts.post("/completion", request)
		if answer["content"] != before || answer["stop_type"] != "word" || answer["stopping_word"] != word {
			t.Errorf("stop %v: %q, %v %v, expected %q", stop, answer["content"], answer["stop_type"], answer["stopping_word"], before)
		}
	}
	request["stream"] = true
	text := ""
	for _, event := range ts.stream("/completion", request) {
		text += event.(object)["content"].(string)
	}
	if text != before {
		t.Errorf("streamed: %q, expected %q", text, before)
	}
	// Held back because it could have become the stop string, and written when it could no longer.
	request["stop"] = whole[len(whole)-3:] + "never said"
	text = ""
	for _, event := range ts.stream("/completion", request) {
		text += event.(object)["content"].(string)
	}
	if text != whole {
		t.Errorf("streamed to the end: %q, expected %q", text, whole)
	}
}

func TestEndOfText(t *testing.T) {
	ts := open(t, nil)
	bias := [][]any{{0, 100}} // the token that ends a text
	answer := ts.post("/completion", object{"prompt": genesis, "n_predict": 8, "logit_bias": bias})
	if answer["stop_type"] != "eos" || answer["content"] != "" {
		t.Errorf("%v", answer)
	}
	answer = ts.post("/completion", object{"prompt": genesis, "n_predict": 8, "logit_bias": bias, "ignore_eos": true})
	if answer["stop_type"] != "limit" || answer["tokens_predicted"] != 8.0 {
		t.Errorf("with ignore_eos: %v", answer)
	}
	biases := answer["generation_settings"].(object)["logit_bias"].([]any)
	if last := biases[len(biases)-1].(object); last["token"] != 0.0 || last["bias"] != nil {
		t.Errorf("biases: %v", biases)
	}
}

func TestLogitBias(t *testing.T) {
	ts := open(t, nil)
	request := object{"prompt": genesis, "n_predict": 12, "temperature": 0}
	tokens := func() []any {
		request["return_tokens"] = true
		return ts.post("/completion", request)["tokens"].([]any)
	}
	first := tokens()[0]
	text := ts.post("/detokenize", object{"tokens": []any{first}})["content"].(string)
	for _, bias := range []any{
		[][]any{{first, -1000}}, [][]any{{first, false}}, object{fmt.Sprint(first): -1000}, object{fmt.Sprint(first): false},
		[][]any{{text, -1000}}, object{text: false},
	} {
		request["logit_bias"] = bias
		if slices.Contains(tokens(), first) {
			t.Errorf("bias %v does not forbid %v", bias, first)
		}
	}
	request["logit_bias"] = [][]any{{99999, 1}, {-1, 5}}
	if tokens()[0] != first {
		t.Error("tokens outside the vocabulary change something")
	}
}

func TestProbabilities(t *testing.T) {
	ts := open(t, nil)
	request := object{"prompt": genesis, "n_predict": 5, "temperature": 0, "n_probs": 3, "seed": 1}
	check := func(probs []any) (tokens []any) {
		for _, p := range probs {
			token := p.(object)
			top := token["top_logprobs"].([]any)
			if len(top) != 3 || token["logprob"].(float64) > 0 || len(token["bytes"].([]any)) == 0 {
				t.Errorf("a token: %v", token)
				continue
			}
			if best := top[0].(object); best["id"] != token["id"] || best["logprob"] != token["logprob"] {
				t.Errorf("the best is not the one that was taken greedily: %v", token)
			}
			tokens = append(tokens, token["id"])
		}
		return tokens
	}
	whole := ts.post("/completion", request)
	tokens := check(whole["completion_probabilities"].([]any))
	if len(tokens) != 5 {
		t.Errorf("%d tokens have probabilities", len(tokens))
	}
	request["stream"] = true
	var streamed []any
	for _, event := range ts.stream("/completion", request) {
		if e := event.(object); e["stop"] == false {
			streamed = append(streamed, check(e["completion_probabilities"].([]any))...)
		}
	}
	if !reflect.DeepEqual(tokens, streamed) {
		t.Errorf("streamed: %v, expected %v", streamed, tokens)
	}
	ts.refuses("POST", "/completion", object{"prompt": "a", "n_probs": 1000}, 400, typeInvalidRequest, "'n_probs': found 1000, expected a whole number from 0 to 100")
}

func TestSeeds(t *testing.T) {
	ts := open(t, nil)
	request := object{"prompt": genesis, "n_predict": 16, "temperature": 1.5}
	random := ts.post("/completion", request)
	seed := random["generation_settings"].(object)["seed"]
	request["seed"] = seed
	if again := ts.post("/completion", request); again["content"] != random["content"] {
		t.Errorf("seed %v: %q and %q", seed, random["content"], again["content"])
	}
	request["seed"] = seed.(float64) + 1
	if other := ts.post("/completion", request); other["content"] == random["content"] {
		t.Errorf("another seed gives the same text")
	}
}

func TestConstraints(t *testing.T) {
	ts := open(t, nil)
	schema := object{"type": "object", "properties": object{"n": object{"type": "integer"}}, "required": []string{"n"},
		"additionalProperties": false}
	answer := ts.post("/completion", object{"prompt": genesis, "n_predict": 60, "json_schema": schema, "seed": 1})
	var value struct{ N *int }
	if err := json.Unmarshal([]byte(answer["content"].(string)), &value); err != nil || value.N == nil {
		t.Errorf("%q: %v", answer["content"], err)
	}
	answer = ts.post("/completion", object{"prompt": genesis, "n_predict": 60, "grammar": `root ::= "yes" | "no"`})
	if text := answer["content"]; text != "yes" && text != "no" {
		t.Errorf("the grammar gave %q", text)
	}
	for name, request := range map[string]object{
		"'grammar'":              {"grammar": "root ::= ("},
		"'json_schema'":          {"json_schema": object{"type": "nonsense"}},
		"only one of them":       {"json_schema": object{}, "grammar": `root ::= "a"`},
		"Field 'grammar': found": {"grammar": 5},
	} {
		request["prompt"] = "a"
		ts.refuses("POST", "/completion", request, 400, typeInvalidRequest, name)
	}
}

// TestExtremes asks for as much as JSON can say, one field at a time: an answer or a clear refusal.
func TestExtremes(t *testing.T) {
	ts := open(t, nil)
	for name := range ts.post("/completion", object{"prompt": "a", "n_predict": 1})["generation_settings"].(object) {
		for _, value := range []any{0, -1, 1, 0.5, -0.5, math.MaxInt32, -math.MaxInt32, 3e38, -3e38, 1e-40, 1e300, true, "text", []int{1}, object{}} {
			request := object{"prompt": "a", "n_predict": 2, "dry_multiplier": 1, "xtc_probability": 1, name: value}
			if name == "stream" && value == true {
				continue
			}
			switch status, answer := ts.call("POST", "/completion", request); status {
			case http.StatusOK:
			case http.StatusBadRequest, http.StatusNotImplemented:
				message := answer.(object)["error"].(object)["message"].(string)
				if !strings.Contains(message, name) && name != "max_tokens" {
					t.Errorf("%s: %v is refused without its name: %s", name, value, message)
				}
			default:
				t.Errorf("%s: %v: status %d: %v", name, value, status, answer)
			}
		}
	}
}

func TestResponseFields(t *testing.T) {
	ts := open(t, nil)
	answer := ts.post("/completion", object{"prompt": genesis, "n_predict": 3,
		"response_fields": []string{"content", "generation_settings/n_predict", "nothing", "content/deeper", "timings/prompt_n"}})
	if len(answer) != 2 || answer["generation_settings/n_predict"] != 3.0 {
		t.Errorf("%v", answer)
	}
}

func TestProgress(t *testing.T) {
	ts := open(t, func(o *Options) { o.Piece = 32 })
	events := ts.stream("/completion", object{"prompt": strings.Repeat(genesis, 8), "n_predict": 4, "stream": true,
		"timings_per_token": true, "return_progress": true})
	last, n := -1.0, 0
	for _, event := range events {
		e := event.(object)
		progress, ok := e["prompt_progress"].(object)
		if !ok {
			continue
		}
		timings := e["timings"].(object)
		if n++; n == 1 && (timings["prompt_n"] != 0.0 || timings["prompt_ms"] != 0.0) {
			t.Errorf("the first: %v", e)
		}
		if processed := progress["processed"].(float64); processed <= last {
			t.Errorf("processed goes from %v to %v", last, processed)
		} else {
			last = processed
		}
		if timings["predicted_n"] != 0.0 {
			t.Errorf("tokens before the prompt is done: %v", e)
		}
	}
	if n < 3 {
		t.Errorf("%d events of progress", n)
	}
}

func TestOpenAICompletion(t *testing.T) {
	ts := open(t, nil)
	request := object{"model": "any", "prompt": genesis, "max_tokens": 6, "temperature": 0, "logprobs": 2}
	answer := ts.post("/v1/completions", request)
	choice := answer["choices"].([]any)[0].(object)
	logprobs := choice["logprobs"].(object)
	text := choice["text"].(string)
	usage := answer["usage"].(object)
	if answer["object"] != "text_completion" || !strings.HasPrefix(answer["id"].(string), "cmpl-") ||
		!strings.HasPrefix(answer["system_fingerprint"].(string), "b") || choice["finish_reason"] != "length" ||
		usage["completion_tokens"] != 6.0 || usage["total_tokens"] != usage["prompt_tokens"].(float64)+6 {
		t.Errorf("%v", answer)
	}
	if tokens := logprobs["tokens"].([]any); len(tokens) != 6 || len(logprobs["token_logprobs"].([]any)) != 6 ||
		len(logprobs["text_offset"].([]any)) != 6 || len(logprobs["top_logprobs"].([]any)[0].(object)) != 2 ||
		len(logprobs["content"].([]any)) != 6 {
		t.Errorf("logprobs: %v", logprobs)
	}

	request["stream"] = true
	events := ts.stream("/v1/completions", request)
	streamed := ""
	var offsets, finish []any
	for _, event := range events[:len(events)-1] {
		choice := event.(object)["choices"].([]any)[0].(object)
		streamed += choice["text"].(string)
		finish = append(finish, choice["finish_reason"])
		if logprobs, ok := choice["logprobs"].(object); ok {
			offsets = append(offsets, logprobs["text_offset"].([]any)...)
		}
	}
	last := events[len(events)-2].(object)
	if streamed != text || events[len(events)-1] != "[DONE]" || finish[len(finish)-1] != "length" || finish[0] != nil ||
		!reflect.DeepEqual(last["usage"].(object)["completion_tokens"], 6.0) || last["timings"] == nil {
		t.Errorf("%q: %v", streamed, events)
	}
	if !reflect.DeepEqual(offsets, logprobs["text_offset"]) {
		t.Errorf("offsets: %v, expected %v", offsets, logprobs["text_offset"])
	}
}

func TestOpenAIChoices(t *testing.T) {
	ts := open(t, nil)
	request := object{"prompt": []string{genesis, "And God said"}, "max_tokens": 6, "n": 3, "temperature": 1, "seed": 5, "echo": true}
	answer := ts.post("/v1/completions", request)
	choices := answer["choices"].([]any)
	texts := map[any]bool{}
	for i, c := range choices {
		choice := c.(object)
		texts[choice["text"]] = true
		prefix := genesis
		if i >= 3 {
			prefix = "And God said"
		}
		if choice["index"] != float64(i) || !strings.HasPrefix(choice["text"].(string), prefix) {
			t.Errorf("choice %d: %v", i, choice)
		}
	}
	if len(choices) != 6 || len(texts) < 4 {
		t.Errorf("%d choices, %d of them different", len(choices), len(texts))
	}
	prompts := 0.0
	for _, prompt := range []string{genesis, "And God said"} {
		prompts += float64(len(ts.post("/tokenize", object{"content": prompt})["tokens"].([]any)))
	}
	if usage := answer["usage"].(object); usage["prompt_tokens"] != prompts || usage["completion_tokens"] != 36.0 {
		t.Errorf("usage: %v, the prompts have %v tokens", usage, prompts)
	}

	request["stream"] = true
	streamed := make([]string, 6)
	ends := 0
	for _, event := range ts.stream("/v1/completions", request) {
		e, ok := event.(object)
		if !ok {
			continue
		}
		choice := e["choices"].([]any)[0].(object)
		streamed[int(choice["index"].(float64))] += choice["text"].(string)
		if choice["finish_reason"] != nil {
			if ends++; (e["usage"] != nil) != (ends == 6) {
				t.Errorf("usage comes with end %d: %v", ends, e)
			}
		}
	}
	for i, c := range choices {
		if text := c.(object)["text"]; streamed[i] != text {
			t.Errorf("choice %d: %q, expected %q", i, streamed[i], text)
		}
	}

	for message, request := range map[string]object{
		"Field 'n': found 100":  {"n": 100},
		"'logprobs': found 101": {"logprobs": 101},
	} {
		request["prompt"] = "a"
		ts.refuses("POST", "/v1/completions", request, 400, typeInvalidRequest, message)
	}
	for message, request := range map[string]object{
		"'suffix'":  {"suffix": "b"},
		"'best_of'": {"best_of": 5},
		"'echo'":    {"echo": true, "logprobs": 1},
	} {
		request["prompt"] = "a"
		ts.refuses("POST", "/v1/completions", request, 501, typeNotSupported, message)
	}
}

func TestVerbose(t *testing.T) {
	ts := open(t, nil)
	answer := ts.post("/v1/completions", object{"prompt": genesis, "max_tokens": 2, "verbose": true})
	if inner, ok := answer["__verbose"].(object); !ok || inner["prompt"] != genesis {
		t.Errorf("%v", answer["__verbose"])
	}
}

func TestManyPromptsAtOnce(t *testing.T) {
	// More than slots and queue hold: one request does not fill the queue.
	ts := open(t, func(o *Options) { o.Slots, o.MaxQueue = 2, 0 })
	prompts := make([]string, 12)
	for i := range prompts {
		prompts[i] = fmt.Sprintf("Verse %d: ", i)
	}
	_, value := ts.call("POST", "/completion", object{"prompt": prompts, "n_predict": 2})
	if answers, ok := value.([]any); !ok || len(answers) != 12 {
		t.Errorf("%v", value)
	}
}

func TestQueueFull(t *testing.T) {
	ts := open(t, func(o *Options) {
		shifting(o)
		o.Slots, o.MaxQueue = 1, 0
	})
	ts.begin(context.Background(), "/completion", endless(nil))
	for _, path := range []string{"/completion", "/v1/completions"} {
		ts.refuses("POST", path, object{"prompt": "a", "stream": true}, 429, typeRateLimit, "waiting")
	}
	if after := ts.do("POST", "/completion", object{"prompt": "a"}).Header.Get("Retry-After"); after != "1" {
		t.Errorf("Retry-After is %q", after)
	}
	if status, _ := ts.call("GET", "/slots?fail_on_no_slot=1", nil); status != http.StatusServiceUnavailable {
		t.Errorf("/slots with no slot: %d", status)
	}
}

func TestDisconnect(t *testing.T) {
	ts := open(t, shifting)
	t.Run("while streaming", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		ts.begin(ctx, "/v1/completions", endless(object{"n": 3}))
		cancel()
	})
	t.Run("while waiting", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		request := ts.request(ctx, "POST", "/completion", endless(object{"stream": false}))
		ended := make(chan error)
		go func() {
			response, err := ts.client.Do(request)
			if err == nil {
				response.Body.Close()
			}
			ended <- err
		}()
		for ts.loaded().engine.Snapshot().Busy == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
		if err := <-ended; err == nil {
			t.Error("an endless answer came")
		}
	})
	ts.quiet()
}

func TestSlowReader(t *testing.T) {
	ts := open(t, func(o *Options) {
		shifting(o)
		o.WriteTimeout = 100 * time.Millisecond
	})
	// Nobody reads; what is written fills the buffers on the way.
	response := ts.do("POST", "/completion", endless(object{"n_probs": 100}))
	defer response.Body.Close()
	ts.quiet()
}

func TestTimeout(t *testing.T) {
	ts := open(t, func(o *Options) {
		shifting(o)
		o.Timeout = 50 * time.Millisecond
	})
	ts.refuses("POST", "/completion", endless(object{"stream": false}), 504, typeTimeout, "50ms")
	events := ts.stream("/completion", endless(nil))
	last, _ := events[len(events)-1].(object)
	if fields, ok := last["error"].(object); !ok || fields["type"] != typeTimeout {
		t.Errorf("the stream ends with %v", last)
	}
	ts.quiet()
}

func TestTimeOfPrediction(t *testing.T) {
	ts := open(t, shifting)
	answer := ts.post("/completion", endless(object{"stream": false, "t_max_predict_ms": 20}))
	if answer["stop_type"] != "limit" || answer["timings"].(object)["predicted_ms"].(float64) < 20 {
		t.Errorf("%v", answer)
	}
}

func TestPings(t *testing.T) {
	// The queue holds the second request up until the first has gone.
	ts := open(t, func(o *Options) {
		shifting(o)
		o.Slots = 1
	})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ts.begin(ctx, "/completion", endless(nil))
	second := ts.openStream(context.Background(), "/completion", object{"prompt": "a", "n_predict": 1, "stream": true, "sse_ping_interval": 1})
	if line, err := second.lines.ReadString('\n'); err != nil || line != ":\n" {
		t.Errorf("the first line is %q: %v", line, err)
	}
	cancel()
	if _, ok := second.next(); !ok {
		t.Error("the second request got no answer")
	}
}

func TestSlotOfRequest(t *testing.T) {
	ts := open(t, nil)
	if answer := ts.post("/completion", object{"prompt": genesis, "n_predict": 1, "id_slot": 2}); answer["id_slot"] != 2.0 {
		t.Errorf("slot %v", answer["id_slot"])
	}
	ts.refuses("POST", "/completion", object{"prompt": "a", "id_slot": 4}, 400, typeInvalidRequest, "'id_slot': found 4, expected -1 to 3")
}

func TestInfill(t *testing.T) {
	ts := open(t, nil)
	ts.refuses("POST", "/infill", object{"input_prefix": "a", "input_suffix": "b"}, 501, typeNotSupported, "prefix, suffix, middle")

	ts = open(t, func(o *Options) {
		o.ModelPath = modelWithTokens(t, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
	})
	request := object{"input_prefix": "In the", "input_suffix": "the earth.", "prompt": " beginning", "n_predict": 4, "temperature": 0}
	answer := ts.post("/infill", request)
	const expected = "<|fim_prefix|>In the<|fim_suffix|>the earth.<|fim_middle|> beginning"
	if answer["prompt"] != expected || answer["tokens_predicted"] != 4.0 {
		t.Errorf("%v", answer)
	}
	request["input_extra"] = []object{{"text": "And God said", "filename": "a.txt"}, {"text": "Let there be light"}}
	answer = ts.post("/infill", request)
	if prompt := answer["prompt"].(string); !strings.HasSuffix(prompt, expected) || !strings.Contains(prompt, "And God said") ||
		!strings.Contains(prompt, "Let there be light") {
		t.Errorf("with extras: %q", prompt)
	}
	// What is too much goes: the suffix keeps its beginning, the prefix its end.
	request = object{"input_prefix": strings.Repeat("verily ", 2000) + "END", "input_suffix": "BEGIN" + strings.Repeat(" thus", 2000),
		"n_predict": 1}
	answer = ts.post("/infill", request)
	if prompt := answer["prompt"].(string); !strings.Contains(prompt, "END<|fim_suffix|>BEGIN thus") || answer["tokens_evaluated"].(float64) > 768 {
		t.Errorf("of a long one: %v, %q", answer["tokens_evaluated"], prompt)
	}

	for message, more := range map[string]object{
		`"input_suffix" is required`: {"input_suffix": nil},
		`"input_prefix" is required`: {"input_prefix": nil},
		"'prompt': found 5":          {"prompt": 5},
		"'input_extra': found {}":    {"input_extra": []any{object{}}},
		"'filename': found 123":      {"input_extra": []any{object{"filename": 123, "text": "a"}}},
		"'text': found 456":          {"input_extra": []any{object{"text": 456}}},
		"'input_extra': found \"a\"": {"input_extra": "a"},
		"'input_prefix': found true": {"input_prefix": true},
	} {
		request := object{"input_prefix": "a", "input_suffix": "b"}
		for name, value := range more {
			request[name] = value
		}
		ts.refuses("POST", "/infill", request, 400, typeInvalidRequest, message)
	}
}

// modelWithTokens is the small model with its last tokens renamed to control tokens.
func modelWithTokens(t *testing.T, names ...string) string {
	t.Helper()
	folder := t.TempDir()
	for _, file := range []string{"config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"} {
		copyFile(t, filepath.Join(modelPath, file), filepath.Join(folder, file))
	}
	data, err := os.ReadFile(filepath.Join(modelPath, "tokenizer.json"))
	if err != nil {
		t.Fatal(err)
	}
	var tokenizer object
	if err := json.Unmarshal(data, &tokenizer); err != nil {
		t.Fatal(err)
	}
	model := tokenizer["model"].(object)
	vocabulary := model["vocab"].(object)
	for i, name := range names {
		id := float64(len(vocabulary) - 1 - i)
		for spelling, other := range vocabulary {
			if other != id {
				continue
			}
			delete(vocabulary, spelling)
			model["merges"] = slices.DeleteFunc(model["merges"].([]any), func(merge any) bool {
				pair, ok := merge.([]any)
				if !ok {
					pair = nil
					for _, part := range strings.Split(merge.(string), " ") {
						pair = append(pair, part)
					}
				}
				return pair[0].(string)+pair[1].(string) == spelling || pair[0] == spelling || pair[1] == spelling
			})
		}
		vocabulary[name] = id
		tokenizer["added_tokens"] = append(tokenizer["added_tokens"].([]any), object{"id": id, "content": name,
			"single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
	}
	if data, err = json.Marshal(tokenizer); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "tokenizer.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return folder
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}
