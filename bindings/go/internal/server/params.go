package server

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/engine"
)

// Bounds of what a request may ask for, beside those of the library.
const (
	maxLogprobs = 100 // each token of an answer carries as many
	maxStops    = 64  // the library's own bound
	maxBreakers = 64
	maxChoices  = 16
	randomSeed  = math.MaxUint32 // llama-server's spelling of "any", beside -1
)

// settings are what a request says about generating, in llama-server's terms. The zero value is not useful: see
// defaultSettings.
type settings struct {
	sampling  phd.SamplerOptions
	samplers  []phd.Stage // in the order in which they are applied
	breakers  []string    // DRY's
	bias      []logitBias
	ignoreEOS bool
	forbidden []phd.Token // for ignoreEOS

	grammar    string // GBNF; "": none
	jsonSchema string // "": none
	lark       string // a grammar of the server's own, in llguidance's Lark; "": none

	maxTokens   int // -1: until the context is full
	keep        int // tokens at the beginning that a context shift keeps; -1: the prompt
	maxTime     time.Duration
	stop        []string
	logprobs    int // the best tokens that are reported with each; -1: no probabilities
	cachePrompt bool
	slot        int // -1: any
	choices     int // answers to each prompt

	stream          bool
	includeUsage    bool
	returnTokens    bool
	returnProgress  bool
	timingsPerToken bool
	verbose         bool
	responseFields  []string
	pingInterval    time.Duration // 0: none

	// Set by whoever makes a prompt from a conversation; only shown.
	chatFormat       string
	reasoningFormat  string
	generationPrompt string

	spellSpecial bool
	triggers     []engine.Trigger // what binds the text after some words
}

type logitBias struct {
	token phd.Token
	bias  float32
}

// A vocabulary is what the settings need to know about a model.
type vocabulary interface {
	Tokenize(text string, addSpecial, parseSpecial bool) ([]phd.Token, error)
	NVocab() int
	EndTokens() []phd.Token
}

// defaultSettings are llama-server's.
func defaultSettings() settings {
	sampling := phd.DefaultSamplerOptions()
	sampling.Temperature = 0.8
	sampling.TopK = 40
	sampling.TopP = 0.95
	sampling.MinP = 0.05
	sampling.TypicalP = 1
	sampling.TopNSigma = -1
	sampling.RepetitionPenalty = 1
	sampling.PenaltyLastN = 64
	sampling.DynatempExponent = 1
	sampling.XTCThreshold = 0.1
	sampling.DRYBase = 1.75
	sampling.DRYAllowedLength = 2
	sampling.DRYPenaltyLastN = 64
	sampling.MirostatTau = 5
	sampling.MirostatEta = 0.1
	sampling.Seed = randomSeed
	return settings{
		sampling:        sampling,
		samplers:        slices.Clone(defaultStages),
		breakers:        []string{"\n", ":", "\"", "*"},
		maxTokens:       -1,
		logprobs:        -1,
		cachePrompt:     true,
		slot:            -1,
		choices:         1,
		pingInterval:    30 * time.Second,
		chatFormat:      "Content-only",
		reasoningFormat: "none",
	}
}

// The stages by llama.cpp's names and letters.
var stageNames = []struct {
	stage  phd.Stage
	name   string
	letter rune
	others []string
}{
	{phd.StagePenalties, "penalties", 'e', nil},
	{phd.StageDRY, "dry", 'd', nil},
	{phd.StageTopNSigma, "top_n_sigma", 's', []string{"topnsigma"}},
	{phd.StageTopK, "top_k", 'k', []string{"topk"}},
	{phd.StageTypicalP, "typ_p", 'y', []string{"typp", "typ", "typical_p", "typical"}},
	{phd.StageTopP, "top_p", 'p', []string{"topp", "nucleus"}},
	{phd.StageMinP, "min_p", 'm', []string{"minp"}},
	{phd.StageXTC, "xtc", 'x', nil},
	{phd.StageTemperature, "temperature", 't', []string{"temp"}},
}

var defaultStages = func() []phd.Stage {
	stages := make([]phd.Stage, len(stageNames))
	for i, s := range stageNames {
		stages[i] = s.stage
	}
	return stages
}()

// parseSettings reads what a request says about generating. What it does not say is as in defaults. Fields that nobody knows
// are ignored, as llama-server ignores them.
func parseSettings(b *body, defaults *settings, v vocabulary) (*settings, error) {
	set := *defaults
	const most = math.MaxInt32

	b.boolean(&set.stream, "stream")
	if options := b.object("stream_options"); options != nil {
		options.boolean(&set.includeUsage, "include_usage")
		if options.err != nil {
			b.fail(options.err)
		}
	}
	b.boolean(&set.verbose, "verbose")
	b.boolean(&set.returnTokens, "return_tokens")
	b.boolean(&set.returnProgress, "return_progress")
	b.boolean(&set.timingsPerToken, "timings_per_token")
	b.texts(&set.responseFields, 100, "response_fields")
	seconds := int(set.pingInterval / time.Second)
	b.integer(&seconds, -1, most, "sse_ping_interval")
	set.pingInterval = time.Duration(max(seconds, 0)) * time.Second

	b.boolean(&set.cachePrompt, "cache_prompt")
	b.integer(&set.slot, -1, most, "id_slot")
	b.integer(&set.choices, 1, maxChoices, "n_cmpl", "n")
	maxTokens := -1
	b.integer(&maxTokens, -1, most, "n_predict", "max_completion_tokens", "max_tokens")
	if maxTokens >= 0 {
		set.maxTokens = maxTokens
	}
	b.integer(&set.keep, -1, most, "n_keep")
	milliseconds := int(set.maxTime / time.Millisecond)
	b.integer(&milliseconds, -1, most, "t_max_predict_ms")
	set.maxTime = time.Duration(max(milliseconds, 0)) * time.Millisecond
	b.stops(&set.stop)

	b.sampling(&set)
	b.logprobs(&set)
	b.constraint(&set)
	b.unsupported()
	if b.err == nil {
		b.bias(&set, v)
	}
	if b.err != nil {
		return nil, b.err
	}
	return &set, nil
}

func (b *body) sampling(set *settings) {
	const most, huge = math.MaxInt32, math.MaxFloat32
	o := &set.sampling
	b.number(&o.Temperature, 0, huge, "temperature")
	b.number(&o.DynatempRange, 0, huge, "dynatemp_range")
	b.number(&o.DynatempExponent, -huge, huge, "dynatemp_exponent")
	b.number(&o.TopP, 0, 1, "top_p")
	b.number(&o.MinP, 0, 1, "min_p")
	b.number(&o.TypicalP, 0, 1, "typical_p")
	b.number(&o.TopNSigma, -1, huge, "top_n_sigma")
	b.positive(&o.RepetitionPenalty, "repeat_penalty")
	b.number(&o.FrequencyPenalty, -huge, huge, "frequency_penalty")
	b.number(&o.PresencePenalty, -huge, huge, "presence_penalty")
	b.number(&o.XTCProbability, 0, 1, "xtc_probability")
	b.number(&o.XTCThreshold, 0, 1, "xtc_threshold")
	b.number(&o.DRYMultiplier, 0, huge, "dry_multiplier")
	dryBase := o.DRYBase
	if b.number(&dryBase, -huge, huge, "dry_base"); dryBase >= 1 {
		o.DRYBase = dryBase
	}
	b.number(&o.MirostatTau, 0, huge, "mirostat_tau")
	b.number(&o.MirostatEta, 0, huge, "mirostat_eta")
	b.clampedInteger(&o.TopK, 0, most, "top_k")
	b.integer(&o.PenaltyLastN, 0, most, "repeat_last_n")
	b.integer(&o.DRYAllowedLength, 0, most, "dry_allowed_length")
	b.integer(&o.DRYPenaltyLastN, 0, most, "dry_penalty_last_n")
	b.integer(&o.MinKeep, 0, most, "min_keep")
	b.integer(&o.Mirostat, 0, 2, "mirostat")
	if o.Mirostat == 2 {
		b.positive(&o.MirostatTau, "mirostat_tau")
	}
	if o.Mirostat == 1 {
		b.fail(notSupported("Field 'mirostat': version 1 is not supported, 2 is"))
	}
	b.texts(&set.breakers, maxBreakers, "dry_sequence_breakers")
	if b.has("dry_sequence_breakers") && len(set.breakers) == 0 {
		b.fail(badRequest("Field 'dry_sequence_breakers': found an empty array, expected strings"))
	}
	b.seed(&o.Seed)
	b.stages(&set.samplers)
}

// seed reads a whole number; negative ones, and the largest of 32 bits, mean any.
func (b *body) seed(out *uint64) {
	raw, name := b.get("seed")
	if raw == nil {
		return
	}
	if seed, err := strconv.ParseUint(string(raw), 10, 64); err == nil {
		*out = seed
		return
	}
	value, ok := wholeNumber(raw)
	if !ok || math.Abs(value) >= 1<<63 {
		b.fail(wrong(name, raw, "a whole number of 64 bits, or -1 for any"))
		return
	}
	if value < 0 {
		value = randomSeed
	}
	*out = uint64(value)
}

// stages reads the order of the samplers: an array of names, or a string of letters. Names that nobody here knows are left
// out, as llama-server does: clients send all that some version of it has had.
func (b *body) stages(out *[]phd.Stage) {
	raw, name := b.get("samplers")
	if raw == nil {
		return
	}
	var names []string
	var letters string
	stages := []phd.Stage{}
	switch {
	case json.Unmarshal(raw, &letters) == nil:
		for _, letter := range letters {
			for _, s := range stageNames {
				if s.letter == letter {
					stages = append(stages, s.stage)
				}
			}
		}
	case json.Unmarshal(raw, &names) == nil:
		for _, name := range names {
			name = strings.ReplaceAll(strings.ToLower(name), "-", "_")
			for _, s := range stageNames {
				if s.name == name || slices.Contains(s.others, name) {
					stages = append(stages, s.stage)
				}
			}
		}
	default:
		b.fail(wrong(name, raw, "an array of names or a string of letters"))
		return
	}
	const most = 32
	if len(stages) > most {
		b.fail(badRequest("Field '%s': found %d samplers, expected at most %d", name, len(stages), most))
		return
	}
	*out = stages
}

func (b *body) stops(out *[]string) {
	raw, name := b.get("stop")
	if raw == nil {
		return
	}
	var stops []string
	var one string
	if json.Unmarshal(raw, &one) == nil {
		stops = []string{one}
	} else if b.texts(&stops, maxStops, name); b.err != nil {
		return
	}
	stops = slices.DeleteFunc(stops, func(stop string) bool { return stop == "" })
	for _, stop := range stops {
		if len(stop) > 1024 {
			b.fail(badRequest("Field '%s': found a string of %d bytes, expected at most 1024", name, len(stop)))
			return
		}
	}
	if len(stops) > 0 {
		*out = stops
	}
}

// logprobs reads how many probabilities are asked for. OpenAI's chat has a boolean of that name, which is not for here.
func (b *body) logprobs(set *settings) {
	n := 0
	if raw, _ := b.get("n_probs"); raw != nil {
		b.integer(&n, 0, maxLogprobs, "n_probs")
	} else if raw, _ := b.get("logprobs"); raw != nil && string(raw) != "true" && string(raw) != "false" {
		b.integer(&n, 0, maxLogprobs, "logprobs")
	}
	if n > 0 {
		set.logprobs = n
	}
	post := false
	if b.boolean(&post, "post_sampling_probs"); post && set.logprobs >= 0 {
		b.fail(notSupported("Field 'post_sampling_probs': only the model's own probabilities are available, before sampling"))
	}
}

func (b *body) constraint(set *settings) {
	grammar, schema := "", json.RawMessage(nil)
	b.text(&grammar, "grammar")
	if raw, _ := b.get("json_schema"); raw != nil {
		schema = raw
	}
	switch {
	case grammar != "" && schema != nil:
		b.fail(badRequest("Field 'json_schema': found together with 'grammar', expected only one of them"))
	case grammar != "":
		set.grammar, set.jsonSchema = grammar, ""
	case schema != nil:
		set.grammar, set.jsonSchema = "", schemaText(schema)
	}
	lazy := false
	if b.boolean(&lazy, "grammar_lazy"); lazy {
		b.fail(notSupported("Field 'grammar_lazy': a grammar of the request's own holds from the first token on"))
	}
}

// schemaText is a JSON schema; the empty one means any object, as for llama-server.
func schemaText(schema json.RawMessage) string {
	var object map[string]json.RawMessage
	if json.Unmarshal(schema, &object) == nil && object != nil && len(object) == 0 {
		return `{"type":"object"}`
	}
	return string(schema)
}

// unsupported refuses what would change the answer and is not there.
func (b *body) unsupported() {
	indent := 0
	if b.integer(&indent, 0, math.MaxInt32, "n_indent"); indent > 0 {
		b.fail(notSupported("Field 'n_indent': the indentation of generated lines cannot be bounded"))
	}
	var adapters []json.RawMessage
	if read(b, &adapters, "an array", "lora"); len(adapters) > 0 {
		b.fail(notSupported("Field 'lora': this server has no LoRA adapters"))
	}
}

// bias reads logit_bias: [[id, bias], ...], [["text", bias], ...] or {"id or text": bias, ...}, where false forbids a token.
// Ids outside the vocabulary are ignored.
func (b *body) bias(set *settings, v vocabulary) {
	if raw, name := b.get("logit_bias"); raw != nil {
		set.bias = nil
		var pairs []json.RawMessage
		var object map[string]json.RawMessage
		switch {
		case json.Unmarshal(raw, &pairs) == nil:
			for _, pair := range pairs {
				var both []json.RawMessage
				if json.Unmarshal(pair, &both) != nil || len(both) != 2 {
					b.fail(wrong(name, pair, "a token or text, and its bias"))
					return
				}
				b.addBias(set, v, both[0], both[1])
			}
		case json.Unmarshal(raw, &object) == nil:
			for key, value := range object {
				token := json.RawMessage(key)
				if _, err := strconv.Atoi(key); err != nil {
					token, _ = json.Marshal(key)
				}
				b.addBias(set, v, token, value)
			}
			slices.SortFunc(set.bias, func(x, y logitBias) int { return int(x.token) - int(y.token) })
		default:
			b.fail(wrong(name, raw, "an array of pairs or an object"))
		}
	}
	b.boolean(&set.ignoreEOS, "ignore_eos")
	set.forbidden = nil
	if set.ignoreEOS {
		set.forbidden = v.EndTokens()
	}
}

func (b *body) addBias(set *settings, v vocabulary, token, value json.RawMessage) {
	bias := 0.0
	if string(value) == "false" {
		bias = math.Inf(-1)
	} else if json.Unmarshal(value, &bias) != nil || math.Abs(bias) > math.MaxFloat32 {
		b.fail(wrong("logit_bias", value, "a number or false"))
		return
	}
	var text string
	if json.Unmarshal(token, &text) == nil {
		tokens, err := v.Tokenize(text, false, false)
		if err != nil {
			b.fail(err)
		}
		for _, token := range tokens {
			set.bias = append(set.bias, logitBias{token, float32(bias)})
		}
		return
	}
	id, ok := wholeNumber(token)
	if !ok {
		b.fail(wrong("logit_bias", token, "a token or text"))
		return
	}
	if id >= 0 && id < float64(v.NVocab()) {
		set.bias = append(set.bias, logitBias{phd.Token(id), float32(bias)})
	}
}

// allBias is the bias that was asked for, and what keeps texts from ending.
func (set *settings) allBias() []logitBias {
	all := slices.Clone(set.bias)
	for _, token := range set.forbidden {
		all = append(all, logitBias{token, float32(math.Inf(-1))})
	}
	return all
}

// pickSeed replaces the seed that means any by one, so that the answer can say which it was.
func (set *settings) pickSeed() {
	if set.sampling.Seed == randomSeed {
		set.sampling.Seed = uint64(rand.Uint32N(randomSeed))
	}
}

// newSampler makes the sampler of one answer; index tells several answers to one prompt apart.
func (set *settings) newSampler(model *phd.Model, index int) (*phd.Sampler, error) {
	options := set.sampling
	options.TopNSigma = max(options.TopNSigma, 0)
	const most = 1 << 20 // more than any text has
	options.PenaltyLastN = min(options.PenaltyLastN, most)
	options.DRYPenaltyLastN = min(options.DRYPenaltyLastN, most)
	if options.Mirostat == 0 {
		defaults := defaultSettings().sampling
		options.MirostatTau, options.MirostatEta = defaults.MirostatTau, defaults.MirostatEta // not looked at
	}
	sampler, err := model.NewEmptySampler(options.Seed + uint64(index))
	if err != nil {
		return nil, err
	}
	if err := set.fill(sampler, &options); err != nil {
		sampler.Close()
		return nil, err
	}
	return sampler, nil
}

func (set *settings) fill(sampler *phd.Sampler, options *phd.SamplerOptions) error {
	switch {
	case set.lark != "":
		if err := sampler.AddGrammar(set.lark); err != nil {
			return err
		}
	case set.grammar != "":
		if err := sampler.AddGBNF(set.grammar); err != nil {
			return fmt.Errorf("Field 'grammar': %w", err)
		}
	case set.jsonSchema != "":
		if err := sampler.AddJSONSchema(set.jsonSchema); err != nil {
			return fmt.Errorf("Field 'json_schema': %w", err)
		}
	}
	if all := set.allBias(); len(all) > 0 {
		tokens, biases := make([]phd.Token, len(all)), make([]float32, len(all))
		for i, b := range all {
			tokens[i], biases[i] = b.token, b.bias
		}
		if err := sampler.AddLogitBias(tokens, biases); err != nil {
			return err
		}
	}
	stages := set.samplers
	if options.Mirostat == 2 {
		stages = []phd.Stage{phd.StageTemperature, phd.StageMirostatV2}
	}
	for _, stage := range stages {
		if err := sampler.AddStage(stage, options); err != nil {
			return err
		}
	}
	if slices.Contains(stages, phd.StageDRY) && options.DRYMultiplier > 0 && options.DRYPenaltyLastN > 0 {
		for _, breaker := range set.breakers {
			if err := sampler.AddDRYBreaker(breaker); err != nil {
				return err
			}
		}
	}
	return nil
}

// describe lists the settings as generation_settings, or the part of them that /slots and /props show.
func (set *settings) describe(brief bool) map[string]any {
	o := &set.sampling
	samplers := []string{}
	for _, stage := range set.samplers {
		for _, s := range stageNames {
			if s.stage == stage {
				samplers = append(samplers, s.name)
			}
		}
	}
	m := map[string]any{
		"seed":                 o.Seed,
		"temperature":          o.Temperature,
		"dynatemp_range":       o.DynatempRange,
		"dynatemp_exponent":    o.DynatempExponent,
		"top_k":                o.TopK,
		"top_p":                o.TopP,
		"min_p":                o.MinP,
		"top_n_sigma":          o.TopNSigma,
		"xtc_probability":      o.XTCProbability,
		"xtc_threshold":        o.XTCThreshold,
		"typical_p":            o.TypicalP,
		"repeat_last_n":        o.PenaltyLastN,
		"repeat_penalty":       o.RepetitionPenalty,
		"presence_penalty":     o.PresencePenalty,
		"frequency_penalty":    o.FrequencyPenalty,
		"dry_multiplier":       o.DRYMultiplier,
		"dry_base":             o.DRYBase,
		"dry_allowed_length":   o.DRYAllowedLength,
		"dry_penalty_last_n":   o.DRYPenaltyLastN,
		"mirostat":             o.Mirostat,
		"mirostat_tau":         o.MirostatTau,
		"mirostat_eta":         o.MirostatEta,
		"adaptive_target":      -1, // a sampler of llama.cpp's that is always off here
		"adaptive_decay":       0.9,
		"max_tokens":           set.maxTokens,
		"n_predict":            set.maxTokens,
		"n_keep":               set.keep,
		"n_discard":            0,
		"ignore_eos":           set.ignoreEOS,
		"stream":               set.stream,
		"n_probs":              max(set.logprobs, 0),
		"min_keep":             o.MinKeep,
		"chat_format":          set.chatFormat,
		"reasoning_format":     set.reasoningFormat,
		"reasoning_in_content": false,
		"generation_prompt":    set.generationPrompt,
		"samplers":             samplers,
		"speculative.types":    "none",
		"timings_per_token":    set.timingsPerToken,
		"post_sampling_probs":  false,
		"backend_sampling":     false,
		"lora":                 []any{},
	}
	if brief {
		return m
	}
	biases := []map[string]any{}
	for _, b := range set.allBias() {
		entry := map[string]any{"token": b.token, "bias": b.bias}
		if math.IsInf(float64(b.bias), 0) {
			entry["bias"] = nil // JSON has no infinity
		}
		biases = append(biases, entry)
	}
	m["logit_bias"] = biases
	m["dry_sequence_breakers"] = set.breakers
	m["stop"] = append([]string{}, set.stop...)
	m["grammar"] = cmp.Or(set.grammar, set.lark)
	m["json_schema"] = nil
	if set.jsonSchema != "" {
		m["json_schema"] = json.RawMessage(set.jsonSchema)
	}
	m["grammar_lazy"] = len(set.triggers) > 0
	m["grammar_triggers"] = []any{}
	m["preserved_tokens"] = []any{}
	return m
}
