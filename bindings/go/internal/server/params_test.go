package server

import (
	"encoding/json"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

// letters is a vocabulary of bytes; 0 and 1 end texts.
type letters struct{}

func (letters) NVocab() int            { return 256 }
func (letters) EndTokens() []phd.Token { return []phd.Token{0, 1} }
func (letters) Tokenize(text string, addSpecial, parseSpecial bool) ([]phd.Token, error) {
	tokens := []phd.Token{}
	for _, b := range []byte(text) {
		tokens = append(tokens, phd.Token(b))
	}
	return tokens, nil
}

func parse(t *testing.T, text string) (*settings, error) {
	t.Helper()
	b, err := parseBody([]byte(text))
	if err != nil {
		return nil, err
	}
	defaults := defaultSettings()
	return parseSettings(b, &defaults, letters{})
}

func TestSettings(t *testing.T) {
	minus := float32(math.Inf(-1))
	for text, expected := range map[string]func(*settings){
		`{}`: func(*settings) {},
		`{"unknown": 1, "model": "x", "user": {"a": [1]}}`:                                     func(*settings) {},
		`{"temperature": null, "top_k": null, "stop": null, "seed": null, "logit_bias": null}`: func(*settings) {},
		`{"temperature": 0.25, "top_p": 0.5, "min_p": 0.125, "typical_p": 0.75}`: func(s *settings) {
			s.sampling.Temperature, s.sampling.TopP, s.sampling.MinP, s.sampling.TypicalP = 0.25, 0.5, 0.125, 0.75
		},
		`{"temperature": -1, "top_p": 7, "min_p": -3, "top_k": -1}`: func(s *settings) { // as far as it goes
			s.sampling.Temperature, s.sampling.TopP, s.sampling.MinP, s.sampling.TopK = 0, 1, 0, 0
		},
		`{"top_k": 40.0, "repeat_last_n": 5, "min_keep": 2}`: func(s *settings) {
			s.sampling.TopK, s.sampling.PenaltyLastN, s.sampling.MinKeep = 40, 5, 2
		},
		`{"repeat_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.5}`: func(s *settings) {
			s.sampling.RepetitionPenalty, s.sampling.PresencePenalty, s.sampling.FrequencyPenalty = 1.5, -0.5, 0.5
		},
		`{"dynatemp_range": 0.5, "dynatemp_exponent": 2, "top_n_sigma": 3, "xtc_probability": 0.5, "xtc_threshold": 0.25}`: func(s *settings) {
			s.sampling.DynatempRange, s.sampling.DynatempExponent, s.sampling.TopNSigma = 0.5, 2, 3
			s.sampling.XTCProbability, s.sampling.XTCThreshold = 0.5, 0.25
		},
		`{"dry_multiplier": 0.5, "dry_base": 2, "dry_allowed_length": 3, "dry_penalty_last_n": 9, "dry_sequence_breakers": ["a"]}`: func(s *settings) {
			s.sampling.DRYMultiplier, s.sampling.DRYBase, s.sampling.DRYAllowedLength, s.sampling.DRYPenaltyLastN = 0.5, 2, 3, 9
			s.breakers = []string{"a"}
		},
		`{"dry_base": 0.5}`: func(*settings) {}, // less than 1 counts as not said
		`{"mirostat": 2, "mirostat_tau": 3, "mirostat_eta": 0.5}`: func(s *settings) {
			s.sampling.Mirostat, s.sampling.MirostatTau, s.sampling.MirostatEta = 2, 3, 0.5
		},
		`{"seed": 18446744073709551615}`: func(s *settings) { s.sampling.Seed = math.MaxUint64 },
		`{"seed": 7.0}`:                  func(s *settings) { s.sampling.Seed = 7 },
		`{"seed": -1}`:                   func(*settings) {},
		`{"seed": -5}`:                   func(*settings) {},
		`{"max_tokens": 5}`:              func(s *settings) { s.maxTokens = 5 },
		`{"max_tokens": 5, "max_completion_tokens": 6, "n_predict": 7}`: func(s *settings) { s.maxTokens = 7 },
		`{"max_tokens": 5, "max_completion_tokens": 6}`:                 func(s *settings) { s.maxTokens = 6 },
		`{"n_predict": -1, "n_keep": -1, "id_slot": 3, "cache_prompt": false}`: func(s *settings) {
			s.keep, s.slot, s.cachePrompt = -1, 3, false
		},
		`{"n": 3}`:                   func(s *settings) { s.choices = 3 },
		`{"n_cmpl": 2, "n": 3}`:      func(s *settings) { s.choices = 2 },
		`{"t_max_predict_ms": 1500}`: func(s *settings) { s.maxTime = 1500 * time.Millisecond },
		`{"t_max_predict_ms": -1}`:   func(*settings) {},
		`{"stop": "end"}`:            func(s *settings) { s.stop = []string{"end"} },
		`{"stop": ["a", "", "b"]}`:   func(s *settings) { s.stop = []string{"a", "b"} },
		`{"stop": []}`:               func(*settings) {},
		`{"n_probs": 4}`:             func(s *settings) { s.logprobs = 4 },
		`{"n_probs": 0}`:             func(*settings) {},
		`{"logprobs": 4}`:            func(s *settings) { s.logprobs = 4 },
		`{"logprobs": true}`:         func(*settings) {},
		`{"stream": true, "stream_options": {"include_usage": true}, "return_tokens": true, "return_progress": true,
		  "timings_per_token": true, "verbose": true, "response_fields": ["a"]}`: func(s *settings) {
			s.stream, s.includeUsage, s.returnTokens, s.returnProgress = true, true, true, true
			s.timingsPerToken, s.verbose, s.responseFields = true, true, []string{"a"}
		},
		`{"sse_ping_interval": 5}`:                           func(s *settings) { s.pingInterval = 5 * time.Second },
		`{"sse_ping_interval": -1}`:                          func(s *settings) { s.pingInterval = 0 },
		`{"grammar": "g"}`:                                   func(s *settings) { s.grammar = "g" },
		`{"grammar": ""}`:                                    func(*settings) {},
		`{"json_schema": {}}`:                                func(s *settings) { s.jsonSchema = `{"type":"object"}` },
		`{"json_schema": {"type": "string"}, "grammar": ""}`: func(s *settings) { s.jsonSchema = `{"type": "string"}` },
		`{"ignore_eos": true}`:                               func(s *settings) { s.ignoreEOS, s.forbidden = true, []phd.Token{0, 1} },
		`{"logit_bias": [[65, 1.5], ["BC", -2], [66, false]]}`: func(s *settings) {
			s.bias = []logitBias{{65, 1.5}, {66, -2}, {67, -2}, {66, minus}}
		},
		`{"logit_bias": {"65": 1, "B": 2}}`:                                               func(s *settings) { s.bias = []logitBias{{65, 1}, {66, 2}} },
		`{"logit_bias": [[-1, 1], [256, 1], [1e9, 1]]}`:                                   func(*settings) {},
		`{"lora": [], "n_indent": 0, "grammar_lazy": false, "post_sampling_probs": true}`: func(*settings) {},
		`{"samplers": "kpt"}`:                                                             func(s *settings) { s.samplers = []phd.Stage{phd.StageTopK, phd.StageTopP, phd.StageTemperature} },
		`{"samplers": ["temperature", "Top-K", "topk", "unknown", "typ_p", "nucleus", "min-p"]}`: func(s *settings) {
			s.samplers = []phd.Stage{phd.StageTemperature, phd.StageTopK, phd.StageTopK, phd.StageTypicalP, phd.StageTopP, phd.StageMinP}
		},
		`{"samplers": []}`: func(s *settings) { s.samplers = []phd.Stage{} },
	} {
		found, err := parse(t, text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		want := defaultSettings()
		expected(&want)
		if !reflect.DeepEqual(*found, want) {
			t.Errorf("%s:\n%+v, expected\n%+v", text, *found, want)
		}
	}
}

func TestWrongSettings(t *testing.T) {
	for text, message := range map[string]string{
		`{"temperature": "hot"}`:                            "Field 'temperature': found \"hot\", expected a number",
		`{"temperature": 1e39}`:                             "Field 'temperature': found 1e39, expected a number",
		`{"temperature": 1e999}`:                            "Field 'temperature'",
		`{"repeat_penalty": 0}`:                             "Field 'repeat_penalty': found 0, expected a number above 0",
		`{"mirostat": 2, "mirostat_tau": 0}`:                "Field 'mirostat_tau': found 0",
		`{"temperature": true}`:                             "Field 'temperature'",
		`{"top_k": 1.5}`:                                    "Field 'top_k': found 1.5, expected a whole number",
		`{"top_k": [1]}`:                                    "Field 'top_k': found [1]",
		`{"repeat_last_n": -2}`:                             "Field 'repeat_last_n': found -2, expected a whole number from 0 to 2147483647",
		`{"n_predict": -2}`:                                 "Field 'n_predict': found -2, expected a whole number from -1",
		`{"max_tokens": 1e12}`:                              "Field 'max_tokens': found 1e12",
		`{"max_tokens": "5"}`:                               "Field 'max_tokens': found \"5\"",
		`{"n": 0}`:                                          "Field 'n': found 0, expected a whole number from 1 to 16",
		`{"n_keep": 0.5}`:                                   "Field 'n_keep'",
		`{"id_slot": -2}`:                                   "Field 'id_slot'",
		`{"seed": 1.5}`:                                     "Field 'seed': found 1.5",
		`{"seed": 1e30}`:                                    "Field 'seed'",
		`{"seed": "x"}`:                                     "Field 'seed'",
		`{"stream": 1}`:                                     "Field 'stream': found 1, expected true or false",
		`{"stream_options": 1}`:                             "Field 'stream_options': found 1, expected an object",
		`{"stream_options": {"include_usage": 1}}`:          "Field 'include_usage'",
		`{"stop": 5}`:                                       "Field 'stop'",
		`{"stop": ["a", 5]}`:                                "Field 'stop'",
		`{"stop": ["a", null]}`:                             "Field 'stop'",
		`{"stop": "` + strings.Repeat("x", 1025) + `"}`:     "Field 'stop': found a string of 1025 bytes",
		`{"stop": [` + strings.Repeat(`"a",`, 64) + `"a"]}`: "an array of at most 64 strings",
		`{"response_fields": "content"}`:                    "Field 'response_fields'",
		`{"n_probs": -1}`:                                   "Field 'n_probs'",
		`{"logprobs": "x"}`:                                 "Field 'logprobs'",
		`{"n_probs": 1, "post_sampling_probs": true}`:       "Field 'post_sampling_probs'",
		`{"mirostat": 1}`:                                   "Field 'mirostat': version 1",
		`{"mirostat": 3}`:                                   "Field 'mirostat': found 3",
		`{"dry_sequence_breakers": []}`:                     "Field 'dry_sequence_breakers'",
		`{"dry_sequence_breakers": "a"}`:                    "Field 'dry_sequence_breakers'",
		`{"samplers": 5}`:                                   "Field 'samplers'",
		`{"samplers": "` + strings.Repeat("k", 33) + `"}`:   "found 33 samplers, expected at most 32",
		`{"grammar": {}}`:                                   "Field 'grammar'",
		`{"grammar": "a", "json_schema": {}}`:               "Field 'json_schema': found together with 'grammar'",
		`{"grammar_lazy": true}`:                            "Field 'grammar_lazy'",
		`{"n_indent": 4}`:                                   "Field 'n_indent'",
		`{"lora": [{"id": 0}]}`:                             "Field 'lora'",
		`{"logit_bias": 5}`:                                 "Field 'logit_bias'",
		`{"logit_bias": [[1]]}`:                             "Field 'logit_bias': found [1]",
		`{"logit_bias": [[1, true]]}`:                       "Field 'logit_bias': found true",
		`{"logit_bias": [[1.5, 1]]}`:                        "Field 'logit_bias': found 1.5",
		`{"logit_bias": {"1": "x"}}`:                        "Field 'logit_bias': found \"x\"",
		`{"ignore_eos": "yes"}`:                             "Field 'ignore_eos'",
		`{"sse_ping_interval": -2}`:                         "Field 'sse_ping_interval'",
		`{"temperature": ` + strings.Repeat("[", 90) + strings.Repeat("]", 90) + `}`: strings.Repeat("[", 60) + "...",
	} {
		if _, err := parse(t, text); err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%.100s: %v, expected %q", text, err, message)
		}
	}
}

// TestDescribedSettings sends the settings that an answer shows back as a request.
func TestDescribedSettings(t *testing.T) {
	set, err := parse(t, `{"temperature": 0.5, "top_k": 7, "seed": 3, "stop": ["a"], "json_schema": {"type":"string"},
		"samplers": "tk", "ignore_eos": true, "n_probs": 2, "n_predict": 9}`)
	if err != nil {
		t.Fatal(err)
	}
	data, err := encodeJSON(set.describe(false))
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(data, &fields); err != nil {
		t.Fatal(err)
	}
	delete(fields, "logit_bias") // has other names
	delete(fields, "grammar")
	defaults := defaultSettings()
	again, err := parseSettings(&body{fields: fields}, &defaults, letters{})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(set, again) {
		t.Errorf("%+v became %+v", set, again)
	}
}

func FuzzRequest(f *testing.F) {
	for _, text := range []string{
		`{"prompt": "a", "temperature": 0.5, "top_k": 40, "seed": -1, "stop": ["a"], "samplers": ["top_k"], "n_probs": 3}`,
		`{"prompt": [1, "b", 2], "logit_bias": [[65, 1], ["B", false]], "ignore_eos": true, "json_schema": {}}`,
		`{"prompt": {"prompt_string": "x"}, "logit_bias": {"65": 1}, "stream_options": {"include_usage": true}, "n": 2}`,
		`{"input": [[1, 2], {"content": [{"type": "text", "text": "a"}]}], "input_extra": [{"text": "a"}], "max_tokens": 1e3}`,
		`[[[[`, `{"a": "\ud800"}`, "{\"a\\", `{"seed": 99999999999999999999}`, `null`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := parseBody(data)
		if err != nil {
			return
		}
		defaults := defaultSettings()
		set, err := parseSettings(b, &defaults, letters{})
		if err != nil {
			return
		}
		if o := set.sampling; o.Temperature < 0 || o.TopK < 0 || o.TopP < 0 || o.TopP > 1 || o.PenaltyLastN < 0 ||
			set.maxTokens < -1 || set.choices < 1 || set.choices > maxChoices || set.logprobs > maxLogprobs ||
			len(set.stop) > maxStops || set.slot < -1 || set.maxTime < 0 {
			t.Errorf("%q was accepted: %+v", data, set)
		}
		for _, b := range set.bias {
			if b.token < 0 || b.token > 255 || b.bias != b.bias {
				t.Errorf("%q: bias %v", data, b)
			}
		}
		if _, err := encodeJSON(set.describe(false)); err != nil {
			t.Errorf("%q cannot be shown: %v", data, err)
		}
		b.extras()
	})
}
