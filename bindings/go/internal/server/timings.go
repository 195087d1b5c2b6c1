package server

import (
	"time"

	"github.com/libphd/libphd/bindings/go/internal/engine"
)

// timings say how long an answer took, in llama-server's terms.
type timings struct {
	CacheN              int     `json:"cache_n"`
	PromptN             int     `json:"prompt_n"`
	PromptMS            float64 `json:"prompt_ms"`
	PromptPerTokenMS    float64 `json:"prompt_per_token_ms"`
	PromptPerSecond     float64 `json:"prompt_per_second"`
	PredictedN          int     `json:"predicted_n"`
	PredictedMS         float64 `json:"predicted_ms"`
	PredictedPerTokenMS float64 `json:"predicted_per_token_ms"`
	PredictedPerSecond  float64 `json:"predicted_per_second"`
}

func newTimings(cached, evaluated int, prompt time.Duration, predicted int, predict time.Duration) timings {
	t := timings{
		CacheN:      cached,
		PromptN:     evaluated,
		PromptMS:    milliseconds(prompt),
		PredictedN:  predicted,
		PredictedMS: milliseconds(predict),
	}
	if t.PromptN > 0 && t.PromptMS > 0 {
		t.PromptPerTokenMS = t.PromptMS / float64(t.PromptN)
		t.PromptPerSecond = 1e3 / t.PromptMS * float64(t.PromptN)
	}
	// The first token comes of the prompt and takes no step of its own.
	if steps := t.PredictedN - 1; steps > 0 && t.PredictedMS > 0 {
		t.PredictedPerTokenMS = t.PredictedMS / float64(steps)
		t.PredictedPerSecond = 1e3 / t.PredictedMS * float64(steps)
	}
	return t
}

func timingsOf(r *engine.Result) timings {
	return newTimings(r.NCached, r.NPrompt-r.NCached, r.PromptTime, r.NDecoded, r.PredictTime)
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// A clock follows an answer while it is made. What it says of the prompt it has from progress events.
type clock struct {
	total     int
	progress  engine.Progress
	predicted int
	first     time.Time // of the tokens
	last      time.Time
}

func (c *clock) begin(prompt int) { c.total = prompt }

func (c *clock) take(event *engine.Event) {
	if event.Progress != nil {
		c.progress = *event.Progress
		return
	}
	c.last = time.Now()
	if c.predicted == 0 {
		c.first = c.last
	}
	c.predicted++
}

func (c *clock) timings() timings {
	evaluated := c.progress.Processed - c.progress.Cached
	elapsed := c.progress.Elapsed
	if evaluated <= 0 {
		evaluated, elapsed = 0, 0 // what has passed is waiting
	}
	return newTimings(c.progress.Cached, evaluated, elapsed, c.predicted, c.last.Sub(c.first))
}

func progressFields(p *engine.Progress) map[string]any {
	return map[string]any{
		"total":     p.Total,
		"cache":     p.Cached,
		"processed": p.Processed,
		"time_ms":   p.Elapsed.Milliseconds(),
	}
}
