package web

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

func get(t *testing.T, method string, headers map[string]string) *http.Response {
	t.Helper()
	r := httptest.NewRequest(method, "/", nil)
	for name, value := range headers {
		r.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	Handler().ServeHTTP(w, r)
	return w.Result()
}

func body(t *testing.T, r io.Reader) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestPlainAndGzippedAreTheSamePage(t *testing.T) {
	plain := get(t, "GET", nil)
	if plain.StatusCode != 200 || plain.Header.Get("Content-Encoding") != "" || body(t, plain.Body) != string(page) {
		t.Errorf("plain: %s, %v", plain.Status, plain.Header)
	}
	zipped := get(t, "GET", map[string]string{"Accept-Encoding": "br, gzip", "Range": "bytes=0-9"})
	if zipped.StatusCode != 200 || zipped.Header.Get("Content-Encoding") != "gzip" {
		t.Fatalf("gzipped: %s, %v", zipped.Status, zipped.Header)
	}
	z, err := gzip.NewReader(zipped.Body)
	if err != nil {
		t.Fatal(err)
	}
	if body(t, z) != string(page) {
		t.Error("the gzipped page is another one")
	}
	if plain.Header.Get("ETag") == zipped.Header.Get("ETag") {
		t.Error("different bytes have the same ETag")
	}
	for _, r := range []*http.Response{plain, zipped} {
		if r.Header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("Vary is %q", r.Header.Get("Vary"))
		}
	}
}

func TestAcceptsGzip(t *testing.T) {
	for header, want := range map[string]bool{
		"": false, "gzip": true, "GZip ; Q=0.5": true, "gzip;q=0": false, "gzip;q=0.000": false, "identity": false, "*": true,
		"*;q=0": false, "gzip;q=0, *": false, "br,gzip": true, "gzip;q=x": false, "xgzip": false, ";q=1": false,
	} {
		if got := acceptsGzip([]string{header}); got != want {
			t.Errorf("Accept-Encoding: %s: got %v", header, got)
		}
	}
}

func TestUnchangedPageIsNotSentAgain(t *testing.T) {
	for _, encoding := range []string{"", "gzip"} {
		etag := get(t, "GET", map[string]string{"Accept-Encoding": encoding}).Header.Get("ETag")
		again := get(t, "GET", map[string]string{"Accept-Encoding": encoding, "If-None-Match": `"other", ` + etag})
		if again.StatusCode != http.StatusNotModified || body(t, again.Body) != "" {
			t.Errorf("%s with the ETag: %s", encoding, again.Status)
		}
		changed := get(t, "GET", map[string]string{"Accept-Encoding": encoding, "If-None-Match": `"other"`})
		if changed.StatusCode != 200 {
			t.Errorf("%s with another ETag: %s", encoding, changed.Status)
		}
	}
}

func TestMethods(t *testing.T) {
	head := get(t, "HEAD", nil)
	if head.StatusCode != 200 || body(t, head.Body) != "" {
		t.Errorf("HEAD: %s", head.Status)
	}
	post := get(t, "POST", nil)
	if post.StatusCode != 405 || post.Header.Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: %s, Allow: %s", post.Status, post.Header.Get("Allow"))
	}
}

// What the policy forbids, the page must not contain; what it contains, the policy must allow.
func TestPolicyFitsThePage(t *testing.T) {
	policy := get(t, "GET", nil).Header.Get("Content-Security-Policy")
	elements := regexp.MustCompile(`(?s)<(script|style)[^>]*>(.*?)</(?:script|style)>`).FindAllStringSubmatch(string(page), -1)
	if len(elements) != 2 {
		t.Errorf("the page has %d scripts and styles, expected one of each", len(elements))
	}
	for _, element := range elements {
		sum := sha256.Sum256([]byte(element[2]))
		source := element[1] + "-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
		if !strings.Contains(policy, source) {
			t.Errorf("%s is not allowed by %s", source, policy)
		}
	}
	for _, forbidden := range []string{"unsafe", "http:", "https:", "*"} {
		if strings.Contains(policy, forbidden) {
			t.Errorf("the policy contains %q: %s", forbidden, policy)
		}
	}
	markup := regexp.MustCompile(`(?s)(<script[^>]*>).*?</script>`).ReplaceAllString(string(page), "$1")
	for _, pattern := range []string{`\son[a-z]+="`, `\sstyle="`, `\s(?:src|href)="(?:[a-z]*:)?//`, `(?i)javascript:`} {
		if found := regexp.MustCompile(pattern).FindString(markup); found != "" {
			t.Errorf("the page contains %q", found)
		}
	}
	for _, pattern := range []string{`\.(?:inner|outer)HTML\b`, `insertAdjacentHTML`, `document\.write`, `\beval\(`} {
		if found := regexp.MustCompile(pattern).FindString(string(page)); found != "" {
			t.Errorf("the script contains %q", found)
		}
	}
}

func TestSecurityHeaders(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		h := get(t, method, nil).Header
		for name, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
			"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
		} {
			if got := h.Get(name); got != want {
				t.Errorf("%s: %s is %q, expected %q", method, name, got, want)
			}
		}
		if h.Get("Permissions-Policy") == "" || !strings.Contains(h.Get("Content-Security-Policy"), "frame-ancestors 'none'") {
			t.Errorf("%s: %v", method, h)
		}
	}
}

func TestPageIsSmall(t *testing.T) {
	if len(page) > 64<<10 {
		t.Errorf("index.html has %d bytes, at most %d are allowed", len(page), 64<<10)
	}
}

func TestUnclosedElementIsRefused(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	contents("<style>a{}", "style")
}
