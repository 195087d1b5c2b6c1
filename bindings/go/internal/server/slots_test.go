package server

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSlots(t *testing.T) {
	ts := open(t, shifting)
	_, value := ts.call("GET", "/slots", nil)
	slots := value.([]any)
	first := slots[0].(object)
	if len(slots) != 4 || first["n_ctx"] != 256.0 || first["is_processing"] != false || first["params"] != nil {
		t.Errorf("slots of a new server: %v", value)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ts.begin(ctx, "/completion", endless(object{"id_slot": 1, "temperature": 0.5}))
	_, value = ts.call("GET", "/slots?fail_on_no_slot=1", nil)
	busy := value.([]any)[1].(object)
	next := busy["next_token"].([]any)[0].(object)
	params := busy["params"].(object)
	if busy["is_processing"] != true || next["n_remain"] != -1.0 || params["temperature"] != 0.5 || params["stop"] != nil {
		t.Errorf("a busy slot: %v", busy)
	}
	if text := fmt.Sprint(value); strings.Contains(text, "heaven") {
		t.Errorf("/slots shows the prompt: %s", text)
	}
	cancel()
	ts.quiet()
	_, value = ts.call("GET", "/slots", nil)
	for _, slot := range value.([]any) {
		if s := slot.(object); s["is_processing"] != false {
			t.Errorf("a slot of an idle server: %v", s)
		} else if next, ok := s["next_token"].([]any); ok && next[0].(object)["n_remain"] != -1.0 {
			t.Errorf("what is left over: %v", next)
		}
	}
	without := open(t, func(o *Options) { o.EndpointSlots = false })
	without.refuses("GET", "/slots", nil, 501, typeNotSupported, "--slots")
}

func TestSlotFiles(t *testing.T) {
	folder := t.TempDir()
	ts := open(t, func(o *Options) { o.SlotSavePath = folder })
	request := object{"prompt": genesis, "n_predict": 8, "temperature": 0, "id_slot": 1}
	answer := ts.post("/completion", request)
	saved := ts.post("/slots/1?action=save", object{"filename": "one.bin"})
	info, err := os.Stat(filepath.Join(folder, "one.bin"))
	if err != nil {
		t.Fatal(err)
	}
	n := answer["tokens_evaluated"].(float64) + 7
	if saved["n_saved"] != n || saved["n_written"] != float64(info.Size()) || saved["id_slot"] != 1.0 || saved["filename"] != "one.bin" ||
		saved["timings"].(object)["save_ms"].(float64) < 0 {
		t.Errorf("saved: %v, expected %v positions in %d bytes", saved, n, info.Size())
	}
	if erased := ts.post("/slots/1?action=erase", nil); erased["n_erased"] != n {
		t.Errorf("erased: %v", erased)
	}
	again := ts.post("/completion", request)["timings"].(object)
	if again["cache_n"] != 0.0 {
		t.Errorf("after erasing: %v", again)
	}

	// Another server, so that nothing else has the text.
	other := open(t, func(o *Options) { o.SlotSavePath = folder })
	restored := other.post("/slots/0?action=restore", object{"filename": "one.bin"})
	if restored["n_restored"] != n || restored["n_read"] != float64(info.Size()) {
		t.Errorf("restored: %v", restored)
	}
	request["id_slot"] = 0
	answer2 := other.post("/completion", request)
	if timings := answer2["timings"].(object); timings["prompt_n"] != 1.0 || answer2["content"] != answer["content"] {
		t.Errorf("after restoring: %v, %q, expected %q", timings, answer2["content"], answer["content"])
	}

	if err := os.WriteFile(filepath.Join(folder, "damaged.bin"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(folder), "outside.bin"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	for filename, message := range map[any]string{
		"missing.bin": "Unable to read", "damaged.bin": "damaged", "": "plain name", "../outside.bin": "plain name", "a/b": "plain name",
		`a\b`: "plain name", ".": "plain name", "..": "plain name", ".hidden": "plain name", "/etc/passwd": "plain name", "a\x00b": "plain name",
		"a\nb": "plain name", "a ": "plain name", "a.": "plain name", "c:a": "plain name", strings.Repeat("x", 256): "plain name", 5: "Field 'filename'",
		"a\u202eb": "plain name", "\u2215a": "plain name",
	} {
		ts.refuses("POST", "/slots/0?action=restore", object{"filename": filename}, 400, typeInvalidRequest, message)
		if s, ok := filename.(string); ok && message == "plain name" {
			ts.refuses("POST", "/slots/0?action=save", object{"filename": s}, 400, typeInvalidRequest, message)
		}
	}
	for _, path := range []string{"/slots/4?action=erase", "/slots/-1?action=erase", "/slots/x?action=save", "/slots/99999999999999999999?action=save"} {
		ts.refuses("POST", path, object{"filename": "a"}, 400, typeInvalidRequest, "Invalid slot ID")
	}
	ts.refuses("POST", "/slots/0?action=burn", object{}, 400, typeInvalidRequest, "Invalid action")
	ts.refuses("POST", "/slots/0", object{}, 400, typeInvalidRequest, "Invalid action")
	without := open(t, nil)
	without.refuses("POST", "/slots/0?action=save", object{"filename": "a"}, 501, typeNotSupported, "--slot-save-path")
}
