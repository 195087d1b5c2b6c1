/// libphd for C++17: the handles of phd.h as objects that own them. Header-only, on phd.h alone; docs/cpp.md shows how
/// to use it.
///
/// Names are those of phd.h without `phd_`, and what phd.h says of a function holds for the member that calls it.
/// Enumerations, flags and plain structs (`phd_status`, `PHD_STAGE_TOP_K`, `phd_usage`) are phd.h's own.
///
/// What can fail returns a `phd::result`. Nothing here throws by itself but `result::value()`, which exists where
/// exceptions do, and memory that runs out. An exception that leaves a progress callback cancels the call and is thrown
/// on from it; none crosses C code.
///
/// An object is as safe with threads as its handle: models may be shared, calls on a session wait for each other, the
/// rest is used by one thread at a time.
#ifndef PHD_HPP
#define PHD_HPP

#include "phd.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#if defined(__cpp_exceptions)
#define PHD_EXCEPTIONS 1
#include <exception>
#include <stdexcept>
#else
#define PHD_EXCEPTIONS 0
#endif

namespace phd {
// Objects compiled with and without exceptions may meet in one program: their inline functions differ, and so must
// their names.
#if PHD_EXCEPTIONS
inline namespace with_exceptions {
#else
inline namespace without_exceptions {
#endif

using token_id = std::int32_t;

// Views ---------------------------------------------------------------------------------------------------------------

/// Elements that someone else owns, as C++20's std::span: from an array, anything with data() and size(), or a pointer
/// and a length.
template <class T>
class span {
 public:
  using element_type = T;
  using value_type = std::remove_cv_t<T>;
  using iterator = T *;

  constexpr span() noexcept = default;
  constexpr span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t N>
  constexpr span(T (&array)[N]) noexcept : data_(array), size_(N) {}
  template <
      class C, class E = std::remove_pointer_t<decltype(std::data(std::declval<C &>()))>,
      class = std::enable_if_t<std::is_convertible_v<E (*)[], T (*)[]> && !std::is_array_v<std::remove_reference_t<C>>>>
  constexpr span(C &&container) noexcept : data_(std::data(container)), size_(std::size(container)) {}

  constexpr T *data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T *begin() const noexcept { return data_; }
  constexpr T *end() const noexcept { return data_ + size_; }
  constexpr T &operator[](std::size_t i) const noexcept { return data_[i]; }
  /// The elements from `begin` on, `n` at most; none where there are none.
  constexpr span subspan(std::size_t begin, std::size_t n = static_cast<std::size_t>(-1)) const noexcept {
    begin = begin < size_ ? begin : size_;
    return {data_ + begin, n < size_ - begin ? n : size_ - begin};
  }

 private:
  T *data_ = nullptr;
  std::size_t size_ = 0;
};

// Errors --------------------------------------------------------------------------------------------------------------

/// Why a call failed: a status, which is not PHD_OK, and a sentence that names the file, tensor or value.
class error {
 public:
  error(phd_status status, std::string message) noexcept : status_(status), message_(std::move(message)) {}
  phd_status status() const noexcept { return status_; }
  const std::string &message() const noexcept { return message_; }

 private:
  phd_status status_;
  std::string message_;
};

#if PHD_EXCEPTIONS
/// What result::value() throws.
class exception : public std::runtime_error {
 public:
  explicit exception(const phd::error &error) : std::runtime_error(error.message()), status_(error.status()) {}
  phd_status status() const noexcept { return status_; }

 private:
  phd_status status_;
};
#endif

/// A value, or the error that stands in its place, much as C++23's std::expected. Asking for the one that is not there
/// ends the program; value() throws instead.
template <class T>
class [[nodiscard]] result {
 public:
  result(T value) noexcept(std::is_nothrow_move_constructible_v<T>)
      : state_(std::in_place_index<0>, std::move(value)) {}
  result(phd::error error) noexcept : state_(std::in_place_index<1>, std::move(error)) {}

  bool has_value() const noexcept { return state_.index() == 0; }
  explicit operator bool() const noexcept {
    static_assert(!std::is_same_v<T, bool>, "does this ask for success or for the value? Write has_value() or *result");
    return has_value();
  }
  /// PHD_OK if there is a value.
  phd_status status() const noexcept { return has_value() ? PHD_OK : error().status(); }
  const phd::error &error() const noexcept { return *present(std::get_if<1>(&state_)); }

  T &operator*() & noexcept { return *present(std::get_if<0>(&state_)); }
  const T &operator*() const & noexcept { return *present(std::get_if<0>(&state_)); }
  T operator*() && noexcept(std::is_nothrow_move_constructible_v<T>) { return std::move(**this); }
  T *operator->() noexcept { return &**this; }
  const T *operator->() const noexcept { return &**this; }
  T value_or(T other) const & { return has_value() ? **this : std::move(other); }
  T value_or(T other) && { return has_value() ? std::move(**this) : std::move(other); }

#if PHD_EXCEPTIONS
  T &value() & {
    check();
    return **this;
  }
  const T &value() const & {
    check();
    return **this;
  }
  T value() && {
    check();
    return std::move(**this);
  }
#endif

 private:
  template <class P>
  static P *present(P *p) noexcept {
    if (p == nullptr) std::abort();
    return p;
  }
#if PHD_EXCEPTIONS
  void check() const {
    if (!has_value()) throw phd::exception(error());
  }
#endif

  std::variant<T, phd::error> state_;
};

/// Success, or an error.
template <>
class [[nodiscard]] result<void> {
 public:
  result() noexcept = default;
  result(phd::error error) noexcept : state_(std::in_place_index<1>, std::move(error)) {}

  bool has_value() const noexcept { return state_.index() == 0; }
  explicit operator bool() const noexcept { return has_value(); }
  phd_status status() const noexcept { return has_value() ? PHD_OK : error().status(); }
  const phd::error &error() const noexcept {
    const phd::error *error = std::get_if<1>(&state_);
    if (error == nullptr) std::abort();
    return *error;
  }

#if PHD_EXCEPTIONS
  void value() const {
    if (!has_value()) throw phd::exception(error());
  }
#endif

 private:
  std::variant<std::monostate, phd::error> state_;
};

// How C functions are called ------------------------------------------------------------------------------------------

namespace detail {

#if PHD_EXCEPTIONS
/// A call of a C function on this thread: where its callbacks leave what they throw.
struct frame {
  std::exception_ptr thrown;
  frame *outer;

  static frame *&innermost() noexcept {
    static thread_local frame *current = nullptr;
    return current;
  }
  frame() noexcept : outer(std::exchange(innermost(), this)) {}
  ~frame() { innermost() = outer; }
  frame(const frame &) = delete;
  frame &operator=(const frame &) = delete;
};
#endif

/// The error that a C function makes, until it is freed.
struct c_error {
  phd_error *raw = nullptr;

  c_error() noexcept = default;
  ~c_error() { phd_error_free(raw); }
  c_error(const c_error &) = delete;
  c_error &operator=(const c_error &) = delete;
};

/// function(args..., &error)
template <class F, class... A>
result<void> call(F *function, A... args) {
  c_error error;
#if PHD_EXCEPTIONS
  phd_status status;
  {
    frame here;
    status = function(args..., &error.raw);
    if (here.thrown) std::rethrow_exception(here.thrown);
  }
#else
  phd_status status = function(args..., &error.raw);
#endif
  if (status == PHD_OK) return {};
  if (error.raw == nullptr) return phd::error(status, phd_status_name(status));
  return phd::error(phd_error_status(error.raw), phd_error_message(error.raw));
}

/// function(args..., &out, &error)
template <class T, class F, class... A>
result<T> get(F *function, A... args) {
  T out{};
  if (auto done = call(function, args..., &out); !done) return done.error();
  return out;
}

/// The same for a struct that begins with its size.
template <class T, class F, class... A>
result<T> get_struct(F *function, A... args) {
  T out{};
  out.struct_size = sizeof out;
  if (auto done = call(function, args..., &out); !done) return done.error();
  return out;
}

/// function(args..., buffer, capacity, &size, &error), for a buffer of `guess` elements and then of as many as there
/// are.
template <class B, class F, class... A>
result<B> fill(std::size_t guess, F *function, A... args) {
  B buffer(guess, typename B::value_type{});
  for (;;) {
    std::size_t size = 0;
    auto done = call(function, args..., buffer.data(), buffer.size(), &size);
    if (!done && done.status() != PHD_ERROR_BUFFER_TOO_SMALL) return done.error();
    buffer.resize(size);
    if (done) return buffer;
  }
}

/// A handle on its way into an owner: freed if a callback's exception comes between.
template <class T>
struct made {
  typename T::handle_type *handle = nullptr;

  made() noexcept = default;
  ~made() { T owned(handle); }
  made(const made &) = delete;
  made &operator=(const made &) = delete;
};

/// function(args..., &handle, &error)
template <class T, class F, class... A>
result<T> make(F *function, A... args) {
  made<T> out;
  if (auto done = call(function, args..., &out.handle); !done) return done.error();
  return T(std::exchange(out.handle, nullptr));
}

/// A path as C takes it. One with a null byte would be cut there.
inline result<const char *> terminated(const std::string &path) {
  if (path.find('\0') != std::string::npos) return phd::error(PHD_ERROR_INVALID_ARGUMENT, "path has a null byte");
  return path.c_str();
}

template <auto Free>
struct deleter {
  template <class H>
  void operator()(H *handle) const noexcept {
    Free(handle);
  }
};

/// Owns a handle. Empty by default and after a move: then every call gets PHD_ERROR_INVALID_ARGUMENT.
template <class H, void (*Free)(H *)>
class owner {
 public:
  using handle_type = H;

  owner() noexcept = default;
  /// Takes over a handle of the C interface.
  explicit owner(H *handle) noexcept : handle_(handle) {}
  /// The handle, which stays owned.
  H *get() const noexcept { return handle_.get(); }
  explicit operator bool() const noexcept { return handle_ != nullptr; }

 private:
  std::unique_ptr<H, deleter<Free>> handle_;
};

/// A phd_progress for callables that take a float and return whether to go on, or nothing.
template <class F>
bool progress(float fraction, void *user) noexcept {
#if PHD_EXCEPTIONS
  try {
#endif
    F &callback = *static_cast<F *>(user);
    if constexpr (std::is_void_v<std::invoke_result_t<F &, float>>) {
      callback(fraction);
      return true;
    } else {
      return static_cast<bool>(callback(fraction));
    }
#if PHD_EXCEPTIONS
  } catch (...) {
    // Without a frame a C function was called directly: there is nobody to throw it on to.
    if (frame *innermost = frame::innermost(); innermost != nullptr) innermost->thrown = std::current_exception();
    return false;
  }
#endif
}

template <class P, class F>
P with_progress(P params, F &callback) noexcept {
  params.progress = progress<F>;
  params.progress_user = const_cast<void *>(static_cast<const void *>(&callback));
  return params;
}

}  // namespace detail

// Parameters: the structs of phd.h, with the library's defaults in them -----------------------------------------------

namespace detail {
template <class P, void (*Init)(P *, std::size_t)>
struct params : P {
  params() noexcept { Init(this, sizeof(P)); }
};
}  // namespace detail

using model_params = detail::params<phd_model_params, phd_model_params_init>;
using session_params = detail::params<phd_session_params, phd_session_params_init>;
using seq_policy = detail::params<phd_seq_policy, phd_seq_policy_init>;
using sampler_params = detail::params<phd_sampler_params, phd_sampler_params_init>;
using speculator_params = detail::params<phd_speculator_params, phd_speculator_params_init>;
using convert_params = detail::params<phd_convert_params, phd_convert_params_init>;

/// A conversation to render: phd_chat_params, with views for its texts. A view without data leaves its text out.
struct chat_params {
  std::string_view messages;
  std::string_view tools;
  std::string_view documents;
  std::string_view variables;
  std::string_view source;
  std::string_view name;
  std::int64_t now = 0;
  bool add_generation_prompt = true;
};

// The library ---------------------------------------------------------------------------------------------------------

inline std::uint32_t abi_version() noexcept { return phd_abi_version(); }
inline const char *version() noexcept { return phd_version(); }
inline const char *status_name(phd_status status) noexcept { return phd_status_name(status); }

using log_callback = std::function<void(std::uint32_t level, std::string_view line)>;

/// Hands lines up to `level`, a phd_log_level, to `callback`; null turns the log off. Exceptions that leave a callback
/// are dropped. A callback must not call this: that is refused.
inline result<void> log_set(log_callback callback, std::uint32_t level) {
  struct sink {
    log_callback callback;
    static bool &is_inside() noexcept {
      static thread_local bool inside = false;
      return inside;
    }
    static void write(std::uint32_t level, const char *message, std::size_t length, void *user) noexcept {
      is_inside() = true;
#if PHD_EXCEPTIONS
      try {
        static_cast<sink *>(user)->callback(level, std::string_view(message, length));
      } catch (...) {
      }
#else
      static_cast<sink *>(user)->callback(level, std::string_view(message, length));
#endif
      is_inside() = false;
    }
  };
  if (sink::is_inside()) return phd::error(PHD_ERROR_INVALID_ARGUMENT, "log_set is called from a log callback");

  // Not destroyed when the program ends, as other threads may still have something to say.
  static std::mutex &mutex = *new std::mutex;
  static sink *installed = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  auto next = callback ? std::make_unique<sink>(sink{std::move(callback)}) : nullptr;
  auto done = detail::call(phd_log_set, next ? sink::write : nullptr, static_cast<void *>(next.get()), level);
  // Only now is the one before no longer called.
  if (done) delete std::exchange(installed, next.release());
  return done;
}

namespace detail {
template <class F>
result<void> convert(F *function, const std::string &input, const std::string &out, const convert_params &params) {
  auto from = terminated(input), to = terminated(out);
  if (!from) return from.error();
  if (!to) return to.error();
  return call(function, *from, *to, &params);
}
}  // namespace detail

inline result<void> convert(const std::string &folder, const std::string &out, const convert_params &params = {}) {
  return detail::convert(phd_convert, folder, out, params);
}
template <class F>
result<void> convert(const std::string &folder, const std::string &out, const convert_params &params, F progress) {
  return detail::convert(phd_convert, folder, out, detail::with_progress(params, progress));
}
inline result<void> quantize(const std::string &input, const std::string &out, const convert_params &params = {}) {
  return detail::convert(phd_quantize, input, out, params);
}
template <class F>
result<void> quantize(const std::string &input, const std::string &out, const convert_params &params, F progress) {
  return detail::convert(phd_quantize, input, out, detail::with_progress(params, progress));
}

/// Natural log-probabilities of tokens.
inline result<std::vector<float>> logprobs(span<const float> logits, span<const token_id> tokens) {
  std::vector<float> out(tokens.size());
  auto done = detail::call(phd_logprobs, logits.data(), logits.size(), tokens.data(), tokens.size(), out.data());
  if (!done) return done.error();
  return out;
}

struct token_logprob {
  token_id token;
  float logprob;
};

/// The `n` most probable tokens, best first.
inline result<std::vector<token_logprob>> top_logprobs(span<const float> logits, std::size_t n) {
  // More than there are is refused below: no need to find memory for it.
  const std::size_t room = n < logits.size() ? n : logits.size();
  std::vector<token_id> tokens(room);
  std::vector<float> logprobs(room);
  auto done = detail::call(phd_top_logprobs, logits.data(), logits.size(), n, tokens.data(), logprobs.data());
  if (!done) return done.error();
  std::vector<token_logprob> out;
  out.reserve(n);
  for (std::size_t i = 0; i < n; i++) out.push_back({tokens[i], logprobs[i]});
  return out;
}

// Model ---------------------------------------------------------------------------------------------------------------

/// Weights and tokenizer: immutable, shared by any number of threads. Sessions keep what they need of it alive.
class model : public detail::owner<phd_model, phd_model_free> {
 public:
  using owner::owner;

  static result<model> load(const std::string &path, const model_params &params = {}) {
    auto terminated = detail::terminated(path);
    if (!terminated) return terminated.error();
    return detail::make<model>(phd_model_load, *terminated, &params);
  }
  /// `progress` is called by this thread with the fraction done; returning false cancels.
  template <class F>
  static result<model> load(const std::string &path, const model_params &params, F progress) {
    return load(path, detail::with_progress(params, progress));
  }

  result<phd_model_desc> info() const { return detail::get_struct<phd_model_desc>(phd_model_info, get()); }

  result<std::string> string(phd_model_text kind) const {
    return detail::fill<std::string>(15, phd_model_string, get(), static_cast<std::uint32_t>(kind));
  }

  /// `flags`: PHD_TOKENIZE_ADD_SPECIAL for a plain prompt, PHD_TOKENIZE_PARSE_SPECIAL for a rendered conversation.
  result<std::vector<token_id>> tokenize(std::string_view text, std::uint32_t flags) const {
    return detail::fill<std::vector<token_id>>(text.size() / 3 + 8, phd_tokenize, get(), text.data(), text.size(),
                                               flags);
  }
  result<std::string> detokenize(span<const token_id> tokens) const {
    return detail::fill<std::string>(tokens.size() * 6 + 15, phd_detokenize, get(), tokens.data(), tokens.size());
  }
  result<bool> token_is_end(token_id token) const { return detail::get<bool>(phd_token_is_end, get(), token); }
  result<std::vector<std::uint8_t>> token_bytes(token_id token, bool special = false) const {
    return detail::fill<std::vector<std::uint8_t>>(16, phd_token_bytes, get(), token, special);
  }

  /// -1 if the vocabulary has none.
  result<token_id> special_token(phd_special kind) const {
    return detail::get<token_id>(phd_special_token, get(), static_cast<std::uint32_t>(kind));
  }

  /// No name: the default template. PHD_ERROR_UNSUPPORTED if there is none.
  result<std::string> chat_template(std::string_view name = {}) const {
    return detail::fill<std::string>(4096, phd_chat_template, get(), name.data(), name.size());
  }
  result<std::string> chat_render(const chat_params &params) const {
    phd_chat_params c;
    phd_chat_params_init(&c, sizeof c);
    c.messages = params.messages.data(), c.messages_len = params.messages.size();
    c.tools = params.tools.data(), c.tools_len = params.tools.size();
    c.documents = params.documents.data(), c.documents_len = params.documents.size();
    c.variables = params.variables.data(), c.variables_len = params.variables.size();
    c.source = params.source.data(), c.source_len = params.source.size();
    c.name = params.name.data(), c.name_len = params.name.size();
    c.now = params.now;
    c.add_generation_prompt = params.add_generation_prompt;
    // Enough for most: a second try would render again.
    std::size_t guess = 2 * (params.messages.size() + params.tools.size() + params.documents.size()) + 4096;
    return detail::fill<std::string>(guess, phd_chat_render, get(), &c);
  }
};

// Session and sequences -----------------------------------------------------------------------------------------------

/// One of a session's sequences: a number with the session it belongs to. Copied freely; must not be used after the
/// session.
class sequence {
 public:
  sequence(phd_session *session, std::int32_t id) noexcept : session_(session), id_(id) {}
  phd_session *session() const noexcept { return session_; }
  std::int32_t id() const noexcept { return id_; }

  result<void> prefill(span<const token_id> tokens) const {
    return detail::call(phd_prefill, session_, id_, tokens.data(), tokens.size());
  }
  result<void> step(token_id token) const { return detail::call(phd_step, session_, id_, token); }

  /// They lie in the session, until the sequence is changed.
  result<span<const float>> logits() const { return view(phd_logits, session_, id_); }
  result<span<const float>> logits_at(std::size_t index) const { return view(phd_logits_at, session_, id_, index); }

  result<std::vector<float>> score(span<const token_id> tokens) const {
    const std::size_t n = tokens.empty() ? 0 : tokens.size() - 1;
    return detail::fill<std::vector<float>>(n, phd_score, session_, id_, tokens.data(), tokens.size());
  }
  result<std::vector<float>> embed(span<const token_id> tokens, phd_pooling pooling = PHD_POOLING_LAST,
                                   bool normalize = false) const {
    const std::uint32_t kind = pooling;
    return detail::fill<std::vector<float>>(4096, phd_embed, session_, id_, tokens.data(), tokens.size(), kind,
                                            normalize);
  }

  result<std::size_t> length() const { return detail::get<std::size_t>(phd_seq_length, session_, id_); }
  result<std::vector<token_id>> tokens() const {
    return detail::fill<std::vector<token_id>>(length().value_or(0), phd_seq_tokens, session_, id_);
  }
  result<void> truncate(std::size_t n_positions) const {
    return detail::call(phd_seq_truncate, session_, id_, n_positions);
  }
  /// Makes `to`, of the same session, a copy.
  result<void> fork(const sequence &to) const {
    if (to.session_ != session_) {
      return phd::error(PHD_ERROR_INVALID_ARGUMENT, "the sequences are of different sessions");
    }
    return detail::call(phd_seq_fork, session_, id_, to.id_);
  }

  /// From any thread.
  result<void> cancel() const { return detail::call(phd_seq_cancel, session_, id_); }
  /// From any thread.
  result<void> cancel_clear() const { return detail::call(phd_seq_cancel_clear, session_, id_); }

  result<void> retain() const { return detail::call(phd_seq_retain, session_, id_); }
  /// The positions taken over; leave the last token out.
  result<std::size_t> take_prefix(span<const token_id> tokens) const {
    return detail::get<std::size_t>(phd_seq_take_prefix, session_, id_, tokens.data(), tokens.size());
  }

  result<void> set_policy(const phd_seq_policy &policy) const {
    return detail::call(phd_seq_set_policy, session_, id_, &policy);
  }
  result<std::size_t> dropped() const { return detail::get<std::size_t>(phd_seq_dropped, session_, id_); }

  result<std::vector<std::uint8_t>> save() const {
    return detail::fill<std::vector<std::uint8_t>>(0, phd_seq_save, session_, id_);
  }
  result<void> restore(span<const std::uint8_t> state) const {
    return detail::call(phd_seq_restore, session_, id_, state.data(), state.size());
  }
  result<void> save_file(const std::string &path) const {
    auto terminated = detail::terminated(path);
    if (!terminated) return terminated.error();
    return detail::call(phd_seq_save_file, session_, id_, *terminated);
  }
  result<void> restore_file(const std::string &path) const {
    auto terminated = detail::terminated(path);
    if (!terminated) return terminated.error();
    return detail::call(phd_seq_restore_file, session_, id_, *terminated);
  }

 private:
  template <class F, class... A>
  static result<span<const float>> view(F *function, A... args) {
    const float *logits = nullptr;
    std::size_t n_vocab = 0;
    if (auto done = detail::call(function, args..., &logits, &n_vocab); !done) return done.error();
    return span<const float>(logits, n_vocab);
  }

  phd_session *session_;
  std::int32_t id_;
};

/// A sequence's part of a batch. The tokens are borrowed.
struct batch_entry : phd_batch_entry {
  /// `wanted`: PHD_ENTRY_LOGITS, PHD_ENTRY_LOGITS_ALL, or 0.
  batch_entry(const sequence &of, span<const token_id> appended, std::uint32_t wanted = PHD_ENTRY_LOGITS) noexcept
      : phd_batch_entry{sizeof(phd_batch_entry), of.id(), wanted, appended.data(), appended.size()} {}
};
static_assert(sizeof(batch_entry) == sizeof(phd_batch_entry) && std::is_standard_layout_v<batch_entry>,
              "an array of entries is an array of C's entries");

/// How much of a text is cached, and where: by a sequence, or (-1) by a retained text or nobody.
struct prefix_match {
  std::size_t n_positions;
  std::int32_t seq;
};

/// A fixed-size KV cache and the sequences in it.
class session : public detail::owner<phd_session, phd_session_free> {
 public:
  using owner::owner;

  static result<session> create(const phd::model &model, const session_params &params = {}) {
    return detail::make<session>(phd_session_create, model.get(), &params);
  }
  /// `progress` is called between the passes of long prefills, by the thread that runs them; returning false cancels.
  static result<session> create(const phd::model &model, const session_params &params,
                                std::function<bool(float)> progress) {
    auto kept = std::make_unique<std::function<bool(float)>>(std::move(progress));
    auto made = create(model, *kept ? detail::with_progress(params, *kept) : params);
    if (made) made->progress_ = std::move(kept);
    return made;
  }

  phd::sequence sequence(std::int32_t id) noexcept { return {get(), id}; }

  result<void> decode(span<const batch_entry> entries) {
    return detail::call(phd_decode, get(), entries.data(), entries.size());
  }
  result<prefix_match> match_prefix(span<const token_id> tokens) {
    prefix_match found{};
    auto done = detail::call(phd_seq_match_prefix, get(), tokens.data(), tokens.size(), &found.n_positions, &found.seq);
    if (!done) return done.error();
    return found;
  }

  result<phd_memory> memory() const { return detail::get_struct<phd_memory>(phd_session_memory, get()); }
  result<phd_usage> usage() const { return detail::get_struct<phd_usage>(phd_session_usage, get()); }
  result<phd_stats> stats() const { return detail::get_struct<phd_stats>(phd_session_stats, get()); }

 private:
  // On the heap, as the library knows its address.
  std::unique_ptr<std::function<bool(float)>> progress_;
};

// Sampler -------------------------------------------------------------------------------------------------------------

/// Turns logits into tokens, reproducibly.
class sampler : public detail::owner<phd_sampler, phd_sampler_free> {
 public:
  using owner::owner;

  /// The default chain.
  static result<sampler> create(std::size_t n_vocab, const sampler_params &params = {}) {
    return detail::make<sampler>(phd_sampler_create, &params, n_vocab);
  }
  static result<sampler> create(const phd::model &model, const sampler_params &params = {}) {
    auto desc = model.info();
    if (!desc) return desc.error();
    return create(std::size_t{desc->n_vocab}, params);
  }
  /// No stages: draws from all tokens.
  static result<sampler> create_empty(std::size_t n_vocab, std::uint64_t seed) {
    return detail::make<sampler>(phd_sampler_create_empty, n_vocab, seed);
  }
  static result<sampler> create_empty(const phd::model &model, std::uint64_t seed) {
    auto desc = model.info();
    if (!desc) return desc.error();
    return create_empty(std::size_t{desc->n_vocab}, seed);
  }
  result<sampler> clone() const { return detail::make<sampler>(phd_sampler_clone, get()); }

  result<void> add(phd_stage stage, const sampler_params &params = {}) {
    return detail::call(phd_sampler_add, get(), static_cast<std::uint32_t>(stage), &params);
  }
  /// As many biases as tokens.
  result<void> add_logit_bias(span<const token_id> tokens, span<const float> biases) {
    if (tokens.size() != biases.size()) {
      return phd::error(PHD_ERROR_INVALID_ARGUMENT, std::to_string(tokens.size()) + " tokens have " +
                                                        std::to_string(biases.size()) + " biases, expected as many");
    }
    return detail::call(phd_sampler_add_logit_bias, get(), tokens.data(), biases.data(), tokens.size());
  }
  result<void> add_dry_breaker(span<const token_id> tokens) {
    return detail::call(phd_sampler_add_dry_breaker, get(), tokens.data(), tokens.size());
  }
  result<void> add_dry_breaker_text(const phd::model &model, std::string_view text) {
    return detail::call(phd_sampler_add_dry_breaker_text, get(), model.get(), text.data(), text.size());
  }
  result<void> add_json_schema(const phd::model &model, std::string_view schema) {
    return detail::call(phd_sampler_add_json_schema, get(), model.get(), schema.data(), schema.size());
  }
  result<void> add_regex(const phd::model &model, std::string_view regex) {
    return detail::call(phd_sampler_add_regex, get(), model.get(), regex.data(), regex.size());
  }
  result<void> add_grammar(const phd::model &model, std::string_view grammar) {
    return detail::call(phd_sampler_add_grammar, get(), model.get(), grammar.data(), grammar.size());
  }

  result<void> add_gbnf(const phd::model &model, std::string_view grammar) {
    return detail::call(phd_sampler_add_gbnf, get(), model.get(), grammar.data(), grammar.size());
  }
  result<bool> constraint_done() { return detail::get<bool>(phd_sampler_constraint_done, get()); }
  result<void> constraint_accept(std::string_view text) {
    return detail::call(phd_sampler_constraint_accept, get(), text.data(), text.size());
  }
  result<void> remove_constraint() { return detail::call(phd_sampler_remove_constraint, get()); }

  result<token_id> sample(span<const float> logits) {
    return detail::get<token_id>(phd_sampler_sample, get(), logits.data(), logits.size());
  }
  /// From the sequence's logits, where they lie.
  result<token_id> sample(const sequence &sequence) {
    return detail::get<token_id>(phd_sample, sequence.session(), sequence.id(), get());
  }
  /// From those after token `index` of its last entry: see sequence::logits_at.
  result<token_id> sample_at(const sequence &sequence, std::size_t index) {
    return detail::get<token_id>(phd_sample_at, sequence.session(), sequence.id(), index, get());
  }
  result<void> accept(token_id token) { return detail::call(phd_sampler_accept, get(), token); }
  result<void> accept_prompt(span<const token_id> tokens) {
    return detail::call(phd_sampler_accept_prompt, get(), tokens.data(), tokens.size());
  }
  result<void> reset() { return detail::call(phd_sampler_reset, get()); }
};

// Stream --------------------------------------------------------------------------------------------------------------

/// The stop string that ended a text, or -1; and the bytes of text so far.
struct stream_stop {
  std::int32_t stop;
  std::uint64_t n_bytes;
};

/// A streaming detokenizer: whole characters only, and none of a stop string.
class stream : public detail::owner<phd_stream, phd_stream_free> {
 public:
  using owner::owner;

  static result<stream> create(const phd::model &model) { return detail::make<stream>(phd_stream_create, model.get()); }

  result<void> add_stop(std::string_view stop) {
    return detail::call(phd_stream_add_stop, get(), stop.data(), stop.size());
  }
  result<void> set_special(bool special) { return detail::call(phd_stream_set_special, get(), special); }
  result<std::string> push(token_id token) { return detail::fill<std::string>(15, phd_stream_push, get(), token); }
  result<stream_stop> stop() const {
    stream_stop found{};
    if (auto done = detail::call(phd_stream_stop, get(), &found.stop, &found.n_bytes); !done) return done.error();
    return found;
  }
  result<std::string> finish() { return detail::fill<std::string>(15, phd_stream_finish, get()); }
};

// Generation ----------------------------------------------------------------------------------------------------------

/// Why a generation has ended.
enum class finish {
  running,      ///< It has not.
  end_token,    ///< The model ended its text or turn.
  stop_string,  ///< stream::stop() says which.
  limit,        ///< As many tokens as were asked for.
  by_caller,    ///< The callback returned false.
  failed,       ///< generation::result() says why: a full cache, a request to cancel.
};

/// Text as it is made, piece by piece:
///
///     for (std::string_view piece : phd::generate(model, sequence, sampler, stream, 64)) std::cout << piece;
///
/// The sequence has its prompt, and so logits. A piece is valid until the next; none is empty. A token is appended to
/// the sequence when the one after it is wanted: at the end all but the last of tokens() are there. Each is accepted by
/// the sampler. However it ends, the stream can begin another text. What it was made of must outlive it.
class generation {
 public:
  class iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = std::string_view;
    using difference_type = std::ptrdiff_t;
    using pointer = const std::string_view *;
    using reference = std::string_view;

    iterator() noexcept = default;
    std::string_view operator*() const noexcept { return generation_->text(); }
    iterator &operator++() {
      if (!generation_->next()) generation_ = nullptr;
      return *this;
    }
    void operator++(int) { ++*this; }
    friend bool operator==(const iterator &a, const iterator &b) noexcept { return a.generation_ == b.generation_; }
    friend bool operator!=(const iterator &a, const iterator &b) noexcept { return !(a == b); }

   private:
    friend generation;
    explicit iterator(generation *g) noexcept : generation_(g) {}
    generation *generation_ = nullptr;
  };

  generation(const phd::model &model, const phd::sequence &sequence, phd::sampler &sampler, phd::stream &stream,
             std::size_t limit)
      : model_(model), sequence_(sequence), sampler_(sampler), stream_(stream), limit_(limit) {}
  ~generation() {
    if (!is_flushed_) (void)stream_.finish();
  }
  generation(const generation &) = delete;
  generation &operator=(const generation &) = delete;

  /// Makes the next piece of text; false if there is none.
  bool next() {
    text_.clear();
    while (finish_ == phd::finish::running && text_.empty()) advance();
    if (finish_ != phd::finish::running) flush();
    return !text_.empty();
  }
  std::string_view text() const noexcept { return text_; }

  iterator begin() { return iterator(next() ? this : nullptr); }
  iterator end() noexcept { return iterator(); }

  phd::finish finish() const noexcept { return finish_; }
  /// The error of finish::failed; otherwise success.
  const phd::result<void> &result() const noexcept { return result_; }
  /// All tokens so far, the one that ended the text included.
  const std::vector<token_id> &tokens() const noexcept { return tokens_; }
  /// Ends it before its end; next() gives what the stream has held back.
  void stop() {
    if (finish_ == phd::finish::running) finish_ = phd::finish::by_caller;
  }

 private:
  void advance() {
    if (tokens_.size() == limit_) {
      finish_ = phd::finish::limit;
      return;
    }
    if (!tokens_.empty()) {
      if (auto done = sequence_.step(tokens_.back()); !done) return fail(done.error());
    }
    auto token = sampler_.sample(sequence_);
    if (!token) return fail(token.error());
    if (auto done = sampler_.accept(*token); !done) return fail(done.error());
    tokens_.push_back(*token);
    auto is_end = model_.token_is_end(*token);
    if (!is_end.has_value()) return fail(is_end.error());
    if (*is_end) {
      finish_ = phd::finish::end_token;
      return;
    }
    auto piece = stream_.push(*token);
    if (!piece) return fail(piece.error());
    text_ += *piece;
    auto stop = stream_.stop();
    if (!stop) return fail(stop.error());
    if (stop->stop >= 0) finish_ = phd::finish::stop_string;
  }

  void fail(const phd::error &error) {
    result_ = error;
    finish_ = phd::finish::failed;
  }

  /// What the stream still holds back is text, too.
  void flush() {
    if (std::exchange(is_flushed_, true)) return;
    auto rest = stream_.finish();
    if (rest) {
      text_ += *rest;
    } else if (result_) {
      fail(rest.error());
    }
  }

  const phd::model &model_;
  phd::sequence sequence_;
  phd::sampler &sampler_;
  phd::stream &stream_;
  std::size_t limit_;
  std::string text_;
  std::vector<token_id> tokens_;
  phd::result<void> result_;
  phd::finish finish_ = phd::finish::running;
  bool is_flushed_ = false;
};

/// Up to `limit` tokens after what the sequence has, as pieces of text.
inline generation generate(const model &model, const sequence &sequence, sampler &sampler, stream &stream,
                           std::size_t limit) {
  return generation(model, sequence, sampler, stream, limit);
}

/// The same for a callback that takes pieces as std::string_view and returns whether to go on, or nothing. After
/// false, what the stream holds back is dropped. Exceptions pass through.
template <class F>
result<finish> generate(const model &model, const sequence &sequence, sampler &sampler, stream &stream,
                        std::size_t limit, F &&on_text) {
  generation text(model, sequence, sampler, stream, limit);
  while (text.next()) {
    if constexpr (std::is_void_v<std::invoke_result_t<F &, std::string_view>>) {
      on_text(text.text());
    } else if (!on_text(text.text())) {
      return finish::by_caller;
    }
  }
  if (!text.result()) return text.result().error();
  return text.finish();
}

// Speculator ----------------------------------------------------------------------------------------------------------

/// Guesses how sequences go on, and verifies the guesses: docs/speculative.md.
class speculator : public detail::owner<phd_speculator, phd_speculator_free> {
 public:
  using owner::owner;

  /// Drafts by looking them up in the text.
  static result<speculator> create(const phd::model &model, const speculator_params &params = {}) {
    const phd_model *no_model = nullptr;
    const phd_session_params *no_params = nullptr;
    return detail::make<speculator>(phd_speculator_create, model.get(), no_model, no_params, &params);
  }
  /// Drafts by a smaller model, in a session of the speculator's own. `params.kind` is taken for PHD_DRAFT_MODEL.
  static result<speculator> create(const phd::model &model, const phd::model &draft_model,
                                   const session_params &draft_params, speculator_params params = {}) {
    params.kind = PHD_DRAFT_MODEL;
    return detail::make<speculator>(phd_speculator_create, model.get(), draft_model.get(), &draft_params, &params);
  }

  result<std::vector<token_id>> draft(const sequence &sequence, token_id token) {
    return detail::fill<std::vector<token_id>>(16, phd_speculator_draft, get(), sequence.session(), sequence.id(),
                                               token);
  }
  result<std::vector<token_id>> accept(const sequence &sequence, phd::sampler &sampler) {
    return detail::fill<std::vector<token_id>>(16, phd_speculator_accept, get(), sequence.session(), sequence.id(),
                                               sampler.get());
  }
  result<std::vector<token_id>> step(const sequence &sequence, token_id token, phd::sampler &sampler) {
    return detail::fill<std::vector<token_id>>(16, phd_speculator_step, get(), sequence.session(), sequence.id(), token,
                                               sampler.get());
  }
  result<void> forget(const sequence &sequence) { return detail::call(phd_speculator_forget, get(), sequence.id()); }
  result<phd_draft_stats> stats() const { return detail::get_struct<phd_draft_stats>(phd_speculator_stats, get()); }
};

}  // namespace with_exceptions or without_exceptions
}  // namespace phd

#endif  // PHD_HPP
