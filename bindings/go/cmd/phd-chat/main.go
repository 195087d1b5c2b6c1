// Command phd-chat is a conversation in the terminal. Ctrl-C stops an answer, and at the prompt the program; /reset begins
// anew.
//
//	phd-chat [flags] MODEL
//
// With a model that has a chat template, lines are a user's messages. Any other model goes on with the text that they
// make.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"

	phd "github.com/libphd/libphd/bindings/go"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "phd-chat:", err)
		}
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out, notes io.Writer) error {
	flags := flag.NewFlagSet("phd-chat", flag.ContinueOnError)
	flags.SetOutput(notes)
	flags.Usage = func() {
		fmt.Fprintln(notes, "usage: phd-chat [flags] MODEL")
		flags.PrintDefaults()
	}
	system := flags.String("system", "", "what the model is told before the conversation")
	positions := flags.Int("positions", 0, "`size` of the cache; 0: what the model was trained for, 4096 at most")
	limit := flags.Int("n", 512, "the most `tokens` of an answer")
	sampling := phd.DefaultSamplerOptions()
	temperature := flags.Float64("temperature", float64(sampling.Temperature), "0: always the most probable token")
	flags.Uint64Var(&sampling.Seed, "seed", rand.Uint64(), "of the random choices")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		flags.Usage()
		return errors.New("expected one model")
	}
	sampling.Temperature = float32(*temperature)

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	model, err := phd.LoadModel(ctx, flags.Arg(0), nil)
	stop()
	if err != nil {
		return err
	}
	defer model.Close()
	if *positions == 0 {
		*positions = min(model.Info().NCtxTrain, 4096)
	}
	c, err := newConversation(model, *system, *positions, *limit, &sampling)
	if err != nil {
		return err
	}
	defer c.close()

	lines := bufio.NewScanner(in)
	for {
		fmt.Fprint(notes, "> ")
		if !lines.Scan() {
			fmt.Fprintln(notes)
			return lines.Err()
		}
		switch line := lines.Text(); line {
		case "":
		case "/reset":
			c.reset()
		default:
			// Between answers Ctrl-C is not caught: it ends the program.
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
			err := c.answer(ctx, line, out)
			stop()
			fmt.Fprintln(out)
			switch {
			case errors.Is(err, context.Canceled):
				fmt.Fprintln(notes, "[stopped]")
			case errors.Is(err, phd.ErrCacheFull):
				fmt.Fprintln(notes, "[the conversation is full: /reset]")
			case err != nil:
				return err
			}
		}
	}
}

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// A conversation is what has been said, and the sequence that holds as much of it as the model has read.
type conversation struct {
	model   *phd.Model
	session *phd.Session
	seq     *phd.Sequence
	sampler *phd.Sampler
	stream  *phd.Stream
	limit   int

	system      string
	hasTemplate bool
	messages    []message // with a template
	text        string    // without one
}

func newConversation(m *phd.Model, system string, positions, limit int, o *phd.SamplerOptions) (*conversation, error) {
	c := &conversation{model: m, system: system, limit: limit}
	if err := c.open(positions, o); err != nil {
		c.close()
		return nil, err
	}
	c.reset()
	return c, nil
}

func (c *conversation) open(positions int, o *phd.SamplerOptions) (err error) {
	if _, c.hasTemplate, err = c.model.ChatTemplate(""); err != nil {
		return err
	}
	if c.session, err = c.model.NewSession(&phd.SessionOptions{NPositions: positions}); err != nil {
		return err
	}
	c.seq = c.session.Sequence(0)
	if c.sampler, err = c.model.NewSampler(o); err != nil {
		return err
	}
	c.stream, err = c.model.NewStream()
	return err
}

// close frees what open has made.
func (c *conversation) close() {
	if c.stream != nil {
		c.stream.Close()
	}
	if c.sampler != nil {
		c.sampler.Close()
	}
	if c.session != nil {
		c.session.Close()
	}
}

func (c *conversation) reset() {
	c.messages, c.text = nil, c.system
	if c.system != "" {
		c.messages = []message{{"system", c.system}}
	}
}

// prompt is the conversation so far as tokens.
func (c *conversation) prompt() ([]phd.Token, error) {
	if !c.hasTemplate {
		return c.model.Tokenize(c.text, true, false)
	}
	messages, err := json.Marshal(c.messages)
	if err != nil {
		return nil, err
	}
	text, err := c.model.RenderChat(phd.ChatOptions{Messages: messages, AddGenerationPrompt: true})
	if err != nil {
		return nil, err
	}
	return c.model.Tokenize(text, false, true)
}

// answer writes what the model has to say to a line. What was said remains, even if ctx ends the answer.
func (c *conversation) answer(ctx context.Context, line string, out io.Writer) error {
	messages, text := c.messages, c.text
	c.messages, c.text = append(c.messages, message{"user", line}), c.text+line
	if err := c.read(ctx); err != nil {
		c.messages, c.text = messages, text // the line was not read
		return err
	}
	said, err := c.say(ctx, out)
	c.messages, c.text = append(c.messages, message{"assistant", said}), c.text+said
	return err
}

// read makes the sequence what the conversation is. The model reads only what is new since the last answer.
func (c *conversation) read(ctx context.Context) error {
	tokens, err := c.prompt()
	if err != nil {
		return err
	}
	have, err := c.seq.Tokens()
	if err != nil {
		return err
	}
	n := 0
	for n < min(len(have), len(tokens)-1) && have[n] == tokens[n] {
		n++
	}
	if err := c.seq.Truncate(n); err != nil {
		return err
	}
	if err := c.sampler.AcceptPrompt(tokens[n:]); err != nil {
		return err
	}
	return c.seq.Prefill(ctx, tokens[n:])
}

// say generates an answer.
func (c *conversation) say(ctx context.Context, out io.Writer) (string, error) {
	var said strings.Builder
	out = io.MultiWriter(&said, out)
	err := c.generate(ctx, out)
	rest, finishErr := c.stream.Finish()
	if _, writeErr := io.WriteString(out, rest); err == nil {
		err = errors.Join(finishErr, writeErr)
	}
	return said.String(), err
}

func (c *conversation) generate(ctx context.Context, out io.Writer) error {
	for range c.limit {
		token, err := c.sampler.Sample(c.seq)
		if err != nil {
			return err
		}
		if c.model.IsEnd(token) {
			break
		}
		if err := c.sampler.Accept(token); err != nil {
			return err
		}
		text, err := c.stream.Push(token)
		if err != nil {
			return err
		}
		if _, err := io.WriteString(out, text); err != nil {
			return err
		}
		if err := c.seq.Step(ctx, token); err != nil {
			return err
		}
	}
	return nil
}
