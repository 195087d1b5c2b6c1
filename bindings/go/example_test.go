package phd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"time"

	phd "github.com/libphd/libphd/bindings/go"
)

const demoModel = "../../models/kjv-phd-cswa-2-16-32"

// Load a model, read a prompt, and write what follows.
func Example() {
	ctx := context.Background()
	model, err := phd.LoadModel(ctx, demoModel, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	session, err := model.NewSession(nil)
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	options := phd.DefaultSamplerOptions()
	options.Temperature = 0
	sampler, err := model.NewSampler(&options)
	if err != nil {
		log.Fatal(err)
	}
	defer sampler.Close()
	stream, err := model.NewStream()
	if err != nil {
		log.Fatal(err)
	}
	defer stream.Close()

	tokens, err := model.Tokenize("In the beginning", true, false)
	if err != nil {
		log.Fatal(err)
	}
	seq := session.Sequence(0)
	if err := seq.Prefill(ctx, tokens); err != nil {
		log.Fatal(err)
	}
	fmt.Print("In the beginning")
	for range 16 {
		token, err := sampler.Sample(seq)
		if err != nil {
			log.Fatal(err)
		}
		if model.IsEnd(token) {
			break
		}
		text, err := stream.Push(token)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Print(text)
		if err := seq.Step(ctx, token); err != nil {
			log.Fatal(err)
		}
	}
	text, err := stream.Finish()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(text)
	// Output:
	// In the beginning of the Lord,
	// And the greatest of the world, and all the
}

// A server extends all its sequences in one call, so that they share each pass over the weights.
func ExampleSession_Decode() {
	ctx := context.Background()
	model, err := phd.LoadModel(ctx, demoModel, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	session, err := model.NewSession(&phd.SessionOptions{NSequences: 2, NPositions: 1024})
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()

	var entries []phd.Entry
	for i, prompt := range []string{"In the beginning", "And it came to pass, that"} {
		tokens, err := model.Tokenize(prompt, true, false)
		if err != nil {
			log.Fatal(err)
		}
		entries = append(entries, phd.Entry{Sequence: session.Sequence(i), Tokens: tokens, Logits: true})
	}
	if err := session.Decode(ctx, entries); err != nil {
		log.Fatal(err)
	}
	for _, entry := range entries {
		best, err := entry.Sequence.TopLogprobs(1)
		if err != nil {
			log.Fatal(err)
		}
		text, err := model.TokenBytes(best[0].Token, false)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%d positions, then %q\n", entry.Sequence.Len(), text)
	}
	// Output:
	// 5 positions, then " of"
	// 7 positions, then " the"
}

// A context ends a call. What the call would have changed is as it was.
func ExampleSequence_Prefill() {
	model, err := phd.LoadModel(context.Background(), demoModel, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	session, err := model.NewSession(nil)
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	tokens, err := model.Tokenize("In the beginning", true, false)
	if err != nil {
		log.Fatal(err)
	}

	ctx, cancel := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
	defer cancel()
	err = session.Sequence(0).Prefill(ctx, tokens)
	fmt.Println(errors.Is(err, phd.ErrCancelled), errors.Is(err, context.DeadlineExceeded), session.Sequence(0).Len())
	// Output: true true 0
}

// A constraint lets only text pass that a JSON schema allows.
func ExampleSampler_AddJSONSchema() {
	ctx := context.Background()
	model, err := phd.LoadModel(ctx, demoModel, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()
	session, err := model.NewSession(nil)
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	sampler, err := model.NewSampler(nil)
	if err != nil {
		log.Fatal(err)
	}
	defer sampler.Close()
	if err := sampler.AddJSONSchema(`{"const": {"begat": ["Seth", "Enos"]}}`); err != nil {
		log.Fatal(err)
	}

	tokens, err := model.Tokenize("Adam: ", true, false)
	if err != nil {
		log.Fatal(err)
	}
	seq := session.Sequence(0)
	if err := seq.Prefill(ctx, tokens); err != nil {
		log.Fatal(err)
	}
	var answer []phd.Token
	for {
		token, err := sampler.Sample(seq)
		if err != nil {
			log.Fatal(err)
		}
		if model.IsEnd(token) {
			break
		}
		if err := sampler.Accept(token); err != nil {
			log.Fatal(err)
		}
		answer = append(answer, token)
		if err := seq.Step(ctx, token); err != nil {
			log.Fatal(err)
		}
	}
	text, err := model.Detokenize(answer)
	if err != nil {
		log.Fatal(err)
	}
	var compact bytes.Buffer // the schema leaves spaces to the model
	if err := json.Compact(&compact, text); err != nil {
		log.Fatal(err)
	}
	fmt.Println(compact.String())
	// Output: {"begat":["Seth","Enos"]}
}
