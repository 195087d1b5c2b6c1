package phd

// #include "shim.h"
import "C"

import (
	"context"
	"encoding/json"
	"errors"
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
	Architecture string // the family, by the checkpoint's name for it, such as "llama"
	Name         string // what a GGUF file calls its model; may be empty
	WeightType   string // the type that most parameters are stored in, such as "Q4_1"
	Backend      string // what computes: the backend and its variant

	NVocab    int // tokens of the vocabulary
	NLayers   int
	NEmbd     int // width of the residual stream, and of embeddings
	NCtxTrain int // positions that the model was trained for
	NHeads    int
	NKVHeads  int // heads of keys and values
	HeadDim   int // elements of a head
	NFF       int // width of the feed-forward layers

	NParams uint64 // parameters in the checkpoint's tensors
	NBytes  uint64 // bytes of the checkpoint's tensors, as it stores them

	HasTokenizer bool // false for a checkpoint of token ids only

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
	name, err := cPath("path", path)
	if err != nil {
		return nil, err
	}
	defer C.free(unsafe.Pointer(name))

	var ptr *C.phd_model
	err = callWithProgress(ctx, o.Progress, func(handle C.uintptr_t, e **C.phd_error) cStatus {
		return C.phd_go_model_load(name, &params, handle, &ptr, e)
	})
	if err != nil {
		return nil, err
	}
	info, err := describe(ptr)
	if err != nil {
		C.phd_model_free(ptr)
		return nil, err
	}
	m := &Model{ptr: ptr, info: info}
	liveModels.Add(1)
	m.cleanup = runtime.AddCleanup(m, freeModel, ptr)
	return m, nil
}

// describe asks C for all that Info returns.
func describe(ptr *C.phd_model) (ModelInfo, error) {
	var e *C.phd_error
	desc := C.phd_model_desc{struct_size: C.sizeof_phd_model_desc}
	if err := check(C.phd_model_info(ptr, &desc, &e), e); err != nil {
		return ModelInfo{}, err
	}
	info := ModelInfo{
		NVocab:       int(desc.n_vocab),
		NLayers:      int(desc.n_layers),
		NEmbd:        int(desc.n_embd),
		NCtxTrain:    int(desc.n_ctx_train),
		NHeads:       int(desc.n_heads),
		NKVHeads:     int(desc.n_kv_heads),
		HeadDim:      int(desc.head_dim),
		NFF:          int(desc.n_ff),
		NParams:      uint64(desc.n_params),
		NBytes:       uint64(desc.weights_bytes),
		HasTokenizer: desc.has_tokenizer != 0,
		Copies:       int(desc.copies),
		Window:       int(desc.window),
		Chunk:        int(desc.chunk),
	}
	for kind, to := range map[C.uint32_t]*string{
		C.PHD_MODEL_ARCHITECTURE: &info.Architecture,
		C.PHD_MODEL_NAME:         &info.Name,
		C.PHD_MODEL_WEIGHT_TYPE:  &info.WeightType,
		C.PHD_MODEL_BACKEND:      &info.Backend,
	} {
		text, err := fill(64, func(buffer []byte, n *C.size_t, e **C.phd_error) cStatus {
			chars, capacity := cChars(buffer)
			return C.phd_model_string(ptr, kind, chars, capacity, n, e)
		})
		if err != nil {
			return ModelInfo{}, err
		}
		*to = string(text)
	}
	return info, nil
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
	ptr := m.ptr
	maybeGC()
	return ptr, nil
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

// SpecialKind is what a token is for.
type SpecialKind uint32

// The roles of special tokens. FIM is filling in the middle.
const (
	SpecialBOS          SpecialKind = C.PHD_SPECIAL_BOS           // begins a text
	SpecialEOS          SpecialKind = C.PHD_SPECIAL_EOS           // ends a text
	SpecialEOT          SpecialKind = C.PHD_SPECIAL_EOT           // ends a turn of a conversation
	SpecialUNK          SpecialKind = C.PHD_SPECIAL_UNK           // stands for what the vocabulary cannot spell
	SpecialPAD          SpecialKind = C.PHD_SPECIAL_PAD           // fills up batches
	SpecialFIMPrefix    SpecialKind = C.PHD_SPECIAL_FIM_PREFIX    // before what stands before the gap
	SpecialFIMSuffix    SpecialKind = C.PHD_SPECIAL_FIM_SUFFIX    // before what stands behind the gap
	SpecialFIMMiddle    SpecialKind = C.PHD_SPECIAL_FIM_MIDDLE    // where the model begins to fill the gap
	SpecialFIMPad       SpecialKind = C.PHD_SPECIAL_FIM_PAD       // fills up
	SpecialFIMRepo      SpecialKind = C.PHD_SPECIAL_FIM_REPO      // before the name of a repository
	SpecialFIMSeparator SpecialKind = C.PHD_SPECIAL_FIM_SEPARATOR // between files of a repository
)

// SpecialToken returns the token of a role, and whether the vocabulary has one: as the checkpoint's files say, and where
// they say nothing by well-known spellings. After Close there are none.
func (m *Model) SpecialToken(kind SpecialKind) (Token, bool) {
	ptr, err := m.enter()
	if err != nil {
		return -1, false
	}
	defer m.gate.leave()
	token := C.int32_t(-1)
	if C.phd_special_token(ptr, C.uint32_t(kind), &token, nil) != C.PHD_OK {
		return -1, false
	}
	return Token(token), token >= 0
}

// ChatTemplate returns the Jinja source of the model's chat template of that name, "" for the default one, and whether
// there is one.
func (m *Model) ChatTemplate(name string) (source string, ok bool, err error) {
	ptr, err := m.enter()
	if err != nil {
		return "", false, err
	}
	defer m.gate.leave()
	chars, length := cString(name)
	text, err := fill(4096, func(buffer []byte, n *C.size_t, e **C.phd_error) cStatus {
		to, capacity := cChars(buffer)
		return C.phd_chat_template(ptr, chars, length, to, capacity, n, e)
	})
	if errors.Is(err, ErrUnsupported) {
		return "", false, nil
	}
	return string(text), err == nil, err
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
