package phd

// #include "shim.h"
import "C"

import (
	"runtime"
)

// Stage is what one step of a sampler's chain does. docs/sampling.md says more.
type Stage uint32

// The stages, with the fields of [SamplerOptions] that are their values.
const (
	StagePenalties   Stage = C.PHD_STAGE_PENALTIES   // RepetitionPenalty, FrequencyPenalty, PresencePenalty, PenaltyLastN
	StageDRY         Stage = C.PHD_STAGE_DRY         // DRYMultiplier, DRYBase, DRYAllowedLength, DRYPenaltyLastN
	StageTopNSigma   Stage = C.PHD_STAGE_TOP_N_SIGMA // TopNSigma
	StageTopK        Stage = C.PHD_STAGE_TOP_K       // TopK
	StageTypicalP    Stage = C.PHD_STAGE_TYPICAL_P   // TypicalP, MinKeep
	StageTopP        Stage = C.PHD_STAGE_TOP_P       // TopP, MinKeep
	StageMinP        Stage = C.PHD_STAGE_MIN_P       // MinP, MinKeep
	StageXTC         Stage = C.PHD_STAGE_XTC         // XTCProbability, XTCThreshold, MinKeep
	StageTemperature Stage = C.PHD_STAGE_TEMPERATURE // Temperature, DynatempRange, DynatempExponent
	StageGreedy      Stage = C.PHD_STAGE_GREEDY      // takes the best token; ends the chain, as the following do
	StageDraw        Stage = C.PHD_STAGE_DRAW        // draws by probability; what a chain ends with if nothing else ends it
	StageMirostatV2  Stage = C.PHD_STAGE_MIROSTAT_V2 // MirostatTau, MirostatEta
)

// SamplerOptions are the values of a sampler's stages. The zero value is not the default: see [DefaultSamplerOptions].
type SamplerOptions struct {
	Temperature float32 // 0: greedy
	TopK        int     // 0: off
	TopP        float32 // 1: off
	MinP        float32 // 0: off
	TypicalP    float32 // 1: off
	TopNSigma   float32 // 0: off

	RepetitionPenalty float32 // 1: off
	FrequencyPenalty  float32
	PresencePenalty   float32
	PenaltyLastN      int // recent tokens that the penalties look at; 0: off

	DynatempRange    float32 // the temperature varies by this with the entropy; 0: off
	DynatempExponent float32

	XTCProbability float32 // 0: off
	XTCThreshold   float32 // above 0.5: off

	DRYMultiplier    float32 // 0: off
	DRYBase          float32
	DRYAllowedLength int
	DRYPenaltyLastN  int // recent tokens that DRY looks at; 0: off

	Mirostat    int // 2: the default chain is the temperature and Mirostat 2.0 alone; 0: off
	MirostatTau float32
	MirostatEta float32

	MinKeep int // candidates that TypicalP, TopP, MinP and XTC leave at least
	Seed    uint64
}

// DefaultSamplerOptions returns the library's defaults.
func DefaultSamplerOptions() SamplerOptions {
	var p C.phd_sampler_params
	C.phd_sampler_params_init(&p, C.sizeof_phd_sampler_params)
	return SamplerOptions{
		Temperature:       float32(p.temperature),
		TopK:              int(p.top_k),
		TopP:              float32(p.top_p),
		MinP:              float32(p.min_p),
		TypicalP:          float32(p.typical_p),
		TopNSigma:         float32(p.top_n_sigma),
		RepetitionPenalty: float32(p.repetition_penalty),
		FrequencyPenalty:  float32(p.frequency_penalty),
		PresencePenalty:   float32(p.presence_penalty),
		PenaltyLastN:      int(p.penalty_last_n),
		DynatempRange:     float32(p.dynatemp_range),
		DynatempExponent:  float32(p.dynatemp_exponent),
		XTCProbability:    float32(p.xtc_probability),
		XTCThreshold:      float32(p.xtc_threshold),
		DRYMultiplier:     float32(p.dry_multiplier),
		DRYBase:           float32(p.dry_base),
		DRYAllowedLength:  int(p.dry_allowed_length),
		DRYPenaltyLastN:   int(p.dry_penalty_last_n),
		Mirostat:          int(p.mirostat),
		MirostatTau:       float32(p.mirostat_tau),
		MirostatEta:       float32(p.mirostat_eta),
		MinKeep:           int(p.min_keep),
		Seed:              uint64(p.seed),
	}
}

// params are o for C; nil: the defaults.
func (o *SamplerOptions) params() (C.phd_sampler_params, error) {
	var p C.phd_sampler_params
	C.phd_sampler_params_init(&p, C.sizeof_phd_sampler_params)
	if o == nil {
		return p, nil
	}
	var u u32s
	p.temperature = C.float(o.Temperature)
	p.top_k = u.of("TopK", o.TopK)
	p.top_p = C.float(o.TopP)
	p.min_p = C.float(o.MinP)
	p.typical_p = C.float(o.TypicalP)
	p.top_n_sigma = C.float(o.TopNSigma)
	p.repetition_penalty = C.float(o.RepetitionPenalty)
	p.frequency_penalty = C.float(o.FrequencyPenalty)
	p.presence_penalty = C.float(o.PresencePenalty)
	p.penalty_last_n = u.of("PenaltyLastN", o.PenaltyLastN)
	p.dynatemp_range = C.float(o.DynatempRange)
	p.dynatemp_exponent = C.float(o.DynatempExponent)
	p.xtc_probability = C.float(o.XTCProbability)
	p.xtc_threshold = C.float(o.XTCThreshold)
	p.dry_multiplier = C.float(o.DRYMultiplier)
	p.dry_base = C.float(o.DRYBase)
	p.dry_allowed_length = u.of("DRYAllowedLength", o.DRYAllowedLength)
	p.dry_penalty_last_n = u.of("DRYPenaltyLastN", o.DRYPenaltyLastN)
	p.mirostat = u.of("Mirostat", o.Mirostat)
	p.mirostat_tau = C.float(o.MirostatTau)
	p.mirostat_eta = C.float(o.MirostatEta)
	p.min_keep = u.of("MinKeep", o.MinKeep)
	p.seed = C.uint64_t(o.Seed)
	return p, u.err
}

// A Sampler turns logits into tokens, reproducibly: a chain of stages, after a constraint and a logit bias. What it
// chooses it does not remember: see [Sampler.Accept].
type Sampler struct {
	owned[*C.phd_sampler]
	model *Model // a child keeps its owner alive
}

func newSampler(m *Model, ptr *C.phd_sampler) *Sampler {
	s := &Sampler{owned: owned[*C.phd_sampler]{ptr: ptr}, model: m}
	liveSamplers.Add(1)
	s.cleanup = runtime.AddCleanup(s, freeSampler, ptr)
	return s
}

func freeSampler(ptr *C.phd_sampler) {
	C.phd_sampler_free(ptr)
	liveSamplers.Add(-1)
}

// NewSampler creates a sampler with the default chain: penalties, DRY, top-n-sigma, top-k, typical-p, top-p, min-p, XTC,
// temperature, draw. If o is nil, their values are the defaults.
func (m *Model) NewSampler(o *SamplerOptions) (*Sampler, error) {
	params, err := o.params()
	if err != nil {
		return nil, err
	}
	var ptr *C.phd_sampler
	var e *C.phd_error
	if err := check(C.phd_sampler_create(&params, C.size_t(m.info.NVocab), &ptr, &e), e); err != nil {
		return nil, err
	}
	return newSampler(m, ptr), nil
}

// NewEmptySampler creates a sampler without stages, which draws from all tokens: see [Sampler.AddStage].
func (m *Model) NewEmptySampler(seed uint64) (*Sampler, error) {
	var ptr *C.phd_sampler
	var e *C.phd_error
	status := C.phd_sampler_create_empty(C.size_t(m.info.NVocab), C.uint64_t(seed), &ptr, &e)
	if err := check(status, e); err != nil {
		return nil, err
	}
	return newSampler(m, ptr), nil
}

// Close frees the sampler.
func (s *Sampler) Close() error {
	s.owned.close(freeSampler)
	return nil
}

// Clone returns a sampler that continues from the same point, independently.
func (s *Sampler) Clone() (*Sampler, error) {
	ptr, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer s.leave()
	var clone *C.phd_sampler
	var e *C.phd_error
	if err := check(C.phd_sampler_clone(ptr, &clone, &e), e); err != nil {
		return nil, err
	}
	return newSampler(s.model, clone), nil
}

// AddStage appends a stage with its values from o; nil: the defaults. After an error the chain is as it was.
func (s *Sampler) AddStage(stage Stage, o *SamplerOptions) error {
	params, err := o.params()
	if err != nil {
		return err
	}
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	var e *C.phd_error
	return check(C.phd_sampler_add(ptr, C.uint32_t(stage), &params, &e), e)
}

// AddLogitBias adds biases, one for each of tokens, to their logits, before all stages, whenever it is called; negative
// infinity forbids a token. Biases of a token add up.
func (s *Sampler) AddLogitBias(tokens []Token, biases []float32) error {
	if len(tokens) != len(biases) {
		return invalid("there are %d tokens and %d biases, expected as many", len(tokens), len(biases))
	}
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	from, count := cTokens(tokens)
	values, _ := cFloats(biases)
	var e *C.phd_error
	return check(C.phd_sampler_add_logit_bias(ptr, from, values, count, &e), e)
}

// AddDRYBreakerTokens adds a sequence of 1 to 21 tokens that DRY sees no repetition across.
func (s *Sampler) AddDRYBreakerTokens(tokens []Token) error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	from, count := cTokens(tokens)
	var e *C.phd_error
	return check(C.phd_sampler_add_dry_breaker(ptr, from, count, &e), e)
}

// withText runs a call that takes the model and a text.
func (s *Sampler) withText(text string,
	call func(ptr *C.phd_sampler, model *C.phd_model, text *C.char, length C.size_t, e **C.phd_error) cStatus) error {
	model, err := s.model.enter()
	if err != nil {
		return err
	}
	defer s.model.gate.leave()
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	chars, length := cString(text)
	var e *C.phd_error
	status := call(ptr, model, chars, length, &e)
	return check(status, e)
}

// AddDRYBreaker adds 1 to 40 bytes of text that DRY sees no repetition across, in all the ways in which the model's
// tokens spell them. llama.cpp's default breakers are "\n", ":", "\"" and "*".
func (s *Sampler) AddDRYBreaker(text string) error {
	return s.withText(text, func(p *C.phd_sampler, m *C.phd_model, t *C.char, n C.size_t, e **C.phd_error) cStatus {
		return C.phd_sampler_add_dry_breaker_text(p, m, t, n, e)
	})
}

// AddJSONSchema lets only JSON pass that is valid by schema; then only end tokens are left. The constraint comes before
// all stages, whenever it is added, and begins with the next token that is accepted, also within a text. A sampler has one
// at most: see [Sampler.RemoveConstraint]. Schemas with keywords that are not implemented are [ErrUnsupported].
func (s *Sampler) AddJSONSchema(schema string) error {
	return s.withText(schema, func(p *C.phd_sampler, m *C.phd_model, t *C.char, n C.size_t, e **C.phd_error) cStatus {
		return C.phd_sampler_add_json_schema(p, m, t, n, e)
	})
}

// AddRegex is AddJSONSchema for a regular expression that the whole text must match, in the syntax of Rust's regex crate.
func (s *Sampler) AddRegex(re string) error {
	return s.withText(re, func(p *C.phd_sampler, m *C.phd_model, t *C.char, n C.size_t, e **C.phd_error) cStatus {
		return C.phd_sampler_add_regex(p, m, t, n, e)
	})
}

// AddGrammar is AddJSONSchema for a grammar in llguidance's variant of Lark's syntax.
func (s *Sampler) AddGrammar(lark string) error {
	return s.withText(lark, func(p *C.phd_sampler, m *C.phd_model, t *C.char, n C.size_t, e **C.phd_error) cStatus {
		return C.phd_sampler_add_grammar(p, m, t, n, e)
	})
}

// AddGBNF is AddJSONSchema for a grammar in llama.cpp's format, GBNF.
func (s *Sampler) AddGBNF(gbnf string) error {
	return s.withText(gbnf, func(p *C.phd_sampler, m *C.phd_model, t *C.char, n C.size_t, e **C.phd_error) cStatus {
		return C.phd_sampler_add_gbnf(p, m, t, n, e)
	})
}

// ConstraintDone reports whether the constraint has ended: it allows only end tokens. It is false if the constraint may go
// on, also where it may end, and without one. What comes after a constraint within a text begins with RemoveConstraint.
func (s *Sampler) ConstraintDone() (bool, error) {
	ptr, err := s.enter()
	if err != nil {
		return false, err
	}
	defer s.leave()
	var done C.bool
	var e *C.phd_error
	err = check(C.phd_sampler_constraint_done(ptr, &done, &e), e)
	return bool(done), err
}

// ConstraintAccept advances the constraint, and nothing else, by text that is there already: what an accepted token says
// beyond the point where the constraint was to begin. Text that the constraint does not allow is refused.
func (s *Sampler) ConstraintAccept(text string) error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	chars, length := cString(text)
	var e *C.phd_error
	return check(C.phd_sampler_constraint_accept(ptr, chars, length, &e), e)
}

// RemoveConstraint takes the constraint away, if there is one. The text goes on freely, or under another constraint.
func (s *Sampler) RemoveConstraint() error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	var e *C.phd_error
	return check(C.phd_sampler_remove_constraint(ptr, &e), e)
}

// Sample chooses a token from the sequence's logits, where they are, without copying them; on a GPU wherever its best 64 tokens tell
// what the sampler chooses, see docs/sampling.md.
func (s *Sampler) Sample(q *Sequence) (Token, error) {
	ptr, err := s.enter()
	if err != nil {
		return 0, err
	}
	defer s.leave()
	session, err := q.session.beginRead()
	if err != nil {
		return 0, err
	}
	defer q.session.endRead()
	var token C.int32_t
	var e *C.phd_error
	if err := check(C.phd_sample(session, q.id, ptr, &token, &e), e); err != nil {
		return 0, err
	}
	return Token(token), nil
}

// SampleAt is Sample from the logits of [Sequence.LogitsAt].
func (s *Sampler) SampleAt(q *Sequence, i int) (Token, error) {
	if i < 0 {
		return 0, invalid("index is %d, expected 0 or more", i)
	}
	ptr, err := s.enter()
	if err != nil {
		return 0, err
	}
	defer s.leave()
	session, err := q.session.beginRead()
	if err != nil {
		return 0, err
	}
	defer q.session.endRead()
	var token C.int32_t
	var e *C.phd_error
	if err := check(C.phd_sample_at(session, q.id, C.size_t(i), ptr, &token, &e), e); err != nil {
		return 0, err
	}
	return Token(token), nil
}

// SampleLogits chooses a token from logits, one for each token of the vocabulary, which are not changed. NaN counts as
// negative infinity, which is never chosen.
func (s *Sampler) SampleLogits(logits []float32) (Token, error) {
	ptr, err := s.enter()
	if err != nil {
		return 0, err
	}
	defer s.leave()
	from, count := cFloats(logits)
	var token C.int32_t
	var e *C.phd_error
	if err := check(C.phd_sampler_sample(ptr, from, count, &token, &e), e); err != nil {
		return 0, err
	}
	return Token(token), nil
}

// Accept tells the constraint, the penalties and DRY of a token that has become part of the text. One that the constraint
// does not allow here is refused.
func (s *Sampler) Accept(t Token) error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	var e *C.phd_error
	return check(C.phd_sampler_accept(ptr, C.int32_t(t), &e), e)
}

// AcceptPrompt tells the penalties and DRY, but not the constraint, of tokens that stand before the text.
func (s *Sampler) AcceptPrompt(tokens []Token) error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	from, count := cTokens(tokens)
	var e *C.phd_error
	return check(C.phd_sampler_accept_prompt(ptr, from, count, &e), e)
}

// Reset goes back to the seed, the beginning of the constraint, and an empty memory.
func (s *Sampler) Reset() error {
	ptr, err := s.enter()
	if err != nil {
		return err
	}
	defer s.leave()
	var e *C.phd_error
	return check(C.phd_sampler_reset(ptr, &e), e)
}
