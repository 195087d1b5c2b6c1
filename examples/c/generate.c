/* Streams text from a model.
 *
 *   cc examples/c/generate.c -Iinclude -Ltarget/release -lphd -Wl,-rpath,target/release -o generate
 *   ./generate MODEL "In the beginning" 64
 */
#include "phd.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Prints an error and frees it; true if there was one. */
static int failed(phd_status status, phd_error **error) {
  if (status == PHD_OK) return 0;
  fprintf(stderr, "%s: %s\n", phd_status_name(status), phd_error_message(*error));
  phd_error_free(*error);
  *error = NULL;
  return 1;
}

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s MODEL PROMPT [TOKENS]\n", argv[0]);
    return 2;
  }
  const char *prompt = argv[2];
  long n_predict = argc > 3 ? strtol(argv[3], NULL, 10) : 64;
  int result = 1;
  phd_error *error = NULL;
  phd_model *model = NULL;
  phd_session *session = NULL;
  phd_sampler *sampler = NULL;
  phd_stream *stream = NULL;
  int32_t *tokens = NULL;
  size_t n_tokens = 0, length = 0;
  char text[512];

  if (failed(phd_model_load(argv[1], NULL, &model, &error), &error)) goto done;

  /* How many tokens, then the tokens. */
  phd_status status = phd_tokenize(model, prompt, strlen(prompt), PHD_TOKENIZE_ADD_SPECIAL, NULL, 0, &n_tokens, NULL);
  if (status != PHD_OK && status != PHD_ERROR_BUFFER_TOO_SMALL) n_tokens = 0;
  tokens = malloc((n_tokens + 1) * sizeof *tokens);
  if (tokens == NULL) goto done;
  status = phd_tokenize(model, prompt, strlen(prompt), PHD_TOKENIZE_ADD_SPECIAL, tokens, n_tokens, &n_tokens, &error);
  if (failed(status, &error)) goto done;

  phd_session_params params;
  phd_session_params_init(&params, sizeof params);
  params.n_positions = (uint32_t)(n_tokens + (size_t)(n_predict > 0 ? n_predict : 0) + 1);
  if (failed(phd_session_create(model, &params, &session, &error), &error)) goto done;
  phd_model_desc desc = {.struct_size = sizeof desc};
  if (failed(phd_model_info(model, &desc, &error), &error)) goto done;
  phd_sampler_params sampling;
  phd_sampler_params_init(&sampling, sizeof sampling);
  sampling.temperature = 0.0f;
  if (failed(phd_sampler_create(&sampling, desc.n_vocab, &sampler, &error), &error)) goto done;
  if (failed(phd_stream_create(model, &stream, &error), &error)) goto done;

  fputs(prompt, stdout);
  if (failed(phd_prefill(session, 0, tokens, n_tokens, &error), &error)) goto done;
  for (long i = 0; i < n_predict; i++) {
    int32_t token;
    bool is_end;
    if (failed(phd_sample(session, 0, sampler, &token, &error), &error)) goto done;
    if (failed(phd_token_is_end(model, token, &is_end, &error), &error)) goto done;
    if (is_end) break;
    if (failed(phd_stream_push(stream, token, text, sizeof text, &length, &error), &error)) goto done;
    fwrite(text, 1, length, stdout);
    fflush(stdout);
    if (failed(phd_step(session, 0, token, &error), &error)) goto done;
  }
  if (failed(phd_stream_finish(stream, text, sizeof text, &length, &error), &error)) goto done;
  fwrite(text, 1, length, stdout);
  putchar('\n');
  result = 0;
done:
  phd_stream_free(stream);
  phd_sampler_free(sampler);
  phd_session_free(session);
  phd_model_free(model);
  free(tokens);
  return result;
}
