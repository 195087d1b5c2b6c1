// A program with symbols that libphd.a has within: its own are called, and libphd calls libphd's. Generates as
// examples/c/generate.c does.
#include "phd.hpp"

#include <cstdlib>
#include <iostream>
#include <regex>

extern "C" {
const char *ggml_type_name(int) { return "mine"; }
void ggml_init() { std::abort(); }
int rust_eh_personality() { std::abort(); }
}

int main(int, char **argv) {
  if (std::string(ggml_type_name(0)) != "mine") return 1;
  // Exceptions of this program's C++ library, which libphd uses, too.
  try {
    std::regex("[");
    return 1;
  } catch (const std::regex_error &) {
  }
  phd::model model = phd::model::load(argv[1]).value();
  phd::session session = phd::session::create(model).value();
  phd::sampler_params greedy;
  greedy.temperature = 0;
  phd::sampler sampler = phd::sampler::create(model, greedy).value();
  phd::stream stream = phd::stream::create(model).value();
  session.sequence(0).prefill(model.tokenize(argv[2], PHD_TOKENIZE_ADD_SPECIAL).value()).value();
  std::cout << argv[2];
  for (std::string_view piece : phd::generate(model, session.sequence(0), sampler, stream, 24)) std::cout << piece;
  std::cout << std::endl;
}
