// Package web holds the page that phd-server shows: one embedded file with its script and its style, and nothing from elsewhere.
package web

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

//go:embed index.html
var page []byte

// A rendering is the page in the forms in which it is sent.
type rendering struct {
	gzipped []byte
	etag    string // without quotes; the gzipped form's has a suffix, as the bytes differ
	policy  string
}

var rendered = sync.OnceValue(func() rendering { return render(page) })

// Handler returns a handler that answers GET and HEAD with the page, whatever the path is, and refuses other methods. Its
// content security policy allows the page's own script and style by their hashes, and requests to the page's own origin.
func Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := rendered()
		h := w.Header()
		h.Set("Content-Security-Policy", p.policy)
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "method not allowed: the page answers GET and HEAD", http.StatusMethodNotAllowed)
			return
		}
		h.Set("Content-Type", "text/html; charset=utf-8")
		// The page changes with the server's version only: browsers keep it and ask each time whether it is still the same.
		h.Set("Cache-Control", "no-cache")
		h.Set("Vary", "Accept-Encoding")
		body, etag := page, p.etag
		if acceptsGzip(r.Header.Values("Accept-Encoding")) {
			body, etag = p.gzipped, p.etag+"-gzip"
			h.Set("Content-Encoding", "gzip")
			r = withoutRange(r)
		}
		h.Set("ETag", `"`+etag+`"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	})
}

func render(page []byte) rendering {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		panic(err) // the level is a constant
	}
	z.Write(page) // a buffer does not fail
	z.Close()
	sum := sha256.Sum256(page)
	return rendering{
		gzipped: b.Bytes(),
		etag:    hex.EncodeToString(sum[:16]),
		policy: strings.Join([]string{
			"default-src 'none'",
			"script-src " + sources(page, "script"),
			"style-src " + sources(page, "style"),
			"connect-src 'self'",
			"img-src data:",
			"base-uri 'none'",
			"form-action 'none'",
			"frame-ancestors 'none'",
			"require-trusted-types-for 'script'",
			"trusted-types 'none'",
		}, "; "),
	}
}

// sources lists the hashes of all elements of that name in the page, as a policy names them.
func sources(page []byte, element string) string {
	var list []string
	for _, content := range contents(string(page), element) {
		sum := sha256.Sum256([]byte(content))
		list = append(list, "'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'")
	}
	if len(list) == 0 {
		return "'none'"
	}
	return strings.Join(list, " ")
}

// contents returns what stands between the tags of each such element. The page is our own: tags are lower case and
// attributes do not contain ">".
func contents(page, element string) []string {
	var list []string
	for {
		_, after, found := strings.Cut(page, "<"+element)
		if !found {
			return list
		}
		_, after, _ = strings.Cut(after, ">")
		content, rest, found := strings.Cut(after, "</"+element+">")
		if !found {
			panic(fmt.Sprintf("web: index.html: <%s> without its end", element))
		}
		list = append(list, content)
		page = rest
	}
}

// acceptsGzip reads Accept-Encoding as RFC 9110, 12.5.3 has it: the coding's own weight counts, else that of "*".
func acceptsGzip(headers []string) bool {
	weights := map[string]float64{}
	for _, item := range strings.Split(strings.Join(headers, ","), ",") {
		coding, parameters, _ := strings.Cut(item, ";")
		weight := 1.0
		if name, value, found := strings.Cut(parameters, "="); found && strings.EqualFold(strings.TrimSpace(name), "q") {
			q, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				q = 0
			}
			weight = q
		}
		weights[strings.ToLower(strings.TrimSpace(coding))] = weight
	}
	if q, named := weights["gzip"]; named {
		return q > 0
	}
	return weights["*"] > 0
}

// withoutRange is the request without its Range: ranges of compressed bytes are of no use to anybody.
func withoutRange(r *http.Request) *http.Request {
	if r.Header.Get("Range") == "" {
		return r
	}
	r = r.Clone(r.Context())
	r.Header.Del("Range")
	return r
}
