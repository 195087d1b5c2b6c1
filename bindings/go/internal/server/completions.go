package server

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/engine"
)

func (s *Server) registerCompletions(mux *http.ServeMux) {
	s.handleAll(mux, "POST", []string{"/completion", "/completions"}, s.completion)
	s.handle(mux, "POST /v1/completions", s.openAICompletion)
	s.handle(mux, "POST /infill", s.infill)
}

// An answer is one text of a completion request.
type answer struct {
	set    *settings
	index  int
	prompt []phd.Token
	text   strings.Builder
	probs  []tokenProbs
	clock  clock
	echoed bool
	offset int // characters of the tokens that were streamed
}

// A completion is a request for one or several texts.
type completion struct {
	s       *Server
	l       *loaded
	set     *settings
	id      string
	openAI  bool
	echo    bool
	several bool // answered by an array, on llama-server's own route
	answers []*answer
	// Sums over the answers that have ended, for OpenAI's usage.
	usage usage
}

// usage counts tokens in OpenAI's terms.
type usage struct {
	prompt, cached, completion int
}

// add counts one answer; of several to the same prompt only the first counts that.
func (u *usage) add(r *engine.Result, countsPrompt bool) {
	if countsPrompt {
		u.prompt += r.NPrompt
		u.cached += r.NCached
	}
	u.completion += r.NDecoded
}

func (u *usage) fields() map[string]any {
	return map[string]any{
		"prompt_tokens":         u.prompt,
		"completion_tokens":     u.completion,
		"total_tokens":          u.prompt + u.completion,
		"prompt_tokens_details": map[string]any{"cached_tokens": u.cached},
	}
}

func (s *Server) completion(w http.ResponseWriter, r *http.Request) error {
	b, err := s.readBody(w, r)
	if err != nil {
		return err
	}
	return s.complete(w, r, b, false)
}

func (s *Server) openAICompletion(w http.ResponseWriter, r *http.Request) error {
	b, err := s.readBody(w, r)
	if err != nil {
		return err
	}
	return s.complete(w, r, b, true)
}

// complete answers a completion request, on llama-server's own route or on OpenAI's.
func (s *Server) complete(w http.ResponseWriter, r *http.Request, b *body, openAI bool) error {
	c, err := s.newCompletion(b, openAI)
	if err != nil {
		return err
	}
	raw, _ := b.get("prompt")
	if raw == nil {
		return badRequest("\"prompt\" is required")
	}
	prompts, several, err := c.l.parsePrompts("prompt", raw)
	if err != nil {
		return err
	}
	c.ask(prompts, several)
	return c.serve(w, r)
}

func (s *Server) newCompletion(b *body, openAI bool) (*completion, error) {
	l := s.loaded()
	set, err := parseSettings(b, &l.defaults, l)
	if err != nil {
		return nil, err
	}
	set.pickSeed()
	c := &completion{s: s, l: l, set: set, openAI: openAI, id: "cmpl-" + newID()}
	if !openAI {
		return c, nil
	}
	b.boolean(&c.echo, "echo")
	suffix, best := "", 1
	b.text(&suffix, "suffix")
	b.integer(&best, 1, maxChoices, "best_of")
	if raw, _ := b.get("logprobs"); raw != nil {
		// 0 asks for the chosen tokens' alone, which llama-server's n_probs cannot.
		b.integer(&set.logprobs, 0, maxLogprobs, "logprobs")
	}
	switch {
	case b.err != nil:
		return nil, b.err
	case suffix != "":
		return nil, notSupported("Field 'suffix': /infill completes between two texts")
	case best > 1 && best != set.choices:
		return nil, notSupported("Field 'best_of': all answers are returned, not the best of them")
	case c.echo && set.logprobs >= 0:
		return nil, notSupported("Field 'echo': the prompt's log-probabilities are not available")
	}
	return c, nil
}

// ask makes the answers that are to be found: n to each prompt.
func (c *completion) ask(prompts [][]phd.Token, several bool) {
	c.several = several || c.set.choices > 1
	for _, prompt := range prompts {
		for range c.set.choices {
			c.answers = append(c.answers, &answer{set: c.set, index: len(c.answers), prompt: prompt})
		}
	}
}

func (c *completion) start(ctx context.Context, i int) (*engine.Generation, error) {
	a := c.answers[i]
	a.clock.begin(len(a.prompt))
	return c.s.start(ctx, c.set, a.prompt, i%c.set.choices)
}

func (c *completion) serve(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := c.s.withTimeout(r)
	defer cancel()
	if c.set.stream {
		return c.stream(ctx, w)
	}
	results := make([]map[string]any, len(c.answers))
	err := c.s.follow(ctx, len(c.answers), 0, c.start, follower{
		event: func(i int, event engine.Event) error {
			c.answers[i].take(c.l, &event)
			return nil
		},
		end: func(i int, result engine.Result) error {
			a := c.answers[i]
			a.text.WriteString(result.Tail)
			c.usage.add(&result, i%c.set.choices == 0)
			if c.openAI {
				results[i] = c.openAIFinal(a, &result, a.text.String())
			} else {
				results[i] = c.final(a, &result, a.text.String())
			}
			return nil
		},
	})
	if err != nil {
		return err
	}
	switch {
	case c.openAI:
		response := results[0]
		choices := response["choices"].([]any)
		for _, other := range results[1:] {
			choices = append(choices, other["choices"].([]any)...)
		}
		response["choices"] = choices
		response["usage"] = c.usage.fields()
		c.s.writeJSON(w, http.StatusOK, response)
	case c.several && len(results) > 1:
		c.s.writeJSON(w, http.StatusOK, results)
	default:
		c.s.writeJSON(w, http.StatusOK, results[0])
	}
	return nil
}

func (c *completion) stream(ctx context.Context, w http.ResponseWriter) error {
	out := c.s.newEventWriter(w)
	ended := 0
	err := c.s.follow(ctx, len(c.answers), c.set.pingInterval, c.start, follower{
		event: func(i int, event engine.Event) error {
			a := c.answers[i]
			a.clock.take(&event)
			if event.Progress != nil && !c.set.returnProgress {
				return nil
			}
			text := event.Text
			if c.openAI {
				if event.Progress == nil {
					text = c.echoed(a) + text
				}
				if text == "" && c.set.logprobs < 0 && event.Progress == nil {
					return nil // a part of a character, or of what may become a stop string
				}
				return out.data(c.openAIPartial(a, &event, text))
			}
			return out.data(c.partial(a, &event, text))
		},
		end: func(i int, result engine.Result) error {
			a := c.answers[i]
			ended++
			c.usage.add(&result, i%c.set.choices == 0)
			if result.Tail != "" {
				event := engine.Event{Text: result.Tail}
				partial := c.partial(a, nil, result.Tail)
				if c.openAI {
					partial = c.openAIPartial(a, &event, result.Tail)
				}
				if err := out.data(partial); err != nil {
					return err
				}
			}
			if !c.openAI {
				return out.data(c.final(a, &result, ""))
			}
			final := c.openAIFinal(a, &result, "")
			if ended == len(c.answers) {
				final["usage"] = c.usage.fields()
			}
			return out.data(final)
		},
		ping: out.ping,
	})
	if err != nil {
		return out.fail(err)
	}
	if c.openAI {
		return out.done()
	}
	return nil
}

// take adds an event to an answer that is returned as a whole.
func (a *answer) take(l *loaded, event *engine.Event) {
	a.clock.take(event)
	a.text.WriteString(event.Text)
	if a.set.logprobs >= 0 {
		a.probs = append(a.probs, l.tokenProbs(event))
	}
}

// final is the end of an answer on llama-server's own route; all of it, unless it was streamed.
func (c *completion) final(a *answer, result *engine.Result, text string) map[string]any {
	tokens := []phd.Token{}
	if c.set.returnTokens && !c.set.stream {
		tokens = append(tokens, result.Tokens...)
	}
	m := map[string]any{
		"index":               a.index,
		"content":             text,
		"tokens":              tokens,
		"id_slot":             result.Slot,
		"stop":                true,
		"model":               c.s.modelName(),
		"tokens_predicted":    result.NDecoded,
		"tokens_evaluated":    result.NPrompt,
		"generation_settings": c.set.describe(false),
		"prompt":              c.l.promptText(a.prompt),
		"has_new_line":        result.HasNewLine,
		"truncated":           result.Truncated,
		"stop_type":           stopType(result.Reason),
		"stopping_word":       result.StopWord,
		"tokens_cached":       result.NPrompt + max(result.NDecoded-1, 0),
		"timings":             timingsOf(result),
	}
	if !c.set.stream && c.set.logprobs >= 0 {
		m["completion_probabilities"] = a.probs
	}
	if len(c.set.responseFields) > 0 {
		return pick(m, c.set.responseFields)
	}
	return m
}

// partial is one event on llama-server's own route; nil stands for text without a token.
func (c *completion) partial(a *answer, event *engine.Event, text string) map[string]any {
	m := map[string]any{
		"index":            a.index,
		"content":          text,
		"tokens":           []phd.Token{},
		"stop":             false,
		"id_slot":          c.set.slot,
		"tokens_predicted": a.clock.predicted,
		"tokens_evaluated": len(a.prompt),
	}
	if event != nil && event.Progress != nil {
		m["prompt_progress"] = progressFields(event.Progress)
	} else if event != nil {
		m["tokens"] = []phd.Token{event.Token}
		if c.set.logprobs >= 0 {
			m["completion_probabilities"] = []tokenProbs{c.l.tokenProbs(event)}
		}
	}
	if c.set.timingsPerToken {
		m["timings"] = a.clock.timings()
	}
	return m
}

func (c *completion) openAIFields(a *answer, text string, logprobs, finish any) map[string]any {
	return map[string]any{
		"choices": []any{map[string]any{
			"text":          text,
			"index":         a.index,
			"logprobs":      logprobs,
			"finish_reason": finish,
		}},
		"created":            time.Now().Unix(),
		"model":              c.s.modelName(),
		"system_fingerprint": buildInfo(),
		"object":             "text_completion",
		"id":                 c.id,
	}
}

func (c *completion) openAIFinal(a *answer, result *engine.Result, text string) map[string]any {
	finish := "length"
	if result.Reason == engine.StopEOS || result.Reason == engine.StopWord {
		finish = "stop"
	}
	var logprobs any
	if !c.set.stream && c.set.logprobs >= 0 {
		logprobs = legacyLogprobs(a.probs, 0)
	}
	text = c.echoed(a) + text
	m := c.openAIFields(a, text, logprobs, finish)
	m["timings"] = timingsOf(result)
	if c.set.verbose {
		m["__verbose"] = c.final(a, result, text)
	}
	return m
}

func (c *completion) openAIPartial(a *answer, event *engine.Event, text string) map[string]any {
	var logprobs any
	if c.set.logprobs >= 0 && event.Progress == nil {
		probs := c.l.tokenProbs(event)
		logprobs = legacyLogprobs([]tokenProbs{probs}, a.offset)
		a.offset += utf8.RuneCountInString(probs.Token)
	}
	m := c.openAIFields(a, text, logprobs, nil)
	if event.Progress != nil {
		m["prompt_progress"] = progressFields(event.Progress)
	}
	if c.set.timingsPerToken {
		m["timings"] = a.clock.timings()
	}
	if c.set.verbose {
		m["__verbose"] = c.partial(a, event, text)
	}
	return m
}

// echoed is the prompt, once, if it is to stand before the answer.
func (c *completion) echoed(a *answer) string {
	if !c.echo || a.echoed {
		return ""
	}
	a.echoed = true
	return c.l.promptText(a.prompt)
}

func stopType(reason engine.StopReason) string {
	switch reason {
	case engine.StopEOS:
		return "eos"
	case engine.StopWord:
		return "word"
	case engine.StopLimit:
		return "limit"
	}
	return "none"
}

// pick makes an object of some fields of another, which are named with slashes between the levels.
func pick(m map[string]any, paths []string) map[string]any {
	picked := make(map[string]any, len(paths))
	for _, path := range paths {
		var value any = m
		found := true
		for _, name := range strings.Split(path, "/") {
			object, _ := value.(map[string]any)
			if value, found = object[name]; !found {
				break
			}
		}
		if found {
			picked[path] = value
		}
	}
	return picked
}

// tokenProbs is a token with its probability and those of the best ones there.
type tokenProbs struct {
	tokenProb
	Top []tokenProb `json:"top_logprobs"`
}

type tokenProb struct {
	ID      phd.Token `json:"id"`
	Token   string    `json:"token"`
	Bytes   []int     `json:"bytes"`
	Logprob float32   `json:"logprob"`
}

func (l *loaded) tokenProbs(event *engine.Event) tokenProbs {
	probs := tokenProbs{tokenProb: l.tokenProb(event.Token, event.Logprob), Top: make([]tokenProb, len(event.Top))}
	for i, top := range event.Top {
		probs.Top[i] = l.tokenProb(top.Token, top.Logprob)
	}
	return probs
}

func (l *loaded) tokenProb(token phd.Token, logprob float32) tokenProb {
	piece, err := l.model.TokenBytes(token, true)
	if err != nil {
		piece = nil // not a token of this vocabulary, which cannot be
	}
	bytes := make([]int, len(piece))
	for i, b := range piece {
		bytes[i] = int(b)
	}
	const lowest = -3.4028235e38 // JSON has no infinity
	return tokenProb{ID: token, Token: strings.ToValidUTF8(string(piece), "\uFFFD"), Bytes: bytes, Logprob: max(logprob, lowest)}
}

// legacyLogprobs are log-probabilities as OpenAI's completions have them, and as llama-server's have them, of tokens that
// stand offset characters after the beginning.
func legacyLogprobs(probs []tokenProbs, offset int) map[string]any {
	tokens := make([]string, len(probs))
	logprobs := make([]float32, len(probs))
	top := make([]map[string]float32, len(probs))
	offsets := make([]int, len(probs))
	for i, p := range probs {
		tokens[i], logprobs[i], offsets[i] = p.Token, p.Logprob, offset
		offset += utf8.RuneCountInString(p.Token)
		top[i] = make(map[string]float32, len(p.Top))
		for _, t := range p.Top {
			if _, there := top[i][t.Token]; !there { // of several with the same spelling, the best
				top[i][t.Token] = t.Logprob
			}
		}
	}
	return map[string]any{
		"content":        slices.Concat([]tokenProbs{}, probs),
		"tokens":         tokens,
		"token_logprobs": logprobs,
		"top_logprobs":   top,
		"text_offset":    offsets,
	}
}
