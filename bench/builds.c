/* Times builds of libphd against one another: all of them in one process, by turns.
 *
 *   cc -std=c11 -Wall -Wextra -O2 bench/builds.c -Iinclude -ldl -o builds
 *   ./builds MODEL COPIES CONTEXT STEPS ROUNDS LIBRARY[:NAME=VALUE]...
 *
 * COPIES is K, or K,W,C for a window and chunks. In each of ROUNDS rounds every library takes STEPS steps at about CONTEXT cached
 * positions, of which the first two are not counted: the caches are still another build's. With 0 STEPS it takes one prompt of CONTEXT
 * tokens. NAME=VALUE is in the environment while that library loads the model. Prints the 10th and 25th percentile and the median in
 * milliseconds, and each as a ratio to the first library's.
 *
 * Programs that run one after the other differ by a tenth on a shared machine, and a file's copies by 1 to 3 parts of a hundred here,
 * depending on where their memory happens to lie: give two copies of each build. (A path that is given twice is loaded once.)
 */
#define _GNU_SOURCE
#include "phd.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_BUILDS = 16, MAX_TIMES = 1 << 16, UNTIMED = 2 };

struct build {
  const char *name;
  phd_session *session;
  void (*model_params_init)(phd_model_params *, size_t);
  void (*session_params_init)(phd_session_params *, size_t);
  phd_status (*model_load)(const char *, const phd_model_params *, phd_model **, phd_error **);
  phd_status (*session_create)(const phd_model *, const phd_session_params *, phd_session **, phd_error **);
  phd_status (*prefill)(phd_session *, int32_t, const int32_t *, size_t, phd_error **);
  phd_status (*step)(phd_session *, int32_t, int32_t, phd_error **);
  phd_status (*seq_truncate)(phd_session *, int32_t, size_t, phd_error **);
  const char *(*error_message)(const phd_error *);
  size_t n_times;
  double times[MAX_TIMES]; /* ms */
};

static struct build builds[MAX_BUILDS];
static int32_t tokens[1 << 16];

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static void check(const struct build *b, phd_status status, const phd_error *error) {
  if (status == PHD_OK) return;
  fprintf(stderr, "%s: %s\n", b->name, b->error_message(error));
  exit(1);
}

static void *find(void *library, const char *name) {
  void *f = dlsym(library, name);
  if (f == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(1);
  }
  return f;
}

/* Loads a library, and the model with it. */
static void set_up(struct build *b, char *argument, const char *model_path, const phd_model_desc *hidden, uint32_t positions) {
  b->name = argument;
  char *setting = strchr(argument, ':');
  char *path = setting ? strndup(argument, (size_t)(setting - argument)) : strdup(argument);
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(1);
  }
  free(path);
#define FIND(name) *(void **)&b->name = find(library, "phd_" #name)
  FIND(model_params_init);
  FIND(session_params_init);
  FIND(model_load);
  FIND(session_create);
  FIND(prefill);
  FIND(step);
  FIND(seq_truncate);
  FIND(error_message);
#undef FIND
  char *variable = setting ? strdup(setting + 1) : NULL;
  char *value = variable ? strchr(variable, '=') : NULL;
  if (value) {
    *value = 0;
    setenv(variable, value + 1, 1);
  }
  phd_model_params load;
  b->model_params_init(&load, sizeof load);
  load.copies = hidden->copies;
  load.window = hidden->window;
  load.chunk = hidden->chunk;
  phd_error *error = NULL;
  phd_model *model = NULL;
  check(b, b->model_load(model_path, &load, &model, &error), error);
  phd_session_params params;
  b->session_params_init(&params, sizeof params);
  params.n_positions = positions;
  check(b, b->session_create(model, &params, &b->session, &error), error);
  if (value) unsetenv(variable);
  free(variable);
}

static int by_time(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void take_turn(struct build *b, size_t context, long steps) {
  phd_error *error = NULL;
  check(b, b->seq_truncate(b->session, 0, steps ? context : 0, &error), error);
  for (long i = 0; i < (steps ? steps : 1); i++) {
    double from = now();
    phd_status status = steps ? b->step(b->session, 0, tokens[i], &error)
                              : b->prefill(b->session, 0, tokens, context, &error);
    double ms = now() - from;
    check(b, status, error);
    if ((steps == 0 || i >= UNTIMED) && b->n_times < MAX_TIMES) b->times[b->n_times++] = ms;
  }
}

int main(int argc, char **argv) {
  phd_model_desc hidden = {.copies = 0};
  long context = argc > 3 ? strtol(argv[3], NULL, 10) : -1, steps = argc > 4 ? strtol(argv[4], NULL, 10) : -1;
  long rounds = argc > 5 ? strtol(argv[5], NULL, 10) : 0;
  int n = argc - 6;
  long most = sizeof tokens / sizeof *tokens;
  if (n < 1 || n > MAX_BUILDS || context < 1 || context > most || steps < 0 || steps > most || (steps > 0 && steps <= UNTIMED) ||
      sscanf(argv[2], "%u,%u,%u", &hidden.copies, &hidden.window, &hidden.chunk) < 1) {
    fprintf(stderr, "usage: %s MODEL K[,W,C] CONTEXT STEPS ROUNDS LIBRARY[:NAME=VALUE]...\n", argv[0]);
    return 2;
  }
  for (long i = 0; i < most; i++) tokens[i] = (int32_t)(1 + (i * 7919) % 200); /* any text will do */
  for (int i = 0; i < n; i++) {
    struct build *b = &builds[i];
    set_up(b, argv[6 + i], argv[1], &hidden, (uint32_t)(context + steps + 1));
    phd_error *error = NULL;
    if (steps) check(b, b->prefill(b->session, 0, tokens, (size_t)context, &error), error);
  }
  for (long round = 0; round < rounds; round++)
    for (int i = 0; i < n; i++) take_turn(&builds[(round % 2 ? n - 1 - i : i)], (size_t)context, steps);
  static const double shares[] = {0.1, 0.25, 0.5};
  double first[3] = {0};
  for (int i = 0; i < n; i++) {
    struct build *b = &builds[i];
    qsort(b->times, b->n_times, sizeof *b->times, by_time);
    printf("%-40s", b->name);
    for (int j = 0; j < 3; j++) {
      double ms = b->n_times ? b->times[(size_t)(shares[j] * (double)b->n_times)] : 0;
      if (i == 0) first[j] = ms;
      printf("  %8.3f %.3f", ms, first[j] > 0 ? ms / first[j] : 0);
    }
    puts("");
  }
  return 0;
}
