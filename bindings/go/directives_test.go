package phd

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Functions that may call back into Go.
var callingBack = []string{
	"phd_go_model_load", "phd_go_convert", "phd_go_log_set", "phd_go_session_create",
	"phd_prefill", "phd_step", "phd_decode", "phd_score", "phd_embed",
	"phd_speculator_create", "phd_speculator_draft", "phd_speculator_accept", "phd_speculator_step",
}

func TestDirectives(t *testing.T) {
	files, err := filepath.Glob("*.go")
	must(t, err)
	directives, err := os.ReadFile("directives.go")
	must(t, err)
	for _, file := range files {
		source, err := os.ReadFile(file)
		must(t, err)
		for _, m := range regexp.MustCompile(`\bC\.(phd_\w+)\(`).FindAllSubmatch(source, -1) {
			name := string(m[1])
			if name == "phd_status" { // a conversion
				continue
			}
			want := !slices.Contains(callingBack, name)
			for _, directive := range []string{"noescape", "nocallback"} {
				if got := strings.Contains(string(directives), "#cgo "+directive+" "+name+"\n"); got != want {
					t.Errorf("%s calls %s; #cgo %s is %v, expected %v", file, name, directive, got, want)
				}
			}
		}
	}
}
