package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// A kind of request, and how often it is made.
type kind struct {
	name   string
	weight int
	run    func(ctx context.Context, c *client) result
}

// kinds is the mix of the load. It stands in a variable for the tests.
var kinds = []kind{
	{"chat, stream", 18, func(ctx context.Context, c *client) result { return c.chat(ctx, true) }},
	{"chat", 8, func(ctx context.Context, c *client) result { return c.chat(ctx, false) }},
	{"completion, stream", 14, func(ctx context.Context, c *client) result { return c.completion(ctx, true) }},
	{"completion", 8, func(ctx context.Context, c *client) result { return c.completion(ctx, false) }},
	{"probe", 12, func(ctx context.Context, c *client) result { return c.probe(ctx) }},
	{"hang up in the prompt", 8, func(ctx context.Context, c *client) result {
		after := time.Duration(1+c.random.IntN(300)) * time.Millisecond
		return c.hangUpInPrompt(ctx, c.newCompletion(c.server.context/4, 64, c.random.IntN(2) == 0), after)
	}},
	{"hang up in the answer", 9, func(ctx context.Context, c *client) result {
		r, _ := c.generate(ctx, c.newCompletion(30, 256, true), 1+c.random.IntN(12))
		return r
	}},
	{"too long a prompt", 5, func(ctx context.Context, c *client) result {
		q := c.newCompletion(0, 8, c.random.IntN(2) == 0)
		q.body["stream"] = q.stream
		long := text(c.random, 2*c.server.context) // a word is a token at least
		if q.path == chatPath {
			q.body["messages"] = []message{{"user", long}}
		} else {
			q.body["prompt"] = long
		}
		return c.refusal(ctx, q.path, q.body)
	}},
	{"no JSON", 5, func(ctx context.Context, c *client) result {
		return c.refusal(ctx, chatPath, raw(pick(c.random, noJSON)))
	}},
	{"wrong types", 6, func(ctx context.Context, c *client) result {
		w := pick(c.random, wrongTypes)
		return c.refusal(ctx, w.path, raw(w.body))
	}},
	{"slow reader", 3, func(ctx context.Context, c *client) result {
		return c.slowRead(ctx, c.newCompletion(30, 256, true), time.Duration(5+c.random.IntN(20))*time.Second)
	}},
	{"half a head", 2, func(ctx context.Context, c *client) result {
		head := "POST /v1/chat/completions HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\nContent-Length: 90\r\n"
		return c.fragment(ctx, head[:1+c.random.IntN(len(head)-1)], time.Duration(c.random.IntN(3000))*time.Millisecond)
	}},
	{"half a body", 2, func(ctx context.Context, c *client) result {
		body := fmt.Sprintf(`{"max_tokens": 9, "messages": [{"role": "user", "content": %q}]}`, text(c.random, 20))
		head := fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\r\nHost: load\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n",
			c.server.authorization(), len(body))
		return c.fragment(ctx, head+body[:c.random.IntN(len(body))], time.Duration(c.random.IntN(3000))*time.Millisecond)
	}},
	{"a huge body", 1, func(ctx context.Context, c *client) result {
		return c.refusal(ctx, textPath, raw(`{"max_tokens": 1, "prompt": "`+strings.Repeat("a huge body ", 1<<20)+`"}`))
	}},
}

func choose(random *rand.Rand) *kind {
	sum := 0
	for i := range kinds {
		sum += kinds[i].weight
	}
	n := random.IntN(sum)
	for i := range kinds {
		if n -= kinds[i].weight; n < 0 {
			return &kinds[i]
		}
	}
	panic("unreachable")
}

func pick[T any](random *rand.Rand, of []T) T { return of[random.IntN(len(of))] }

// chat goes on with the client's conversation, or begins another one.
func (c *client) chat(ctx context.Context, stream bool) result {
	if len(c.history) == 0 || len(c.history) > 6 || c.random.IntN(3) == 0 {
		c.history = []message{{"system", pick(c.random, c.server.prefixes)}}
	}
	c.history = append(c.history, message{"user", text(c.random, 3+c.random.IntN(30))})
	tokens := 4 + c.random.IntN(60)
	q := request{path: chatPath, stream: stream, max: tokens,
		body: map[string]any{"messages": c.history, "max_tokens": tokens, "seed": c.random.IntN(1000)}}
	r, text := c.generate(ctx, q, 0)
	if r.outcome == answered && text != "" {
		c.history = append(c.history, message{"assistant", text})
	} else {
		c.history = nil
	}
	return r
}

// completion asks for the continuation of a short or a long text; some begin as others do.
func (c *client) completion(ctx context.Context, stream bool) result {
	words := 3 + c.random.IntN(30)
	if c.random.IntN(4) == 0 {
		words = c.server.context/8 + c.random.IntN(c.server.context/8)
	}
	r, _ := c.generate(ctx, c.newCompletion(words, 4+c.random.IntN(60), stream), 0)
	return r
}

func (c *client) newCompletion(words, tokens int, stream bool) request {
	prompt := text(c.random, words)
	if c.random.IntN(2) == 0 {
		prompt = pick(c.random, c.server.prefixes) + "\n" + prompt
	}
	q := request{path: pick(c.random, []string{completionPath, textPath, chatPath}), stream: stream, max: tokens,
		body: map[string]any{"seed": c.random.IntN(1000)}}
	switch q.path {
	case chatPath:
		q.body["messages"] = []message{{"user", prompt}}
		q.body["max_tokens"] = tokens
	case completionPath:
		q.body["prompt"] = prompt
		q.body["n_predict"] = tokens
	default:
		q.body["prompt"] = prompt
		q.body["max_tokens"] = tokens
	}
	return q
}

// probe asks what was asked before the load, and expects the same answer: no request sees anything of another.
func (c *client) probe(ctx context.Context) result {
	p := pick(c.random, c.server.probes)
	r, text := c.generate(ctx, p.request(c.random.IntN(2) == 0, c.random.IntN(2) == 0), 0)
	if r.outcome == answered && text != p.answer {
		if c.server.cfg.Peer {
			r.problem = "another answer than alone"
		} else {
			r.failf("another answer than alone: %q, not %q", text, p.answer)
		}
	}
	return r
}

// raw is sent as it is.
type raw string

var noJSON = []string{
	``, `{`, `{"messages": [{"role": "user", "content": "unfinished`, `messages=hello`, `{"messages": [}`, `{'messages': []}`,
	"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]", strings.Repeat("[", 100_000), "\x00\x01\x02\x03",
	`{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e}`,
}

var wrongTypes = []struct{ path, body string }{
	{chatPath, `{"messages": "hello"}`},
	{chatPath, `{"messages": [7]}`},
	{chatPath, `{"messages": [{"role": "user", "content": 17}]}`},
	{chatPath, `{"max_tokens": 4}`},
	{chatPath, `[]`},
	{chatPath, `{"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}`},
	{chatPath, `{"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "tools": "none"}`},
	{textPath, `{"prompt": 3.5, "max_tokens": 4}`},
	{textPath, `{"prompt": true, "max_tokens": 4}`},
	{textPath, `{"prompt": "x", "max_tokens": 4, "temperature": "hot"}`},
	{textPath, `{"prompt": [1, 2, 99999999], "max_tokens": 4}`},
	{textPath, `{"prompt": [1, -2], "max_tokens": 4}`},
	{completionPath, `{"prompt": {"a": 1}, "n_predict": 4}`},
	{completionPath, `{"prompt": "x", "n_predict": [4]}`},
	{completionPath, `{"prompt": "x", "n_predict": 4, "json_schema": {"type": "nothing"}}`},
	{completionPath, `{"prompt": "x", "n_predict": 4, "grammar": "root ::= ("}`},
	{completionPath, `null`},
	{"/v1/embeddings", `{"input": true}`},
	{"/tokenize", `{"content": {"a": 1}}`},
	{"/detokenize", `{"tokens": "x"}`},
}

// text is so many words.
func text(random *rand.Rand, words int) string {
	var b strings.Builder
	for i := range words {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(pick(random, vocabulary))
	}
	return b.String()
}

var vocabulary = strings.Fields(`the and of to that in he shall unto for I his a they be is him not them it with all thou thy
	was God which my me said but ye their have will thee from as are when this out were upon man you by Israel king son up
	there people house before come land children men your day also one her had came so into water city went great little
	bread naïve façade Ωmega 東京 привет 🙂 x=1; {"a":[1,2]} 3.14159 <tag> C++ didn't`)
