package server

import (
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/engine"
	"github.com/libphd/libphd/bindings/go/internal/toolcall"
)

func (s *Server) registerChat(mux *http.ServeMux) {
	s.handleAll(mux, "POST", []string{"/chat/completions", "/v1/chat/completions"}, s.chatCompletion)
	s.handleAll(mux, "POST", []string{"/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"},
		s.countTokens(nil, inputTokens))
	s.handleAll(mux, "POST", []string{"/chat/completions/control", "/v1/chat/completions/control"}, s.chatControl)
	s.handle(mux, "POST /apply-template", s.applyTemplate)
	s.registerResponses(mux)
	s.registerMessages(mux)
}

// A chat is a conversation, put to the model, and the answers to it.
type chat struct {
	s        *Server
	l        *loaded
	set      *settings
	plan     *toolcall.Plan
	thinking toolcall.Thinking
	prompt   string
	tokens   []phd.Token
	id       string
	created  int64
	answers  []*chatAnswer
}

// A chatAnswer is one answer.
type chatAnswer struct {
	answer
	parser *toolcall.Parser
	result *engine.Result // nil until it has ended
}

// A chatSink is told of answers as they are made.
type chatSink interface {
	progress(a *chatAnswer, p *engine.Progress) error
	// token tells of one token, and of what it has brought to the message, if anything.
	token(a *chatAnswer, event *engine.Event, deltas []toolcall.Delta) error
	// end tells that an answer has ended, and what was held back until then.
	end(a *chatAnswer, deltas []toolcall.Delta) error
}

// newChat reads a request in the form of OpenAI's chat completions.
func (s *Server) newChat(b *body) (*chat, error) {
	l := s.loaded()
	c := &chat{s: s, l: l, id: "chatcmpl-" + newID(), created: time.Now().Unix()}
	raw, _ := b.get("messages")
	messages, err := parseMessages(raw)
	if err != nil {
		return nil, err
	}
	var options toolcall.Options
	if err := parseTools(b, &options); err != nil {
		return nil, err
	}
	if len(options.Tools) > 0 && !s.opts.Jinja {
		return nil, badRequest("Field 'tools': tools need --jinja")
	}
	if c.set, err = parseSettings(b, &l.defaults, l); err != nil {
		return nil, err
	}
	c.set.pickSeed()
	if !b.has("verbose") && s.log.Enabled(context.Background(), slog.LevelDebug) {
		c.set.verbose = true // as llama-server does
	}
	if err := c.parseLogprobs(b); err != nil {
		return nil, err
	}
	if c.set.jsonSchema != "" {
		options.Schema, c.set.jsonSchema = json.RawMessage(c.set.jsonSchema), ""
	}
	if options.Schema, err = parseFormat(b, options.Schema); err != nil {
		return nil, err
	}
	b.text(&c.set.reasoningFormat, "reasoning_format")
	switch c.set.reasoningFormat {
	case "auto", "deepseek":
		options.Separate = true
	case "deepseek-legacy": // told apart in whole answers alone
		options.Separate = !c.set.stream
	case "none":
	default:
		raw, _ := b.get("reasoning_format")
		return nil, wrong("reasoning_format", raw, `"none", "auto", "deepseek" or "deepseek-legacy"`)
	}
	template := l.chat.plain
	if len(options.Tools) > 0 && options.Choice != toolcall.None {
		template = l.chat.withTools
	}
	c.plan = template.Plan(options)
	switch {
	case b.err != nil:
		return nil, b.err
	case c.plan.Calls() && c.set.grammar != "":
		return nil, badRequest("Field 'grammar': found together with 'tools', expected only one of them")
	case c.set.grammar != "" && options.Schema != nil:
		return nil, badRequest("Field 'response_format': found together with 'grammar', expected only one of them")
	}
	if err := c.render(b, messages, template); err != nil {
		return nil, err
	}
	return c, nil
}

// parseLogprobs reads OpenAI's way to ask for log-probabilities.
func (c *chat) parseLogprobs(b *body) error {
	raw, _ := b.get("logprobs")
	wanted := false
	if string(raw) == "true" || string(raw) == "false" {
		b.boolean(&wanted, "logprobs")
	}
	if wanted {
		n := 20 // as llama-server has it
		b.integer(&n, 0, maxLogprobs, "top_logprobs")
		c.set.logprobs = n
	} else if raw, _ := b.get("top_logprobs"); raw != nil && string(raw) != "0" {
		return badRequest("Field 'top_logprobs': found %s, expected 'logprobs' to be true with it", excerpt(raw))
	}
	return b.err
}

// variables are what the template is told beside the conversation.
func (c *chat) variables(b *body) (map[string]json.RawMessage, error) {
	variables := map[string]json.RawMessage{"enable_thinking": json.RawMessage("true")}
	if c.s.opts.Reasoning == "off" {
		variables["enable_thinking"] = json.RawMessage("false")
	}
	if given := c.s.opts.ChatTemplateKwargs; given != nil {
		var object map[string]json.RawMessage
		if json.Unmarshal(given, &object) == nil {
			maps.Copy(variables, object)
		}
	}
	if given := b.object("chat_template_kwargs"); given != nil {
		maps.Copy(variables, given.fields)
	}
	if raw := variables["enable_thinking"]; string(raw) != "true" && string(raw) != "false" {
		return nil, wrong("chat_template_kwargs.enable_thinking", raw, "true or false")
	}
	effort := ""
	switch b.text(&effort, "reasoning_effort"); effort {
	case "":
	case "none":
		variables["enable_thinking"] = json.RawMessage("false")
		delete(variables, "reasoning_effort")
	default:
		variables["reasoning_effort"], _ = json.Marshal(effort)
	}
	return variables, b.err
}

// render makes the prompt, and binds the answer.
func (c *chat) render(b *body, messages []toolcall.Message, template *toolcall.Template) error {
	variables, err := c.variables(b)
	if err != nil {
		return err
	}
	generate := true
	b.boolean(&generate, "add_generation_prompt")
	continued, err := c.continued(b, messages, generate)
	if err != nil {
		return err
	}
	if continued != nil {
		messages = messages[:len(messages)-1]
	}
	if c.prompt, err = c.l.chat.render(c.plan.Messages(messages), c.plan.RenderTools(), variables, generate || continued != nil); err != nil {
		return err
	}
	c.thinking = c.plan.Thinking(c.prompt)
	if continued != nil {
		c.resume(continued, template.Think)
	}
	if c.tokens, err = c.l.chat.tokenize(c.prompt); err != nil {
		return err
	}
	c.set.chatFormat = c.plan.Format()
	return c.constrain()
}

// continued is the last message, if the model is to go on with it instead of answering it.
func (c *chat) continued(b *body, messages []toolcall.Message, generate bool) (*toolcall.Message, error) {
	explicit := false
	if raw, _ := b.get("continue_final_message"); raw != nil && string(raw) != "false" {
		switch string(raw) {
		case "true", `"content"`, `"reasoning_content"`:
			explicit = true
		default:
			return nil, wrong("continue_final_message", raw, `true, false, "content" or "reasoning_content"`)
		}
	}
	n := len(messages)
	if n == 0 || messages[n-1].Role != "assistant" || !explicit && !c.s.opts.PrefillAssistant {
		if explicit {
			return nil, badRequest("Field 'continue_final_message': the last message is not the assistant's")
		}
		return nil, nil
	}
	switch {
	case explicit && generate && b.has("add_generation_prompt"):
		return nil, errGenerateAndContinue
	case n > 1 && messages[n-2].Role == "assistant":
		return nil, badRequest("Field 'messages': found two of the assistant's at the end, expected one that can be continued")
	case len(messages[n-1].Calls) > 0 && !explicit:
		return nil, nil
	case len(messages[n-1].Calls) > 0:
		return nil, badRequest("Field 'continue_final_message': the last message has tool calls, which cannot be continued")
	}
	return &messages[n-1], nil
}

var errGenerateAndContinue = badRequest("Field 'continue_final_message': cannot be true when 'add_generation_prompt' is")

// resume puts the beginning of the answer at the end of the prompt, as if the model had written it.
func (c *chat) resume(m *toolcall.Message, think toolcall.Tags) {
	content := m.Text("\n\n")
	if think.Open != "" {
		if c.thinking == toolcall.Thinks {
			c.prompt = strings.TrimRight(c.prompt, " \t\r\n")
			c.prompt = strings.TrimSuffix(c.prompt, think.Open)
		}
		switch {
		case m.Reasoning != "" && content == "":
			c.prompt += think.Open + "\n" + m.Reasoning
			c.thinking = toolcall.Thinks
			return
		case m.Reasoning != "" || c.thinking == toolcall.Thinks:
			c.prompt += think.Open + "\n" + m.Reasoning + "\n" + think.Close + "\n\n"
		}
		c.thinking = toolcall.HasThought
	}
	c.prompt += content
}

// constrain binds what the model writes to what the plan wants.
func (c *chat) constrain() error {
	if err := c.checkTools(); err != nil {
		return err
	}
	templates := c.l.chat
	for _, marker := range c.plan.Markers() {
		if _, ok := templates.control(marker); ok {
			c.set.spellSpecial = true
		}
	}
	constraint := c.plan.Constraint(templates.control, c.thinking)
	c.set.jsonSchema, c.set.lark = constraint.Schema, constraint.Grammar
	for _, trigger := range constraint.Triggers {
		c.set.triggers = append(c.set.triggers, engine.Trigger{
			Text:      trigger.Text,
			Constrain: func(sampler *phd.Sampler) error { return sampler.AddGrammar(trigger.Grammar) },
		})
	}
	for _, stop := range append(c.plan.Stops(), templates.stop) {
		if stop != "" && !slices.Contains(c.set.stop, stop) && len(c.set.stop) < maxStops {
			c.set.stop = append(slices.Clip(c.set.stop), stop)
		}
	}
	return nil
}

// maxGrammar is how much room there is for the tools' schemas within the library's bound on grammars, with as many tools as there
// may be.
const maxGrammar = 56 << 10

// checkTools looks whether the tools' schemas can be enforced. Arguments of those that cannot may be any object, unless the
// request insists.
func (c *chat) checkTools() error {
	if !c.plan.Calls() {
		return nil
	}
	size := 0
	for i, tool := range c.plan.Tools() {
		schema := string(tool.ArgumentSchema())
		if size += len(schema); size > maxGrammar && !tool.Strict {
			c.s.log.Warn("a tool's schema is not enforced: there are too many of them", "tool", tool.Name)
			c.plan.Loosen(i)
			continue
		}
		err := c.l.chat.checkSchema(schema)
		if err == nil {
			continue
		}
		if tool.Strict {
			return badRequest("Field 'tools[%d].function.parameters': %v", i, err)
		}
		c.s.log.Warn("a tool's schema cannot be enforced: its arguments may be any object", "tool", tool.Name, "why", err)
		c.plan.Loosen(i)
	}
	return nil
}

// run makes the answers and tells the sink of them.
func (c *chat) run(ctx context.Context, sink chatSink, ping func() error) error {
	for i := range c.set.choices {
		parser := c.plan.NewParser(c.thinking, newCallID)
		c.answers = append(c.answers, &chatAnswer{answer: answer{set: c.set, index: i, prompt: c.tokens}, parser: parser})
	}
	start := func(ctx context.Context, i int) (*engine.Generation, error) {
		c.answers[i].clock.begin(len(c.tokens))
		return c.s.start(ctx, c.set, c.tokens, i)
	}
	interval := c.set.pingInterval
	if ping == nil {
		interval = 0
	}
	return c.s.follow(ctx, len(c.answers), interval, start, follower{
		event: func(i int, event engine.Event) error {
			a := c.answers[i]
			if event.Progress != nil {
				a.clock.take(&event)
				if !c.set.returnProgress {
					return nil
				}
				return sink.progress(a, event.Progress)
			}
			a.take(c.l, &event)
			return sink.token(a, &event, a.parser.Push(event.Text))
		},
		end: func(i int, result engine.Result) error {
			a := c.answers[i]
			a.text.WriteString(result.Tail)
			a.result = &result
			deltas := append(a.parser.Push(result.Tail), a.parser.Finish()...)
			return sink.end(a, deltas)
		},
		ping: ping,
	})
}

// newCallID makes an ID of a call, of so many characters if that matters.
func newCallID(length int) string {
	id := newID()
	if length > 0 && length < len(id) {
		id = id[:length]
	}
	return id
}

// discard is the sink of those who wait for the whole.
type discard struct{}

func (discard) progress(*chatAnswer, *engine.Progress) error             { return nil }
func (discard) token(*chatAnswer, *engine.Event, []toolcall.Delta) error { return nil }
func (discard) end(*chatAnswer, []toolcall.Delta) error                  { return nil }

// finishReason is why an answer has ended, in OpenAI's words.
func (a *chatAnswer) finishReason() string {
	switch {
	case a.result.Reason != engine.StopEOS && a.result.Reason != engine.StopWord:
		return "length"
	case len(a.parser.Message().Calls) > 0:
		return "tool_calls"
	}
	return "stop"
}

// usage counts the tokens of all answers. They share the prompt.
func (c *chat) usage() *usage {
	u := &usage{prompt: len(c.tokens)}
	for i, a := range c.answers {
		if a.result == nil {
			continue
		}
		if i == 0 {
			u.cached = a.result.NCached
		}
		u.completion += a.result.NDecoded
	}
	return u
}

// readChat reads a request, which convert makes one of OpenAI's chat completions; nil: it is one.
func (s *Server) readChat(w http.ResponseWriter, r *http.Request, convert func(*body) (*body, error)) (*body, *chat, error) {
	asked, err := s.readBody(w, r)
	if err != nil {
		return nil, nil, err
	}
	b := asked
	if convert != nil {
		if b, err = convert(asked); err != nil {
			return nil, nil, err
		}
	}
	c, err := s.newChat(b)
	return asked, c, err
}

func (s *Server) chatCompletion(w http.ResponseWriter, r *http.Request) error {
	_, c, err := s.readChat(w, r, nil)
	if err != nil {
		return err
	}
	ctx, cancel := s.withTimeout(r)
	defer cancel()
	if c.set.stream {
		out := s.newEventWriter(w)
		stream := &chatStream{chat: c, out: out, begun: make(map[int]bool)}
		stream.includeUsage = c.set.includeUsage
		if err := c.run(ctx, stream, out.ping); err != nil {
			return out.fail(err)
		}
		return out.done()
	}
	if err := c.run(ctx, discard{}, nil); err != nil {
		return err
	}
	s.writeJSON(w, http.StatusOK, c.response())
	return nil
}

// chatResponse is a whole answer, or a chunk of one.
type chatResponse struct {
	Choices     []chatChoice   `json:"choices"`
	Created     int64          `json:"created"`
	Model       string         `json:"model"`
	Fingerprint string         `json:"system_fingerprint"`
	Object      string         `json:"object"`
	Usage       map[string]any `json:"usage,omitempty"`
	ID          string         `json:"id"`
	Verbose     map[string]any `json:"__verbose,omitempty"`
	Timings     *timings       `json:"timings,omitempty"`
	Progress    map[string]any `json:"prompt_progress,omitempty"`
}

type chatChoice struct {
	FinishReason *string        `json:"finish_reason"`
	Index        int            `json:"index"`
	Message      map[string]any `json:"message,omitempty"`
	Delta        any            `json:"delta,omitempty"` // an empty object is written
	Logprobs     *chatLogprobs  `json:"logprobs,omitempty"`
}

type chatLogprobs struct {
	Content []tokenProbs `json:"content"`
}

func (c *chat) newResponse(object string) *chatResponse {
	return &chatResponse{
		Choices: []chatChoice{}, Created: c.created, Model: c.s.modelName(), Fingerprint: buildInfo(), Object: object, ID: c.id,
	}
}

// response is the whole of the answers.
func (c *chat) response() *chatResponse {
	response := c.newResponse("chat.completion")
	for _, a := range c.answers {
		reason := a.finishReason()
		choice := chatChoice{FinishReason: &reason, Index: a.index, Message: messageFields(a.parser.Message())}
		if c.set.logprobs >= 0 {
			choice.Logprobs = &chatLogprobs{append([]tokenProbs{}, a.probs...)}
		}
		response.Choices = append(response.Choices, choice)
	}
	response.Usage = c.usage().fields()
	response.Timings = new(timings)
	*response.Timings = timingsOf(c.answers[0].result)
	if c.set.verbose {
		response.Verbose = c.verbose(c.answers[0])
	}
	return response
}

// verbose is what llama-server's own route says of an answer.
func (c *chat) verbose(a *chatAnswer) map[string]any {
	whole := completion{s: c.s, l: c.l, set: c.set}
	return whole.final(&a.answer, a.result, a.text.String())
}

// messageFields is a message in OpenAI's form.
func messageFields(m toolcall.Message) map[string]any {
	fields := map[string]any{"role": m.Role, "content": m.Content}
	if m.Reasoning != "" {
		fields["reasoning_content"] = m.Reasoning
	}
	if len(m.Calls) > 0 {
		calls := make([]any, len(m.Calls))
		for i, call := range m.Calls {
			calls[i] = map[string]any{
				"id":       call.ID,
				"type":     "function",
				"function": map[string]any{"name": call.Name, "arguments": call.Arguments},
			}
		}
		fields["tool_calls"] = calls
		if m.Content == "" {
			fields["content"] = nil
		}
	}
	return fields
}

// deltaFields is what has come to a message, in OpenAI's form.
func deltaFields(d toolcall.Delta) map[string]any {
	switch {
	case d.Reasoning != "":
		return map[string]any{"reasoning_content": d.Reasoning}
	case d.Content != "":
		return map[string]any{"content": d.Content}
	}
	call := map[string]any{"index": d.Call.Index}
	function := map[string]any{"arguments": d.Call.Arguments}
	if d.Call.ID != "" {
		call["id"], call["type"] = d.Call.ID, "function"
		function["name"] = d.Call.Name
	}
	call["function"] = function
	return map[string]any{"tool_calls": []any{call}}
}

// A chatStream writes answers as OpenAI's chunks.
type chatStream struct {
	*chat
	out          *eventWriter
	includeUsage bool
	begun        map[int]bool // the answers that have said who speaks
	ended        int
}

// send writes chunks with deltas. What belongs to the token goes with the last of them.
func (s *chatStream) send(a *chatAnswer, deltas []map[string]any, last func(*chatResponse)) error {
	if !s.begun[a.index] {
		s.begun[a.index] = true
		deltas = append([]map[string]any{{"role": "assistant", "content": nil}}, deltas...)
	}
	for i, delta := range deltas {
		chunk := s.newResponse("chat.completion.chunk")
		chunk.Choices = append(chunk.Choices, chatChoice{Index: a.index, Delta: delta})
		if i == len(deltas)-1 && last != nil {
			last(chunk)
		}
		if err := s.out.data(chunk); err != nil {
			return err
		}
	}
	return nil
}

func (s *chatStream) progress(a *chatAnswer, p *engine.Progress) error {
	var deltas []map[string]any
	if s.begun[a.index] {
		deltas = append(deltas, map[string]any{})
	}
	return s.send(a, deltas, func(chunk *chatResponse) {
		chunk.Progress = progressFields(p)
		if s.set.timingsPerToken {
			chunk.Timings = a.timings()
		}
	})
}

func (s *chatStream) token(a *chatAnswer, event *engine.Event, deltas []toolcall.Delta) error {
	var fields []map[string]any
	for _, d := range deltas {
		fields = append(fields, deltaFields(d))
	}
	if len(fields) == 0 && s.set.logprobs >= 0 {
		fields = append(fields, map[string]any{"content": ""}) // for the log-probabilities to go with
	}
	return s.send(a, fields, func(chunk *chatResponse) {
		if len(fields) == 0 {
			return
		}
		if s.set.logprobs >= 0 {
			chunk.Choices[0].Logprobs = &chatLogprobs{[]tokenProbs{s.l.tokenProbs(event)}}
		}
		if s.set.timingsPerToken {
			chunk.Timings = a.timings()
		}
	})
}

// timings are those so far.
func (a *chatAnswer) timings() *timings {
	t := a.clock.timings()
	return &t
}

func (s *chatStream) end(a *chatAnswer, deltas []toolcall.Delta) error {
	var fields []map[string]any
	for _, d := range deltas {
		fields = append(fields, deltaFields(d))
	}
	if err := s.send(a, fields, func(chunk *chatResponse) {
		if s.set.logprobs >= 0 {
			chunk.Choices[0].Logprobs = &chatLogprobs{[]tokenProbs{}}
		}
	}); err != nil {
		return err
	}
	s.ended++
	isLast := s.ended == len(s.answers)
	reason := a.finishReason()
	t := timingsOf(a.result)
	withUsage := s.includeUsage && isLast
	if err := s.send(a, []map[string]any{{}}, func(chunk *chatResponse) {
		chunk.Choices[0].FinishReason = &reason
		if s.set.verbose {
			chunk.Verbose = s.verbose(a)
		}
		if !withUsage {
			chunk.Timings = &t
		}
	}); err != nil || !withUsage {
		return err
	}
	chunk := s.newResponse("chat.completion.chunk")
	chunk.Usage, chunk.Timings = s.usage().fields(), &t
	return s.out.data(chunk)
}

func (s *Server) applyTemplate(w http.ResponseWriter, r *http.Request) error {
	_, c, err := s.readChat(w, r, nil)
	if err != nil {
		return err
	}
	s.writeJSON(w, http.StatusOK, map[string]any{"prompt": c.prompt})
	return nil
}

// inputTokens is what OpenAI's routes that count say beside the count.
var inputTokens = map[string]any{"object": "response.input_tokens"}

// countTokens makes a handler that counts the tokens of a request's prompt; fields are what the answer says beside that.
func (s *Server) countTokens(
	convert func(*body) (*body, error), fields map[string]any) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		_, c, err := s.readChat(w, r, convert)
		if err != nil {
			return err
		}
		answer := maps.Clone(fields)
		answer["input_tokens"] = len(c.tokens)
		s.writeJSON(w, http.StatusOK, answer)
		return nil
	}
}

// chatControl is llama-server's way to end a model's thinking from outside. Here nothing can: the answer is in its form and says so.
func (s *Server) chatControl(w http.ResponseWriter, r *http.Request) error {
	b, err := s.readBody(w, r)
	if err != nil {
		return err
	}
	id, action := "", ""
	b.text(&id, "id")
	b.text(&action, "action")
	switch {
	case b.err != nil:
		return b.err
	case id == "":
		return badRequest("missing completion id")
	case action != "reasoning_end":
		return badRequest("unknown control action")
	}
	s.writeJSON(w, http.StatusOK, map[string]any{"success": false, "message": "reasoning cannot be ended from outside"})
	return nil
}
