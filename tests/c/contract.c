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
  CHECK(desc.window == 16 && desc.chunk == 32);
  INVALID("model", phd_model_info(NULL, &desc, &error));
  INVALID("out", phd_model_info(model, NULL, &error));
  desc.struct_size = 0;
  INVALID("struct_size", phd_model_info(model, &desc, &error));
  size_t n = 0;
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

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  CHECK(phd_abi_version() == 1 && strlen(phd_version()) > 4);
  CHECK(strcmp(phd_status_name(PHD_ERROR_CACHE_FULL), "PHD_ERROR_CACHE_FULL") == 0);
  CHECK(PHD_ERROR_INTERNAL == 10 && PHD_BACKEND_CUDA == 2 && PHD_CACHE_Q8_0 == 2 && PHD_WEIGHT_Q6_K == 9);
  CHECK(phd_error_status(NULL) == PHD_OK && strlen(phd_error_message(NULL)) == 0);
  phd_model_free(NULL);
  phd_session_free(NULL);
  phd_sampler_free(NULL);
  phd_stream_free(NULL);
  phd_error_free(NULL);
  models(argv[1], argv[3]);
  sessions(argv[1]);
  text(argv[2]);
  samplers(argv[2]);
  conversion(argv[1]);
  if (failures == 0) puts("contract holds");
  return failures != 0;
}
