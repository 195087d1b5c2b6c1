// phd.hpp for the second time in one program, before the standard headers.
#include "phd.hpp"
#include "phd.hpp"

#include "other_unit.hpp"

phd_status other_unit_prefill(phd_session *session, const int32_t *tokens, size_t n_tokens) {
  return phd::sequence(session, 0).prefill({tokens, n_tokens}).status();
}

std::string other_unit_missing_model() { return phd::model::load("/no/such/model").error().message(); }
