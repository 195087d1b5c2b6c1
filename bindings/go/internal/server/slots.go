package server

import (
	"errors"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	phd "github.com/libphd/libphd/bindings/go"
	"github.com/libphd/libphd/bindings/go/internal/engine"
)

func (s *Server) registerSlots(mux *http.ServeMux) {
	s.handle(mux, "GET /slots", s.listSlots)
	s.handle(mux, "POST /slots/{id}", s.slotAction)
}

func (s *Server) listSlots(w http.ResponseWriter, r *http.Request) error {
	if !s.opts.EndpointSlots {
		return notSupported("This server does not support slots endpoint. Start it with `--slots`")
	}
	infos := s.loaded().engine.Slots()
	idle := 0
	slots := make([]map[string]any, len(infos))
	for i, info := range infos {
		if !info.Busy {
			idle++
		}
		slots[i] = describeSlot(&info)
	}
	if r.URL.Query().Get("fail_on_no_slot") != "" && idle == 0 {
		return unavailable("no slot available")
	}
	s.writeJSON(w, http.StatusOK, slots)
	return nil
}

// describeSlot shows what a slot does, without the texts that are in it.
func describeSlot(info *engine.SlotInfo) map[string]any {
	m := map[string]any{
		"id":            info.ID,
		"n_ctx":         info.NContext,
		"speculative":   false,
		"is_processing": info.Busy,
	}
	if info.Task == 0 {
		return m
	}
	remain := -1
	if info.Busy {
		remain = info.NRemain
	}
	m["id_task"] = info.Task
	m["n_prompt_tokens"] = info.NPrompt
	m["n_prompt_tokens_processed"] = info.NPromptDone - info.NCached
	m["n_prompt_tokens_cache"] = info.NCached
	if set, ok := info.Label.(*settings); ok {
		m["params"] = set.describe(true)
	}
	m["next_token"] = []map[string]any{{
		"has_next_token": info.Busy,
		"has_new_line":   false,
		"n_remain":       remain,
		"n_decoded":      info.NDecoded,
	}}
	return m
}

func (s *Server) slotAction(w http.ResponseWriter, r *http.Request) error {
	if s.opts.SlotSavePath == "" {
		return notSupported("This server does not support slots action. Start it with `--slot-save-path`")
	}
	l := s.loaded()
	id, err := strconv.Atoi(r.PathValue("id"))
	if err != nil || id < 0 || id >= l.engine.NSlots() {
		return badRequest("Invalid slot ID: found %s, expected 0 to %d",
			strconv.Quote(r.PathValue("id")), l.engine.NSlots()-1)
	}
	ctx, cancel := s.withTimeout(r)
	defer cancel()
	action := r.URL.Query().Get("action")
	if action == "erase" {
		n, err := l.engine.EraseSlot(ctx, id)
		if err != nil {
			return err
		}
		s.writeJSON(w, http.StatusOK, map[string]any{"id_slot": id, "n_erased": n})
		return nil
	}
	if action != "save" && action != "restore" {
		return badRequest("Invalid action: found %s, expected save, restore or erase", strconv.Quote(action))
	}
	b, err := s.readBody(w, r)
	if err != nil {
		return err
	}
	filename := ""
	if b.text(&filename, "filename"); b.err != nil {
		return b.err
	}
	if !validFilename(filename) {
		return badRequest("Invalid filename: expected the plain name of a file")
	}
	path := filepath.Join(s.opts.SlotSavePath, filename)
	if action == "save" {
		n, bytes, took, err := l.engine.SaveSlot(ctx, id, path)
		if err != nil {
			return s.slotError(err)
		}
		s.writeJSON(w, http.StatusOK, map[string]any{"id_slot": id, "filename": filename, "n_saved": n, "n_written": bytes,
			"timings": map[string]any{"save_ms": milliseconds(took)}})
		return nil
	}
	n, bytes, took, err := l.engine.RestoreSlot(ctx, id, path)
	if err != nil {
		return s.slotError(err)
	}
	s.writeJSON(w, http.StatusOK, map[string]any{"id_slot": id, "filename": filename, "n_restored": n, "n_read": bytes,
		"timings": map[string]any{"restore_ms": milliseconds(took)}})
	return nil
}

// slotError tells what is wrong with a file from what is wrong with the server. The path stays here.
func (s *Server) slotError(err error) error {
	switch {
	case errors.Is(err, phd.ErrIO):
		s.log.Warn("a slot's file", "error", err)
		return badRequest("Unable to read or write the file of the slot")
	case errors.Is(err, phd.ErrFormat), errors.Is(err, phd.ErrInvalidArgument):
		s.log.Warn("a slot's file", "error", err)
		return badRequest("The file of the slot is none of this model, or damaged")
	}
	return err
}

// validFilename says whether a client may choose this name: a file of the folder, on any system, and not a hidden one.
func validFilename(name string) bool {
	if name == "" || len(name) > 255 || !utf8.ValidString(name) || strings.ContainsAny(name, `/\:*?"<>|`) ||
		strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".") || strings.TrimSpace(name) != name {
		return false
	}
	for _, r := range name {
		// Control characters, marks that change how the name reads, and letters that some system takes for a separator.
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || unicode.Is(unicode.Zl, r) || unicode.Is(unicode.Zp, r) ||
			r == '\uFF0E' || r == '\u2215' || r == '\u2216' || r == unicode.ReplacementChar {
			return false
		}
	}
	return filepath.IsLocal(name)
}
