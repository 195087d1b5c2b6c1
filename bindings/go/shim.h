/* What Go cannot say to C: function pointers, structs that point to Go's memory, and several calls as one. */
#ifndef PHD_GO_SHIM_H
#define PHD_GO_SHIM_H

#include <phd.h>

#include <stdlib.h>

/* callbacks.c */
bool phd_go_progress(float fraction, void *user);
void phd_go_log(uint32_t level, const char *message, size_t length, void *user);
uintptr_t phd_go_inside_progress(void);

/* `progress` is a cgo.Handle or 0. Go must not make a pointer of it: it is none. */

static inline enum phd_status phd_go_model_load(const char *path, phd_model_params *params, uintptr_t progress,
                                           phd_model **out, phd_error **error) {
  if (progress != 0) {
    params->progress = phd_go_progress;
    params->progress_user = (void *)progress;
  }
  return phd_model_load(path, params, out, error);
}

static inline enum phd_status phd_go_session_create(const phd_model *model, phd_session_params *params, uintptr_t progress,
                                               phd_session **out, phd_error **error) {
  if (progress != 0) {
    params->progress = phd_go_progress;
    params->progress_user = (void *)progress;
  }
  return phd_session_create(model, params, out, error);
}

static inline enum phd_status phd_go_convert(bool quantize, const char *input, const char *out, phd_convert_params *params,
                                        uintptr_t progress, phd_error **error) {
  if (progress != 0) {
    params->progress = phd_go_progress;
    params->progress_user = (void *)progress;
  }
  return quantize ? phd_quantize(input, out, params, error) : phd_convert(input, out, params, error);
}

static inline enum phd_status phd_go_log_set(bool on, uint32_t level, phd_error **error) {
  return phd_log_set(on ? phd_go_log : NULL, NULL, level, error);
}

/* Logits stay in the session: these read them where they are. Go holds a lock that keeps the session from changing. */

static inline enum phd_status phd_go_top_logprobs(const phd_session *session, int32_t seq, size_t n, int32_t *tokens,
                                             float *logprobs, phd_error **error) {
  const float *logits;
  size_t n_vocab;
  enum phd_status status = phd_logits(session, seq, &logits, &n_vocab, error);
  return status != PHD_OK ? status : phd_top_logprobs(logits, n_vocab, n, tokens, logprobs, error);
}

static inline enum phd_status phd_go_logprobs(const phd_session *session, int32_t seq, const int32_t *tokens, size_t n,
                                         float *logprobs, phd_error **error) {
  const float *logits;
  size_t n_vocab;
  enum phd_status status = phd_logits(session, seq, &logits, &n_vocab, error);
  return status != PHD_OK ? status : phd_logprobs(logits, n_vocab, tokens, n, logprobs, error);
}

/* A struct in Go's memory must not point to Go's memory; one on this stack may. Texts: by pointer and length. */
static inline enum phd_status phd_go_chat_render(const phd_model *model, const char *messages, size_t messages_len,
                                            const char *tools, size_t tools_len, const char *documents,
                                            size_t documents_len, const char *variables, size_t variables_len,
                                            const char *source, size_t source_len, const char *name, size_t name_len,
                                            int64_t now, bool add_generation_prompt, char *text, size_t capacity,
                                            size_t *len, phd_error **error) {
  phd_chat_params p;
  phd_chat_params_init(&p, sizeof p);
  p.messages = messages;
  p.messages_len = messages_len;
  p.tools = tools;
  p.tools_len = tools_len;
  p.documents = documents;
  p.documents_len = documents_len;
  p.variables = variables;
  p.variables_len = variables_len;
  p.source = source;
  p.source_len = source_len;
  p.name = name;
  p.name_len = name_len;
  p.now = now;
  p.add_generation_prompt = add_generation_prompt;
  return phd_chat_render(model, &p, text, capacity, len, error);
}

#endif
