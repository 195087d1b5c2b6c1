// Package phd runs hidden-decoding language models (PHD-Transformer, PHD-SWA, PHD-CSWA) and plain Llama-like ones. It
// is a thin layer over libphd's C API.
//
// A [Model] is weights and a tokenizer; it is immutable and shared. A [Session] is a fixed-size cache and the sequences
// in it. A [Sequence] is a text: tokens, their cached keys and values, and the logits of its last position. A [Sampler]
// turns logits into tokens, a [Stream] tokens into text.
//
//	model, err := phd.LoadModel(ctx, path, nil)
//	...
//	defer model.Close()
//	session, err := model.NewSession(nil)
//	...
//	defer session.Close()
//	tokens, err := model.Tokenize("In the beginning", true, false)
//	...
//	seq := session.Sequence(0)
//	err = seq.Prefill(ctx, tokens)
//
// # Contexts
//
// The end of a context stops what runs: a load between two tensors, a prefill or a step within a fraction of a
// millisecond on the CPU. The error is then both [ErrCancelled] and the context's own, by [errors.Is]. A call that was
// cancelled has changed nothing. A call whose context ended too late to matter succeeds; it never cancels another call.
//
// # Lifetimes
//
// Close frees an object at once. It may be called more than once and from any goroutine; it waits for calls that run on
// the object, and later ones return [ErrClosed]. An object that is not reachable any more is freed by the garbage
// collector, some time. Objects may be closed in any order: C keeps what it needs, so a session outlives its model's
// Close. Only objects that [Session.Sequence] returns have no Close: they belong to their session.
//
// # Concurrency
//
// All types may be used by several goroutines. Calls that change one session run one after another, and calls on one
// Sampler, Stream or Speculator do, too. [Session.Stats], [Sequence.Cancel] and [Sequence.CancelClear] never wait.
//
// # Building
//
// By default the package finds libphd with pkg-config. With the build tag phd_vendored it links the static library that
// scripts/vendor.sh has put into its folder. See the README.
package phd
