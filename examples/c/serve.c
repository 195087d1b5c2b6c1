/* Serves many prompts at once: those of the command line, or the lines of standard input. Every line of an answer is printed as soon
 * as it is complete, after the number of its prompt. docs/serving.md explains the loop.
 *
 *   cc examples/c/serve.c -Iinclude -Ltarget/release -lphd -Wl,-rpath,target/release -o serve
 *   ./serve MODEL 64 "In the beginning" "And God said"
 */
#include "phd.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  SLOTS = 4,        /* requests that run at once: sequences of the session */
  POSITIONS = 4096, /* of the cache, for all of them and for retained texts */
  PIECE = 32        /* prompt tokens of a batch, so that steps never wait long for a prompt */
};

/* A running request; its sequence is its slot. */
typedef struct {
  size_t number;
  int32_t *tokens; /* the prompt, then the token to be appended next */
  size_t n_tokens; /* of the prompt */
  size_t n_done;   /* of these, in the sequence */
  size_t n_generated;
  size_t promised; /* positions that it may come to take */
  phd_sampler *sampler;
  phd_stream *stream; /* null: the slot is free */
  char line[1024];
  size_t line_length;
} request;

typedef struct {
  phd_model *model;
  phd_session *session;
  size_t n_vocab, block, n_predict, promised;
  request slots[SLOTS];
} server;

/* Prints an error and frees it; true if there was one. */
static bool failed(phd_status status, phd_error **error) {
  if (status == PHD_OK) return false;
  fprintf(stderr, "%s: %s\n", phd_status_name(status), phd_error_message(*error));
  phd_error_free(*error);
  *error = NULL;
  return true;
}

static void print_line(request *r) {
  printf("%zu| %.*s\n", r->number, (int)r->line_length, r->line);
  fflush(stdout);
  r->line_length = 0;
}

static void emit(request *r, const char *text, size_t length) {
  for (size_t i = 0; i < length; i++) {
    if (text[i] == '\n' || r->line_length == sizeof r->line) print_line(r);
    if (text[i] != '\n') r->line[r->line_length++] = text[i];
  }
}

static void release(server *s, request *r) {
  phd_stream_free(r->stream);
  phd_sampler_free(r->sampler);
  free(r->tokens);
  s->promised -= r->promised;
  memset(r, 0, sizeof *r);
}

/* Ends a request. Its text stays as long as there is room, for whoever begins alike. */
static bool finish(server *s, int32_t seq) {
  request *r = &s->slots[seq];
  phd_error *error = NULL;
  char text[16];
  size_t length = 0;
  if (failed(phd_stream_finish(r->stream, text, sizeof text, &length, &error), &error)) return false;
  emit(r, text, length);
  if (r->line_length > 0) print_line(r);
  release(s, r);
  return !failed(phd_seq_retain(s->session, seq, &error), &error);
}

/* What became of a prompt that asked for a slot. */
typedef enum { ADMITTED, WAITS, REFUSED } admission;

static admission admit(server *s, int32_t seq, size_t number, const char *prompt) {
  request *r = &s->slots[seq];
  phd_error *error = NULL;
  size_t n = 0;
  phd_status status = phd_tokenize(s->model, prompt, strlen(prompt), PHD_TOKENIZE_ADD_SPECIAL, NULL, 0, &n, NULL);
  if (status == PHD_OK) return REFUSED; /* no tokens: nothing to continue */
  if (status != PHD_ERROR_BUFFER_TOO_SMALL) n = 0;

  /* Only what fits to its end is begun, so that no batch finds the cache full. Shared prefixes take less than is promised here. */
  size_t blocks = (n + s->n_predict + s->block - 1) / s->block + 1;
  if (blocks * s->block > POSITIONS) return REFUSED;
  if (s->promised + blocks * s->block > POSITIONS) return WAITS;

  memset(r, 0, sizeof *r);
  r->number = number;
  r->tokens = (int32_t *)malloc((n + 1) * sizeof *r->tokens);
  if (r->tokens == NULL) return REFUSED;
  r->promised = blocks * s->block;
  s->promised += r->promised;
  phd_sampler_params sampling;
  phd_sampler_params_init(&sampling, sizeof sampling);
  sampling.temperature = 0.0f; /* or as the request says */
  sampling.seed = number;
  status = phd_tokenize(s->model, prompt, strlen(prompt), PHD_TOKENIZE_ADD_SPECIAL, r->tokens, n, &r->n_tokens, &error);
  /* All but the last token may be there already: that one's logits are needed. */
  if (failed(status, &error) || failed(phd_sampler_create(&sampling, s->n_vocab, &r->sampler, &error), &error) ||
      failed(phd_sampler_accept_prompt(r->sampler, r->tokens, r->n_tokens, &error), &error) ||
      failed(phd_stream_create(s->model, &r->stream, &error), &error) ||
      failed(phd_seq_take_prefix(s->session, seq, r->tokens, r->n_tokens - 1, &r->n_done, &error), &error)) {
    release(s, r);
    return REFUSED;
  }
  return ADMITTED;
}

/* Draws the next token of a request from its logits; sets `*is_end` when it is done. */
static bool sample(server *s, int32_t seq, bool *is_end) {
  request *r = &s->slots[seq];
  phd_error *error = NULL;
  char text[512];
  int32_t token = 0;
  size_t length = 0;
  if (failed(phd_sample(s->session, seq, r->sampler, &token, &error), &error)) return false;
  if (failed(phd_sampler_accept(r->sampler, token, &error), &error)) return false;
  if (failed(phd_token_is_end(s->model, token, is_end, &error), &error)) return false;
  if (*is_end) return true;
  if (failed(phd_stream_push(r->stream, token, text, sizeof text, &length, &error), &error)) return false;
  emit(r, text, length);
  r->tokens[r->n_tokens] = token;
  *is_end = ++r->n_generated == s->n_predict;
  return true;
}

/* One batch: the next token of every request that has one, and up to PIECE tokens of prompts. */
static bool run_batch(server *s) {
  phd_batch_entry entries[SLOTS];
  phd_error *error = NULL;
  size_t n = 0, left = PIECE;
  for (int32_t seq = 0; seq < SLOTS; seq++) {
    request *r = &s->slots[seq];
    if (r->stream == NULL) continue;
    bool is_prompt = r->n_done < r->n_tokens;
    size_t rest = r->n_tokens - r->n_done;
    size_t piece = !is_prompt ? 1 : rest < left ? rest : left;
    if (piece == 0) continue;
    if (is_prompt) left -= piece;
    memset(&entries[n], 0, sizeof entries[n]);
    entries[n].struct_size = sizeof entries[n];
    entries[n].seq = seq;
    entries[n].tokens = r->tokens + r->n_done;
    entries[n].n_tokens = piece;
    entries[n].flags = !is_prompt || piece == rest ? PHD_ENTRY_LOGITS : 0;
    n++;
  }
  /* All of it or nothing: after a failure the same batch, without whoever was to blame, can be tried again. */
  if (failed(phd_decode(s->session, entries, n, &error), &error)) return false;
  for (size_t i = 0; i < n; i++) {
    request *r = &s->slots[entries[i].seq];
    bool is_end = false;
    if (r->n_done < r->n_tokens) r->n_done += entries[i].n_tokens;
    if (entries[i].flags != PHD_ENTRY_LOGITS) continue;
    if (!sample(s, entries[i].seq, &is_end)) return false;
    if (is_end && !finish(s, entries[i].seq)) return false;
  }
  return true;
}

/* A line of standard input without its end, in `line`; null at the end. */
static char *read_line(char *line, int size) {
  if (fgets(line, size, stdin) == NULL) return NULL;
  line[strcspn(line, "\n")] = '\0';
  return line;
}

static bool serve(server *s, int n_prompts, char **prompts) {
  char line[8192];
  const char *waiting = NULL;
  size_t number = 0;
  for (;;) {
    /* Free slots take waiting prompts. */
    size_t n_running = 0;
    bool is_held = false;
    for (int32_t seq = 0; seq < SLOTS; seq++) {
      while (s->slots[seq].stream == NULL && !is_held) {
        if (waiting == NULL) {
          waiting = n_prompts < 0 ? read_line(line, sizeof line) : (int)number < n_prompts ? prompts[number] : NULL;
          if (waiting == NULL) break;
          number++;
        }
        admission what = admit(s, seq, number, waiting);
        is_held = what == WAITS;
        if (what == REFUSED) fprintf(stderr, "prompt %zu is refused\n", number);
        if (what != WAITS) waiting = NULL;
      }
      n_running += s->slots[seq].stream != NULL;
    }
    if (n_running == 0) return true;
    if (!run_batch(s)) return false;
  }
}

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s MODEL TOKENS [PROMPT...]\n", argv[0]);
    return 2;
  }
  static server s;
  int result = 1;
  long n_predict = strtol(argv[2], NULL, 10);
  phd_error *error = NULL;
  phd_model_desc desc;
  phd_session_params params;
  phd_usage usage;
  phd_stats stats;
  desc.struct_size = sizeof desc;
  usage.struct_size = sizeof usage;
  stats.struct_size = sizeof stats;
  s.n_predict = n_predict > 0 && n_predict < POSITIONS ? (size_t)n_predict : 1;
  if (failed(phd_model_load(argv[1], NULL, &s.model, &error), &error)) goto done;
  if (failed(phd_model_info(s.model, &desc, &error), &error)) goto done;
  s.n_vocab = desc.n_vocab;
  phd_session_params_init(&params, sizeof params);
  params.n_positions = POSITIONS;
  params.n_sequences = SLOTS;
  if (failed(phd_session_create(s.model, &params, &s.session, &error), &error)) goto done;
  if (failed(phd_session_usage(s.session, &usage, &error), &error)) goto done;
  s.block = (size_t)usage.block;

  if (!serve(&s, argc > 3 ? argc - 3 : -1, argv + 3)) goto done;

  if (failed(phd_session_stats(s.session, &stats, &error), &error)) goto done;
  if (failed(phd_session_usage(s.session, &usage, &error), &error)) goto done;
  fprintf(stderr, "tokens: %llu in pieces of prompts, %llu in steps, %llu taken over by %llu of %llu requests\n",
          (unsigned long long)stats.prompt_tokens, (unsigned long long)stats.step_tokens,
          (unsigned long long)stats.prefix_tokens, (unsigned long long)stats.prefix_hits,
          (unsigned long long)stats.prefix_lookups);
  fprintf(stderr, "time: %.0f ms in batches with prompts, %.0f ms in steps, %llu passes\n", (double)stats.prefill_ns * 1e-6,
          (double)stats.step_ns * 1e-6, (unsigned long long)stats.passes);
  fprintf(stderr, "positions: %llu used, %llu retained, %llu free, %llu given up\n", (unsigned long long)usage.used,
          (unsigned long long)usage.retained, (unsigned long long)usage.free, (unsigned long long)stats.evicted);
  result = 0;
done:
  for (int i = 0; i < SLOTS; i++) release(&s, &s.slots[i]);
  phd_session_free(s.session);
  phd_model_free(s.model);
  return result;
}
