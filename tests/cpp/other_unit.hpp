// What other_unit.cpp offers: run.sh compiles it without exceptions where test_phd.cpp has them, and the other way
// round.
#pragma once

#include "phd.h"

#include <string>

phd_status other_unit_prefill(phd_session *session, const int32_t *tokens, size_t n_tokens);
std::string other_unit_missing_model();
