// A conversation in the terminal. Ctrl-C stops an answer, and at the prompt the program; /reset begins anew.
//
//   chat MODEL [SYSTEM_PROMPT [TEMPERATURE]]
//
// With a model that has a chat template, lines are a user's messages. Any other model goes on with the text that they
// make.
#include "phd.hpp"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include <unistd.h>

namespace {

volatile std::sig_atomic_t interrupted = 0;
void interrupt(int) { interrupted = 1; }

struct message {
  std::string role, content;
};

std::string quoted(const std::string &text) {
  std::string json = "\"";
  for (char c : text) {
    char escape[8];
    if (static_cast<unsigned char>(c) < 0x20) {
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(c));
      json += escape;
    } else {
      if (c == '"' || c == '\\') json += '\\';
      json += c;
    }
  }
  return json + '"';
}

class chat {
 public:
  chat(const char *path, std::string system, float temperature) : model_(phd::model::load(path).value()) {
    phd::session_params params;
    params.n_positions = std::min(model_.info().value().n_ctx_train, 4096u);
    n_positions_ = params.n_positions;
    session_ = phd::session::create(model_, params, [](float) { return !interrupted; }).value();

    phd::sampler_params sampling;
    sampling.temperature = temperature;
    sampling.top_p = 0.95f;
    sampling.seed = std::random_device()();
    sampler_ = phd::sampler::create(model_, sampling).value();
    stream_ = phd::stream::create(model_).value();

    has_template_ = model_.chat_template().has_value();
    if (!system.empty()) messages_.push_back({"system", std::move(system)});
    n_kept_ = messages_.size();
  }

  void reset() { messages_.resize(n_kept_); }

  /// Prints the answer to `line`. What fails leaves the conversation as it was.
  void answer(const std::string &line) {
    interrupted = 0;
    const std::vector<message> before = messages_;
    try {
      messages_.push_back({"user", line});
      const std::vector<phd::token_id> prompt = fitting_prompt();

      // The conversation so far is in the cache, perhaps but for its last token; what was forgotten no longer is. The
      // prompt's last token is computed in any case, for its logits.
      phd::sequence sequence = session_.sequence(0);
      phd::span<const phd::token_id> tokens(prompt);
      std::size_t n_cached = sequence.take_prefix(tokens.subspan(0, tokens.size() - 1)).value();
      sequence.prefill(tokens.subspan(n_cached)).value();

      std::string text;
      // A model without a template may never end by itself.
      const std::size_t limit = has_template_ ? n_positions_ : 256;
      phd::generation pieces = phd::generate(model_, sequence, sampler_, stream_, limit);
      for (std::string_view piece : pieces) {
        std::cout << piece << std::flush;
        text += piece;
        if (interrupted) pieces.stop();
      }
      std::cout << std::endl;
      messages_.push_back({"assistant", text});
      if (interrupted) {
        std::cerr << "[stopped]" << std::endl;
      } else if (pieces.result().status() == PHD_ERROR_CACHE_FULL) {
        std::cerr << "[no room for more of this answer]" << std::endl;
      } else {
        pieces.result().value();
      }
    } catch (const phd::exception &e) {
      messages_ = before;
      std::cerr << "[" << (e.status() == PHD_ERROR_CANCELLED ? "stopped" : e.what()) << "]" << std::endl;
    }
  }

 private:
  std::vector<phd::token_id> prompt() const {
    if (has_template_) {
      std::string json = "[";
      for (const message &m : messages_) {
        json += (json.size() > 1 ? ",{\"role\":" : "{\"role\":") + quoted(m.role) +
                ",\"content\":" + quoted(m.content) + "}";
      }
      json += "]";
      phd::chat_params params;
      params.messages = json;
      return model_.tokenize(model_.chat_render(params).value(), PHD_TOKENIZE_PARSE_SPECIAL).value();
    }
    std::string text;
    for (const message &m : messages_) text += m.content;
    return model_.tokenize(text, PHD_TOKENIZE_ADD_SPECIAL).value();
  }

  /// Forgets the oldest exchanges until the prompt leaves a quarter of the cache to the answer.
  std::vector<phd::token_id> fitting_prompt() {
    for (;;) {
      std::vector<phd::token_id> tokens = prompt();
      if (tokens.empty()) throw phd::exception({PHD_ERROR_INVALID_ARGUMENT, "nothing to answer"});
      if (tokens.size() <= n_positions_ - n_positions_ / 4) return tokens;
      if (messages_.size() == n_kept_ + 1) {
        throw phd::exception({PHD_ERROR_CACHE_FULL, "the message is too long: " + std::to_string(tokens.size()) +
                                                        " tokens, for a cache of " + std::to_string(n_positions_)});
      }
      const auto oldest = messages_.begin() + static_cast<std::ptrdiff_t>(n_kept_);
      messages_.erase(oldest, oldest + 2);
    }
  }

  phd::model model_;
  phd::session session_;
  phd::sampler sampler_;
  phd::stream stream_;
  std::size_t n_positions_ = 0;
  bool has_template_ = false;
  std::vector<message> messages_;
  std::size_t n_kept_ = 0;  // the system prompt
};

}  // namespace

int main(int argc, char **argv) {
  if (argc < 2 || argc > 4) {
    std::cerr << "usage: " << argv[0] << " MODEL [SYSTEM_PROMPT [TEMPERATURE]]" << std::endl;
    return 2;
  }
  try {
    chat chat(argv[1], argc > 2 ? argv[2] : "", argc > 3 ? std::strtof(argv[3], nullptr) : 0.7f);

    // Without SA_RESTART, so that it also ends waiting for a line.
    struct sigaction action = {};
    action.sa_handler = interrupt;
    sigaction(SIGINT, &action, nullptr);

    const bool is_terminal = isatty(STDIN_FILENO);
    std::string line;
    while ((!is_terminal || std::cout << "> " << std::flush) && std::getline(std::cin, line)) {
      if (line == "/reset") {
        chat.reset();
      } else if (!line.empty()) {
        chat.answer(line);
      }
    }
    return 0;
  } catch (const std::exception &e) {
    std::cerr << e.what() << std::endl;
    return 1;
  }
}
