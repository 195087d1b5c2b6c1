package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A running server is one that Run runs, found by what it logs.
type running struct {
	*testServer
	stop    context.CancelFunc
	ended   chan error
	address string
}

// addresses is a log handler that passes on where a server listens.
type addresses struct {
	slog.Handler
	found chan string
}

func (a addresses) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "listening" {
		r.Attrs(func(attr slog.Attr) bool {
			a.found <- attr.Value.String()
			return true
		})
	}
	return nil
}

func (a addresses) Enabled(context.Context, slog.Level) bool { return true }

// start runs a server with the small model and waits until it has loaded.
func start(t *testing.T, change func(*Options)) *running {
	t.Helper()
	opts := DefaultOptions()
	opts.ModelPath = modelPath
	opts.Context, opts.Slots, opts.Threads = 1024, 4, 2
	opts.ContextShift = true
	opts.Port = 0
	found := make(chan string, 10)
	opts.Logger = slog.New(addresses{slog.DiscardHandler, found})
	if change != nil {
		change(&opts)
	}
	if err := opts.Validate(); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	client := &http.Client{Transport: &http.Transport{}}
	r := &running{testServer: &testServer{Server: New(opts), client: client, t: t}, stop: stop, ended: make(chan error, 1)}
	go func() { r.ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		client.CloseIdleConnections()
		stop()
		if err := r.wait(); err != nil {
			t.Error(err)
		}
	})
	select {
	case r.address = <-found:
	case err := <-r.ended:
		r.ended <- err
		t.Fatalf("the server ended: %v", err)
	}
	r.url = r.address
	for r.loaded() == nil {
		select {
		case err := <-r.ended:
			r.ended <- err
			t.Fatalf("the server ended: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	return r
}

// wait returns what Run has returned.
func (r *running) wait() error {
	err := <-r.ended
	r.ended <- err
	return err
}

func TestDrain(t *testing.T) {
	r := start(t, nil)
	stream := r.openStream(context.Background(), "/completion", object{"prompt": genesis, "n_predict": 200, "stream": true, "ignore_eos": true})
	stream.next()
	r.stop()
	n := 1
	var last object
	for {
		event, ok := stream.next()
		if !ok {
			break
		}
		last = event.(object)
		n++
	}
	if last["stop"] != true || last["tokens_predicted"] != 200.0 {
		t.Errorf("what ran when the server was told to stop ended with %v", last)
	}
	if err := r.wait(); err != nil {
		t.Error(err)
	}
	if connection, err := net.Dial("tcp", strings.TrimPrefix(r.address, "http://")); err == nil {
		connection.Close()
		t.Error("the server still listens")
	}
}

func TestDrainTimeout(t *testing.T) {
	r := start(t, func(o *Options) { o.DrainTimeout = 50 * time.Millisecond })
	stream := r.begin(context.Background(), "/completion", endless(nil))
	r.stop()
	var last object
	for {
		event, ok := stream.next()
		if !ok {
			break
		}
		last = event.(object)
	}
	if fields, ok := last["error"].(object); !ok || fields["type"] != typeUnavailable {
		t.Errorf("the stream ended with %v", last)
	}
	if err := r.wait(); err != nil {
		t.Error(err)
	}
}

func TestStopWhileLoading(t *testing.T) {
	opts := DefaultOptions()
	opts.ModelPath = modelPath
	opts.Port = 0
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := New(opts).Run(ctx); err != nil {
		t.Error(err)
	}
	opts.ModelPath = t.TempDir()
	if err := New(opts).Run(context.Background()); err == nil {
		t.Error("a server without a model runs")
	}
}

func TestPortIsTaken(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	opts := DefaultOptions()
	opts.ModelPath = modelPath
	opts.Port = listener.Addr().(*net.TCPAddr).Port
	if err := New(opts).Run(context.Background()); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("%v", err)
	}
}

func TestUnixSocket(t *testing.T) {
	folder, err := os.MkdirTemp("", "phd") // t.TempDir's paths may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(folder)
	path := filepath.Join(folder, "server.sock")
	// A socket that a killed server has left.
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	old.Close()

	r := start(t, func(o *Options) { o.Hosts = []string{path} })
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	response, err := client.Get("http://server/health")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	client.CloseIdleConnections()
	if response.StatusCode != http.StatusOK || r.address != path {
		t.Errorf("%d at %s", response.StatusCode, r.address)
	}
	opts := r.opts
	if err := New(opts).Run(context.Background()); err == nil {
		t.Error("two servers listen at one socket")
	}
	file := filepath.Join(folder, "file.sock")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	opts.Hosts = []string{file}
	if err := New(opts).Run(context.Background()); err == nil {
		t.Error("a file was replaced by a socket")
	}
}

func TestSeveralAddresses(t *testing.T) {
	probe, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Logf("no IPv6 here: %v", err)
		return
	}
	port := probe.Addr().(*net.TCPAddr).Port
	probe.Close()
	r := start(t, func(o *Options) { o.Hosts, o.Port = []string{"127.0.0.1", "::1"}, port })
	for _, host := range []string{"127.0.0.1", "::1"} {
		r.url = "http://" + net.JoinHostPort(host, big.NewInt(int64(port)).String())
		if status, _ := r.call("GET", "/health", nil); status != http.StatusOK {
			t.Errorf("%s: %d", host, status)
		}
	}
}

func TestTLS(t *testing.T) {
	folder := t.TempDir()
	cert, key := filepath.Join(folder, "cert.pem"), filepath.Join(folder, "key.pem")
	pool := writeCertificate(t, cert, key)
	r := start(t, func(o *Options) { o.TLSCert, o.TLSKey = cert, key })
	if !strings.HasPrefix(r.address, "https://") {
		t.Errorf("the address is %s", r.address)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	response, err := client.Post(r.address+"/completion", "application/json", strings.NewReader(`{"prompt":"a","n_predict":3,"stream":true}`))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil || !strings.Contains(string(text), `"stop":true`) || response.ProtoMajor != 2 {
		t.Errorf("%s: %s: %v", response.Proto, text, err)
	}
	old := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MaxVersion: tls.VersionTLS11}}}
	if response, err := old.Get(r.address + "/health"); err == nil {
		response.Body.Close()
		t.Error("TLS 1.1 is accepted")
	}

	opts := r.opts
	opts.Port, opts.TLSKey = 0, cert
	if err := New(opts).Run(context.Background()); err == nil || !strings.Contains(err.Error(), "--ssl-cert-file") {
		t.Errorf("a key that is none: %v", err)
	}
}

func writeCertificate(t *testing.T, certPath, keyPath string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for path, data := range map[string][]byte{certPath: certPEM, keyPath: pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return pool
}

func TestMaxConnections(t *testing.T) {
	r := start(t, func(o *Options) { o.MaxConnections = 1 })
	stream := r.begin(context.Background(), "/completion", endless(nil))
	// The second connection is made by the system, and served when the first has gone.
	second := make(chan int, 1)
	go func() {
		response, err := (&http.Client{Transport: &http.Transport{}}).Get(r.address + "/health")
		if err != nil {
			second <- 0
			return
		}
		response.Body.Close()
		second <- response.StatusCode
	}()
	for range 100 {
		stream.next()
	}
	select {
	case status := <-second:
		t.Errorf("two connections at once: %d", status)
	default:
	}
	stream.response.Body.Close()
	if status := <-second; status != http.StatusOK {
		t.Errorf("after the first connection: %d", status)
	}
}

func TestDefaultContext(t *testing.T) {
	r := start(t, func(o *Options) {
		o.Context, o.Slots, o.ContextShift = 0, 0, false
		o.Defaults = map[string]json.RawMessage{"n_predict": json.RawMessage("3")}
	})
	l := r.loaded()
	if l.engine.NSlots() != 4 || l.engine.Context() != 2048 || l.engine.SlotContext() != 2048 {
		t.Errorf("%d slots of %d in %d", l.engine.NSlots(), l.engine.SlotContext(), l.engine.Context())
	}
	if answer := r.post("/completion", object{"prompt": genesis, "ignore_eos": true}); answer["tokens_predicted"] != 3.0 {
		t.Errorf("%v", answer)
	}
}
