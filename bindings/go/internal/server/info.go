package server

import (
	"net/http"
	"strings"

	phd "github.com/libphd/libphd/bindings/go"
)

func (s *Server) registerInfo(mux *http.ServeMux) {
	s.handleAll(mux, "GET", []string{"/health", "/v1/health"}, s.health)
	s.handleAll(mux, "GET", []string{"/models", "/v1/models"}, s.models)
	s.handle(mux, "GET /props", s.props)
	s.handle(mux, "POST /props", s.changeProps)
	s.handle(mux, "GET /metrics", s.scrape)
	s.handle(mux, "GET /phd/state", s.showState)
	s.handle(mux, "GET /lora-adapters", func(w http.ResponseWriter, r *http.Request) error {
		s.writeJSON(w, http.StatusOK, []any{})
		return nil
	})
	s.refuse(mux, "POST", []string{"/lora-adapters"}, "This server has no LoRA adapters")
	s.refuse(mux, "POST", []string{"/v1/audio/transcriptions", "/audio/transcriptions"}, "The model does not hear: it reads text only")
	s.refuse(mux, "POST", []string{"/v1/systemone"}, "The model is no decision model")
	for _, pattern := range []string{"GET /cors-proxy", "POST /cors-proxy", "GET /tools", "POST /tools"} {
		s.handle(mux, pattern, func(http.ResponseWriter, *http.Request) error {
			// As llama-server answers when they are off; here they always are.
			return &apiError{status: http.StatusForbidden, kind: "feature_disabled", message: "this feature is disabled"}
		})
	}
	if s.opts.UI != nil {
		mux.Handle("GET /{$}", s.opts.UI)
		mux.Handle("GET /index.html", s.opts.UI)
	}
}

func (s *Server) health(w http.ResponseWriter, r *http.Request) error {
	if s.draining.Load() || s.loaded().engine.Draining() {
		return unavailable(shuttingDownMessage)
	}
	s.writeJSON(w, http.StatusOK, map[string]any{"status": "ok"})
	return nil
}

func (s *Server) models(w http.ResponseWriter, r *http.Request) error {
	l := s.loaded()
	name := s.modelName()
	aliases := append([]string{}, s.opts.Aliases...)
	s.writeJSON(w, http.StatusOK, map[string]any{
		"object": "list",
		"data": []any{map[string]any{
			"id":      name,
			"aliases": aliases,
			"tags":    append([]string{}, s.opts.Tags...),
			"object":  "model",
			"architecture": map[string]any{
				"input_modalities":  []string{"text"},
				"output_modalities": []string{"text"},
			},
			"created":  s.started.Unix(),
			"owned_by": "libphd",
			"meta": map[string]any{
				"n_vocab":     l.info.NVocab,
				"n_ctx":       l.engine.SlotContext(),
				"n_ctx_train": l.info.NCtxTrain,
				"n_embd":      l.info.NEmbd,
				"n_params":    l.info.NParams,
				"size":        l.info.NBytes,
				"copies":      l.info.Copies,
				"window":      l.info.Window,
				"chunk":       l.info.Chunk,
			},
		}},
		// Ollama's shape, which some clients read.
		"models": []any{map[string]any{
			"name": name, "model": name, "modified_at": "", "size": "", "digest": "", "type": "model", "description": "",
			"tags": []string{""}, "capabilities": []string{"completion"}, "parameters": "",
			"details": map[string]any{"parent_model": "", "format": "gguf", "family": "", "families": []string{""},
				"parameter_size": "", "quantization_level": ""},
		}},
	})
	return nil
}

func (s *Server) props(w http.ResponseWriter, r *http.Request) error {
	l := s.loaded()
	m := map[string]any{
		"default_generation_settings": map[string]any{
			"params": l.defaults.describe(true),
			"n_ctx":  l.engine.SlotContext(),
		},
		"total_slots":        l.engine.NSlots(),
		"model_alias":        s.modelName(),
		"model_path":         s.opts.ModelPath,
		"modalities":         map[string]any{"vision": false, "video": false, "audio": false},
		"media_marker":       "<__media__>",
		"endpoint_slots":     s.opts.EndpointSlots,
		"endpoint_props":     s.opts.EndpointProps,
		"endpoint_metrics":   s.opts.EndpointMetrics,
		"ui":                 s.opts.UI != nil,
		"ui_settings":        map[string]any{},
		"chat_template":      l.template,
		"chat_template_caps": l.chat.withTools.Capabilities(),
		"bos_token":          l.spelling(phd.SpecialBOS),
		"eos_token":          l.spelling(phd.SpecialEOS),
		"build_info":         buildInfo(),
		"is_sleeping":        false,
	}
	if template, ok, err := l.model.ChatTemplate("tool_use"); err == nil && ok && s.opts.ChatTemplate == "" {
		m["chat_template_tool_use"] = template
	}
	s.writeJSON(w, http.StatusOK, m)
	return nil
}

// spelling is a special token as text; "" if the model has none of the kind.
func (l *loaded) spelling(kind phd.SpecialKind) string {
	token, ok := l.model.SpecialToken(kind)
	if !ok {
		return ""
	}
	piece, err := l.model.TokenBytes(token, true)
	if err != nil {
		return ""
	}
	return strings.ToValidUTF8(string(piece), "\uFFFD")
}

func (s *Server) changeProps(w http.ResponseWriter, r *http.Request) error {
	if !s.opts.EndpointProps {
		return notSupported("This server does not support changing global properties. Start it with `--props`")
	}
	if _, err := s.readBody(w, r); err != nil {
		return err
	}
	s.writeJSON(w, http.StatusOK, map[string]any{"success": true}) // llama-server knows none either
	return nil
}

// showState is for the page that the server shows: what the model is, and what the cache and the slots hold right now.
func (s *Server) showState(w http.ResponseWriter, r *http.Request) error {
	l := s.loaded()
	snapshot := l.engine.Snapshot()
	slots := []map[string]any{}
	rows := 0
	for _, info := range l.engine.Slots() {
		slots = append(slots, map[string]any{
			"id": info.ID, "busy": info.Busy, "task": info.Task, "n_context": info.NContext, "n_past": info.NPast,
			"n_prompt": info.NPrompt, "n_prompt_done": info.NPromptDone, "n_cached": info.NCached,
			"n_decoded": info.NDecoded, "n_remain": info.NRemain, "tokens_per_second": info.TokensPerSecond,
		})
		if info.Busy {
			rows += int(l.info.Copies)
		}
	}
	u, m, t := snapshot.Usage, snapshot.Memory, snapshot.Stats
	s.writeJSON(w, http.StatusOK, map[string]any{
		"model": map[string]any{
			"name": s.modelName(), "copies": l.info.Copies, "window": l.info.Window, "chunk": l.info.Chunk,
			"n_layers": l.info.NLayers, "n_embd": l.info.NEmbd, "n_vocab": l.info.NVocab, "n_ctx_train": l.info.NCtxTrain,
		},
		"n_positions":   l.engine.Context(),
		"slot_context":  l.engine.SlotContext(),
		"rows_per_step": rows, // copies of all that runs: they share each pass over the weights
		"usage": map[string]any{
			"used": u.Used, "free": u.Free, "shared": u.Shared, "retained": u.Retained, "block": u.Block,
		},
		"memory": map[string]any{
			"weights_bytes": m.Weights, "cache_bytes": m.Cache, "hidden_bytes": m.Hidden, "scratch_bytes": m.Scratch,
		},
		"slots": slots,
		"queue": map[string]any{"waiting": snapshot.Queued, "busy": snapshot.Busy, "capacity": s.opts.MaxQueue},
		"totals": map[string]any{
			"requests": snapshot.Started, "cancelled": snapshot.Cancelled, "rejected": snapshot.Rejected,
			"prompt_tokens": snapshot.PromptTokens, "predicted_tokens": snapshot.PredictedTokens,
			"prompt_seconds": snapshot.PromptTime.Seconds(), "predicted_seconds": snapshot.PredictTime.Seconds(),
			"passes": t.Passes, "rows": t.Rows, "prefix_hits": t.PrefixHits, "prefix_tokens": t.PrefixTokens,
			"dropped": t.Dropped, "evicted": t.Evicted,
		},
		"uptime_seconds": s.metrics.uptime().Seconds(),
	})
	return nil
}
