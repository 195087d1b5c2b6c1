package phd

import (
	"context"
	"errors"
	"testing"
)

const demoModel = "../../models/kjv-phd-cswa-2-16-32"

func TestGenerate(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	m, err := LoadModel(ctx, demoModel, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s, err := m.NewSession(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tokens, err := m.Tokenize("In the beginning", true, false)
	if err != nil {
		t.Fatal(err)
	}
	q := s.Sequence(0)
	if err := q.Prefill(ctx, tokens); err != nil {
		t.Fatal(err)
	}
	smp, _ := m.NewSampler(nil)
	st, _ := m.NewStream()
	out := ""
	for range 30 {
		tok, err := smp.Sample(q)
		if err != nil {
			t.Fatal(err)
		}
		x, err := st.Push(tok)
		if err != nil {
			t.Fatal(err)
		}
		out += x
		if err := s.Decode(ctx, []Entry{{Sequence: q, Tokens: []Token{tok}, Logits: true}}); err != nil {
			t.Fatal(err)
		}
	}
	t.Log(out, q.Len())
	err = q.Step(ctx, 99999)
	if !errors.Is(err, ErrInvalidArgument) {
		t.Fatal(err)
	}
	t.Log(err)
}
