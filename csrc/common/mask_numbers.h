// Which Philox numbers the Monte-Carlo masks use. Compiles under NVRTC.
#pragma once

#include "common/philox.h"

namespace dlm_fast {

// First counter: what a number decides. The second is the rank of the token among the maskable
// ones, two ranks to a block; the third the sample (the pair where samples come in pairs).
enum MaskPurpose : PhiloxWord { kTokenKey = 0, kSampleNumber = 1, kSequenceOffset = 2 };

// The 64-bit keys of the maskable tokens of ranks 2 * pair and 2 * pair + 1.
DLM_HOST_DEVICE inline PhiloxBlock token_key_block(PhiloxWord pair, PhiloxWord sample,
                                                   PhiloxWord draw, PhiloxKey key) {
  return philox4x32(kTokenKey, pair, sample, draw, key);
}

}  // namespace dlm_fast
