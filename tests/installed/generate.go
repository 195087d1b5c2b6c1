//go:build ignore

// Generates text through the Go package, linked with an installed libphd: tests/installed.sh.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	phd "github.com/libphd/libphd/bindings/go"
)

func main() {
	log.SetFlags(0)
	ctx := context.Background()
	model, err := phd.LoadModel(ctx, os.Args[1], nil)
	check(err)
	defer model.Close()
	session, err := model.NewSession(nil)
	check(err)
	defer session.Close()
	tokens, err := model.Tokenize(os.Args[2], true, false)
	check(err)
	sequence := session.Sequence(0)
	check(sequence.Prefill(ctx, tokens))
	options := phd.DefaultSamplerOptions()
	options.Temperature = 0
	sampler, err := model.NewSampler(&options)
	check(err)
	defer sampler.Close()
	fmt.Print(os.Args[2])
	for range 24 {
		token, err := sampler.Sample(sequence)
		check(err)
		text, err := model.Detokenize([]phd.Token{token})
		check(err)
		fmt.Print(string(text))
		check(sequence.Step(ctx, token))
	}
	fmt.Println()
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
