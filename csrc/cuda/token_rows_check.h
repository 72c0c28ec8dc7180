// Checks that the plans of all kernels that choose tokens share.
#pragma once

#include <string>

#include "cuda/token_rows_params.h"
#include "dlm_fast/check.h"

namespace dlm_fast::cuda {

inline void check_token_rows(const TokenRows& rows, const std::string& kernel) {
  DLM_CHECK(rows.count > 0, kernel + ": no rows; leave the launch out");
  DLM_CHECK(rows.vocabulary > 0, kernel + ": no vocabulary");
  DLM_CHECK(rows.num_forbidden >= 0 && rows.num_forbidden < rows.vocabulary,
            kernel + ": all tokens are forbidden");
  DLM_CHECK(!rows.num_forbidden || rows.forbidden, kernel + ": forbidden ids are missing");
  DLM_CHECK(!rows.keys || rows.draw_inverse > 0, kernel + ": a draw needs a temperature above 0");
}

}  // namespace dlm_fast::cuda
