// include/phd.hpp on the model in models/, with and without exceptions. run.sh says with which compilers and flags.
//
//   test_phd MODEL FOLDER [doctest's options]     FOLDER: for temporary files
#include "phd.hpp"

#if !PHD_EXCEPTIONS
#define DOCTEST_CONFIG_NO_EXCEPTIONS_BUT_WITH_ALL_ASSERTS
#endif
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <csignal>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>
#if __cplusplus >= 202002L
#include <ranges>
#include <span>
#endif

#include <sys/wait.h>
#include <unistd.h>

#include "other_unit.hpp"

namespace {

std::string model_path, folder;

/// The value, or the end of the test program with the error's text.
template <class T>
T must(phd::result<T> result) {
  if (!result.has_value()) {
    MESSAGE(result.error().message());
    std::abort();
  }
  return *std::move(result);
}
void must(phd::result<void> result) {
  if (!result) {
    MESSAGE(result.error().message());
    std::abort();
  }
}

const phd::model &shared_model() {
  static const phd::model model = must(phd::model::load(model_path));
  return model;
}

phd::session make_session(std::uint32_t n_positions = 512, std::uint32_t n_sequences = 4) {
  phd::session_params params;
  params.n_positions = n_positions;
  params.n_sequences = n_sequences;
  params.n_draft = 8;
  params.n_retained = 4;
  params.n_threads = 1;
  return must(phd::session::create(shared_model(), params));
}

phd::sampler make_greedy() {
  phd::sampler_params params;
  params.temperature = 0;
  return must(phd::sampler::create(shared_model(), params));
}

std::vector<phd::token_id> tokens_of(std::string_view text) {
  return must(shared_model().tokenize(text, PHD_TOKENIZE_ADD_SPECIAL));
}

std::vector<float> logits_of(const phd::sequence &sequence) {
  auto logits = must(sequence.logits());
  return {logits.begin(), logits.end()};
}

/// `n` tokens that a prompt takes several passes for.
std::vector<phd::token_id> long_prompt(std::size_t n = 1200) {
  std::vector<phd::token_id> tokens(n);
  for (std::size_t i = 0; i < n; i++) tokens[i] = static_cast<phd::token_id>(i * 7 % 1999 + 1);
  return tokens;
}

/// Whether `f` aborts, in a process of its own.
template <class F>
bool aborts(F f) {
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

// What owns moves and does not copy; nothing is paid for it.
template <class T, class H>
constexpr bool is_owner = std::is_nothrow_move_constructible_v<T> &&std::is_nothrow_move_assignable_v<T> &&
                          !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T> &&
                          std::is_nothrow_default_constructible_v<T> && !std::is_convertible_v<H *, T>;
static_assert(is_owner<phd::model, phd_model> && sizeof(phd::model) == sizeof(void *));
static_assert(is_owner<phd::session, phd_session> && sizeof(phd::session) == 2 * sizeof(void *));
static_assert(is_owner<phd::sampler, phd_sampler> && sizeof(phd::sampler) == sizeof(void *));
static_assert(is_owner<phd::stream, phd_stream> && sizeof(phd::stream) == sizeof(void *));
static_assert(is_owner<phd::speculator, phd_speculator> && sizeof(phd::speculator) == sizeof(void *));
static_assert(std::is_trivially_copyable_v<phd::sequence>);
static_assert(std::is_nothrow_move_constructible_v<phd::result<phd::model>>);

}  // namespace

TEST_CASE("the library says what it is") {
  CHECK(phd::version() == std::string(phd_version()));
  CHECK(phd::abi_version() == phd_abi_version());
  CHECK(phd::status_name(PHD_ERROR_IO) == std::string("PHD_ERROR_IO"));
}

TEST_CASE("spans view what is contiguous") {
  std::vector<int> vector = {1, 2, 3};
  const std::vector<int> constant = {4, 5};
  std::array<int, 2> array = {6, 7};
  int plain[] = {8};
  CHECK(phd::span<int>(vector).data() == vector.data());
  CHECK(phd::span<const int>(vector).size() == 3);
  CHECK(phd::span<const int>(constant)[1] == 5);
  CHECK(phd::span<const int>(array).size() == 2);
  CHECK(phd::span<int>(plain)[0] == 8);
  CHECK(phd::span<const char>(std::string("abc")).size() == 3);
  CHECK(phd::span<const int>().empty());
  static_assert(!std::is_constructible_v<phd::span<int>, const std::vector<int> &>);
  static_assert(!std::is_constructible_v<phd::span<const int>, std::vector<long> &>);
  static_assert(std::is_convertible_v<phd::span<int>, phd::span<const int>>);

  phd::span<const int> span = vector;
  CHECK(std::accumulate(span.begin(), span.end(), 0) == 6);
  CHECK(span.subspan(1).size() == 2);
  CHECK(span.subspan(1, 1)[0] == 2);
  CHECK(span.subspan(3).empty());
  CHECK(span.subspan(9, 9).empty());
#if __cplusplus >= 202002L
  CHECK(std::span<const int>(span).size() == 3);
  CHECK(phd::span<const int>(std::span<int>(vector)).size() == 3);
#endif
}

TEST_CASE("results hold a value or an error") {
  auto missing = phd::model::load("/no/such/model");
  CHECK(!missing);
  CHECK(!missing.has_value());
  CHECK(missing.status() == PHD_ERROR_IO);
  CHECK(missing.error().status() == PHD_ERROR_IO);
  CHECK(missing.error().message().find("/no/such/model") != std::string::npos);

  phd::result<int> seven = 7, none = missing.error();
  CHECK(seven.status() == PHD_OK);
  CHECK(*seven == 7);
  CHECK(seven.value_or(8) == 7);
  CHECK(none.value_or(8) == 8);
  *seven += 1;
  CHECK(*seven == 8);
  phd::result<std::string> text = std::string(100, 'x');
  CHECK(text->size() == 100);
  CHECK((*std::move(text)).size() == 100);
  phd::result<void> done, failed = missing.error();
  CHECK(done);
  CHECK(done.status() == PHD_OK);
  CHECK(!failed);
  CHECK(failed.error().message() == missing.error().message());
}

TEST_CASE("asking a result for what it does not hold ends the program") {
  CHECK(aborts([] { (void)*phd::result<int>(phd::error(PHD_ERROR_IO, "lost")); }));
  CHECK(aborts([] { (void)phd::result<std::string>(phd::error(PHD_ERROR_IO, "lost"))->size(); }));
  CHECK(aborts([] { (void)phd::result<int>(7).error(); }));
  CHECK(aborts([] { (void)phd::result<void>().error(); }));
  CHECK(!aborts([] { (void)*phd::result<int>(7); }));
}

TEST_CASE("paths are paths") {
  CHECK(phd::model::load(std::string("a\0b", 3)).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::convert(std::string("\0", 1), folder + "/x").status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::quantize(model_path, std::string("\0", 1)).status() == PHD_ERROR_INVALID_ARGUMENT);
  auto session = make_session();
  CHECK(session.sequence(0).save_file(std::string("\0", 1)).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(session.sequence(0).restore_file(std::string("\0", 1)).status() == PHD_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("owners move, and are empty then") {
  phd::model first = must(phd::model::load(model_path));
  const phd_model *handle = first.get();
  phd::model second = std::move(first);
  CHECK(second.get() == handle);
  CHECK(second);
  CHECK(!first);  // NOLINT(bugprone-use-after-move): that is what is tested
  CHECK(first.info().status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(first.tokenize("x", 0).status() == PHD_ERROR_INVALID_ARGUMENT);
  second = must(phd::model::load(model_path));  // the sanitizer sees that the first one is freed
  CHECK(must(second.info()).n_vocab == 2048);

  phd::session none;
  CHECK(none.sequence(0).length().status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(none.usage().status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::session::create(first).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::sampler::create(first).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::sampler::create_empty(first, 1).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::sampler().clone().status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::stream().push(1).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::speculator().stats().status() == PHD_ERROR_INVALID_ARGUMENT);

  // Sessions keep their model alive, and move under their sequences.
  phd::session session = must(phd::session::create(second));
  phd::sequence sequence = session.sequence(0);
  second = phd::model();
  phd::session moved = std::move(session);
  must(sequence.prefill(tokens_of("In the beginning")));
  CHECK(must(moved.sequence(0).length()) == must(sequence.length()));

  // Handles of the C interface are taken over.
  phd_stream *raw = nullptr;
  REQUIRE(phd_stream_create(shared_model().get(), &raw, nullptr) == PHD_OK);
  phd::stream stream(raw);
  CHECK(must(stream.stop()).stop == -1);
}

TEST_CASE("parameters begin as the library's defaults") {
  phd_sampler_params c;
  phd_sampler_params_init(&c, sizeof c);
  phd::sampler_params params;
  CHECK(params.struct_size == sizeof(phd_sampler_params));
  CHECK(params.temperature == c.temperature);
  CHECK(params.top_k == c.top_k);
  CHECK(phd::model_params().struct_size == sizeof(phd_model_params));
  CHECK(phd::session_params().n_positions > 0);
  CHECK(phd::seq_policy().when_full == PHD_WHEN_FULL_STOP);
  CHECK(phd::speculator_params().n_draft > 0);
  CHECK(phd::convert_params().struct_size == sizeof(phd_convert_params));

  phd::model_params wrong;
  wrong.backend = 77;
  auto refused = phd::model::load(model_path, wrong);
  CHECK(refused.status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(refused.error().message().find("77") != std::string::npos);
}

TEST_CASE("a model describes itself") {
  const phd_model_desc desc = must(shared_model().info());
  CHECK(desc.copies == 2);
  CHECK(desc.window == 16);
  CHECK(desc.chunk == 32);
  CHECK(desc.n_heads == 6);
  CHECK(desc.has_tokenizer == 1);
  CHECK(desc.n_params > 2'000'000);
  CHECK(must(shared_model().string(PHD_MODEL_ARCHITECTURE)) == "llama");
  CHECK(must(shared_model().string(PHD_MODEL_WEIGHT_TYPE)) == "BF16");
  CHECK(must(shared_model().special_token(PHD_SPECIAL_EOS)) == 0);
  CHECK(must(shared_model().special_token(PHD_SPECIAL_FIM_PREFIX)) == -1);
}

TEST_CASE("text becomes tokens, and text again") {
  std::string text;
  for (int i = 0; i < 300; i++) text += "And God said, é 漢 !?;";  // more tokens than the first guess
  auto tokens = tokens_of(text);
  CHECK(tokens.size() > text.size() / 3 + 8);
  CHECK(must(shared_model().detokenize(tokens)) == text);
  CHECK(tokens_of("").empty());
  CHECK(must(shared_model().detokenize({})).empty());
  const auto end = must(shared_model().tokenize("<|endoftext|>", PHD_TOKENIZE_PARSE_SPECIAL));
  REQUIRE(end.size() == 1);
  CHECK(*shared_model().token_is_end(end[0]));
  CHECK(!*shared_model().token_is_end(tokens[0]));
  CHECK(!*shared_model().token_is_end(1 << 20));
  CHECK(shared_model().token_bytes(1 << 20).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(must(shared_model().token_bytes(end[0])).empty());
  const auto spelling = must(shared_model().token_bytes(end[0], true));
  CHECK(std::string(spelling.begin(), spelling.end()) == "<|endoftext|>");
  auto bad = shared_model().tokenize("a\xff", 0);
  CHECK(bad.status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(bad.error().message().find("UTF-8") != std::string::npos);
}

TEST_CASE("conversations become text") {
  phd::chat_params params;
  params.messages = R"([{"role":"user","content":"Hi"}])";
  params.source =
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ x }}{{ tools|length }}"
      "{{ documents|length }}{% if add_generation_prompt %}<assistant>{% endif %}";
  params.variables = R"({"x": " and more "})";
  params.tools = R"([{"type":"function","function":{"name":"f"}}])";
  params.documents = R"([{"title":"a","text":"b"},{"title":"c","text":"d"}])";
  CHECK(must(shared_model().chat_render(params)) == "<user>Hi and more 12<assistant>");
  params.add_generation_prompt = false;
  CHECK(must(shared_model().chat_render(params)) == "<user>Hi and more 12");
  params.source = "{{ strftime_now('%Y') }}{{ 'x' * 20000 }}";  // more than the first guess
  params.now = 86400;
  CHECK(must(shared_model().chat_render(params)) == "1970" + std::string(20000, 'x'));
  params.source = "{{ raise_exception('no such role') }}";
  auto refused = shared_model().chat_render(params);
  CHECK(!refused);
  CHECK(refused.error().message().find("no such role") != std::string::npos);

  // This model has none of its own.
  params.source = {};
  CHECK(!shared_model().chat_render(params));
  CHECK(shared_model().chat_template().status() == PHD_ERROR_UNSUPPORTED);
  params.name = "tool_use";
  CHECK(!shared_model().chat_render(params));
  CHECK(!shared_model().chat_template("tool_use"));
}

TEST_CASE("sequences are extended, cut and copied") {
  auto session = make_session();
  auto first = session.sequence(0), second = session.sequence(1);
  const auto tokens = tokens_of("In the beginning God created the heaven and the earth.");
  must(first.prefill(tokens));
  CHECK(must(first.length()) == tokens.size());
  CHECK(must(first.tokens()) == tokens);
  const auto logits = logits_of(first);
  CHECK(logits.size() == 2048);

  // The same, token by token.
  must(second.prefill(phd::span<const phd::token_id>(tokens).subspan(0, 2)));
  for (std::size_t i = 2; i < tokens.size(); i++) must(second.step(tokens[i]));
  const auto stepped = logits_of(second);
  for (std::size_t i = 0; i < logits.size(); i++) REQUIRE(std::fabs(stepped[i] - logits[i]) < 1e-3f);

  must(first.fork(session.sequence(2)));
  CHECK(logits_of(session.sequence(2)) == logits);
  auto other = make_session();
  CHECK(first.fork(other.sequence(0)).status() == PHD_ERROR_INVALID_ARGUMENT);

  must(first.truncate(3));
  CHECK(must(first.length()) == 3);
  CHECK(first.logits().status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(first.truncate(4).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(session.sequence(99).length().status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(first.step(-1).status() == PHD_ERROR_INVALID_ARGUMENT);

  auto full = first.prefill(std::vector<phd::token_id>(600, 1));
  CHECK(full.status() == PHD_ERROR_CACHE_FULL);
  CHECK(must(first.length()) == 3);
}

TEST_CASE("batches are as their entries alone") {
  auto session = make_session(), alone = make_session();
  const auto a = tokens_of("In the beginning"), b = tokens_of("And God said unto Moses");
  must(alone.sequence(0).prefill(a));
  must(alone.sequence(1).prefill(b));

  std::vector<phd::batch_entry> batch = {{session.sequence(0), a}, {session.sequence(1), b, PHD_ENTRY_LOGITS_ALL}};
  must(session.decode(batch));
  CHECK(logits_of(session.sequence(0)) == logits_of(alone.sequence(0)));
  CHECK(logits_of(session.sequence(1)) == logits_of(alone.sequence(1)));
  CHECK(must(session.sequence(1).logits_at(b.size() - 1))[7] == must(session.sequence(1).logits())[7]);
  CHECK(session.sequence(1).logits_at(b.size()).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(session.sequence(0).logits_at(0).status() == PHD_ERROR_INVALID_ARGUMENT);
  auto drawer = make_greedy();
  for (std::size_t i = 0; i < b.size(); i++) {
    CHECK(must(drawer.sample_at(session.sequence(1), i)) == must(drawer.sample(must(session.sequence(1).logits_at(i)))));
  }
  CHECK(drawer.sample_at(session.sequence(1), b.size()).status() == PHD_ERROR_INVALID_ARGUMENT);

  // Without logits; and twice the same sequence is refused.
  const phd::token_id next[] = {5};
  const phd::batch_entry quiet[] = {{session.sequence(0), next, 0}};
  must(session.decode(quiet));
  CHECK(!session.sequence(0).logits());
  const phd::batch_entry twice[] = {{session.sequence(0), next}, {session.sequence(0), next}};
  CHECK(session.decode(twice).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(must(session.sequence(0).length()) == a.size() + 1);
}

TEST_CASE("prefixes are found and taken over") {
  auto session = make_session();
  const auto tokens = tokens_of("In the beginning God created the heaven and the earth.");
  must(session.sequence(1).prefill(tokens));
  auto found = must(session.match_prefix(tokens));
  CHECK(found.n_positions == tokens.size());
  CHECK(found.seq == 1);
  must(session.sequence(1).retain());
  CHECK(must(session.sequence(1).length()) == 0);
  CHECK(must(session.match_prefix(tokens)).seq == -1);
  CHECK(must(session.usage()).retained > 0);
  const auto rest = phd::span<const phd::token_id>(tokens).subspan(0, tokens.size() - 1);
  CHECK(must(session.sequence(2).take_prefix(rest)) == rest.size());
  CHECK(must(session.sequence(2).length()) == rest.size());
  const phd::token_id unknown[] = {1999, 1998};
  CHECK(must(session.sequence(3).take_prefix(unknown)) == 0);
  CHECK(must(session.match_prefix(unknown)).n_positions == 0);
}

TEST_CASE("policies drop the middle") {
  auto session = make_session();
  auto sequence = session.sequence(0);
  phd::seq_policy policy;
  policy.when_full = PHD_WHEN_FULL_DROP_MIDDLE;
  policy.n_keep = 32;
  policy.limit = 256;
  must(sequence.set_policy(policy));
  must(sequence.prefill(long_prompt(250)));
  CHECK(must(sequence.dropped()) == 0);
  for (int i = 0; i < 10; i++) must(sequence.step(3));
  CHECK(must(sequence.dropped()) > 0);
  CHECK(must(sequence.length()) == 260 - must(sequence.dropped()));
  policy.when_full = 9;
  CHECK(sequence.set_policy(policy).status() == PHD_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("sessions count") {
  auto session = make_session();
  must(session.sequence(0).prefill(tokens_of("In the beginning")));
  must(session.sequence(0).step(1));
  const phd_stats stats = must(session.stats());
  CHECK(stats.prompt_tokens == tokens_of("In the beginning").size());
  CHECK(stats.step_tokens == 1);
  CHECK(stats.calls == 2);
  const phd_usage usage = must(session.usage());
  CHECK(usage.used + usage.retained + usage.free >= 512);
  CHECK(usage.used > 0);
  const phd_memory memory = must(session.memory());
  CHECK(memory.cache_bytes > 0);
  CHECK(memory.weights_bytes > 0);
}

TEST_CASE("states are saved and restored") {
  auto session = make_session(), other = make_session();
  must(session.sequence(0).prefill(tokens_of("And it came to pass")));
  const auto logits = logits_of(session.sequence(0));
  auto state = must(session.sequence(0).save());
  must(other.sequence(3).restore(state));
  CHECK(logits_of(other.sequence(3)) == logits);
  state[state.size() / 2] ^= 1;
  CHECK(other.sequence(3).restore(state).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(logits_of(other.sequence(3)) == logits);

  const std::string path = folder + "/state";
  must(session.sequence(0).save_file(path));
  must(other.sequence(1).restore_file(path));
  CHECK(logits_of(other.sequence(1)) == logits);
  CHECK(other.sequence(1).restore_file(model_path + "/config.json").status() == PHD_ERROR_FORMAT);
  CHECK(session.sequence(0).save_file("/no/such/folder/state").status() == PHD_ERROR_IO);
}

TEST_CASE("scores are the log-probabilities of the logits") {
  auto session = make_session();
  const auto tokens = tokens_of("In the beginning God");
  const auto scores = must(session.sequence(0).score(tokens));
  REQUIRE(scores.size() == tokens.size() - 1);
  const phd::batch_entry all[] = {{session.sequence(1), tokens, PHD_ENTRY_LOGITS_ALL}};
  must(session.decode(all));
  for (std::size_t i = 0; i < scores.size(); i++) {
    auto logits = must(session.sequence(1).logits_at(i));
    const phd::token_id next[] = {tokens[i + 1]};
    CHECK(must(phd::logprobs(logits, next))[0] == doctest::Approx(scores[i]).epsilon(1e-4));
  }
  const phd::token_id one[] = {tokens[0]};
  CHECK(must(session.sequence(2).score(one)).empty());
  CHECK(session.sequence(2).score({}).status() == PHD_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("log-probabilities") {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f)};
  const phd::token_id tokens[] = {0, 2};
  const auto some = must(phd::logprobs(logits, tokens));
  CHECK(some[0] == doctest::Approx(std::log(1.0 / 8)));
  CHECK(some[1] == doctest::Approx(std::log(5.0 / 8)));
  const auto top = must(phd::top_logprobs(logits, 2));
  REQUIRE(top.size() == 2);
  CHECK(top[0].token == 2);
  CHECK(top[1].token == 1);
  CHECK(top[1].logprob == doctest::Approx(std::log(2.0 / 8)));
  CHECK(must(phd::top_logprobs(logits, 0)).empty());
  CHECK(phd::top_logprobs(logits, 4).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::top_logprobs(logits, std::numeric_limits<std::size_t>::max()).status() == PHD_ERROR_INVALID_ARGUMENT);
  const phd::token_id outside[] = {3};
  CHECK(phd::logprobs(logits, outside).status() == PHD_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("embeddings") {
  auto session = make_session();
  const auto tokens = tokens_of("In the beginning God");
  const auto embedding = must(session.sequence(0).embed(tokens, PHD_POOLING_MEAN, true));
  CHECK(embedding.size() == must(shared_model().info()).n_embd);
  float length = 0;
  for (float x : embedding) length += x * x;
  CHECK(length == doctest::Approx(1).epsilon(1e-4));
  CHECK(must(session.sequence(1).embed(tokens)) != embedding);
}

TEST_CASE("samplers choose") {
  auto session = make_session();
  auto sequence = session.sequence(0);
  const auto prompt = tokens_of("In the beginning");
  must(sequence.prefill(prompt));
  const auto logits = logits_of(sequence);
  const auto best = static_cast<phd::token_id>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  auto greedy = make_greedy();
  CHECK(must(greedy.sample(sequence)) == best);
  CHECK(must(greedy.sample(logits)) == best);
  CHECK(greedy.sample(phd::span<const float>(logits).subspan(1)).status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(greedy.sample(session.sequence(1)).status() == PHD_ERROR_INVALID_ARGUMENT);

  // A copy goes on from the same point, a reset one from the beginning.
  phd::sampler_params hot;
  hot.temperature = 1.5f;
  hot.seed = 42;
  hot.repetition_penalty = 1.1f;
  hot.penalty_last_n = 16;
  auto sampler = must(phd::sampler::create(logits.size(), hot));
  must(sampler.accept_prompt(prompt));
  (void)must(sampler.sample(logits));
  auto copy = must(sampler.clone());
  std::vector<phd::token_id> first, second;
  for (int i = 0; i < 20; i++) {
    first.push_back(must(sampler.sample(logits)));
    must(sampler.accept(first.back()));
    second.push_back(must(copy.sample(logits)));
    must(copy.accept(second.back()));
  }
  CHECK(first == second);
  must(copy.reset());
  must(sampler.reset());
  CHECK(must(copy.sample(logits)) == must(sampler.sample(logits)));

  // A chain of one's own.
  auto chain = must(phd::sampler::create_empty(shared_model(), 7));
  phd::sampler_params one;
  one.top_k = 1;
  must(chain.add(PHD_STAGE_TOP_K, one));
  must(chain.add(PHD_STAGE_DRAW));
  CHECK(must(chain.sample(logits)) == best);
  CHECK(chain.add(PHD_STAGE_TOP_P).status() == PHD_ERROR_INVALID_ARGUMENT);  // behind the end

  const phd::token_id tokens[] = {best};
  const float biases[] = {-std::numeric_limits<float>::infinity()};
  must(greedy.add_logit_bias(tokens, biases));
  CHECK(must(greedy.sample(logits)) != best);
  CHECK(greedy.add_logit_bias(tokens, {}).status() == PHD_ERROR_INVALID_ARGUMENT);
  must(greedy.add_dry_breaker(tokens));
  must(greedy.add_dry_breaker_text(shared_model(), "\n"));
  CHECK(greedy.add_dry_breaker_text(shared_model(), "").status() == PHD_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("constraints bind") {
  auto session = make_session();
  auto stream = must(phd::stream::create(shared_model()));
  std::int32_t seq = 0;
  auto text_of = [&](phd::sampler &sampler) {
    auto sequence = session.sequence(seq++ % 4);
    must(sequence.truncate(0));
    must(sequence.prefill(tokens_of("The")));
    std::string text;
    auto why = must(
        phd::generate(shared_model(), sequence, sampler, stream, 64, [&](std::string_view piece) { text += piece; }));
    CHECK(why == phd::finish::end_token);
    return text;
  };
  auto regex = make_greedy();
  must(regex.add_regex(shared_model(), "(yes|no), [0-9]{3}"));
  const auto answer = text_of(regex);
  CHECK((answer.rfind("yes, ", 0) == 0 || answer.rfind("no, ", 0) == 0));
  CHECK(answer.size() == answer.find(' ') + 4);
  CHECK(regex.add_regex(shared_model(), "x").status() == PHD_ERROR_INVALID_ARGUMENT);

  auto json = make_greedy();
  must(json.add_json_schema(shared_model(), R"({"enum": ["a", {"b": 1}]})"));
  const auto object = text_of(json);
  CHECK((object == "\"a\"" || object.front() == '{'));
  auto refused = make_greedy().add_json_schema(shared_model(), R"({"no_such_keyword": 1})");
  CHECK(refused.status() == PHD_ERROR_UNSUPPORTED);

  auto lark = make_greedy();
  must(lark.add_grammar(shared_model(), "start: \"abc\" \"d\"{2}"));
  CHECK(!*lark.constraint_done());
  CHECK(text_of(lark) == "abcdd");
  CHECK(*lark.constraint_done());
  must(lark.reset());
  must(lark.constraint_accept("abcd"));
  CHECK(lark.constraint_accept("abc").status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(text_of(lark) == "d");
  must(lark.remove_constraint());
  CHECK(!*lark.constraint_done());
  CHECK(lark.constraint_accept("d").status() == PHD_ERROR_INVALID_ARGUMENT);
  must(lark.add_regex(shared_model(), "xyz"));
  CHECK(text_of(lark) == "xyz");

  auto gbnf = make_greedy();
  must(gbnf.add_gbnf(shared_model(), "root ::= \"ab\" [x-z]\n"));
  const auto three = text_of(gbnf);
  CHECK(three.size() == 3);
  CHECK(three.substr(0, 2) == "ab");
  CHECK(!make_greedy().add_gbnf(shared_model(), "root ::= undefined"));

  // A token that the constraint does not allow is no part of the text.
  auto only = make_greedy();
  must(only.add_regex(shared_model(), "yes"));
  CHECK(only.accept(tokens_of("no")[0]).status() == PHD_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("streams give whole characters and stop") {
  auto stream = must(phd::stream::create(shared_model()));
  must(stream.add_stop("created"));
  must(stream.add_stop("never"));
  std::string text;
  for (auto token : tokens_of("é漢 God created the heaven")) text += must(stream.push(token));
  CHECK(text == "é漢 God ");
  CHECK(must(stream.stop()).stop == 0);
  CHECK(must(stream.stop()).n_bytes == text.size());
  CHECK(must(stream.finish()).empty());

  const auto end = must(shared_model().tokenize("<|endoftext|>", PHD_TOKENIZE_PARSE_SPECIAL))[0];
  CHECK(must(stream.push(end)).empty());
  CHECK(must(stream.push(tokens_of("A")[0])) == "A");
  CHECK(stream.set_special(true).status() == PHD_ERROR_INVALID_ARGUMENT);  // within a text
  CHECK(must(stream.finish()).empty());
  must(stream.set_special(true));
  CHECK(must(stream.push(end)) == "<|endoftext|>");
  CHECK(stream.add_stop("").status() == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(must(stream.finish()).empty());

  // Held back: more than the first guess.
  must(stream.add_stop("The beginning of a long stop string that does not come"));
  for (auto token : tokens_of("The beginning of a long stop string")) CHECK(must(stream.push(token)).empty());
  CHECK(must(stream.finish()) == "The beginning of a long stop string");
}

TEST_CASE("text is generated by iterator and by callback") {
  const auto &model = shared_model();
  const auto prompt = tokens_of("In the beginning");

  // By hand.
  auto session = make_session();
  auto sampler = make_greedy();
  auto stream = must(phd::stream::create(model));
  std::string expected;
  std::vector<phd::token_id> tokens;
  must(session.sequence(0).prefill(prompt));
  for (int i = 0; i < 24; i++) {
    tokens.push_back(must(sampler.sample(session.sequence(0))));
    must(sampler.accept(tokens.back()));
    expected += must(stream.push(tokens.back()));
    must(session.sequence(0).step(tokens.back()));
  }
  expected += must(stream.finish());

  must(session.sequence(1).prefill(prompt));
  phd::generation pieces = phd::generate(model, session.sequence(1), sampler, stream, 24);
  std::string text;
  int n_pieces = 0;
  for (std::string_view piece : pieces) {
    CHECK(!piece.empty());
    text += piece;
    n_pieces++;
  }
  CHECK(text == expected);
  CHECK(n_pieces > 10);
  CHECK(pieces.finish() == phd::finish::limit);
  CHECK(pieces.result());
  CHECK(pieces.tokens() == tokens);
  CHECK(!pieces.next());
  CHECK(pieces.begin() == pieces.end());
  // All but the last are in the sequence.
  auto held = must(session.sequence(1).tokens());
  CHECK(held.size() == prompt.size() + tokens.size() - 1);
  CHECK(std::equal(tokens.begin(), tokens.end() - 1, held.begin() + static_cast<std::ptrdiff_t>(prompt.size())));

  must(session.sequence(2).prefill(prompt));
  std::string by_callback;
  auto append = [&](std::string_view piece) { by_callback += piece; };
  CHECK(must(phd::generate(model, session.sequence(2), sampler, stream, 24, append)) == phd::finish::limit);
  CHECK(by_callback == expected);

  // A callback ends it; the stream begins anew.
  must(session.sequence(2).truncate(0));
  must(session.sequence(2).prefill(prompt));
  int n = 0;
  CHECK(must(phd::generate(model, session.sequence(2), sampler, stream, 24,
                           [&](std::string_view) { return ++n < 3; })) == phd::finish::by_caller);
  CHECK(n == 3);
  must(stream.add_stop("greatest"));  // between texts

  // So does leaving the loop.
  must(session.sequence(2).truncate(0));
  must(session.sequence(2).prefill(prompt));
  for (std::string_view piece : phd::generate(model, session.sequence(2), sampler, stream, 24)) {
    CHECK(!piece.empty());
    break;
  }
  // Or stop(), which gives what was held back: here all of the first token but its space.
  REQUIRE(expected.rfind(" of the", 0) == 0);
  must(stream.add_stop("of the zebra"));
  must(session.sequence(2).truncate(0));
  must(session.sequence(2).prefill(prompt));
  phd::generation stopped = phd::generate(model, session.sequence(2), sampler, stream, 24);
  CHECK(stopped.next());
  CHECK(stopped.text() == " ");
  stopped.stop();
  CHECK(stopped.finish() == phd::finish::by_caller);
  CHECK(stopped.next());
  CHECK(stopped.text() == "of");
  CHECK(!stopped.next());
  CHECK(stopped.result());

  // Stop strings.
  must(session.sequence(2).truncate(0));
  must(session.sequence(2).prefill(prompt));
  text.clear();
  CHECK(must(phd::generate(model, session.sequence(2), sampler, stream, 24,
                           [&](std::string_view piece) { text += piece; })) == phd::finish::stop_string);
  CHECK(text == expected.substr(0, expected.find("greatest")));

  // No tokens at all, and a sequence without logits.
  CHECK(phd::generate(model, session.sequence(2), sampler, stream, 0).next() == false);
  phd::generation empty = phd::generate(model, session.sequence(3), sampler, stream, 4);
  CHECK(empty.begin() == empty.end());
  CHECK(empty.finish() == phd::finish::failed);
  CHECK(empty.result().status() == PHD_ERROR_INVALID_ARGUMENT);
#if __cplusplus >= 202002L
  static_assert(std::input_iterator<phd::generation::iterator> && std::ranges::input_range<phd::generation>);
#endif
}

TEST_CASE("generation ends where the model or the cache does") {
  const auto &model = shared_model();
  auto session = make_session(64, 1);
  auto sequence = session.sequence(0);
  auto stream = must(phd::stream::create(model));
  must(sequence.prefill(tokens_of("In the beginning")));
  auto ending = make_greedy();
  const phd::token_id end[] = {0};
  const float much[] = {1000};
  must(ending.add_logit_bias(end, much));
  phd::generation none = phd::generate(model, sequence, ending, stream, 24);
  CHECK(!none.next());
  CHECK(none.finish() == phd::finish::end_token);
  CHECK(none.tokens() == std::vector<phd::token_id>{0});

  auto greedy = make_greedy();
  phd::generation full = phd::generate(model, sequence, greedy, stream, 1000);
  std::string text;
  for (std::string_view piece : full) text += piece;
  CHECK(full.finish() == phd::finish::failed);
  CHECK(full.result().status() == PHD_ERROR_CACHE_FULL);
  CHECK(text == must(model.detokenize(full.tokens())));  // nothing of it is lost
  CHECK(must(sequence.length()) == 64);
}

TEST_CASE("requests to cancel come from any thread") {
  phd::session_params params;
  params.n_positions = 2048;
  params.n_threads = 1;
  std::function<void()> between;
  auto session = must(phd::session::create(shared_model(), params, [&](float) {
    if (between) between();
    return true;
  }));
  auto sequence = session.sequence(0);

  // While the call runs: this thread waits in the callback until the other one has asked.
  int n_passes = 0;
  between = [&] {
    if (n_passes++ == 0) std::thread([&] { must(sequence.cancel()); }).join();
  };
  CHECK(sequence.prefill(long_prompt()).status() == PHD_ERROR_CANCELLED);
  CHECK(n_passes >= 1);
  CHECK(must(sequence.length()) == 0);
  CHECK(must(session.stats()).cancelled == 1);
  between = nullptr;
  must(sequence.prefill(long_prompt()));  // the request is used up

  // Before the call; and taken back.
  must(sequence.cancel());
  CHECK(sequence.step(1).status() == PHD_ERROR_CANCELLED);
  must(sequence.cancel());
  must(sequence.cancel_clear());
  must(sequence.step(1));

  // A generation ends with it, and gives what it has.
  auto sampler = make_greedy();
  auto stream = must(phd::stream::create(shared_model()));
  phd::generation text = phd::generate(shared_model(), sequence, sampler, stream, 100);
  CHECK(text.next());
  std::thread([&] { must(sequence.cancel()); }).join();
  while (text.next()) {
  }
  CHECK(text.finish() == phd::finish::failed);
  CHECK(text.result().status() == PHD_ERROR_CANCELLED);
}

TEST_CASE("progress is told, and cancels") {
  std::vector<float> told;
  auto loaded = phd::model::load(model_path, {}, [&](float fraction) { told.push_back(fraction); });
  CHECK(loaded);
  REQUIRE(!told.empty());
  CHECK(std::is_sorted(told.begin(), told.end()));
  CHECK(phd::model::load(model_path, {}, [](float) { return false; }).status() == PHD_ERROR_CANCELLED);
  bool (*function)(float) = +[](float) { return false; };
  CHECK(phd::model::load(model_path, {}, function).status() == PHD_ERROR_CANCELLED);

  phd::session_params params;
  params.n_positions = 2048;
  params.n_threads = 1;
  int n = 0;
  auto session = must(phd::session::create(shared_model(), params, [&](float) { return ++n < 2; }));
  phd::session moved = std::move(session);  // the library knows the callback's address
  CHECK(moved.sequence(0).prefill(long_prompt()).status() == PHD_ERROR_CANCELLED);
  CHECK(n == 2);
  CHECK(must(moved.sequence(0).length()) == 0);
  must(phd::session::create(shared_model(), params, nullptr)).sequence(0).prefill(long_prompt()).has_value();

  // A call on the session from within is refused.
  phd_status within = PHD_OK;
  phd::session *self = nullptr;
  auto inside = must(phd::session::create(shared_model(), params, [&](float) {
    within = self->sequence(0).length().status();
    return true;
  }));
  self = &inside;
  must(inside.sequence(0).prefill(long_prompt()));
  CHECK(within == PHD_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("the log") {
  constexpr std::uint32_t off = 0, info = 3, debug = 4;
  std::vector<std::string> lines;
  std::uint32_t highest = 0;
  phd_status within = PHD_OK;
  must(phd::log_set(
      [&](std::uint32_t level, std::string_view line) {
        lines.emplace_back(line);
        highest = std::max(highest, level);
        within = phd::log_set(nullptr, off).status();
      },
      info));
  (void)make_session();
  CHECK(!lines.empty());
  CHECK(highest <= info);
  CHECK(within == PHD_ERROR_INVALID_ARGUMENT);
  CHECK(phd::log_set([](std::uint32_t, std::string_view) {}, 99).status() == PHD_ERROR_INVALID_ARGUMENT);

  // The one before hears no more.
  const auto n = lines.size();
  int n_others = 0;
  must(phd::log_set([&](std::uint32_t, std::string_view) { n_others++; }, debug));
  (void)make_session();
  CHECK(lines.size() == n);
  CHECK(n_others > 0);
  must(phd::log_set(nullptr, off));
  const int before = n_others;
  (void)make_session();
  CHECK(n_others == before);
}

TEST_CASE("speculation gives the same text") {
  const auto &model = shared_model();
  const auto prompt = tokens_of("And God said, Let there be light: and there was light. And God said, Let there be");
  auto session = make_session();
  auto sampler = make_greedy();
  must(session.sequence(0).prefill(prompt));
  std::vector<phd::token_id> expected = {must(sampler.sample(session.sequence(0)))};
  while (expected.size() < 24) {
    must(session.sequence(0).step(expected.back()));
    expected.push_back(must(sampler.sample(session.sequence(0))));
  }

  auto run = [&](phd::speculator &speculator, std::int32_t seq) {
    auto sequence = session.sequence(seq);
    must(sequence.prefill(prompt));
    std::vector<phd::token_id> tokens = {must(sampler.sample(sequence))};
    while (tokens.size() < 24) {
      const auto next = must(speculator.step(sequence, tokens.back(), sampler));
      CHECK(!next.empty());
      tokens.insert(tokens.end(), next.begin(), next.end());
    }
    tokens.resize(24);
    CHECK(tokens == expected);
  };
  phd::speculator_params params;
  params.n_draft = 4;
  params.p_min = 0;
  auto lookup = must(phd::speculator::create(model, params));
  run(lookup, 1);
  CHECK(must(lookup.stats()).steps > 0);

  // The model as its own draft model: every draft is right.
  phd::session_params draft_params;
  draft_params.n_positions = 512;
  draft_params.n_sequences = 4;
  draft_params.n_threads = 1;
  auto drafting = must(phd::speculator::create(model, model, draft_params, params));
  run(drafting, 2);
  const phd_draft_stats stats = must(drafting.stats());
  CHECK(stats.accepted > 0);
  CHECK(stats.draft_bytes > 0);
  must(drafting.forget(session.sequence(2)));

  // In parts, as a server does it.
  auto sequence = session.sequence(3);
  must(sequence.prefill(prompt));
  std::vector<phd::token_id> entry = {must(sampler.sample(sequence))};
  const auto drafts = must(drafting.draft(sequence, entry[0]));
  CHECK(!drafts.empty());
  entry.insert(entry.end(), drafts.begin(), drafts.end());
  const phd::batch_entry batch[] = {{sequence, entry, PHD_ENTRY_LOGITS_ALL}};
  must(session.decode(batch));
  const auto accepted = must(drafting.accept(sequence, sampler));
  REQUIRE(!accepted.empty());
  CHECK(std::equal(accepted.begin(), accepted.end(), expected.begin() + 1));
  CHECK(drafting.accept(sequence, sampler).status() == PHD_ERROR_INVALID_ARGUMENT);

  params.n_draft = 1000;
  CHECK(phd::speculator::create(model, params).status() == PHD_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("checkpoints are converted") {
  const std::string full = folder + "/full.gguf", small = folder + "/small.gguf";
  must(phd::convert(model_path, full));
  phd::convert_params params;
  params.weight_type = PHD_WEIGHT_Q8_0;
  float last = 0;
  must(phd::quantize(full, small, params, [&](float fraction) { last = fraction; }));
  CHECK(last == 1.0f);
  auto model = must(phd::model::load(small));
  CHECK(must(model.string(PHD_MODEL_WEIGHT_TYPE)) == "Q8_0");
  CHECK(must(model.info()).copies == 2);
  CHECK(phd::convert(model_path, full, params, [](float) { return false; }).status() == PHD_ERROR_CANCELLED);
  params.weight_type = PHD_WEIGHT_Q4_0;
  CHECK(phd::quantize(small, small + "2", params).status() == PHD_ERROR_INVALID_ARGUMENT);  // is quantized already
  CHECK(phd::convert("/no/such/folder", full).status() == PHD_ERROR_IO);
}

TEST_CASE("another unit, compiled the other way, works on the same handles") {
  auto session = make_session();
  const auto tokens = tokens_of("In the beginning");
  CHECK(other_unit_prefill(session.get(), tokens.data(), tokens.size()) == PHD_OK);
  CHECK(must(session.sequence(0).tokens()) == tokens);
  CHECK(other_unit_missing_model().find("/no/such/model") != std::string::npos);
}

#if PHD_EXCEPTIONS
namespace {
struct own_exception {
  int number;
};
}  // namespace

TEST_CASE("value() throws what went wrong") {
  CHECK(phd::result<int>(7).value() == 7);
  CHECK_NOTHROW(phd::result<void>().value());
  try {
    (void)phd::model::load("/no/such/model").value();
    FAIL("nothing is thrown");
  } catch (const phd::exception &e) {
    CHECK(e.status() == PHD_ERROR_IO);
    CHECK(std::string(e.what()).find("/no/such/model") != std::string::npos);
  }
  const phd::result<int> none = phd::error(PHD_ERROR_FORMAT, "odd");
  CHECK_THROWS_AS((void)none.value(), phd::exception);
  phd::result<int> seven = 7;
  seven.value() = 8;
  CHECK(*seven == 8);
  phd::result<void> failed = none.error();
  CHECK_THROWS_WITH_AS(failed.value(), "odd", phd::exception);
  static_assert(std::is_base_of_v<std::runtime_error, phd::exception> &&
                std::is_nothrow_copy_constructible_v<phd::exception>);
}

TEST_CASE("what a callback throws goes around C") {
  auto number_of = [](auto f) {
    try {
      (void)f();
    } catch (const own_exception &e) {
      return e.number;
    }
    return 0;
  };
  CHECK(number_of([] { return phd::model::load(model_path, {}, [](float) { throw own_exception{1}; }); }) == 1);
  // Also at the very end.
  CHECK(number_of([] {
          return phd::model::load(model_path, {}, [](float fraction) {
            if (fraction == 1) throw own_exception{1};
          });
        }) == 1);
  CHECK(number_of([] {
          return phd::convert(model_path, folder + "/thrown.gguf", {}, [](float) -> bool { throw own_exception{2}; });
        }) == 2);
  CHECK(access((folder + "/thrown.gguf").c_str(), F_OK) != 0);

  phd::session_params params;
  params.n_positions = 2048;
  params.n_threads = 1;
  int n = 0;
  auto session = must(phd::session::create(shared_model(), params, [&](float) -> bool {
    // A call of its own within, which must not take the exception of the call outside.
    (void)phd::model::load("/no/such/model");
    if (n++ == 1) throw own_exception{3};
    return true;
  }));
  CHECK(number_of([&] { return session.sequence(0).prefill(long_prompt()); }) == 3);
  CHECK(must(session.sequence(0).length()) == 0);
  must(session.sequence(0).prefill(long_prompt()));  // the session lives

  // Through C directly there is nobody to throw to: the call is cancelled, and nothing is left over for later ones.
  n = 1;
  const auto prompt = long_prompt();
  must(session.sequence(0).truncate(0));
  CHECK(phd_prefill(session.get(), 0, prompt.data(), prompt.size(), nullptr) == PHD_ERROR_CANCELLED);
  must(session.sequence(0).cancel());
  CHECK(session.sequence(0).step(1).status() == PHD_ERROR_CANCELLED);

  // What generate()'s callback throws, too; the stream can begin another text.
  auto sampler = make_greedy();
  auto stream = must(phd::stream::create(shared_model()));
  must(session.sequence(0).prefill(tokens_of("In the beginning")));
  CHECK(number_of([&] {
          return phd::generate(shared_model(), session.sequence(0), sampler, stream, 9,
                               [](std::string_view) { throw own_exception{4}; });
        }) == 4);
  must(stream.add_stop("x"));

  // A log has nobody to throw to.
  must(phd::log_set([](std::uint32_t, std::string_view) { throw own_exception{5}; }, 4));
  CHECK(number_of([] {
          (void)make_session();
          return 0;
        }) == 0);
  must(phd::log_set(nullptr, 0));
}
#endif

int main(int argc, char **argv) {
  if (argc < 3) return 2;
  model_path = argv[1];
  folder = argv[2];
  doctest::Context context(argc - 2, argv + 2);
  return context.run();
}
