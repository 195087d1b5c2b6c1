package phd

// #include "shim.h"
// #cgo noescape phd_model_params_init
// #cgo nocallback phd_model_params_init
// #cgo noescape phd_go_model_load
// #cgo noescape phd_model_info
// #cgo nocallback phd_model_info
// #cgo noescape phd_model_free
// #cgo nocallback phd_model_free
// #cgo noescape phd_tokenize
// #cgo nocallback phd_tokenize
// #cgo noescape phd_detokenize
// #cgo nocallback phd_detokenize
// #cgo noescape phd_token_bytes
// #cgo nocallback phd_token_bytes
// #cgo noescape phd_token_is_end
// #cgo nocallback phd_token_is_end
// #cgo noescape phd_go_chat_render
// #cgo nocallback phd_go_chat_render
import "C"

import (
	"context"
	"encoding/json"
	"math"
	"runtime"
	"strings"
	"time"
	"unsafe"
)

// A Token is a token's number in the vocabulary.
type Token = int32

// Backend is what computes.
type Backend uint32

// The backends.
const (
	BackendAuto      Backend = C.PHD_BACKEND_AUTO // the best there is
	BackendCPU       Backend = C.PHD_BACKEND_CPU
	BackendCUDA      Backend = C.PHD_BACKEND_CUDA
	BackendReference Backend = C.PHD_BACKEND_REFERENCE // plain f32 on one thread: slow, and what others are compared with
)

// ModelOptions says how a model is loaded. The zero value is the default.
type ModelOptions struct {
	Backend Backend
	Device  int // number of the device, for BackendCUDA

	// Progress, if not nil, is told the fraction done, 0 to 1. Returning false cancels the load.
	Progress func(fraction float32) bool

	// Instead of the checkpoint's own hidden decoding; Copies 0: as the checkpoint says.
	Copies, Window, Chunk int

	// NoMmap reads files whole instead of mapping them. A mapped file must not be truncated while the model lives.
	NoMmap bool
}

// ModelInfo describes a model.
type ModelInfo struct {
	NVocab    int // tokens of the vocabulary
	NLayers   int
	NEmbd     int // width of the residual stream, and of embeddings
	NCtxTrain int // positions that the model was trained for

	Copies int // K: how often each token is read
	Window int // W, in hidden tokens; 0: none
	Chunk  int // C, in positions; 0: none
}

// A Model is weights and a tokenizer: immutable, shared by any number of sessions and goroutines.
type Model struct {
	gate    gate
	ptr     *C.phd_model // only within the gate: see enter
	info    ModelInfo
	cleanup runtime.Cleanup
}

// LoadModel loads a Hub folder or a GGUF file. The end of ctx cancels the load.
func LoadModel(ctx context.Context, path string, o *ModelOptions) (*Model, error) {
	if o == nil {
		o = new(ModelOptions)
	}
	if err := ctx.Err(); err != nil {
		return nil, contextError(ctx)
	}
	var params C.phd_model_params
	C.phd_model_params_init(&params, C.sizeof_phd_model_params)
	if o.Device < math.MinInt32 || o.Device > math.MaxInt32 {
		return nil, invalid("Device is %d, expected the number of a device", o.Device)
	}
	var u u32s
	params.backend = C.uint32_t(o.Backend)
	params.device = C.int32_t(o.Device)
	params.copies = u.of("Copies", o.Copies)
	params.window = u.of("Window", o.Window)
	params.chunk = u.of("Chunk", o.Chunk)
	params.no_mmap = cFlag(o.NoMmap)
	if u.err != nil {
		return nil, u.err
	}
	cPath, err := cPath("path", path)
	if err != nil {
		return nil, err
	}
	defer C.free(unsafe.Pointer(cPath))

	var ptr *C.phd_model
	var e *C.phd_error
	var status cStatus
	callWithProgress(ctx, o.Progress, func(handle C.uintptr_t) {
		status = C.phd_go_model_load(cPath, &params, handle, &ptr, &e)
	})
	if err := checkContext(ctx, status, e); err != nil {
		return nil, err
	}
	desc := C.phd_model_desc{struct_size: C.sizeof_phd_model_desc}
	if err := check(C.phd_model_info(ptr, &desc, &e), e); err != nil {
		C.phd_model_free(ptr)
		return nil, err
	}
	m := &Model{ptr: ptr, info: ModelInfo{
		NVocab:    int(desc.n_vocab),
		NLayers:   int(desc.n_layers),
		NEmbd:     int(desc.n_embd),
		NCtxTrain: int(desc.n_ctx_train),
		Copies:    int(desc.copies),
		Window:    int(desc.window),
		Chunk:     int(desc.chunk),
	}}
	liveModels.Add(1)
	m.cleanup = runtime.AddCleanup(m, freeModel, ptr)
	return m, nil
}

func freeModel(ptr *C.phd_model) {
	C.phd_model_free(ptr)
	liveModels.Add(-1)
}

// Close frees the model. Sessions, samplers and streams made of it go on working.
func (m *Model) Close() error {
	m.gate.close(func() {
		m.cleanup.Stop()
		freeModel(m.ptr)
		m.ptr = nil
	})
	return nil
}

// enter returns the model for C; then m.gate.leave must follow.
func (m *Model) enter() (*C.phd_model, error) {
	if !m.gate.enter() {
		return nil, ErrClosed
	}
	return m.ptr, nil
}

// Info describes the model.
func (m *Model) Info() ModelInfo { return m.info }

// Tokenize returns the tokens of text, which is UTF-8. With addSpecial it adds the special tokens that the model expects
// around a text; with parseSpecial it takes the spelling of a special token for that token.
func (m *Model) Tokenize(text string, addSpecial, parseSpecial bool) ([]Token, error) {
	ptr, err := m.enter()
	if err != nil {
		return nil, err
	}
	defer m.gate.leave()
	var flags C.uint32_t
	if addSpecial {
		flags |= C.PHD_TOKENIZE_ADD_SPECIAL
	}
	if parseSpecial {
		flags |= C.PHD_TOKENIZE_PARSE_SPECIAL
	}
	chars, length := cString(text)
	return fill(len(text)/3+16, func(buffer []Token, n *C.size_t, e **C.phd_error) cStatus {
		to, capacity := cTokens(buffer)
		return C.phd_tokenize(ptr, chars, length, flags, to, capacity, n, e)
	})
}

// Detokenize returns the text of tokens. It may end within a character, which is why it is not a string: see [Stream].
// Control tokens have no text.
func (m *Model) Detokenize(tokens []Token) ([]byte, error) {
	ptr, err := m.enter()
	if err != nil {
		return nil, err
	}
	defer m.gate.leave()
	from, count := cTokens(tokens)
	return fill(6*len(tokens)+16, func(buffer []byte, n *C.size_t, e **C.phd_error) cStatus {
		to, capacity := cChars(buffer)
		return C.phd_detokenize(ptr, from, count, to, capacity, n, e)
	})
}

// TokenBytes returns the bytes of one token, which may be part of a character. Control tokens have none, or with special
// their spelling.
func (m *Model) TokenBytes(t Token, special bool) ([]byte, error) {
	ptr, err := m.enter()
	if err != nil {
		return nil, err
	}
	defer m.gate.leave()
	return fill(32, func(buffer []byte, n *C.size_t, e **C.phd_error) cStatus {
		to, capacity := cBytes(buffer)
		return C.phd_token_bytes(ptr, C.int32_t(t), C.bool(special), to, capacity, n, e)
	})
}

// IsEnd reports whether generation ends with t: end of text, of turn, of message. It is false for a number outside the
// vocabulary, and after Close.
func (m *Model) IsEnd(t Token) bool {
	ptr, err := m.enter()
	if err != nil {
		return false
	}
	defer m.gate.leave()
	var isEnd C.bool
	return C.phd_token_is_end(ptr, C.int32_t(t), &isEnd, nil) == C.PHD_OK && bool(isEnd)
}

// ChatOptions is a conversation to render.
type ChatOptions struct {
	Messages  json.RawMessage // a list of objects, usually with role and content
	Tools     json.RawMessage // a list of objects that describe functions; may be nil, as the following
	Documents json.RawMessage // a list of objects with title and text
	Variables json.RawMessage // an object: variables of the template's own, such as {"enable_thinking": false}

	Template string // Jinja source instead of the model's template
	Name     string // which of the model's templates; "": "tool_use" if there is one and Tools are given, else "default"

	Now                 time.Time // what the template takes for the time on the wall; zero: now, in UTC
	AddGenerationPrompt bool      // end the text with the beginning of the model's turn
}

// RenderChat returns the text that a conversation is for the model: what transformers' apply_chat_template makes of it.
// The template writes the begin token itself, so tokenize with parseSpecial and without addSpecial.
func (m *Model) RenderChat(o ChatOptions) (string, error) {
	ptr, err := m.enter()
	if err != nil {
		return "", err
	}
	defer m.gate.leave()
	var now C.int64_t
	if !o.Now.IsZero() {
		_, offset := o.Now.Zone()
		if now = C.int64_t(o.Now.Unix()) + C.int64_t(offset); now == 0 {
			now = 1 // for C, 0 is now
		}
	}
	messages, messagesLen := cChars(o.Messages)
	tools, toolsLen := cChars(o.Tools)
	documents, documentsLen := cChars(o.Documents)
	variables, variablesLen := cChars(o.Variables)
	source, sourceLen := cString(o.Template)
	name, nameLen := cString(o.Name)
	guess := 1024 + 2*(len(o.Messages)+len(o.Tools)+len(o.Documents))
	text, err := fill(guess, func(buffer []byte, n *C.size_t, e **C.phd_error) cStatus {
		to, capacity := cChars(buffer)
		return C.phd_go_chat_render(ptr, messages, messagesLen, tools, toolsLen, documents, documentsLen,
			variables, variablesLen, source, sourceLen, name, nameLen, now, C.bool(o.AddGenerationPrompt),
			to, capacity, n, e)
	})
	return string(text), err
}

// cPath copies a path for C, to be freed. C's end with NUL, so one within is refused.
func cPath(name, path string) (*C.char, error) {
	if strings.IndexByte(path, 0) >= 0 {
		return nil, invalid("%s %q contains a NUL", name, path)
	}
	return C.CString(path), nil
}

func cFlag(b bool) C.uint32_t {
	if b {
		return 1
	}
	return 0
}
