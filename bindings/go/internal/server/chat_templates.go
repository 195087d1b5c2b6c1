package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/toolcall"
)

// namedTemplates are chat templates that can be chosen by name. The token that begins a text is not in them: tokenize adds it for
// models that want it.
var namedTemplates = map[string]string{
	"chatml": `{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}`,
	"llama3": `{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}`,
	"gemma": `{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + message.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}`,
	"phi3": `{%- for message in messages -%}
{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}`,
	"zephyr": `{%- for message in messages -%}
{{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}`,
	"command-r": `{%- for message in messages -%}
{%- set who = {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'} -%}
{{- '<|START_OF_TURN_TOKEN|>' + who[message.role] + message.content | trim + '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}`,
}

// chatTemplates are what conversations are put to the model with.
type chatTemplates struct {
	model  *phd.Model
	source string // Jinja; "": the model's own
	// What the template does, and the one that the model has for conversations with tools, if that is another.
	plain, withTools *toolcall.Template
	stop             string // what ends a turn in a template that is not the model's; "": the model's own tokens do
	bos              phd.Token
	addBOS           bool

	mu      sync.Mutex
	schemas map[string]error // schemas of tools that were compiled, and what came of it
}

// newChatTemplates looks what the model's chat template, or the one that the options give, can do. A model without one gets
// ChatML, as with llama-server.
func newChatTemplates(model *phd.Model, opts *Options, log *slog.Logger) (*chatTemplates, error) {
	c := &chatTemplates{model: model, source: opts.ChatTemplate, schemas: map[string]error{}}
	if named, ok := namedTemplates[c.source]; ok {
		c.source = named
	} else if c.source != "" && !strings.Contains(c.source, "{") {
		log.Warn("the chat template has no Jinja in it: all prompts will be the same", "template", c.source)
	}
	source := c.source
	if source == "" {
		own, ok, err := model.ChatTemplate("")
		if err != nil {
			return nil, err
		}
		if ok {
			source = own
		} else {
			log.Info("the model has no chat template: ChatML is used")
			c.source = namedTemplates["chatml"]
			source, c.stop = c.source, "<|im_end|>"
		}
	}
	c.plain = toolcall.Analyze(source, c.renderWith(""))
	c.withTools = c.plain
	if c.source == "" {
		if own, ok, err := model.ChatTemplate("tool_use"); err != nil {
			return nil, err
		} else if ok {
			c.withTools = toolcall.Analyze(own, c.renderWith("tool_use"))
		}
	}
	log.Info("chat template", "calls", c.withTools.Format(), "thinks", c.plain.Think.Open != "", "system_role", c.plain.SystemRole)
	first, err := model.Tokenize("a", true, false)
	if err != nil {
		return nil, err
	}
	c.bos, c.addBOS = model.SpecialToken(phd.SpecialBOS)
	c.addBOS = c.addBOS && len(first) > 0 && first[0] == c.bos
	return c, nil
}

// text is the template that is used for conversations without tools.
func (c *chatTemplates) text() string {
	if c.source != "" {
		return c.source
	}
	own, _, _ := c.model.ChatTemplate("") // it was there when the model was loaded
	return own
}

// renderWith renders small conversations with one of the model's templates.
func (c *chatTemplates) renderWith(name string) toolcall.Render {
	return func(messages, tools json.RawMessage) (string, error) {
		return c.renderAs(name, messages, tools, nil, false)
	}
}

// render makes a prompt of a conversation.
func (c *chatTemplates) render(messages, tools json.RawMessage, variables map[string]json.RawMessage, generate bool) (string, error) {
	return c.renderAs("", messages, tools, variables, generate)
}

func (c *chatTemplates) renderAs(name string, messages, tools json.RawMessage, variables map[string]json.RawMessage, generate bool) (string, error) {
	now := time.Now()
	all := map[string]json.RawMessage{
		"date_string": json.RawMessage(now.Format(`"02 Jan 2006"`)),
		"datetime":    json.RawMessage(now.Format(`"Jan 02 2006"`)),
	}
	if strings.Contains(c.text(), "functools[") {
		// FireFunction's template takes the tools as a text of this name, and must have it.
		functions, err := json.Marshal(string(tools))
		if err != nil {
			return "", err
		}
		all["functions"] = functions
	}
	for name, value := range variables {
		all[name] = value
	}
	encoded, err := encodeJSON(all)
	if err != nil {
		return "", err
	}
	text, err := c.model.RenderChat(phd.ChatOptions{
		Messages: messages, Tools: tools, Variables: encoded, Template: c.source, Name: name, Now: now,
		AddGenerationPrompt: generate,
	})
	if err != nil {
		return "", badRequest("the chat template refuses the conversation: %v", err)
	}
	return text, nil
}

// tokenize makes tokens of a prompt. Most templates write the token that begins a text; for the others it is added, if the model
// wants it.
func (c *chatTemplates) tokenize(prompt string) ([]phd.Token, error) {
	tokens, err := c.model.Tokenize(prompt, false, true)
	if err != nil {
		return nil, err
	}
	if c.addBOS && (len(tokens) == 0 || tokens[0] != c.bos) {
		tokens = append([]phd.Token{c.bos}, tokens...)
	}
	return tokens, nil
}

// control is the control token that a word is spelled as, if it is one.
func (c *chatTemplates) control(word string) (int32, bool) {
	tokens, err := c.model.Tokenize(word, false, true)
	if err != nil || len(tokens) != 1 {
		return 0, false
	}
	text, err := c.model.TokenBytes(tokens[0], false)
	if err != nil || len(text) > 0 {
		return 0, false
	}
	spelled, err := c.model.TokenBytes(tokens[0], true)
	return tokens[0], err == nil && bytes.Equal(spelled, []byte(word))
}

// Bounds of the schemas whose fate is remembered: clients send the same tools with each request.
const (
	maxSchemas     = 1024
	longestSchemas = 8 << 10
)

// checkSchema says whether a schema can be enforced.
func (c *chatTemplates) checkSchema(schema string) error {
	c.mu.Lock()
	err, known := c.schemas[schema]
	c.mu.Unlock()
	if known {
		return err
	}
	sampler, err := c.model.NewEmptySampler(0)
	if err != nil {
		return err
	}
	defer sampler.Close()
	err = sampler.AddJSONSchema(schema)
	if len(schema) > longestSchemas || err != nil && !errors.Is(err, phd.ErrUnsupported) && !errors.Is(err, phd.ErrInvalidArgument) {
		return err
	}
	c.mu.Lock()
	if len(c.schemas) >= maxSchemas {
		clear(c.schemas)
	}
	c.schemas[schema] = err
	c.mu.Unlock()
	return err
}
