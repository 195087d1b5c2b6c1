/* libphd: the embeddable runtime for hidden-decoding language models.
 *
 * Generated from src/ffi by cbindgen; do not edit.
 *
 * Conventions: every fallible function returns a phd_status and takes a last argument `phd_error **error`, which may be
 * null; a failed call changes nothing. Inputs come first, outputs last; outputs are written only on success (but for the
 * size that a too small buffer would need). Text is UTF-8 by length. A model may be shared by any number of threads. What the
 * arguments of a call point to must not change while it runs.
 */

#ifndef PHD_H
#define PHD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 Weights that are quantized already may be quantized once more.
 */
#define PHD_CONVERT_REQUANTIZE 1

/*
 No finer type for the output layer.
 */
#define PHD_CONVERT_PURE 2

/*
 Leave the logits of the entry's last position.
 */
#define PHD_ENTRY_LOGITS 1

/*
 Leave the logits of all of the entry's positions: see phd_logits_at.
 */
#define PHD_ENTRY_LOGITS_ALL 2

/*
 Flags of phd_tokenize: add the special tokens that the model expects around a text.
 */
#define PHD_TOKENIZE_ADD_SPECIAL 1

/*
 Flags of phd_tokenize: take the spelling of a special token in the text for that token.
 */
#define PHD_TOKENIZE_PARSE_SPECIAL 2

/*
 Values never change meaning; new ones are added at the end.
 */
typedef enum phd_status {
  PHD_OK = 0,
  PHD_ERROR_INVALID_ARGUMENT,
  PHD_ERROR_IO,
  PHD_ERROR_FORMAT,
  PHD_ERROR_UNSUPPORTED,
  PHD_ERROR_OUT_OF_MEMORY,
  PHD_ERROR_CACHE_FULL,
  PHD_ERROR_BACKEND,
  PHD_ERROR_CANCELLED,
  PHD_ERROR_BUFFER_TOO_SMALL,
  PHD_ERROR_INTERNAL,
} phd_status;

/*
 What computes.
 */
typedef enum phd_backend {
  /*
   The best there is.
   */
  PHD_BACKEND_AUTO = 0,
  PHD_BACKEND_CPU,
  PHD_BACKEND_CUDA,
  /*
   Plain f32 on one thread: slow, and what the others are compared with.
   */
  PHD_BACKEND_REFERENCE,
} phd_backend;

/*
 Element type of cached keys and values.
 */
typedef enum phd_cache_type {
  PHD_CACHE_F32 = 0,
  PHD_CACHE_F16,
  PHD_CACHE_Q8_0,
  /*
   Not f16's precision, but the range of f32.
   */
  PHD_CACHE_BF16,
} phd_cache_type;

/*
 A text that describes a model: see phd_model_string.
 */
typedef enum phd_model_text {
  /*
   The family, by the checkpoint's name for it: "llama".
   */
  PHD_MODEL_ARCHITECTURE = 0,
  /*
   What a GGUF file calls its model (`general.name`); may be empty.
   */
  PHD_MODEL_NAME,
  /*
   The type that most parameters are stored in: "Q4_1".
   */
  PHD_MODEL_WEIGHT_TYPE,
  /*
   What computes: the backend and its variant.
   */
  PHD_MODEL_BACKEND,
} phd_model_text;

/*
 What an embedding is of.
 */
typedef enum phd_pooling {
  /*
   The last position.
   */
  PHD_POOLING_LAST = 0,
  /*
   The mean over all positions given.
   */
  PHD_POOLING_MEAN,
} phd_pooling;

/*
 What a token is for: see phd_special_token.
 */
typedef enum phd_special {
  /*
   Begins a text.
   */
  PHD_SPECIAL_BOS = 0,
  /*
   Ends a text.
   */
  PHD_SPECIAL_EOS,
  /*
   Ends a turn of a conversation.
   */
  PHD_SPECIAL_EOT,
  /*
   Stands for what the vocabulary cannot spell.
   */
  PHD_SPECIAL_UNK,
  PHD_SPECIAL_PAD,
  /*
   Filling in the middle: before what stands before the gap.
   */
  PHD_SPECIAL_FIM_PREFIX,
  /*
   Before what stands behind the gap.
   */
  PHD_SPECIAL_FIM_SUFFIX,
  /*
   Where the model begins to fill the gap.
   */
  PHD_SPECIAL_FIM_MIDDLE,
  PHD_SPECIAL_FIM_PAD,
  /*
   Before the name of a repository.
   */
  PHD_SPECIAL_FIM_REPO,
  /*
   Between files of a repository.
   */
  PHD_SPECIAL_FIM_SEPARATOR,
} phd_special;

/*
 What a stage of a sampler does; docs/sampling.md says more. The values are fields of phd_sampler_params.
 */
typedef enum phd_stage {
  /*
   repetition_penalty, frequency_penalty, presence_penalty, penalty_last_n
   */
  PHD_STAGE_PENALTIES = 0,
  /*
   dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n
   */
  PHD_STAGE_DRY,
  /*
   top_n_sigma
   */
  PHD_STAGE_TOP_N_SIGMA,
  /*
   top_k
   */
  PHD_STAGE_TOP_K,
  /*
   typical_p, min_keep
   */
  PHD_STAGE_TYPICAL_P,
  /*
   top_p, min_keep
   */
  PHD_STAGE_TOP_P,
  /*
   min_p, min_keep
   */
  PHD_STAGE_MIN_P,
  /*
   xtc_probability, xtc_threshold, min_keep
   */
  PHD_STAGE_XTC,
  /*
   temperature, dynatemp_range, dynatemp_exponent
   */
  PHD_STAGE_TEMPERATURE,
  /*
   Takes the best token. Ends the chain, as the following do.
   */
  PHD_STAGE_GREEDY,
  /*
   Draws by probability; what a chain ends with if nothing else ends it.
   */
  PHD_STAGE_DRAW,
  /*
   mirostat_tau, mirostat_eta
   */
  PHD_STAGE_MIROSTAT_V2,
} phd_stage;

/*
 Type of a file's weights. Values never change meaning; new ones are added at the end.
 */
typedef enum phd_weight_type {
  /*
   As they are; for phd_convert.
   */
  PHD_WEIGHT_AUTO = 0,
  PHD_WEIGHT_F32,
  PHD_WEIGHT_F16,
  PHD_WEIGHT_BF16,
  PHD_WEIGHT_Q4_0,
  PHD_WEIGHT_Q4_1,
  PHD_WEIGHT_Q8_0,
  PHD_WEIGHT_Q4_K,
  PHD_WEIGHT_Q5_K,
  PHD_WEIGHT_Q6_K,
} phd_weight_type;

/*
 What happens when a sequence has no room for more.
 */
typedef enum phd_when_full {
  /*
   PHD_ERROR_CACHE_FULL.
   */
  PHD_WHEN_FULL_STOP = 0,
  /*
   The oldest positions after the first `n_keep` are dropped: half of what could be, or as much as is needed, in whole chunks of
   the model. The remaining text has positions without a gap, as in training.
   */
  PHD_WHEN_FULL_DROP_MIDDLE,
} phd_when_full;

/*
 Where drafts come from.
 */
typedef enum phd_draft_kind {
  /*
   The text itself: where its last tokens stood before, it may go on as it did there.
   */
  PHD_DRAFT_LOOKUP = 0,
  /*
   A smaller model of the same vocabulary.
   */
  PHD_DRAFT_MODEL,
} phd_draft_kind;

/*
 How much is said; each level includes those before it.
 */
typedef enum phd_log_level {
  PHD_LOG_OFF = 0,
  PHD_LOG_ERROR,
  PHD_LOG_WARN,
  /*
   Models and sessions come into being.
   */
  PHD_LOG_INFO,
  /*
   What happens within calls: a full cache, drops, evictions, cancelled work.
   */
  PHD_LOG_DEBUG,
} phd_log_level;

/*
 What went wrong: a status and a sentence. Freed by the caller.
 */
typedef struct phd_error phd_error;

/*
 Weights and tokenizer: immutable, shared by any number of threads.
 */
typedef struct phd_model phd_model;

/*
 Turns logits into tokens, reproducibly: a chain of stages, in the order in which they were added. Used by one thread at
 a time. Without a constraint, sampling allocates nothing.
 */
typedef struct phd_sampler phd_sampler;

/*
 A fixed-size KV cache and the sequences in it. Calls from several threads wait for each other.
 */
typedef struct phd_session phd_session;

/*
 Guesses how the texts of a session's sequences go on, and verifies the guesses: docs/speculative.md. One thread at a time may use it,
 together with the session and the sampler of the call.
 */
typedef struct phd_speculator phd_speculator;

/*
 A streaming detokenizer: holds back the bytes of a character that later tokens complete, and text that can be the
 beginning of a stop string. Used by one thread at a time.
 */
typedef struct phd_stream phd_stream;

/*
 Told the fraction done, 0 to 1; returning false cancels the call. Must not call into the same session.
 */
typedef bool (*phd_progress)(float fraction, void *user);

typedef struct phd_model_params {
  size_t struct_size;
  /*
   A phd_backend.
   */
  uint32_t backend;
  int32_t device;
  /*
   May be null.
   */
  phd_progress progress;
  void *progress_user;
  /*
   Instead of the checkpoint's own hidden decoding; 0 copies: as the checkpoint says.
   */
  uint32_t copies;
  uint32_t window;
  uint32_t chunk;
  /*
   Read files whole instead of mapping them. A mapped file must not be truncated while the model lives.
   */
  uint32_t no_mmap;
} phd_model_params;

typedef struct phd_model_desc {
  size_t struct_size;
  uint32_t n_vocab;
  uint32_t n_layers;
  uint32_t n_embd;
  uint32_t n_ctx_train;
  /*
   K: how often each token is read.
   */
  uint32_t copies;
  /*
   W, in hidden tokens; 0 = none.
   */
  uint32_t window;
  /*
   C, in positions; 0 = none.
   */
  uint32_t chunk;
  uint32_t n_heads;
  /*
   Heads of keys and values.
   */
  uint32_t n_kv_heads;
  /*
   Elements of a head.
   */
  uint32_t head_dim;
  /*
   Width of the feed-forward layers.
   */
  uint32_t n_ff;
  /*
   1, or 0 for a checkpoint of token ids only.
   */
  uint32_t has_tokenizer;
  /*
   Parameters in the checkpoint's tensors.
   */
  uint64_t n_params;
  /*
   Bytes of the checkpoint's tensors, as it stores them.
   */
  uint64_t weights_bytes;
} phd_model_desc;

typedef struct phd_convert_params {
  size_t struct_size;
  /*
   A phd_weight_type.
   */
  uint32_t weight_type;
  /*
   PHD_CONVERT_REQUANTIZE, PHD_CONVERT_PURE.
   */
  uint32_t flags;
  /*
   0 = one per physical core that the process may use.
   */
  uint32_t n_threads;
  /*
   Read the input whole instead of mapping it. A mapped file must not be truncated meanwhile.
   */
  uint32_t no_mmap;
  /*
   `tokenizer.ggml.pre` instead of what the folder's tokenizer.json says; null: that. For phd_convert.
   */
  const char *pre;
  /*
   May be null. Returning false cancels.
   */
  phd_progress progress;
  void *progress_user;
} phd_convert_params;

/*
 Told one line, UTF-8 of `length` bytes and not terminated, from whichever thread has something to say.
 */
typedef void (*phd_log_callback)(uint32_t level, const char *message, size_t length, void *user);

typedef struct phd_session_params {
  size_t struct_size;
  /*
   The whole cache, in positions, shared by all sequences.
   */
  uint32_t n_positions;
  uint32_t n_sequences;
  /*
   0 = one per physical core that the process may use.
   */
  uint32_t n_threads;
  /*
   A phd_cache_type.
   */
  uint32_t cache_type;
  /*
   Called between the passes of a long prefill; may be null.
   */
  phd_progress progress;
  void *progress_user;
  /*
   Texts that phd_seq_retain keeps at most.
   */
  uint32_t n_retained;
  /*
   For speculative decoding: positions that can be taken back without recomputing hidden rows; and the tokens, for each
   sequence of a batch, whose logits PHD_ENTRY_LOGITS_ALL can ask for are one more (16 in all at least).
   */
  uint32_t n_draft;
  /*
   1: a sequence's results must not depend, in any bit, on who shares its batches. On the CPU they never do; a backend that
   would trade that for speed does not under this flag.
   */
  uint32_t batch_invariant;
  /*
   Must be 0.
   */
  uint32_t reserved;
} phd_session_params;

/*
 See phd_seq_set_policy.
 */
typedef struct phd_seq_policy {
  size_t struct_size;
  /*
   A phd_when_full.
   */
  uint32_t when_full;
  /*
   Positions at the beginning that are never dropped; rounded up to whole blocks.
   */
  uint32_t n_keep;
  /*
   Positions that the sequence may have; 0 = as many as the session allows.
   */
  uint32_t limit;
  /*
   Must be 0.
   */
  uint32_t reserved;
} phd_seq_policy;

typedef struct phd_sampler_params {
  size_t struct_size;
  /*
   0 = greedy.
   */
  float temperature;
  /*
   0 = off.
   */
  uint32_t top_k;
  /*
   1 = off.
   */
  float top_p;
  /*
   0 = off.
   */
  float min_p;
  /*
   1 = off.
   */
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  /*
   Recent tokens that the penalties look at; 0 = off.
   */
  uint32_t penalty_last_n;
  uint64_t seed;
  /*
   The temperature varies by this with the entropy; 0 = off.
   */
  float dynatemp_range;
  float dynatemp_exponent;
  /*
   1 = off.
   */
  float typical_p;
  /*
   0 = off.
   */
  float top_n_sigma;
  /*
   0 = off.
   */
  float xtc_probability;
  /*
   Above 0.5 = off.
   */
  float xtc_threshold;
  /*
   0 = off.
   */
  float dry_multiplier;
  float dry_base;
  uint32_t dry_allowed_length;
  /*
   Recent tokens that DRY looks at; 0 = off.
   */
  uint32_t dry_penalty_last_n;
  /*
   2: the default chain is the temperature and Mirostat 2.0 alone. 0 = off.
   */
  uint32_t mirostat;
  float mirostat_tau;
  float mirostat_eta;
  /*
   Candidates that typical_p, top_p, min_p and XTC leave at least.
   */
  uint32_t min_keep;
} phd_sampler_params;

/*
 Exact bytes held by a session; the weights are shared with the model's other sessions.
 */
typedef struct phd_memory {
  size_t struct_size;
  uint64_t weights_bytes;
  /*
   Keys and values of the original tokens.
   */
  uint64_t cache_bytes;
  /*
   Hidden-token rings.
   */
  uint64_t hidden_bytes;
  uint64_t scratch_bytes;
} phd_memory;

/*
 One sequence's part of a batch. All entries of an array have the `struct_size` of the first, `sizeof(phd_batch_entry)`.
 */
typedef struct phd_batch_entry {
  size_t struct_size;
  int32_t seq;
  /*
   PHD_ENTRY_LOGITS, PHD_ENTRY_LOGITS_ALL, or 0: then the sequence has no logits afterwards.
   */
  uint32_t flags;
  /*
   What is appended: a piece of a prompt, or one token.
   */
  const int32_t *tokens;
  size_t n_tokens;
} phd_batch_entry;

/*
 How a session's pool is used, in positions of whole blocks: used + retained + free is the whole pool.
 */
typedef struct phd_usage {
  size_t struct_size;
  /*
   In blocks that sequences refer to.
   */
  uint64_t used;
  /*
   In blocks that nobody refers to.
   */
  uint64_t free;
  /*
   The part of `used` that several sequences share, counted once.
   */
  uint64_t shared;
  /*
   In blocks that only retained texts refer to: given up as soon as a sequence needs them.
   */
  uint64_t retained;
  /*
   Positions of a block.
   */
  uint64_t block;
} phd_usage;

/*
 A session's counters since it was created; times in nanoseconds.
 */
typedef struct phd_stats {
  size_t struct_size;
  /*
   Positions appended by entries of several tokens.
   */
  uint64_t prompt_tokens;
  /*
   Positions appended by entries of one token.
   */
  uint64_t step_tokens;
  /*
   Time in calls with an entry of several tokens.
   */
  uint64_t prefill_ns;
  /*
   Time in calls of single tokens only.
   */
  uint64_t step_ns;
  /*
   Time that calls have waited for one another.
   */
  uint64_t wait_ns;
  /*
   Calls that extend sequences, failed ones included.
   */
  uint64_t calls;
  /*
   Passes over the weights.
   */
  uint64_t passes;
  /*
   Rows that have entered a layer, summed over layers.
   */
  uint64_t rows;
  uint64_t cancelled;
  /*
   Calls that found the cache full.
   */
  uint64_t cache_full;
  uint64_t prefix_lookups;
  /*
   Look-ups that found at least one token.
   */
  uint64_t prefix_hits;
  /*
   Positions taken over instead of computed.
   */
  uint64_t prefix_tokens;
  /*
   Positions dropped by policies.
   */
  uint64_t dropped;
  /*
   Positions that retained texts have given up.
   */
  uint64_t evicted;
} phd_stats;

typedef struct phd_speculator_params {
  size_t struct_size;
  /*
   A phd_draft_kind.
   */
  uint32_t kind;
  /*
   Drafts of a step at most, 1 to 256. The session's `n_draft` must be at least as large.
   */
  uint32_t n_draft;
  /*
   Lookup: tokens that must have stood before, and how many of them at most are compared, up to 64.
   */
  uint32_t ngram_min;
  uint32_t ngram_max;
  /*
   Draft model: drafting stops before a token less probable than this; 0 = never.
   */
  float p_min;
  /*
   Must be 0.
   */
  uint32_t reserved;
} phd_speculator_params;

/*
 Counts since a speculator was created.
 */
typedef struct phd_draft_stats {
  size_t struct_size;
  /*
   Passes verified.
   */
  uint64_t steps;
  /*
   Drafts that they verified.
   */
  uint64_t drafted;
  /*
   Those that became text.
   */
  uint64_t accepted;
  /*
   Bytes of the draft model's session, weights not counted.
   */
  uint64_t draft_bytes;
} phd_draft_stats;

/*
 A conversation to render. Texts are JSON by length; null with length 0 leaves one out.
 */
typedef struct phd_chat_params {
  size_t struct_size;
  /*
   A list of objects, usually with `role` and `content`.
   */
  const char *messages;
  size_t messages_len;
  /*
   A list of objects that describe functions.
   */
  const char *tools;
  size_t tools_len;
  /*
   A list of objects with `title` and `text`.
   */
  const char *documents;
  size_t documents_len;
  /*
   An object: variables of the template's own, such as `{"enable_thinking": false}`.
   */
  const char *variables;
  size_t variables_len;
  /*
   Jinja instead of the checkpoint's template.
   */
  const char *source;
  size_t source_len;
  /*
   The name of one of the checkpoint's templates. By default "tool_use" if there is one and tools are given, else
   "default".
   */
  const char *name;
  size_t name_len;
  /*
   What the template takes for the time, in seconds since 1970 as a clock on the wall shows it; 0: now, in UTC.
   */
  int64_t now;
  /*
   Not 0: ends the text with the beginning of the model's turn.
   */
  uint32_t add_generation_prompt;
  /*
   0.
   */
  uint32_t reserved;
} phd_chat_params;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Grows when the ABI breaks.
 */
uint32_t phd_abi_version(void);

/*
 The library's version, such as "0.1.0"; static.
 */
const char *phd_version(void);

/*
 Loads a Hub folder or a GGUF file. `params` may be null. On failure `*out` is as it was.
 */
enum phd_status phd_model_load(const char *path,
                               const struct phd_model_params *params,
                               struct phd_model **out,
                               struct phd_error **error);

/*
 Frees the handle; null is fine. Sessions keep what they need alive.
 */
void phd_model_free(struct phd_model *model);

/*
 Describes a model. The caller sets `out->struct_size`; no more than that is written.
 */
enum phd_status phd_model_info(const struct phd_model *model, struct phd_model_desc *out, struct phd_error **error);

/*
 A text that describes a model, `kind` a phd_model_text: `*len` bytes of UTF-8, not terminated. Sizes are handled as in
 phd_tokenize.
 */
enum phd_status phd_model_string(const struct phd_model *model,
                                 uint32_t kind,
                                 char *text,
                                 size_t capacity,
                                 size_t *len,
                                 struct phd_error **error);

/*
 Writes the defaults into `params`; `struct_size` is `sizeof(phd_convert_params)`.
 */
void phd_convert_params_init(struct phd_convert_params *params, size_t struct_size);

/*
 Converts a Hub folder to the GGUF file `out`, which llama.cpp reads as the vanilla base. `params` may be null. The file is
 written whole or not at all: after a failure or a cancel `out` is what it was.
 */
enum phd_status phd_convert(const char *folder,
                            const char *out,
                            const struct phd_convert_params *params,
                            struct phd_error **error);

/*
 Converts the weights of the GGUF file `input` to `params->weight_type` and keeps everything else. Written whole or not at
 all, as by phd_convert.
 */
enum phd_status phd_quantize(const char *input,
                             const char *out,
                             const struct phd_convert_params *params,
                             struct phd_error **error);

/*
 Hands what the library says, up to `level` (a phd_log_level), to `callback`, for the whole process; null turns it off. When this
 returns, the callback before is not running and will not be called again. A callback must not call this. Without it the library
 says nothing.
 */
enum phd_status phd_log_set(phd_log_callback callback,
                            void *user,
                            uint32_t level,
                            struct phd_error **error);

/*
 Writes the defaults into `params`; `struct_size` is `sizeof(phd_model_params)`.
 */
void phd_model_params_init(struct phd_model_params *params, size_t struct_size);

/*
 Writes the defaults into `params`; `struct_size` is `sizeof(phd_session_params)`.
 */
void phd_session_params_init(struct phd_session_params *params, size_t struct_size);

/*
 Writes the defaults into `policy`; `struct_size` is `sizeof(phd_seq_policy)`.
 */
void phd_seq_policy_init(struct phd_seq_policy *policy, size_t struct_size);

/*
 Writes the defaults into `params`; `struct_size` is `sizeof(phd_sampler_params)`.
 */
void phd_sampler_params_init(struct phd_sampler_params *params, size_t struct_size);

/*
 Creates a sampler for logits of `n_vocab` with the default chain: penalties, DRY, top-n-sigma, top-k, typical-p, top-p,
 min-p, XTC, temperature, draw. `params` may be null. On failure `*out` is as it was.
 */
enum phd_status phd_sampler_create(const struct phd_sampler_params *params,
                                   size_t n_vocab,
                                   struct phd_sampler **out,
                                   struct phd_error **error);

/*
 Creates a sampler without stages, which draws from all tokens: see phd_sampler_add.
 */
enum phd_status phd_sampler_create_empty(size_t n_vocab,
                                         uint64_t seed,
                                         struct phd_sampler **out,
                                         struct phd_error **error);

/*
 A sampler that continues from the same point, independently.
 */
enum phd_status phd_sampler_clone(const struct phd_sampler *sampler,
                                  struct phd_sampler **out,
                                  struct phd_error **error);

/*
 Appends a stage, a phd_stage, with its values from `params`, which may be null. After a failure the chain is as it was.
 */
enum phd_status phd_sampler_add(struct phd_sampler *sampler,
                                uint32_t stage,
                                const struct phd_sampler_params *params,
                                struct phd_error **error);

/*
 Adds `biases` to the logits of `tokens` (`n` of each) before all stages, whenever it is called; -infinity forbids a
 token. Biases of a token add up.
 */
enum phd_status phd_sampler_add_logit_bias(struct phd_sampler *sampler,
                                           const int32_t *tokens,
                                           const float *biases,
                                           size_t n,
                                           struct phd_error **error);

/*
 Adds a sequence of 1 to 21 tokens that DRY sees no repetition across.
 */
enum phd_status phd_sampler_add_dry_breaker(struct phd_sampler *sampler,
                                            const int32_t *tokens,
                                            size_t n,
                                            struct phd_error **error);

/*
 The same for 1 to 40 bytes of UTF-8, in all the ways in which the model's tokens spell them. llama.cpp's default
 breakers are "\n", ":", "\"" and "*".
 */
enum phd_status phd_sampler_add_dry_breaker_text(struct phd_sampler *sampler,
                                                 const struct phd_model *model,
                                                 const char *text,
                                                 size_t len,
                                                 struct phd_error **error);

/*
 Lets only JSON pass that is valid by a JSON schema, `len` bytes of UTF-8. Then only end tokens are left. The constraint
 comes before all stages, whenever it is called, and begins with the next token that is accepted, also within a text: what was
 accepted before is not part of it. A sampler has one at most: see phd_sampler_remove_constraint. Schemas with keywords that are not
 implemented are refused with `PHD_ERROR_UNSUPPORTED`.
 */
enum phd_status phd_sampler_add_json_schema(struct phd_sampler *sampler,
                                            const struct phd_model *model,
                                            const char *schema,
                                            size_t len,
                                            struct phd_error **error);

/*
 The same for a regular expression that the whole text must match; syntax of Rust's regex crate.
 */
enum phd_status phd_sampler_add_regex(struct phd_sampler *sampler,
                                      const struct phd_model *model,
                                      const char *regex,
                                      size_t len,
                                      struct phd_error **error);

/*
 The same for a grammar in llguidance's variant of Lark's syntax.
 */
enum phd_status phd_sampler_add_grammar(struct phd_sampler *sampler,
                                        const struct phd_model *model,
                                        const char *grammar,
                                        size_t len,
                                        struct phd_error **error);

/*
 The same for a grammar in llama.cpp's format, GBNF.
 */
enum phd_status phd_sampler_add_gbnf(struct phd_sampler *sampler,
                                     const struct phd_model *model,
                                     const char *grammar,
                                     size_t len,
                                     struct phd_error **error);

/*
 Whether the constraint has ended: it allows only end tokens. False if it may go on, also where it may end, and without a
 constraint. What comes after a constraint within a text begins with phd_sampler_remove_constraint.
 */
enum phd_status phd_sampler_constraint_done(struct phd_sampler *sampler,
                                            bool *done,
                                            struct phd_error **error);

/*
 Advances the constraint, and nothing else, by `len` bytes of UTF-8 that are part of the text already: what a token that has
 been accepted says beyond the point where the constraint was to begin. Text that the constraint does not allow is refused.
 */
enum phd_status phd_sampler_constraint_accept(struct phd_sampler *sampler,
                                              const char *text,
                                              size_t len,
                                              struct phd_error **error);

/*
 Takes the constraint away, if there is one. The text goes on freely, or under another constraint.
 */
enum phd_status phd_sampler_remove_constraint(struct phd_sampler *sampler, struct phd_error **error);

/*
 Chooses a token from `n_vocab` logits, which are not changed. NaN counts as -infinity, which is never chosen. The choice
 is not remembered: see phd_sampler_accept.
 */
enum phd_status phd_sampler_sample(struct phd_sampler *sampler,
                                   const float *logits,
                                   size_t n_vocab,
                                   int32_t *token,
                                   struct phd_error **error);

/*
 Chooses the next token of `seq`: what phd_sampler_sample does with phd_logits, with the same outcome. Where a GPU computes, its
 logits are not even copied where its best 64 tokens tell what the sampler chooses, see docs/sampling.md. The session is busy
 meanwhile, as in any call.
 */
enum phd_status phd_sample(const struct phd_session *session,
                           int32_t seq,
                           struct phd_sampler *sampler,
                           int32_t *token,
                           struct phd_error **error);

/*
 The same by the logits of phd_logits_at: after token `index` of the last entry of `seq`, if that asked for
 PHD_ENTRY_LOGITS_ALL.
 */
enum phd_status phd_sample_at(const struct phd_session *session,
                              int32_t seq,
                              size_t index,
                              struct phd_sampler *sampler,
                              int32_t *token,
                              struct phd_error **error);

/*
 Tells the constraint, the penalties and DRY of a token that has become part of the text. One that the constraint does
 not allow here is refused.
 */
enum phd_status phd_sampler_accept(struct phd_sampler *sampler, int32_t token, struct phd_error **error);

/*
 Tells the penalties and DRY, but not the constraint, of tokens that stand before the text: the prompt.
 */
enum phd_status phd_sampler_accept_prompt(struct phd_sampler *sampler,
                                          const int32_t *tokens,
                                          size_t n_tokens,
                                          struct phd_error **error);

/*
 Back to the seed, the beginning of the constraint, and an empty memory.
 */
enum phd_status phd_sampler_reset(struct phd_sampler *sampler, struct phd_error **error);

/*
 Frees a sampler; null is fine.
 */
void phd_sampler_free(struct phd_sampler *sampler);

/*
 Natural log-probabilities of `n_tokens` tokens by `n_vocab` logits, into `logprobs` (`n_tokens`). Sums are in f64.
 */
enum phd_status phd_logprobs(const float *logits,
                             size_t n_vocab,
                             const int32_t *tokens,
                             size_t n_tokens,
                             float *logprobs,
                             struct phd_error **error);

/*
 The `n` most probable tokens by `n_vocab` logits, best first, and their natural log-probabilities: `n` of each are
 written.
 */
enum phd_status phd_top_logprobs(const float *logits,
                                 size_t n_vocab,
                                 size_t n,
                                 int32_t *tokens,
                                 float *logprobs,
                                 struct phd_error **error);

/*
 Creates a session, with everything it will ever need. `params` may be null. On failure `*out` is as it was.
 */
enum phd_status phd_session_create(const struct phd_model *model,
                                   const struct phd_session_params *params,
                                   struct phd_session **out,
                                   struct phd_error **error);

/*
 Frees a session; null is fine. No call may be running on it.
 */
void phd_session_free(struct phd_session *session);

/*
 Reports what the session holds. The caller sets `out->struct_size`; no more than that is written.
 */
enum phd_status phd_session_memory(const struct phd_session *session, struct phd_memory *out, struct phd_error **error);

/*
 Appends `n_tokens` tokens to `seq` and leaves the last position's logits. After any failure the sequence, its logits
 included, is what it was; `PHD_ERROR_CACHE_FULL` names the positions needed and free.
 */
enum phd_status phd_prefill(struct phd_session *session,
                            int32_t seq,
                            const int32_t *tokens,
                            size_t n_tokens,
                            struct phd_error **error);

/*
 Appends one token; otherwise as phd_prefill.
 */
enum phd_status phd_step(struct phd_session *session, int32_t seq, int32_t token, struct phd_error **error);

/*
 Extends several sequences at once: pieces of prompts and single tokens of any of them, each sequence at most once. All copies of
 all tokens share each pass over the weights. A batch is carried out whole or not at all: after any failure, the cancelling of
 one of its sequences included, all of them are what they were, their logits included. `PHD_ERROR_CACHE_FULL` names the
 positions that the batch needs and those free for it.
 */
enum phd_status phd_decode(struct phd_session *session,
                           const struct phd_batch_entry *entries,
                           size_t n_entries,
                           struct phd_error **error);

/*
 The logits that the last call on `seq` left, `n_vocab` of them. They lie in the session and are valid until the next
 call that changes that sequence. `PHD_ERROR_INVALID_ARGUMENT` if there are none. A GPU's are copied first: phd_sample and
 phd_sample_at may do without.
 */
enum phd_status phd_logits(const struct phd_session *session,
                           int32_t seq,
                           const float **logits,
                           size_t *n_vocab,
                           struct phd_error **error);

/*
 The logits after token `index` of the last entry of `seq`, if that asked for PHD_ENTRY_LOGITS_ALL. They are valid until the
 sequence is changed or another call asks for all positions'. `PHD_ERROR_INVALID_ARGUMENT` if there are none.
 */
enum phd_status phd_logits_at(const struct phd_session *session,
                              int32_t seq,
                              size_t index,
                              const float **logits,
                              size_t *n_vocab,
                              struct phd_error **error);

/*
 Appends tokens as phd_prefill does, leaves no logits, and writes `ln p(tokens[i] | everything before it)` for i = 1.. to
 `scores[i - 1]`: `n_tokens - 1` of them. A small buffer gets `PHD_ERROR_BUFFER_TOO_SMALL` and nothing is appended.
 */
enum phd_status phd_score(struct phd_session *session,
                          int32_t seq,
                          const int32_t *tokens,
                          size_t n_tokens,
                          float *scores,
                          size_t capacity,
                          size_t *n_scores,
                          struct phd_error **error);

/*
 Appends tokens as phd_prefill does, leaves no logits, and writes an embedding of them, `n_embd` numbers: the output norm's row of
 the last copy, `pooling` (a phd_pooling) over the tokens, divided by its length if `normalize`. Empty the sequence before and after
 for embeddings of single texts. A small buffer gets `PHD_ERROR_BUFFER_TOO_SMALL` and nothing is appended.
 */
enum phd_status phd_embed(struct phd_session *session,
                          int32_t seq,
                          const int32_t *tokens,
                          size_t n_tokens,
                          uint32_t pooling,
                          bool normalize,
                          float *embedding,
                          size_t capacity,
                          size_t *n_embd,
                          struct phd_error **error);

/*
 Positions in `seq`.
 */
enum phd_status phd_seq_length(const struct phd_session *session,
                               int32_t seq,
                               size_t *n_positions,
                               struct phd_error **error);

/*
 Shortens `seq` to `n_positions`; 0 empties it. Unless that changes nothing its logits are gone.
 */
enum phd_status phd_seq_truncate(struct phd_session *session,
                                 int32_t seq,
                                 size_t n_positions,
                                 struct phd_error **error);

/*
 Makes `dst` a copy of `src`, logits included, whatever `dst` held. Cache blocks are shared until one of the two writes
 into them.
 */
enum phd_status phd_seq_fork(struct phd_session *session, int32_t src, int32_t dst, struct phd_error **error);

/*
 From any thread: the call running on `seq`, or else the next one, returns `PHD_ERROR_CANCELLED`, which uses the
 request up.
 */
enum phd_status phd_seq_cancel(const struct phd_session *session, int32_t seq, struct phd_error **error);

/*
 Takes back a request to cancel that no call has used up.
 */
enum phd_status phd_seq_cancel_clear(const struct phd_session *session, int32_t seq, struct phd_error **error);

/*
 Empties `seq` and keeps its text as long as there is room, so that phd_seq_take_prefix can take it over. Retained texts give way,
 the least recently used first and from its end, as soon as a sequence needs their blocks.
 */
enum phd_status phd_seq_retain(struct phd_session *session,
                               int32_t seq,
                               struct phd_error **error);

/*
 How many of `tokens` the longest cached text has that they begin with, among all sequences and retained texts; 0 if none.
 `*seq` is the sequence that has it, or -1. Nothing is changed.
 */
enum phd_status phd_seq_match_prefix(struct phd_session *session,
                                     const int32_t *tokens,
                                     size_t n_tokens,
                                     size_t *n_positions,
                                     int32_t *seq,
                                     struct phd_error **error);

/*
 Makes `seq`, whatever it held, the longest cached prefix of `tokens`, and writes its length. Keys and values are shared, not
 computed. The sequence has no logits: leave the last token out, and prefill what is missing. Of hidden rows at most one chunk's
 positions are computed again by that (PHD-SWA: a few windows).
 */
enum phd_status phd_seq_take_prefix(struct phd_session *session,
                                    int32_t seq,
                                    const int32_t *tokens,
                                    size_t n_tokens,
                                    size_t *n_positions,
                                    struct phd_error **error);

/*
 The tokens of `seq`, in order. A small buffer gets `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_tokens`.
 */
enum phd_status phd_seq_tokens(const struct phd_session *session,
                               int32_t seq,
                               int32_t *tokens,
                               size_t capacity,
                               size_t *n_tokens,
                               struct phd_error **error);

/*
 Decides what happens when `seq` is full, from the next call on; null: the default, to stop. Under PHD_WHEN_FULL_DROP_MIDDLE a
 call that finds no room below `limit` first drops, and is still carried out whole or not at all. For the moment of the dropping
 the old text and the new one both take room: `limit` is at most the session's positions less `n_keep` and a block.
 */
enum phd_status phd_seq_set_policy(struct phd_session *session,
                                   int32_t seq,
                                   const struct phd_seq_policy *policy,
                                   struct phd_error **error);

/*
 Positions that its policy has dropped from `seq`.
 */
enum phd_status phd_seq_dropped(const struct phd_session *session,
                                int32_t seq,
                                size_t *n_positions,
                                struct phd_error **error);

/*
 How the pool is used. The caller sets `out->struct_size`; no more than that is written.
 */
enum phd_status phd_session_usage(const struct phd_session *session, struct phd_usage *out, struct phd_error **error);

/*
 The session's counters, from any thread, without waiting for a running call. The caller sets `out->struct_size`; no more than
 that is written.
 */
enum phd_status phd_session_stats(const struct phd_session *session,
                                  struct phd_stats *out,
                                  struct phd_error **error);

/*
 Writes `seq`, logits included, to `state`: for any session of the same model and cache type. A small buffer gets
 `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_bytes`. After `PHD_ERROR_BACKEND`, when a device fails, what the buffer holds is no
 state.
 */
enum phd_status phd_seq_save(const struct phd_session *session,
                             int32_t seq,
                             uint8_t *state,
                             size_t capacity,
                             size_t *n_bytes,
                             struct phd_error **error);

/*
 Makes `seq`, whatever it held, what phd_seq_save wrote. A state of another model or cache type, a damaged or a forged one gets
 `PHD_ERROR_INVALID_ARGUMENT`; after any failure the sequence is what it was, but after `PHD_ERROR_BACKEND`, when a device fails while
 it is written, it is empty.
 */
enum phd_status phd_seq_restore(struct phd_session *session,
                                int32_t seq,
                                const uint8_t *state,
                                size_t n_bytes,
                                struct phd_error **error);

/*
 phd_seq_save to a file, written whole or not at all.
 */
enum phd_status phd_seq_save_file(const struct phd_session *session,
                                  int32_t seq,
                                  const char *path,
                                  struct phd_error **error);

/*
 phd_seq_restore from a file; what is wrong with it is `PHD_ERROR_FORMAT`.
 */
enum phd_status phd_seq_restore_file(struct phd_session *session,
                                     int32_t seq,
                                     const char *path,
                                     struct phd_error **error);

/*
 Writes the defaults into `params`; `struct_size` is `sizeof(phd_speculator_params)`.
 */
void phd_speculator_params_init(struct phd_speculator_params *params, size_t struct_size);

/*
 Creates a speculator for sessions of `model`. For PHD_DRAFT_MODEL it makes a session of `draft_model` with `draft_params` (null: the
 defaults) for itself, which follows each sequence in the sequence of the same number and needs as many of them; a draft model whose
 vocabulary differs is refused, naming the first token that does. For PHD_DRAFT_LOOKUP both must be null. `params` may be null. On
 failure `*out` is as it was.
 */
enum phd_status phd_speculator_create(const struct phd_model *model,
                                      const struct phd_model *draft_model,
                                      const struct phd_session_params *draft_params,
                                      const struct phd_speculator_params *params,
                                      struct phd_speculator **out,
                                      struct phd_error **error);

/*
 Frees a speculator; null is fine.
 */
void phd_speculator_free(struct phd_speculator *speculator);

/*
 Guesses how `seq` goes on after `token`, which was chosen and is not in the session: up to `n_draft` tokens, and no more than the
 sequence has room for without its policy dropping any. The first part of a step, for servers: decode `token` and the drafts of
 each sequence as one entry with PHD_ENTRY_LOGITS_ALL (if all of them together get `PHD_ERROR_CACHE_FULL`, without drafts), and then
 phd_speculator_accept. A buffer of less than `n_draft` tokens gets `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_drafts`. The
 session is not changed; cancelling `seq` ends what the draft model computes.
 */
enum phd_status phd_speculator_draft(struct phd_speculator *speculator,
                                     struct phd_session *session,
                                     int32_t seq,
                                     int32_t token,
                                     int32_t *drafts,
                                     size_t capacity,
                                     size_t *n_drafts,
                                     struct phd_error **error);

/*
 Samples after each token of the last entry of `seq`, which was decoded with PHD_ENTRY_LOGITS_ALL and is the token chosen before and
 its drafts, until a sampled token is not the draft there or ends the generation, and tells the sampler of each. Writes the sampled
 tokens, one at least. All of them but the last, and nothing after them, are then in the session: the last is what the next step
 begins with. phd_logits has what it was sampled from. A buffer of fewer tokens than the entry has gets
 `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_tokens`. After any failure session and sampler are what they were; what fails
 after the first token ends the run, and comes back as the next step's failure.
 */
enum phd_status phd_speculator_accept(struct phd_speculator *speculator,
                                      struct phd_session *session,
                                      int32_t seq,
                                      struct phd_sampler *sampler,
                                      int32_t *tokens,
                                      size_t capacity,
                                      size_t *n_tokens,
                                      struct phd_error **error);

/*
 Appends `token`, which was chosen last, with drafts, in one pass, and writes the tokens that follow it: one, and one more for each
 draft that was right. They are those that phd_step, phd_sampler_sample and phd_sampler_accept in turn would give. All of them but the
 last are then in the session too; the last is what the next step begins with. A buffer of less than `n_draft + 1` tokens gets
 `PHD_ERROR_BUFFER_TOO_SMALL` and the size in `*n_tokens`. After any failure the sequence's text and the sampler are what they were,
 but for what a policy has dropped.
 */
enum phd_status phd_speculator_step(struct phd_speculator *speculator,
                                    struct phd_session *session,
                                    int32_t seq,
                                    int32_t token,
                                    struct phd_sampler *sampler,
                                    int32_t *tokens,
                                    size_t capacity,
                                    size_t *n_tokens,
                                    struct phd_error **error);

/*
 Gives up what the draft model holds of a sequence's text: for one that has ended, so that others have its room.
 */
enum phd_status phd_speculator_forget(struct phd_speculator *speculator, int32_t seq, struct phd_error **error);

/*
 What has been drafted and accepted. The caller sets `out->struct_size`; no more than that is written.
 */
enum phd_status phd_speculator_stats(const struct phd_speculator *speculator,
                                     struct phd_draft_stats *out,
                                     struct phd_error **error);

/*
 The name of a status, such as "PHD_ERROR_IO"; static. For a number that is none: "PHD_ERROR_UNKNOWN".
 */
const char *phd_status_name(phd_status status);

/*
 The status of an error; `PHD_OK` for null.
 */
enum phd_status phd_error_status(const struct phd_error *error);

/*
 One sentence naming the file, tensor or value; lives as long as the error. Empty for null.
 */
const char *phd_error_message(const struct phd_error *error);

/*
 Frees an error; null is fine.
 */
void phd_error_free(struct phd_error *error);

/*
 Token ids of `len` bytes of UTF-8. `*n_tokens` is how many there are; if that exceeds `capacity`, nothing else is
 written and the status is `PHD_ERROR_BUFFER_TOO_SMALL`. A null buffer with capacity 0 asks for the count.
 */
enum phd_status phd_tokenize(const struct phd_model *model,
                             const char *text,
                             size_t len,
                             uint32_t flags,
                             int32_t *tokens,
                             size_t capacity,
                             size_t *n_tokens,
                             struct phd_error **error);

/*
 The text of tokens, `*len` bytes, not terminated; it may end within a character. Control tokens have no text. Sizes
 are handled as in phd_tokenize.
 */
enum phd_status phd_detokenize(const struct phd_model *model,
                               const int32_t *tokens,
                               size_t n_tokens,
                               char *text,
                               size_t capacity,
                               size_t *len,
                               struct phd_error **error);

/*
 The token of a role, `kind` a phd_special, or -1 if the vocabulary has none: as the checkpoint's files say, and where they say
 nothing by well-known spellings.
 */
enum phd_status phd_special_token(const struct phd_model *model,
                                  uint32_t kind,
                                  int32_t *token,
                                  struct phd_error **error);

/*
 Whether generation ends with `token`: end of text, of turn, of message.
 */
enum phd_status phd_token_is_end(const struct phd_model *model, int32_t token, bool *is_end, struct phd_error **error);

/*
 The bytes of one token, which may be part of a character, such as OpenAI's `logprobs` list them. Control tokens have
 none, or with `special` their spelling. Sizes are handled as in phd_tokenize.
 */
enum phd_status phd_token_bytes(const struct phd_model *model,
                                int32_t token,
                                bool special,
                                uint8_t *bytes,
                                size_t capacity,
                                size_t *len,
                                struct phd_error **error);

/*
 Creates a streaming detokenizer. On failure `*out` is as it was.
 */
enum phd_status phd_stream_create(const struct phd_model *model, struct phd_stream **out, struct phd_error **error);

/*
 Adds a stop string, `len` bytes of UTF-8, 1 to 1024; 64 at most. The text ends before the stop string that is complete
 first; of several that end together, before the longest. Between texts only. Stop strings stay when a text ends.
 */
enum phd_status phd_stream_add_stop(struct phd_stream *stream, const char *stop, size_t len, struct phd_error **error);

/*
 Spells control tokens out (true) or leaves them out (false, as at first). Between texts only.
 */
enum phd_status phd_stream_set_special(struct phd_stream *stream, bool special, struct phd_error **error);

/*
 Passes one token and writes the text that it completes, `*len` bytes of whole characters of UTF-8, not terminated.
 After a stop string there is no more text. With `PHD_ERROR_BUFFER_TOO_SMALL` the token has not been taken.
 */
enum phd_status phd_stream_push(struct phd_stream *stream,
                                int32_t token,
                                char *text,
                                size_t capacity,
                                size_t *len,
                                struct phd_error **error);

/*
 Which stop string ended the text, counted in the order in which they were added, or -1; and the bytes of text written so
 far, which after a stop string are those before it.
 */
enum phd_status phd_stream_stop(const struct phd_stream *stream,
                                int32_t *stop,
                                uint64_t *n_bytes,
                                struct phd_error **error);

/*
 Ends the text: an incomplete character becomes U+FFFD, and what was held back for a stop string is written. The stream
 can then begin another text.
 */
enum phd_status phd_stream_finish(struct phd_stream *stream,
                                  char *text,
                                  size_t capacity,
                                  size_t *len,
                                  struct phd_error **error);

/*
 Frees a stream; null is fine.
 */
void phd_stream_free(struct phd_stream *stream);

/*
 The Jinja source of one of the checkpoint's chat templates, `*len` bytes of UTF-8, not terminated; a null name of length 0 asks
 for the default one. `PHD_ERROR_UNSUPPORTED` if there is none of that name. Sizes are handled as in phd_tokenize.
 */
enum phd_status phd_chat_template(const struct phd_model *model,
                                  const char *name,
                                  size_t name_len,
                                  char *text,
                                  size_t capacity,
                                  size_t *len,
                                  struct phd_error **error);

/*
 Writes the defaults into `params`; `struct_size` is `sizeof(phd_chat_params)`.
 */
void phd_chat_params_init(struct phd_chat_params *params, size_t struct_size);

/*
 The text that a conversation is for the model, `*len` bytes of UTF-8, not terminated: what transformers'
 `apply_chat_template` makes of it. The template writes the begin token itself: phd_tokenize it with
 `PHD_TOKENIZE_PARSE_SPECIAL` alone. Sizes are handled as in phd_tokenize; asking for the size renders, too.
 */
enum phd_status phd_chat_render(const struct phd_model *model,
                                const struct phd_chat_params *params,
                                char *text,
                                size_t capacity,
                                size_t *len,
                                struct phd_error **error);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PHD_H */
