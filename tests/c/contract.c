/* The C interface as a program uses and misuses it. Compiled as C99 and as C++17. */
#include "phd.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
      failures++;                                                         \
    }                                                                     \
  } while (0)

/* The call must give `expected`, and a sentence that contains `word`. */
#define EXPECT(expected, word, call)                                                            \
  do {                                                                                          \
    phd_error *error = NULL;                                                                    \
    phd_status status = (call);                                                                 \
    if (status != (expected) || (status != PHD_OK) != (error != NULL) ||                        \
        phd_error_status(error) != status || strstr(phd_error_message(error), word) == NULL) {  \
      fprintf(stderr, "%s:%d: %s: %s: %s\n", __FILE__, __LINE__, #call, phd_status_name(status), \
              phd_error_message(error));                                                        \
      failures++;                                                                               \
    }                                                                                           \
    phd_error_free(error);                                                                      \
  } while (0)

#define OK(call) EXPECT(PHD_OK, "", call)
#define INVALID(word, call) EXPECT(PHD_ERROR_INVALID_ARGUMENT, word, call)

enum { N = 40 };

static bool stop_at_once(float fraction, void *user) {
  *(int *)user += 1;
  return fraction < 0.0f;
}

static void models(const char *golden, const char *folder) {
  phd_model *model = NULL;
  phd_model_params params;
  char path[4096];
  INVALID("path", phd_model_load(NULL, NULL, &model, &error));
  INVALID("out", phd_model_load(golden, NULL, NULL, &error));
  EXPECT(PHD_ERROR_IO, "/no/such/model", phd_model_load("/no/such/model", NULL, &model, &error));
  EXPECT(PHD_ERROR_FORMAT, "config.json", phd_model_load(folder, NULL, &model, &error));
  snprintf(path, sizeof path, "%s/config.json", golden);
  EXPECT(PHD_ERROR_FORMAT, "GGUF", phd_model_load(path, NULL, &model, &error));
  CHECK(phd_model_load("/no/such/model", NULL, &model, NULL) == PHD_ERROR_IO);

  phd_model_params_init(&params, sizeof params);
  params.backend = 77;
  INVALID("77", phd_model_load(golden, &params, &model, &error));
  phd_model_params_init(&params, sizeof params);
  params.struct_size = 3;
  INVALID("struct_size", phd_model_load(golden, &params, &model, &error));
  phd_model_params_init(&params, sizeof params);
  params.copies = 100000;
  INVALID("100000", phd_model_load(golden, &params, &model, &error));
  phd_model_params_init(&params, sizeof params);
  int calls = 0;
  params.progress = stop_at_once;
  params.progress_user = &calls;
  EXPECT(PHD_ERROR_CANCELLED, "cancelled", phd_model_load(golden, &params, &model, &error));
  CHECK(calls == 1);
  CHECK(model == NULL);

  /* An older, shorter struct; and a newer one whose tail is zero. */
  phd_model_params_init(&params, offsetof(phd_model_params, progress));
  params.backend = PHD_BACKEND_CPU;
  OK(phd_model_load(golden, &params, &model, &error));
  phd_model_free(model);
  struct { phd_model_params known; uint64_t later; } newer;
  memset(&newer, 0, sizeof newer);
  phd_model_params_init(&newer.known, sizeof newer);
  OK(phd_model_load(golden, &newer.known, &model, &error));
  phd_model_desc desc;
  memset(&desc, 0xff, sizeof desc);
  desc.struct_size = offsetof(phd_model_desc, window);
  OK(phd_model_info(model, &desc, &error));
  CHECK(desc.copies == 2 && desc.n_vocab == 128 && desc.n_layers == 3 && desc.n_embd == 64 && desc.n_ctx_train == 512);
  CHECK(desc.window == UINT32_MAX);
  desc.struct_size = sizeof desc;
  OK(phd_model_info(model, &desc, &error));
  CHECK(desc.window == 16 && desc.chunk == 32 && desc.n_heads == 4 && desc.n_kv_heads == 2 && desc.head_dim == 16);
  CHECK(desc.n_ff == 96 && desc.has_tokenizer == 0 && desc.n_params > 0 && desc.weights_bytes == 2 * desc.n_params);

  /* A program whose header ends with `chunk`. */
  struct {
    struct {
      size_t struct_size;
      uint32_t n_vocab, n_layers, n_embd, n_ctx_train, copies, window, chunk;
    } desc;
    uint64_t after;
  } older;
  memset(&older, 0xff, sizeof older);
  older.desc.struct_size = sizeof older.desc;
  OK(phd_model_info(model, (phd_model_desc *)&older.desc, &error));
  CHECK(older.desc.chunk == 32 && older.after == UINT64_MAX);
  INVALID("model", phd_model_info(NULL, &desc, &error));
  INVALID("out", phd_model_info(model, NULL, &error));
  desc.struct_size = 0;
  INVALID("struct_size", phd_model_info(model, &desc, &error));
  size_t n = 0;
  char text[64];
  OK(phd_model_string(model, PHD_MODEL_ARCHITECTURE, text, sizeof text, &n, &error));
  CHECK(n == 5 && memcmp(text, "llama", n) == 0);
  OK(phd_model_string(model, PHD_MODEL_NAME, NULL, 0, &n, &error));
  CHECK(n == 0);
  OK(phd_model_string(model, PHD_MODEL_WEIGHT_TYPE, text, sizeof text, &n, &error));
  CHECK(n == 4 && memcmp(text, "BF16", n) == 0);
  OK(phd_model_string(model, PHD_MODEL_BACKEND, text, sizeof text, &n, &error));
  CHECK(n > 0);
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "5", phd_model_string(model, PHD_MODEL_ARCHITECTURE, text, 1, &n, &error));
  CHECK(n == 5);
  INVALID("kind is 4", phd_model_string(model, 4, text, sizeof text, &n, &error));
  INVALID("model", phd_model_string(NULL, 0, text, sizeof text, &n, &error));
  INVALID("null", phd_model_string(model, 0, text, sizeof text, NULL, &error));
  int32_t token = 7;
  EXPECT(PHD_ERROR_UNSUPPORTED, "tokenizer", phd_special_token(model, PHD_SPECIAL_BOS, &token, &error));
  EXPECT(PHD_ERROR_UNSUPPORTED, "tokenizer", phd_chat_template(model, NULL, 0, text, sizeof text, &n, &error));
  EXPECT(PHD_ERROR_UNSUPPORTED, "tokenizer", phd_tokenize(model, "a", 1, 0, NULL, 0, &n, &error));
  phd_model_free(model);
  newer.later = 1;
  INVALID("field", phd_model_load(golden, &newer.known, &model, &error));
}

static void sessions(const char *golden) {
  phd_model *model = NULL;
  phd_session *session = NULL, *other = NULL;
  phd_session_params params;
  const float *logits = NULL;
  float first[128], second[128];
  size_t n = 0;
  int32_t tokens[N + 1];
  for (int i = 0; i <= N; i++) tokens[i] = (i * 37 + 11) % 128;
  OK(phd_model_load(golden, NULL, &model, &error));
  phd_session_params_init(&params, sizeof params);
  params.n_positions = 0;
  INVALID("n_positions", phd_session_create(model, &params, &session, &error));
  params.n_positions = N;
  params.n_sequences = 0;
  INVALID("n_sequences", phd_session_create(model, &params, &session, &error));
  params.n_sequences = 2;
  params.cache_type = 9;
  INVALID("cache_type", phd_session_create(model, &params, &session, &error));
  const uint64_t row_bytes[] = {32 * 4, 32 * 2, 34, 32 * 2}; /* (phd_cache_type) */
  for (uint32_t type = PHD_CACHE_F32; type <= PHD_CACHE_BF16; type++) {
    phd_memory size;
    size.struct_size = sizeof size;
    params.cache_type = type;
    OK(phd_session_create(model, &params, &session, &error));
    OK(phd_session_memory(session, &size, &error));
    CHECK(size.cache_bytes == 3 * 2 * N * row_bytes[type]);
    OK(phd_prefill(session, 0, tokens, N, &error));
    phd_session_free(session);
    session = NULL;
  }
  params.cache_type = PHD_CACHE_F32;
  INVALID("model", phd_session_create(NULL, &params, &session, &error));
  INVALID("out", phd_session_create(model, &params, NULL, &error));
  OK(phd_session_create(model, &params, &session, &error));
  OK(phd_session_create(model, &params, &other, &error));
  phd_model_free(model); /* sessions keep what they need */

  phd_memory memory;
  memory.struct_size = sizeof memory;
  OK(phd_session_memory(session, &memory, &error));
  CHECK(memory.cache_bytes == 3 * 2 * N * 32 * 4);
  CHECK(memory.hidden_bytes == 3 * 2 * 2 * 16 * 32 * 4);
  CHECK(memory.weights_bytes > 200000 && memory.scratch_bytes > 0);
  INVALID("session", phd_session_memory(NULL, &memory, &error));

  INVALID("session", phd_prefill(NULL, 0, tokens, 1, &error));
  INVALID("tokens is null", phd_prefill(session, 0, NULL, 1, &error));
  INVALID("no tokens", phd_prefill(session, 0, tokens, 0, &error));
  INVALID("sequence 2", phd_prefill(session, 2, tokens, 1, &error));
  INVALID("sequence -1", phd_step(session, -1, 1, &error));
  INVALID("128", phd_step(session, 0, 128, &error));
  INVALID("-5", phd_step(session, 0, -5, &error));
  INVALID("no logits", phd_logits(session, 0, &logits, &n, &error));
  EXPECT(PHD_ERROR_CACHE_FULL, "1 more", (phd_prefill(session, 0, tokens, N, NULL), phd_step(session, 0, 1, &error)));
  OK(phd_seq_length(session, 0, &n, &error));
  CHECK(n == N);
  OK(phd_logits(session, 0, &logits, &n, &error));
  CHECK(n == 128);
  memcpy(first, logits, sizeof first);
  INVALID("logits is null", phd_logits(session, 0, NULL, &n, &error));

  /* A failed call changes nothing; what follows a rollback is what would have followed anyway. */
  OK(phd_seq_truncate(session, 0, N / 2, &error));
  EXPECT(PHD_ERROR_CACHE_FULL, "21 more", phd_prefill(session, 0, tokens, N / 2 + 1, &error));
  INVALID("truncated", phd_seq_truncate(session, 0, N, &error));
  OK(phd_prefill(session, 0, tokens + N / 2, N - N / 2, &error));
  OK(phd_logits(session, 0, &logits, &n, &error));
  for (int i = 0; i < 128; i++) CHECK(fabsf(logits[i] - first[i]) < 1e-4f);

  OK(phd_seq_cancel(session, 0, &error));
  OK(phd_seq_truncate(session, 0, N - 1, &error));
  EXPECT(PHD_ERROR_CANCELLED, "cancelled", phd_step(session, 0, tokens[N - 1], &error));
  OK(phd_step(session, 0, tokens[N - 1], &error));
  OK(phd_seq_cancel(session, 0, &error));
  OK(phd_seq_cancel_clear(session, 0, &error));
  INVALID("sequence 7", phd_seq_cancel(session, 7, &error));
  OK(phd_seq_fork(session, 0, 1, &error));
  OK(phd_logits(session, 1, &logits, &n, &error));
  for (int i = 0; i < 128; i++) CHECK(fabsf(logits[i] - first[i]) < 1e-4f);
  INVALID("sequence 5", phd_seq_fork(session, 0, 5, &error));
  OK(phd_seq_truncate(session, 0, 0, &error));
  OK(phd_seq_length(session, 0, &n, &error));
  CHECK(n == 0);

  /* Several sequences in one call, carried out whole or not at all. */
  phd_batch_entry entries[2];
  memset(entries, 0, sizeof entries);
  for (int i = 0; i < 2; i++) {
    entries[i].struct_size = sizeof entries[i];
    entries[i].seq = i;
    entries[i].flags = PHD_ENTRY_LOGITS;
    entries[i].tokens = tokens;
    entries[i].n_tokens = N / 4;
  }
  OK(phd_seq_truncate(session, 1, 0, &error));
  INVALID("session", phd_decode(NULL, entries, 2, &error));
  INVALID("entries is null", phd_decode(session, NULL, 2, &error));
  INVALID("empty", phd_decode(session, NULL, 0, &error));
  INVALID("empty", phd_decode(session, entries, 0, &error));
  entries[1].struct_size = 16;
  INVALID("entry 1 has struct_size 16", phd_decode(session, entries, 2, &error));
  entries[1].struct_size = sizeof entries[1];
  entries[1].flags = 6;
  INVALID("entry 1 has flags 0x6", phd_decode(session, entries, 2, &error));
  entries[1].flags = PHD_ENTRY_LOGITS;
  entries[1].tokens = NULL;
  INVALID("tokens is null", phd_decode(session, entries, 2, &error));
  entries[1].tokens = tokens;
  entries[1].seq = 0;
  INVALID("twice", phd_decode(session, entries, 2, &error));
  entries[1].seq = 1;
  entries[1].n_tokens = N;
  EXPECT(PHD_ERROR_CACHE_FULL, "50 more", phd_decode(session, entries, 2, &error));
  OK(phd_seq_length(session, 0, &n, &error));
  CHECK(n == 0);
  entries[1].n_tokens = N / 4;
  OK(phd_decode(session, entries, 2, &error));
  entries[0].tokens = entries[1].tokens = tokens + N / 4;
  entries[0].flags = 0;
  OK(phd_decode(session, entries, 2, &error));
  INVALID("no logits", phd_logits(session, 0, &logits, &n, &error));
  OK(phd_logits(session, 1, &logits, &n, &error));
  OK(phd_prefill(other, 0, tokens, N / 2, &error));
  memcpy(second, logits, sizeof second);
  OK(phd_logits(other, 0, &logits, &n, &error));
  for (int i = 0; i < 128; i++) CHECK(fabsf(logits[i] - second[i]) < 1e-4f);
  OK(phd_seq_truncate(other, 0, 0, &error));

  OK(phd_prefill(other, 1, tokens, N, &error));
  phd_session_free(session);
  OK(phd_logits(other, 1, &logits, &n, &error));
  for (int i = 0; i < 128; i++) CHECK(fabsf(logits[i] - first[i]) < 1e-4f);
  phd_session_free(other);
}

enum { VOCAB = 128, EMBD = 64, TEXT = 20 };

/* What a failed call must leave alone. */
typedef struct {
  size_t length;
  bool has_logits;
  float logits[VOCAB];
} sequence;

static sequence look(const phd_session *session, int32_t seq) {
  sequence found;
  const float *logits = NULL;
  size_t n = 0;
  memset(&found, 0, sizeof found);
  OK(phd_seq_length(session, seq, &found.length, &error));
  found.has_logits = phd_logits(session, seq, &logits, &n, NULL) == PHD_OK;
  if (found.has_logits) memcpy(found.logits, logits, sizeof found.logits);
  return found;
}

static bool unchanged(const phd_session *session, int32_t seq, const sequence *before) {
  const sequence now = look(session, seq);
  return now.length == before->length && now.has_logits == before->has_logits &&
         memcmp(now.logits, before->logits, sizeof now.logits) == 0;
}

static bool close_to(const float *found, const float *expected, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (!(fabsf(found[i] - expected[i]) < 1e-4f)) return false;
  }
  return true;
}

static phd_session *new_session(const phd_model *model) {
  phd_session *session = NULL;
  phd_session_params params, old;
  phd_session_params_init(&params, sizeof params);
  CHECK(params.n_retained == 64 && params.n_draft == 0 && params.batch_invariant == 0 && params.reserved == 0);
  params.n_positions = 128;
  params.n_sequences = 2;
  params.cache_type = PHD_CACHE_F32;
  params.reserved = 5;
  INVALID("reserved 5", phd_session_create(model, &params, &session, &error));
  params.reserved = 0;
  params.batch_invariant = 2;
  INVALID("batch_invariant is 2", phd_session_create(model, &params, &session, &error));
  params.batch_invariant = 1;
  params.n_draft = 1000;
  INVALID("n_draft is 1000", phd_session_create(model, &params, &session, &error));
  params.n_draft = 19;
  params.n_retained = 1u << 20;
  INVALID("n_retained is 1048576", phd_session_create(model, &params, &session, &error));
  CHECK(session == NULL);

  /* A program that was compiled before there were these fields: they are not read, whatever stands there. */
  memset(&old, 0xff, sizeof old);
  phd_session_params_init(&old, offsetof(phd_session_params, n_retained));
  old.n_positions = 128;
  OK(phd_session_create(model, &old, &session, &error));
  phd_session_free(session);

  params.n_retained = 2;
  OK(phd_session_create(model, &params, &session, &error));
  return session;
}

/* What a session draws is what is drawn from its logits: those after each of sequence 0's last tokens, and the last. */
static void draws(phd_session *session, float all[TEXT][VOCAB]) {
  phd_sampler *sampler = NULL, *twin = NULL, *other = NULL;
  int32_t found = -7, expected = -8;
  phd_sampler_params params;
  phd_sampler_params_init(&params, sizeof params);
  params.seed = 5;
  for (uint32_t k = 0; k < 60; k += 20) {
    params.top_k = k;
    OK(phd_sampler_create(&params, VOCAB, &sampler, &error));
    OK(phd_sampler_clone(sampler, &twin, &error));
    for (size_t i = 0; i < TEXT; i++) {
      OK(phd_sample_at(session, 0, i, sampler, &found, &error));
      OK(phd_sampler_sample(twin, all[i], VOCAB, &expected, &error));
      CHECK(found == expected);
    }
    OK(phd_sample(session, 0, sampler, &found, &error));
    OK(phd_sampler_sample(twin, all[TEXT - 1], VOCAB, &expected, &error));
    CHECK(found == expected);
    phd_sampler_free(twin);
    if (k < 40) phd_sampler_free(sampler);
  }
  OK(phd_sampler_create(&params, VOCAB - 1, &other, &error));
  found = -7;
  INVALID("session is null", phd_sample(NULL, 0, sampler, &found, &error));
  INVALID("sampler is null", phd_sample(session, 0, NULL, &found, &error));
  INVALID("token is null", phd_sample(session, 0, sampler, NULL, &error));
  INVALID("no logits", phd_sample(session, 1, sampler, &found, &error));
  INVALID("sequence 2", phd_sample(session, 2, sampler, &found, &error));
  INVALID("128 elements", phd_sample(session, 0, other, &found, &error));
  INVALID("session is null", phd_sample_at(NULL, 0, 0, sampler, &found, &error));
  INVALID("sampler is null", phd_sample_at(session, 0, 0, NULL, &found, &error));
  INVALID("token is null", phd_sample_at(session, 0, 0, sampler, NULL, &error));
  INVALID("20 tokens", phd_sample_at(session, 0, TEXT, sampler, &found, &error));
  INVALID("0 tokens", phd_sample_at(session, 1, 0, sampler, &found, &error));
  INVALID("128 elements", phd_sample_at(session, 0, 0, other, &found, &error));
  CHECK(found == -7);
  phd_sampler_free(other);
  phd_sampler_free(sampler);
}

/* Logits of every position, scores and embeddings; sequence 0 has the first TEXT tokens afterwards, sequence 1 nothing. */
static void every_position(phd_session *session, const int32_t *tokens) {
  static float all[TEXT][VOCAB];
  const float *logits = NULL;
  float scores[TEXT], expected, embedding[EMBD], single[EMBD], length = 0.0f;
  size_t n = 0;
  int32_t wrong[2] = {1, VOCAB};
  phd_batch_entry entry;
  sequence before;
  memset(&entry, 0, sizeof entry);
  entry.struct_size = sizeof entry;
  entry.flags = PHD_ENTRY_LOGITS_ALL;
  entry.tokens = tokens;
  entry.n_tokens = TEXT;
  OK(phd_decode(session, &entry, 1, &error));
  for (size_t i = 0; i < TEXT; i++) {
    OK(phd_logits_at(session, 0, i, &logits, &n, &error));
    CHECK(n == VOCAB);
    memcpy(all[i], logits, sizeof all[i]);
  }
  OK(phd_logits(session, 0, &logits, &n, &error));
  CHECK(memcmp(logits, all[TEXT - 1], sizeof all[0]) == 0);
  INVALID("20 tokens", phd_logits_at(session, 0, TEXT, &logits, &n, &error));
  INVALID("20 tokens", phd_logits_at(session, 0, SIZE_MAX, &logits, &n, &error));
  INVALID("0 tokens", phd_logits_at(session, 1, 0, &logits, &n, &error));
  INVALID("sequence 2", phd_logits_at(session, 2, 0, &logits, &n, &error));
  INVALID("logits is null", phd_logits_at(session, 0, 0, NULL, &n, &error));
  INVALID("n_vocab is null", phd_logits_at(session, 0, 0, &logits, NULL, &error));
  INVALID("session", phd_logits_at(NULL, 0, 0, &logits, &n, &error));
  draws(session, all);
  before = look(session, 0);
  entry.n_tokens = 41;
  INVALID("n_draft", phd_decode(session, &entry, 1, &error));
  entry.n_tokens = 1;
  entry.flags = 4;
  INVALID("flags 0x4", phd_decode(session, &entry, 1, &error));
  CHECK(unchanged(session, 0, &before));
  OK(phd_logits_at(session, 0, 3, &logits, &n, &error));
  CHECK(memcmp(logits, all[3], sizeof all[3]) == 0);

  for (int i = 0; i < TEXT; i++) scores[i] = 7.0f;
  INVALID("session", phd_score(NULL, 1, tokens, TEXT, scores, TEXT, &n, &error));
  INVALID("sequence 2", phd_score(session, 2, tokens, TEXT, scores, TEXT, &n, &error));
  INVALID("tokens is null", phd_score(session, 1, NULL, TEXT, scores, TEXT, &n, &error));
  INVALID("0 tokens", phd_score(session, 1, tokens, 0, scores, TEXT, &n, &error));
  INVALID("scores is null", phd_score(session, 1, tokens, TEXT, NULL, TEXT, &n, &error));
  INVALID("null", phd_score(session, 1, tokens, TEXT, scores, TEXT, NULL, &error));
  INVALID("128", phd_score(session, 1, wrong, 2, scores, TEXT, &n, &error));
  OK(phd_seq_cancel(session, 1, &error));
  EXPECT(PHD_ERROR_CANCELLED, "cancelled", phd_score(session, 1, tokens, TEXT, scores, TEXT, &n, &error));
  n = 0;
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "18 elements", phd_score(session, 1, tokens, TEXT, scores, TEXT - 2, &n, &error));
  CHECK(n == TEXT - 1);
  for (int i = 0; i < TEXT; i++) CHECK(scores[i] == 7.0f);
  OK(phd_seq_length(session, 1, &n, &error));
  CHECK(n == 0);
  OK(phd_score(session, 1, tokens, TEXT, scores, TEXT, &n, &error));
  CHECK(n == TEXT - 1 && scores[TEXT - 1] == 7.0f);
  for (int i = 0; i + 1 < TEXT; i++) {
    OK(phd_logprobs(all[i], VOCAB, tokens + i + 1, 1, &expected, &error));
    CHECK(fabsf(scores[i] - expected) < 1e-4f);
  }
  OK(phd_seq_length(session, 1, &n, &error));
  CHECK(n == TEXT);
  INVALID("no logits", phd_logits(session, 1, &logits, &n, &error));

  OK(phd_seq_truncate(session, 1, 0, &error));
  INVALID("pooling is 2", phd_embed(session, 1, tokens, TEXT, 2, true, embedding, EMBD, &n, &error));
  INVALID("session", phd_embed(NULL, 1, tokens, TEXT, PHD_POOLING_LAST, true, embedding, EMBD, &n, &error));
  INVALID("tokens is null", phd_embed(session, 1, NULL, 1, PHD_POOLING_LAST, true, embedding, EMBD, &n, &error));
  INVALID("no tokens", phd_embed(session, 1, tokens, 0, PHD_POOLING_LAST, true, embedding, EMBD, &n, &error));
  INVALID("embedding is null", phd_embed(session, 1, tokens, 1, PHD_POOLING_LAST, true, NULL, EMBD, &n, &error));
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "63 elements",
         phd_embed(session, 1, tokens, TEXT, PHD_POOLING_MEAN, true, embedding, EMBD - 1, &n, &error));
  CHECK(n == EMBD);
  OK(phd_seq_length(session, 1, &n, &error));
  CHECK(n == 0);
  OK(phd_embed(session, 1, tokens, TEXT, PHD_POOLING_MEAN, true, embedding, EMBD, &n, &error));
  CHECK(n == EMBD);
  for (int i = 0; i < EMBD; i++) length += embedding[i] * embedding[i];
  CHECK(fabsf(length - 1.0f) < 1e-4f);
  INVALID("no logits", phd_logits(session, 1, &logits, &n, &error));
  /* Of one token the mean is the last. */
  OK(phd_seq_truncate(session, 1, 0, &error));
  OK(phd_embed(session, 1, tokens, 1, PHD_POOLING_MEAN, false, embedding, EMBD, &n, &error));
  OK(phd_seq_truncate(session, 1, 0, &error));
  OK(phd_embed(session, 1, tokens, 1, PHD_POOLING_LAST, false, single, EMBD, &n, &error));
  CHECK(memcmp(embedding, single, sizeof single) == 0);
  OK(phd_seq_truncate(session, 1, 0, &error));
}

/* Retained texts, what the pool and the counters say; sequence 0 is empty afterwards, sequence 1 has the first TEXT tokens. */
static void prefixes(phd_session *session, const int32_t *tokens) {
  const sequence before = look(session, 0);
  const float *logits = NULL;
  int32_t text[TEXT], other[2] = {tokens[1], tokens[0]}, wrong = -3, seq = 77;
  size_t n = 0;
  phd_usage usage;
  phd_stats stats, first;
  first.struct_size = sizeof first;
  OK(phd_session_stats(session, &first, &error));

  memset(text, 0, sizeof text);
  INVALID("session", phd_seq_tokens(NULL, 0, text, TEXT, &n, &error));
  INVALID("sequence -1", phd_seq_tokens(session, -1, text, TEXT, &n, &error));
  INVALID("tokens is null", phd_seq_tokens(session, 0, NULL, TEXT, &n, &error));
  INVALID("null", phd_seq_tokens(session, 0, text, TEXT, NULL, &error));
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "19 elements", phd_seq_tokens(session, 0, text, TEXT - 1, &n, &error));
  CHECK(n == TEXT && text[0] == 0);
  OK(phd_seq_tokens(session, 0, text, TEXT, &n, &error));
  CHECK(n == TEXT && memcmp(text, tokens, sizeof text) == 0);
  OK(phd_seq_tokens(session, 1, NULL, 0, &n, &error));
  CHECK(n == 0);

  INVALID("session", phd_seq_retain(NULL, 0, &error));
  INVALID("sequence 9", phd_seq_retain(session, 9, &error));
  CHECK(unchanged(session, 0, &before));
  OK(phd_seq_retain(session, 0, &error));
  OK(phd_seq_length(session, 0, &n, &error));
  CHECK(n == 0);
  INVALID("no logits", phd_logits(session, 0, &logits, &n, &error));

  memset(&usage, 0xff, sizeof usage);
  usage.struct_size = offsetof(phd_usage, shared);
  OK(phd_session_usage(session, &usage, &error));
  CHECK(usage.used == 0 && usage.free == 128 - TEXT && usage.shared == UINT64_MAX && usage.block == UINT64_MAX);
  usage.struct_size = sizeof usage;
  OK(phd_session_usage(session, &usage, &error));
  CHECK(usage.used == 0 && usage.shared == 0 && usage.retained == TEXT && usage.block == 1);
  INVALID("session", phd_session_usage(NULL, &usage, &error));
  INVALID("out", phd_session_usage(session, NULL, &error));
  usage.struct_size = 8;
  INVALID("struct_size is 8", phd_session_usage(session, &usage, &error));

  INVALID("session", phd_seq_match_prefix(NULL, tokens, TEXT, &n, &seq, &error));
  INVALID("tokens is null", phd_seq_match_prefix(session, NULL, TEXT, &n, &seq, &error));
  INVALID("n_positions is null", phd_seq_match_prefix(session, tokens, TEXT, NULL, &seq, &error));
  INVALID("seq is null", phd_seq_match_prefix(session, tokens, TEXT, &n, NULL, &error));
  INVALID("token 0 is -3", phd_seq_match_prefix(session, &wrong, 1, &n, &seq, &error));
  CHECK(seq == 77);
  OK(phd_seq_match_prefix(session, tokens, N, &n, &seq, &error));
  CHECK(n == TEXT && seq == -1);
  OK(phd_seq_match_prefix(session, other, 2, &n, &seq, &error));
  CHECK(n == 0 && seq == -1);

  INVALID("session", phd_seq_take_prefix(NULL, 1, tokens, TEXT, &n, &error));
  INVALID("sequence 2", phd_seq_take_prefix(session, 2, tokens, TEXT, &n, &error));
  INVALID("tokens is null", phd_seq_take_prefix(session, 1, NULL, TEXT, &n, &error));
  INVALID("n_positions is null", phd_seq_take_prefix(session, 1, tokens, TEXT, NULL, &error));
  INVALID("token 0 is -3", phd_seq_take_prefix(session, 1, &wrong, 1, &n, &error));
  OK(phd_seq_take_prefix(session, 1, tokens, TEXT - 1, &n, &error));
  CHECK(n == TEXT - 1);
  INVALID("no logits", phd_logits(session, 1, &logits, &n, &error));
  OK(phd_step(session, 1, tokens[TEXT - 1], &error));
  OK(phd_logits(session, 1, &logits, &n, &error));
  CHECK(close_to(logits, before.logits, VOCAB));
  OK(phd_seq_match_prefix(session, tokens, N, &n, &seq, &error));
  CHECK(n == TEXT && seq == 1);
  OK(phd_seq_take_prefix(session, 0, other, 2, &n, &error));
  CHECK(n == 0);
  OK(phd_seq_take_prefix(session, 0, NULL, 0, &n, &error));
  CHECK(n == 0);
  /* 19 positions are the retained text's, too. */
  usage.struct_size = sizeof usage;
  OK(phd_session_usage(session, &usage, &error));
  CHECK(usage.used == TEXT && usage.retained == 1 && usage.free == 128 - TEXT - 1 && usage.shared == 0);

  memset(&stats, 0xff, sizeof stats);
  stats.struct_size = offsetof(phd_stats, step_tokens);
  OK(phd_session_stats(session, &stats, &error));
  CHECK(stats.prompt_tokens == first.prompt_tokens && stats.step_tokens == UINT64_MAX);
  stats.struct_size = sizeof stats;
  OK(phd_session_stats(session, &stats, &error));
  CHECK(stats.step_tokens == first.step_tokens + 1 && stats.calls == first.calls + 1 && stats.passes == first.passes + 1);
  CHECK(stats.prefix_lookups == first.prefix_lookups + 3 && stats.prefix_hits == first.prefix_hits + 1);
  CHECK(stats.prefix_tokens == first.prefix_tokens + TEXT - 1 && stats.rows > first.rows);
  CHECK(stats.step_ns > first.step_ns && stats.prefill_ns == first.prefill_ns && stats.wait_ns >= first.wait_ns);
  CHECK(stats.dropped == 0 && stats.evicted == 0 && stats.cancelled == 1 && stats.cache_full == 0);
  INVALID("session", phd_session_stats(NULL, &stats, &error));
  INVALID("out", phd_session_stats(session, NULL, &error));
  stats.struct_size = 1;
  INVALID("struct_size is 1", phd_session_stats(session, &stats, &error));
}

/* Sequence 0 drops its middle. */
static void policies(phd_session *session, const int32_t *tokens) {
  phd_seq_policy policy;
  int32_t text[64];
  size_t n = 0;
  sequence before;
  memset(&policy, 0xff, sizeof policy);
  phd_seq_policy_init(&policy, sizeof policy);
  CHECK(policy.struct_size == sizeof policy && policy.when_full == PHD_WHEN_FULL_STOP && policy.n_keep == 0);
  CHECK(policy.limit == 0 && policy.reserved == 0);
  phd_seq_policy_init(NULL, sizeof policy);
  INVALID("session", phd_seq_set_policy(NULL, 0, &policy, &error));
  INVALID("sequence 2", phd_seq_set_policy(session, 2, &policy, &error));
  OK(phd_seq_set_policy(session, 0, NULL, &error));
  policy.struct_size = 3;
  INVALID("struct_size is 3", phd_seq_set_policy(session, 0, &policy, &error));
  policy.struct_size = sizeof policy;
  policy.when_full = 2;
  INVALID("when_full is 2", phd_seq_set_policy(session, 0, &policy, &error));
  policy.when_full = PHD_WHEN_FULL_DROP_MIDDLE;
  policy.reserved = 1;
  INVALID("reserved is 1", phd_seq_set_policy(session, 0, &policy, &error));
  policy.reserved = 0;
  policy.limit = 129;
  INVALID("limit is 129", phd_seq_set_policy(session, 0, &policy, &error));
  policy.n_keep = 4;
  policy.limit = 36;
  INVALID("limit is 36, expected 37 to 123", phd_seq_set_policy(session, 0, &policy, &error));
  policy.limit = 124;
  INVALID("limit is 124", phd_seq_set_policy(session, 0, &policy, &error));

  policy.when_full = PHD_WHEN_FULL_STOP;
  policy.limit = 64;
  OK(phd_seq_set_policy(session, 0, &policy, &error));
  OK(phd_prefill(session, 0, tokens, 64, &error));
  before = look(session, 0);
  EXPECT(PHD_ERROR_CACHE_FULL, "1 more", phd_step(session, 0, 1, &error));
  CHECK(unchanged(session, 0, &before));

  policy.when_full = PHD_WHEN_FULL_DROP_MIDDLE;
  OK(phd_seq_set_policy(session, 0, &policy, &error));
  OK(phd_seq_cancel(session, 0, &error));
  EXPECT(PHD_ERROR_CANCELLED, "cancelled", phd_step(session, 0, 1, &error));
  CHECK(unchanged(session, 0, &before));
  OK(phd_seq_dropped(session, 0, &n, &error));
  CHECK(n == 0);
  OK(phd_step(session, 0, 1, &error));
  OK(phd_seq_dropped(session, 0, &n, &error));
  CHECK(n == 32);
  OK(phd_seq_tokens(session, 0, text, 64, &n, &error));
  CHECK(n == 33 && memcmp(text, tokens, 4 * sizeof *text) == 0 && text[32] == 1);
  CHECK(memcmp(text + 4, tokens + 36, 28 * sizeof *text) == 0);
  INVALID("session", phd_seq_dropped(NULL, 0, &n, &error));
  INVALID("sequence 2", phd_seq_dropped(session, 2, &n, &error));
  INVALID("n_positions is null", phd_seq_dropped(session, 0, NULL, &error));
}

/* A sequence as bytes and as a file. */
static void states(const phd_model *model, phd_session *session, const char *folder, const char *path) {
  phd_session *halves = NULL;
  phd_session_params params;
  sequence saved = look(session, 0), before = look(session, 1);
  size_t n = 0, written = 0;
  uint8_t *state = NULL;
  FILE *file = NULL;
  INVALID("session", phd_seq_save(NULL, 0, NULL, 0, &n, &error));
  INVALID("sequence 2", phd_seq_save(session, 2, NULL, 0, &n, &error));
  INVALID("state is null", phd_seq_save(session, 0, NULL, 4, &n, &error));
  INVALID("null", phd_seq_save(session, 0, NULL, 0, NULL, &error));
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "0 elements", phd_seq_save(session, 0, NULL, 0, &n, &error));
  CHECK(n > saved.length * 3 * 2 * 32 * 4 + VOCAB * 4 && n < 40000);
  state = (uint8_t *)malloc(n);
  CHECK(state != NULL);
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "elements", phd_seq_save(session, 0, state, n - 1, &n, &error));
  OK(phd_seq_save(session, 0, state, n, &written, &error));
  CHECK(written == n);

  INVALID("session", phd_seq_restore(NULL, 1, state, n, &error));
  INVALID("sequence 2", phd_seq_restore(session, 2, state, n, &error));
  INVALID("state is null", phd_seq_restore(session, 1, NULL, n, &error));
  INVALID("0 bytes", phd_seq_restore(session, 1, NULL, 0, &error));
  INVALID("more than memory", phd_seq_restore(session, 1, state, SIZE_MAX, &error));
  for (size_t i = 0; i < n; i += i < 80 ? 1 : 997) {
    INVALID("saved state", phd_seq_restore(session, 1, state, i, &error));
    state[i] ^= 16;
    INVALID("saved state", phd_seq_restore(session, 1, state, n, &error));
    state[i] ^= 16;
  }
  phd_session_params_init(&params, sizeof params);
  OK(phd_session_create(model, &params, &halves, &error));
  INVALID("cache type", phd_seq_restore(halves, 0, state, n, &error));
  phd_session_free(halves);
  CHECK(unchanged(session, 1, &before));
  OK(phd_seq_restore(session, 1, state, n, &error));
  CHECK(unchanged(session, 1, &saved));
  OK(phd_seq_dropped(session, 1, &written, &error));
  CHECK(written == 32);
  OK(phd_step(session, 0, 5, &error));
  OK(phd_step(session, 1, 5, &error));
  saved = look(session, 0);
  before = look(session, 1);
  CHECK(close_to(saved.logits, before.logits, VOCAB));

  INVALID("session", phd_seq_save_file(NULL, 0, path, &error));
  INVALID("path is null", phd_seq_save_file(session, 0, NULL, &error));
  INVALID("sequence 2", phd_seq_save_file(session, 2, path, &error));
  EXPECT(PHD_ERROR_IO, "/no/such/folder", phd_seq_save_file(session, 0, "/no/such/folder/state", &error));
  INVALID("session", phd_seq_restore_file(NULL, 1, path, &error));
  INVALID("path is null", phd_seq_restore_file(session, 1, NULL, &error));
  EXPECT(PHD_ERROR_IO, path, phd_seq_restore_file(session, 1, path, &error));
  EXPECT(PHD_ERROR_IO, folder, phd_seq_restore_file(session, 1, folder, &error));
  file = fopen(path, "wb");
  CHECK(file != NULL);
  if (file != NULL) {
    CHECK(fwrite(state, 1, n - 1, file) == n - 1);
    fclose(file);
  }
  EXPECT(PHD_ERROR_FORMAT, path, phd_seq_restore_file(session, 1, path, &error));
  CHECK(unchanged(session, 1, &before));
  OK(phd_seq_save_file(session, 0, path, &error));
  OK(phd_seq_restore_file(session, 1, path, &error));
  CHECK(unchanged(session, 1, &saved));
  CHECK(remove(path) == 0);
  free(state);
}

static void serving(const char *golden, const char *folder, const char *state_path) {
  phd_model *model = NULL;
  phd_session *session;
  int32_t tokens[64];
  for (int i = 0; i < 64; i++) tokens[i] = (i * 37 + 11) % VOCAB;
  OK(phd_model_load(golden, NULL, &model, &error));
  session = new_session(model);
  every_position(session, tokens);
  prefixes(session, tokens);
  policies(session, tokens);
  states(model, session, folder, state_path);
  phd_session_free(session);
  phd_model_free(model);
}

static void set(const char **text, size_t *len, const char *value) {
  *text = value;
  *len = value == NULL ? 0 : strlen(value);
}

/* A model without a chat template, and templates given with the call. */
static void chat(const phd_model *model) {
  phd_chat_params params;
  char buffer[256], deep[400];
  const char *expected = "user: Hi caf\xc3\xa9|[{\"type\": \"function\"}]|yes|";
  size_t length = 0;
  phd_chat_params_init(&params, sizeof params);
  EXPECT(PHD_ERROR_UNSUPPORTED, "no chat template", phd_chat_template(model, NULL, 0, buffer, sizeof buffer, &length, &error));
  EXPECT(PHD_ERROR_UNSUPPORTED, "no chat template", phd_chat_template(model, "x", 1, buffer, sizeof buffer, &length, &error));
  INVALID("UTF-8", phd_chat_template(model, "\xff", 1, buffer, sizeof buffer, &length, &error));
  INVALID("name is null", phd_chat_template(model, NULL, 1, buffer, sizeof buffer, &length, &error));
  INVALID("model", phd_chat_template(NULL, NULL, 0, buffer, sizeof buffer, &length, &error));
  INVALID("no chat template", phd_chat_render(model, NULL, buffer, sizeof buffer, &length, &error));
  set(&params.messages, &params.messages_len, "[{\"role\": \"user\", \"content\": \"Hi caf\xc3\xa9\", \"name\": null}]");
  INVALID("no chat template", phd_chat_render(model, &params, buffer, sizeof buffer, &length, &error));
  set(&params.source, &params.source_len,
      "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}|{{ tools|tojson }}|{{ 'yes' if flag }}|"
      "{{ 'name' in messages[0] and 'never' or '' }}{{ raise_exception('refused: ' ~ refuse) if refuse }}");
  set(&params.tools, &params.tools_len, "[{\"type\": \"function\"}]");
  set(&params.variables, &params.variables_len, "{\"flag\": true}");
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "", phd_chat_render(model, &params, NULL, 0, &length, &error));
  CHECK(length == strlen(expected));
  OK(phd_chat_render(model, &params, buffer, sizeof buffer, &length, &error));
  CHECK(length == strlen(expected) && memcmp(buffer, expected, length) == 0);
  set(&params.variables, &params.variables_len, "{\"refuse\": \"so\"}");
  INVALID("refused: so", phd_chat_render(model, &params, buffer, sizeof buffer, &length, &error));
  set(&params.variables, &params.variables_len, "{\"messages\": 1}");
  INVALID("variables.messages", phd_chat_render(model, &params, buffer, sizeof buffer, &length, &error));
  set(&params.variables, &params.variables_len, "[]");
  INVALID("variables is no object", phd_chat_render(model, &params, buffer, sizeof buffer, &length, &error));
  set(&params.variables, &params.variables_len, "{\"a\": }");
  INVALID("variables is not JSON: expected value at line 1 column 7",
          phd_chat_render(model, &params, buffer, sizeof buffer, &length, &error));
  memset(deep, '[', sizeof deep);
  params.variables = deep;
  params.variables_len = sizeof deep;
  INVALID("variables is not JSON: recursion limit", phd_chat_render(model, &params, buffer, sizeof buffer, &length, &error));
  set(&params.variables, &params.variables_len, NULL);
  set(&params.tools, &params.tools_len, "[1]");
  INVALID("tools[0] is no object", phd_chat_render(model, &params, buffer, sizeof buffer, &length, &error));
  memset(deep, '[', 80);
  memset(deep + 80, ']', 80);
  snprintf(buffer, sizeof buffer, "[{\"content\": %.160s}]", deep);
  set(&params.messages, &params.messages_len, buffer);
  set(&params.tools, &params.tools_len, NULL);
  INVALID("messages[0].content nests", phd_chat_render(model, &params, NULL, 0, &length, &error));
  set(&params.messages, &params.messages_len, "[]");
  INVALID("messages is empty", phd_chat_render(model, &params, NULL, 0, &length, &error));
  set(&params.messages, &params.messages_len, "[\"\xff\"]");
  INVALID("messages is not JSON", phd_chat_render(model, &params, NULL, 0, &length, &error));
  set(&params.messages, &params.messages_len, "[7]");
  INVALID("messages[0] is no object", phd_chat_render(model, &params, NULL, 0, &length, &error));
  set(&params.messages, &params.messages_len, "[{}]");
  set(&params.source, &params.source_len, "{{ 1 + }}");
  INVALID("does not compile", phd_chat_render(model, &params, NULL, 0, &length, &error));
  set(&params.source, &params.source_len, "{{ 'x' * 999999999 }}");
  INVALID("out of fuel", phd_chat_render(model, &params, NULL, 0, &length, &error));
  params.messages = NULL;
  INVALID("messages is null", phd_chat_render(model, &params, NULL, 0, &length, &error));
  INVALID("model", phd_chat_render(NULL, &params, NULL, 0, &length, &error));
  params.struct_size = 1;
  INVALID("struct_size", phd_chat_render(model, &params, NULL, 0, &length, &error));
}

static void text(const char *demo) {
  phd_model *model = NULL;
  phd_stream *stream = NULL;
  int32_t tokens[64];
  char buffer[64];
  const char *prompt = "In the beginning \xf0\x9f\x8c\x8d";
  size_t n = 0, length = 0, total = 0;
  bool is_end = false;
  OK(phd_model_load(demo, NULL, &model, &error));
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "0 elements", phd_tokenize(model, prompt, strlen(prompt), 0, NULL, 0, &n, &error));
  CHECK(n > 5 && n < 64);
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "1 elements", phd_tokenize(model, prompt, strlen(prompt), 0, tokens, 1, &n, &error));
  OK(phd_tokenize(model, prompt, strlen(prompt), 3, tokens, 64, &n, &error));
  INVALID("flags", phd_tokenize(model, prompt, 2, 4, tokens, 64, &n, &error));
  INVALID("UTF-8", phd_tokenize(model, "\xff", 1, 0, tokens, 64, &n, &error));
  INVALID("text is null", phd_tokenize(model, NULL, 1, 0, tokens, 64, &n, &error));
  INVALID("tokens is null", phd_tokenize(model, prompt, 2, 0, NULL, 4, &n, &error));
  OK(phd_tokenize(model, NULL, 0, 0, NULL, 0, &n, &error));
  CHECK(n == 0);
  OK(phd_tokenize(model, prompt, strlen(prompt), 0, tokens, 64, &n, &error));
  OK(phd_detokenize(model, tokens, n, buffer, sizeof buffer, &length, &error));
  CHECK(length == strlen(prompt) && memcmp(buffer, prompt, length) == 0);
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "", phd_detokenize(model, tokens, n, NULL, 0, &length, &error));
  CHECK(length == strlen(prompt));
  tokens[n] = 1 << 20;
  INVALID("1048576", phd_detokenize(model, tokens, n + 1, buffer, sizeof buffer, &length, &error));
  OK(phd_stream_create(model, &stream, &error));
  for (size_t i = 0; i < n; i++) {
    OK(phd_stream_push(stream, tokens[i], buffer + total, sizeof buffer - total, &length, &error));
    total += length;
  }
  CHECK(total == strlen(prompt) && memcmp(buffer, prompt, total) == 0);
  OK(phd_stream_finish(stream, buffer, sizeof buffer, &length, &error));
  CHECK(length == 0);
  OK(phd_token_is_end(model, 0, &is_end, &error));
  CHECK(is_end);
  INVALID("stream", phd_stream_push(NULL, 0, buffer, 1, &length, &error));

  /* Tokens by role. */
  int32_t token = 7;
  OK(phd_special_token(model, PHD_SPECIAL_BOS, &token, &error));
  CHECK(token == 0);
  OK(phd_special_token(model, PHD_SPECIAL_FIM_SEPARATOR, &token, &error));
  CHECK(token == -1);
  INVALID("kind is 11", phd_special_token(model, PHD_SPECIAL_FIM_SEPARATOR + 1, &token, &error));
  INVALID("token is null", phd_special_token(model, PHD_SPECIAL_BOS, NULL, &error));
  INVALID("model", phd_special_token(NULL, PHD_SPECIAL_BOS, &token, &error));

  /* Bytes of tokens, and control tokens. */
  uint8_t bytes[16];
  OK(phd_token_bytes(model, tokens[0], false, bytes, sizeof bytes, &length, &error));
  CHECK(length > 0 && length < 16 && memcmp(bytes, prompt, length) == 0);
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "", phd_token_bytes(model, tokens[0], false, NULL, 0, &length, &error));
  CHECK(length > 0);
  OK(phd_token_bytes(model, 0, false, NULL, 0, &length, &error));
  CHECK(length == 0);
  EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "", phd_token_bytes(model, 0, true, NULL, 0, &length, &error));
  CHECK(length > 0);
  INVALID("1048576", phd_token_bytes(model, 1 << 20, true, bytes, sizeof bytes, &length, &error));
  INVALID("-1", phd_token_bytes(model, -1, true, bytes, sizeof bytes, &length, &error));
  INVALID("model", phd_token_bytes(NULL, 0, true, bytes, sizeof bytes, &length, &error));

  /* Stop strings: the text ends before "beginning", whatever the tokens are; a small buffer changes nothing. */
  int32_t stop = 7;
  uint64_t n_bytes = 7;
  INVALID("0 bytes", phd_stream_add_stop(stream, "", 0, &error));
  INVALID("null", phd_stream_add_stop(stream, NULL, 3, &error));
  INVALID("UTF-8", phd_stream_add_stop(stream, "\xff", 1, &error));
  INVALID("stream", phd_stream_add_stop(NULL, "a", 1, &error));
  OK(phd_stream_add_stop(stream, "never", 5, &error));
  OK(phd_stream_add_stop(stream, "beginning", 9, &error));
  OK(phd_stream_stop(stream, &stop, &n_bytes, &error));
  CHECK(stop == -1 && n_bytes == 0);
  total = 0;
  for (size_t i = 0; i < n; i++) {
    phd_status status = phd_stream_push(stream, tokens[i], NULL, 0, &length, NULL);
    if (status == PHD_ERROR_BUFFER_TOO_SMALL) {
      OK(phd_stream_push(stream, tokens[i], buffer + total, sizeof buffer - total, &length, &error));
      total += length;
    } else {
      CHECK(status == PHD_OK && length == 0);
    }
  }
  OK(phd_stream_stop(stream, &stop, &n_bytes, &error));
  CHECK(stop == 1 && n_bytes == total && total == 7 && memcmp(buffer, "In the ", total) == 0);
  INVALID("within a text", phd_stream_add_stop(stream, "x", 1, &error));
  INVALID("within a text", phd_stream_set_special(stream, true, &error));
  INVALID("n_bytes", phd_stream_stop(stream, &stop, NULL, &error));
  INVALID("stream", phd_stream_stop(NULL, &stop, &n_bytes, &error));
  OK(phd_stream_finish(stream, NULL, 0, &length, &error));
  OK(phd_stream_set_special(stream, true, &error));
  OK(phd_stream_push(stream, 0, buffer, sizeof buffer, &length, &error));
  CHECK(length > 0);
  OK(phd_stream_finish(stream, buffer, sizeof buffer, &length, &error));
  phd_stream_free(stream);
  chat(model);
  phd_model_free(model);
}

static void samplers(const char *text_model) {
  phd_model *model = NULL;
  phd_sampler *sampler = NULL, *fork = NULL;
  phd_sampler_params params;
  phd_model_desc desc;
  const float logits[4] = {0.0f, 3.0f, 1.0f, -2.0f};
  const int32_t two[2] = {1, 9};
  const float biases[2] = {-INFINITY, 0.0f};
  const char schema[] = "{\"type\": \"boolean\"}", ignored[] = "{\"uniqueItems\": true}";
  char text[64];
  float *row, logprobs[5];
  int32_t token = -1, tokens[5];
  size_t length, total = 0;
  int i;
  phd_sampler_params_init(&params, sizeof params);
  params.top_p = -1.0f;
  INVALID("top_p", phd_sampler_create(&params, 4, &sampler, &error));
  phd_sampler_params_init(&params, sizeof params);
  params.temperature = 0.0f;
  OK(phd_sampler_create(&params, 4, &sampler, &error));
  OK(phd_sampler_sample(sampler, logits, 4, &token, &error));
  CHECK(token == 1);
  INVALID("", phd_sampler_sample(sampler, logits, 3, &token, &error));
  INVALID("logits", phd_sampler_sample(sampler, NULL, 4, &token, &error));
  INVALID("9", phd_sampler_accept(sampler, 9, &error));
  OK(phd_sampler_accept(sampler, 1, &error));
  INVALID("9", phd_sampler_accept_prompt(sampler, two, 2, &error));
  OK(phd_sampler_accept_prompt(sampler, two, 1, &error));
  INVALID("9", phd_sampler_add_logit_bias(sampler, two, biases, 2, &error));
  OK(phd_sampler_sample(sampler, logits, 4, &token, &error));
  CHECK(token == 1);
  OK(phd_sampler_add_logit_bias(sampler, two, biases, 1, &error));
  OK(phd_sampler_sample(sampler, logits, 4, &token, &error));
  CHECK(token == 2);
  OK(phd_sampler_reset(sampler, &error));
  phd_sampler_free(sampler);

  /* A chain of one's own. */
  OK(phd_sampler_create_empty(4, 7, &sampler, &error));
  params.top_k = 2;
  OK(phd_sampler_add(sampler, PHD_STAGE_TOP_K, &params, &error));
  INVALID("99", phd_sampler_add(sampler, 99, &params, &error));
  OK(phd_sampler_add(sampler, PHD_STAGE_GREEDY, NULL, &error));
  INVALID("Greedy", phd_sampler_add(sampler, PHD_STAGE_DRAW, NULL, &error));
  OK(phd_sampler_add_dry_breaker(sampler, two, 1, &error));
  INVALID("no tokens", phd_sampler_add_dry_breaker(sampler, two, 0, &error));
  OK(phd_sampler_sample(sampler, logits, 4, &token, &error));
  CHECK(token == 1);
  phd_sampler_free(sampler);

  /* Log-probabilities: of 4 logits, ln(e^3 / (1 + e^3 + e + e^-2)). */
  OK(phd_top_logprobs(logits, 4, 2, tokens, logprobs, &error));
  CHECK(tokens[0] == 1 && tokens[1] == 2);
  CHECK(fabsf(logprobs[0] + 0.1755f) < 1e-3f && fabsf(logprobs[0] - logprobs[1] - 2.0f) < 1e-6f);
  OK(phd_logprobs(logits, 4, tokens + 1, 1, logprobs, &error));
  CHECK(logprobs[0] == logprobs[1]);
  INVALID("9", phd_logprobs(logits, 4, two, 2, logprobs, &error));
  INVALID("logprobs", phd_logprobs(logits, 4, two, 1, NULL, &error));
  INVALID("n is 5", phd_top_logprobs(logits, 4, 5, tokens, logprobs, &error));

  /* A constraint. */
  OK(phd_model_load(text_model, NULL, &model, &error));
  desc.struct_size = sizeof desc;
  OK(phd_model_info(model, &desc, &error));
  row = (float *)calloc(desc.n_vocab, sizeof *row);
  CHECK(row != NULL);
  OK(phd_sampler_create(NULL, desc.n_vocab, &sampler, &error));
  EXPECT(PHD_ERROR_UNSUPPORTED, "uniqueItems",
         phd_sampler_add_json_schema(sampler, model, ignored, strlen(ignored), &error));
  INVALID("model", phd_sampler_add_json_schema(sampler, NULL, schema, strlen(schema), &error));
  INVALID("schema", phd_sampler_add_json_schema(sampler, model, NULL, 5, &error));
  INVALID("UTF-8", phd_sampler_add_grammar(sampler, model, "\xff", 1, &error));
  INVALID("regular", phd_sampler_add_regex(sampler, model, "(", 1, &error));

  /* One that begins within a text, ends, and is taken away. */
  bool done = true;
  OK(phd_sampler_accept(sampler, 1, &error));
  OK(phd_sampler_remove_constraint(sampler, &error));
  OK(phd_sampler_constraint_done(sampler, &done, &error));
  CHECK(!done);
  INVALID("no constraint", phd_sampler_constraint_accept(sampler, "a", 1, &error));
  OK(phd_sampler_add_regex(sampler, model, "ab", 2, &error));
  INVALID("\"b\"", phd_sampler_constraint_accept(sampler, "b", 1, &error));
  OK(phd_sampler_constraint_accept(sampler, "a", 1, &error));
  OK(phd_sampler_constraint_done(sampler, &done, &error));
  CHECK(!done);
  OK(phd_sampler_constraint_accept(sampler, "b", 1, &error));
  OK(phd_sampler_constraint_done(sampler, &done, &error));
  CHECK(done);
  INVALID("done is null", phd_sampler_constraint_done(sampler, NULL, &error));
  INVALID("sampler", phd_sampler_constraint_done(NULL, &done, &error));
  INVALID("UTF-8", phd_sampler_constraint_accept(sampler, "\xff", 1, &error));
  INVALID("sampler", phd_sampler_remove_constraint(NULL, &error));
  OK(phd_sampler_remove_constraint(sampler, &error));

  INVALID("line 1, column 11", phd_sampler_add_gbnf(sampler, model, "root ::= (", 10, &error));
  OK(phd_sampler_add_gbnf(sampler, model, "root ::= \"a\" root | \"b\"", 23, &error));
  OK(phd_sampler_constraint_accept(sampler, "aab", 3, &error));
  OK(phd_sampler_constraint_done(sampler, &done, &error));
  CHECK(done);
  OK(phd_sampler_remove_constraint(sampler, &error));
  INVALID("model", phd_sampler_add_gbnf(sampler, NULL, "root ::= \"a\"", 12, &error));

  OK(phd_sampler_add_json_schema(sampler, model, schema, strlen(schema), &error));
  INVALID("constraint", phd_sampler_add_regex(sampler, model, "a", 1, &error));
  OK(phd_sampler_add_dry_breaker_text(sampler, model, "\n", 1, &error));
  OK(phd_sampler_clone(sampler, &fork, &error));
  phd_sampler_free(sampler);
  for (i = 0; i < 10; i++) {
    bool is_end = false;
    OK(phd_sampler_sample(fork, row, desc.n_vocab, &token, &error));
    OK(phd_sampler_accept(fork, token, &error));
    OK(phd_token_is_end(model, token, &is_end, &error));
    if (is_end) break;
    OK(phd_detokenize(model, &token, 1, text + total, sizeof text - total, &length, &error));
    total += length;
  }
  CHECK((total == 4 && memcmp(text, "true", 4) == 0) || (total == 5 && memcmp(text, "false", 5) == 0));
  free(row);
  phd_sampler_free(fork);
  phd_model_free(model);
}

static void conversion(const char *golden) {
  phd_convert_params params;
  phd_model *model = NULL;
  char first[64], second[64];
  snprintf(first, sizeof first, "/tmp/phd-contract-%p-1.gguf", (void *)&params);
  snprintf(second, sizeof second, "/tmp/phd-contract-%p-2.gguf", (void *)&params);
  INVALID("folder is null", phd_convert(NULL, first, NULL, &error));
  INVALID("out is null", phd_convert(golden, NULL, NULL, &error));
  EXPECT(PHD_ERROR_IO, "/no/such", phd_convert("/no/such", first, NULL, &error));
  phd_convert_params_init(&params, sizeof params);
  params.weight_type = 99;
  INVALID("weight_type is 99", phd_convert(golden, first, &params, &error));
  params.weight_type = PHD_WEIGHT_AUTO;
  params.flags = 8;
  INVALID("flags", phd_convert(golden, first, &params, &error));
  params.flags = 0;
  params.struct_size = 1;
  INVALID("struct_size", phd_convert(golden, first, &params, &error));
  phd_convert_params_init(&params, sizeof params);
  int calls = 0;
  params.progress = stop_at_once;
  params.progress_user = &calls;
  EXPECT(PHD_ERROR_CANCELLED, "cancelled", phd_convert(golden, first, &params, &error));
  CHECK(calls == 1);
  EXPECT(PHD_ERROR_IO, "phd-contract", phd_model_load(first, NULL, &model, &error));
  OK(phd_convert(golden, first, NULL, &error));

  INVALID("input is null", phd_quantize(NULL, second, NULL, &error));
  INVALID("PHD_WEIGHT_AUTO", phd_quantize(first, second, NULL, &error));
  phd_convert_params_init(&params, sizeof params);
  params.weight_type = PHD_WEIGHT_Q8_0;
  params.pre = "gpt-2";
  INVALID("pre", phd_quantize(first, second, &params, &error));
  params.pre = NULL;
  INVALID("is the input", phd_quantize(first, first, &params, &error));
  OK(phd_quantize(first, second, &params, &error));
  params.weight_type = PHD_WEIGHT_F16;
  INVALID("requantize", phd_quantize(second, first, &params, &error));
  params.flags = PHD_CONVERT_REQUANTIZE | PHD_CONVERT_PURE;
  OK(phd_quantize(second, first, &params, &error));
  OK(phd_model_load(first, NULL, &model, &error));
  phd_model_desc desc;
  desc.struct_size = sizeof desc;
  OK(phd_model_info(model, &desc, &error));
  CHECK(desc.copies == 2 && desc.window == 16 && desc.chunk == 32);
  phd_model_free(model);
  remove(first);
  remove(second);
}

/* The same greedy text with drafts and without. */
static void speculators(const char *golden, const char *demo) {
  enum { TEXT = 20, D = 4 };
  phd_model *model = NULL, *other = NULL;
  phd_session *session = NULL;
  phd_sampler *sampler = NULL;
  phd_speculator *speculator = NULL;
  phd_session_params params, draft_params;
  phd_speculator_params how;
  phd_sampler_params greedy;
  phd_draft_stats stats;
  const float *logits = NULL;
  int32_t prompt[N], text[TEXT], found[TEXT + D + 1], out[D + 1];
  size_t n = 0, length = 0, count;
  int kind, i;
  for (i = 0; i < N; i++) prompt[i] = (i % 9 * 37 + 11) % 128;
  OK(phd_model_load(golden, NULL, &model, &error));
  OK(phd_model_load(demo, NULL, &other, &error));
  phd_session_params_init(&params, sizeof params);
  params.n_positions = 2 * N;
  params.n_draft = D;
  phd_sampler_params_init(&greedy, sizeof greedy);
  greedy.temperature = 0.0f;
  OK(phd_sampler_create(&greedy, 128, &sampler, &error));
  OK(phd_session_create(model, &params, &session, &error));
  OK(phd_prefill(session, 0, prompt, N, &error));
  for (i = 0; i < TEXT; i++) {
    OK(phd_logits(session, 0, &logits, &n, &error));
    OK(phd_sampler_sample(sampler, logits, n, &text[i], &error));
    OK(phd_step(session, 0, text[i], &error));
  }

  draft_params = params;
  draft_params.n_draft = 0;
  phd_speculator_params_init(&how, sizeof how);
  how.n_draft = 0;
  INVALID("n_draft is 0", phd_speculator_create(model, NULL, NULL, &how, &speculator, &error));
  how.n_draft = D;
  how.kind = 7;
  INVALID("kind is 7", phd_speculator_create(model, NULL, NULL, &how, &speculator, &error));
  how.kind = PHD_DRAFT_LOOKUP;
  how.ngram_max = 65;
  INVALID("ngram_max", phd_speculator_create(model, NULL, NULL, &how, &speculator, &error));
  how.ngram_max = 4;
  how.reserved = 1;
  INVALID("reserved", phd_speculator_create(model, NULL, NULL, &how, &speculator, &error));
  how.reserved = 0;
  INVALID("model", phd_speculator_create(NULL, NULL, NULL, &how, &speculator, &error));
  INVALID("out", phd_speculator_create(model, NULL, NULL, &how, NULL, &error));
  INVALID("draft_model", phd_speculator_create(model, model, NULL, &how, &speculator, &error));
  how.kind = PHD_DRAFT_MODEL;
  INVALID("draft_model is null", phd_speculator_create(model, NULL, NULL, &how, &speculator, &error));
  INVALID("vocabulary", phd_speculator_create(model, other, NULL, &how, &speculator, &error));
  how.p_min = 2.0f;
  INVALID("p_min", phd_speculator_create(model, model, NULL, &how, &speculator, &error));
  CHECK(speculator == NULL);
  how.p_min = 0.0f;

  for (kind = PHD_DRAFT_LOOKUP; kind <= PHD_DRAFT_MODEL; kind++) {
    how.kind = (uint32_t)kind;
    if (kind == PHD_DRAFT_LOOKUP) {
      OK(phd_speculator_create(model, NULL, NULL, &how, &speculator, &error));
    } else {
      OK(phd_speculator_create(model, model, &draft_params, &how, &speculator, &error));
    }
    OK(phd_seq_truncate(session, 0, 0, &error));
    OK(phd_prefill(session, 0, prompt, N, &error));
    INVALID("no entry", phd_speculator_accept(speculator, session, 0, sampler, out, D + 1, &n, &error));
    found[0] = text[0];
    count = 1;

    EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "5 are needed",
           phd_speculator_step(speculator, session, 0, text[0], sampler, out, D, &n, &error));
    CHECK(n == D + 1);
    EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "4 are needed",
           phd_speculator_draft(speculator, session, 0, text[0], NULL, 0, &n, &error));
    CHECK(n == D);
    INVALID("drafts is null", phd_speculator_draft(speculator, session, 0, text[0], NULL, D, &n, &error));
    INVALID("length", phd_speculator_step(speculator, session, 0, text[0], sampler, out, D + 1, NULL, &error));
    INVALID("speculator", phd_speculator_step(NULL, session, 0, text[0], sampler, out, D + 1, &n, &error));
    INVALID("session", phd_speculator_step(speculator, NULL, 0, text[0], sampler, out, D + 1, &n, &error));
    INVALID("sampler", phd_speculator_step(speculator, session, 0, text[0], NULL, out, D + 1, &n, &error));
    INVALID("sequence 1", phd_speculator_step(speculator, session, 1, text[0], sampler, out, D + 1, &n, &error));
    INVALID("128", phd_speculator_step(speculator, session, 0, 128, sampler, out, D + 1, &n, &error));
    OK(phd_seq_cancel(session, 0, &error));
    EXPECT(PHD_ERROR_CANCELLED, "cancelled",
           phd_speculator_step(speculator, session, 0, text[0], sampler, out, D + 1, &n, &error));
    OK(phd_seq_length(session, 0, &length, &error));
    CHECK(length == N);

    while (count < TEXT) {
      if (count % 2 == 1) {
        OK(phd_speculator_step(speculator, session, 0, found[count - 1], sampler, out, D + 1, &n, &error));
      } else { /* the three parts of a step */
        int32_t entry_tokens[D + 1];
        phd_batch_entry entry;
        memset(&entry, 0, sizeof entry);
        entry_tokens[0] = found[count - 1];
        OK(phd_speculator_draft(speculator, session, 0, entry_tokens[0], entry_tokens + 1, D, &n, &error));
        CHECK(n <= D);
        entry.struct_size = sizeof entry;
        entry.flags = PHD_ENTRY_LOGITS_ALL;
        entry.tokens = entry_tokens;
        entry.n_tokens = length = n + 1;
        OK(phd_decode(session, &entry, 1, &error));
        EXPECT(PHD_ERROR_BUFFER_TOO_SMALL, "are needed",
               phd_speculator_accept(speculator, session, 0, sampler, NULL, 0, &n, &error));
        CHECK(n == length);
        OK(phd_speculator_accept(speculator, session, 0, sampler, out, D + 1, &n, &error));
      }
      CHECK(n >= 1 && n <= D + 1);
      memcpy(found + count, out, n * sizeof *out);
      count += n;
      OK(phd_seq_length(session, 0, &length, &error));
      CHECK(length == N + count - 1);
      OK(phd_logits(session, 0, &logits, &n, &error));
    }
    CHECK(memcmp(found, text, sizeof text) == 0);
    stats.struct_size = sizeof stats;
    OK(phd_speculator_stats(speculator, &stats, &error));
    CHECK(stats.steps > 0 && stats.accepted <= stats.drafted && stats.steps + stats.accepted == count - 1);
    CHECK((stats.draft_bytes > 0) == (kind == PHD_DRAFT_MODEL) && (kind == PHD_DRAFT_LOOKUP || stats.drafted > 0));
    INVALID("speculator", phd_speculator_stats(NULL, &stats, &error));
    OK(phd_speculator_forget(speculator, 0, &error));
    phd_speculator_free(speculator);
    speculator = NULL;
  }
  phd_session_free(session);
  phd_sampler_free(sampler);
  phd_model_free(other);
  phd_model_free(model);
}

int main(int argc, char **argv) {
  char state_path[4096];
  if (argc != 4) return 2;
  CHECK(phd_abi_version() == 1 && strlen(phd_version()) > 4);
  CHECK(strcmp(phd_status_name(PHD_ERROR_CACHE_FULL), "PHD_ERROR_CACHE_FULL") == 0);
  CHECK(PHD_ERROR_INTERNAL == 10 && PHD_BACKEND_CUDA == 2 && PHD_CACHE_Q8_0 == 2 && PHD_CACHE_BF16 == 3 && PHD_WEIGHT_Q6_K == 9);
  CHECK(phd_error_status(NULL) == PHD_OK && strlen(phd_error_message(NULL)) == 0);
  phd_model_free(NULL);
  phd_session_free(NULL);
  phd_sampler_free(NULL);
  phd_speculator_free(NULL);
  phd_stream_free(NULL);
  phd_error_free(NULL);
  models(argv[1], argv[3]);
  sessions(argv[1]);
  snprintf(state_path, sizeof state_path, "%s.state", argv[0]);
  serving(argv[1], argv[3], state_path);
  text(argv[2]);
  samplers(argv[2]);
  conversion(argv[1]);
  speculators(argv[1], argv[2]);
  if (failures == 0) puts("contract holds");
  return failures != 0;
}
