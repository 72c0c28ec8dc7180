// Launch plans of the small-N head kernel: entry point, grid, depth of the pipeline.
#include "cuda/head_decode_plan.h"

#include <algorithm>

#include "cuda/dtype_names.h"
#include "cuda/token_rows_check.h"

namespace dlm_fast::cuda {
namespace {

constexpr int kMostStages = 6;
// A partial result per warp and row, and the row's counters: see DecodeScratch.
constexpr int64_t kScratchBytesPerRow =
    sizeof(DecodeRow) + kDecodeThreads / 32 * sizeof(DecodePartial);
// One state of five eight-byte numbers and one candidate of three words per warp.
constexpr unsigned kMergeScratchBytes = kDecodeMergeThreads / 32 * (40 + 12);

int num_splits(int vocabulary) {
  return (vocabulary + kDecodeSplit - 1) / kDecodeSplit;
}

bool aligned(const void* base, device::Index row_bytes, int rows) {
  const auto misplaced = reinterpret_cast<uintptr_t>(base) % 16;
  return misplaced == 0 && (rows <= 1 || row_bytes % 16 == 0);
}

void check(const HeadDecodeParams& params, Dtype dtype, DecodeDevice device) {
  DLM_CHECK(dtype != Dtype::kFloat64, "head_decode: hidden and weight must be float32 or 16-bit");
  check_token_rows(params.rows, "head_decode");
  DLM_CHECK(params.rows.count <= kDecodeRows, "head_decode: " + std::to_string(params.rows.count) +
                                                  " rows, at most " + std::to_string(kDecodeRows) +
                                                  "; use the general path");
  DLM_CHECK(params.width > 0 && params.hidden_rows > 0, "head_decode: empty hidden states");
  DLM_CHECK(params.rows.rows || params.rows.count <= params.hidden_rows,
            "head_decode: more rows than hidden states");
  DLM_CHECK(params.hidden_stride >= 0 && params.weight_stride >= 0, "head_decode: negative stride");
  DLM_CHECK(params.hidden && params.weight && params.partials && params.target_logit,
            "head_decode: an address is missing");
  DLM_CHECK(device.multiprocessors > 0, "head_decode: a device has multiprocessors");
}

}  // namespace

int64_t head_decode_workspace_bytes(int rows, int vocabulary) {
  return int64_t{num_splits(vocabulary)} * rows * static_cast<int64_t>(sizeof(DecodePartial));
}

std::array<Launch, 2> plan_head_decode(HeadDecodeParams params, Dtype dtype, DecodeDevice device) {
  check(params, dtype, device);
  const int bytes = element_bytes(dtype);
  params.hidden_aligned = aligned(params.hidden, params.hidden_stride * bytes, params.hidden_rows);
  params.weight_aligned =
      aligned(params.weight, params.weight_stride * bytes, params.rows.vocabulary);
  const int tokens = params.rows.count <= 8 ? 8 : params.rows.count <= 32 ? 32 : 64;
  const int64_t stage_bytes = int64_t{kDecodeSplit + tokens} * kDecodeTileBytes;
  const int64_t scratch_bytes = tokens * kScratchBytesPerRow;
  const int64_t fitting = (device.shared_bytes - scratch_bytes) / stage_bytes;
  DLM_CHECK(fitting >= 2, "head_decode: a block can have " + std::to_string(device.shared_bytes) +
                              " bytes of shared memory, " +
                              std::to_string(scratch_bytes + 2 * stage_bytes) +
                              " are needed; use the general path");
  params.stages = static_cast<int>(std::min<int64_t>(fitting, kMostStages));

  Launch pass;
  pass.kernel = "head_decode" + suffix(dtype) + "_" + std::to_string(tokens);
  // One block fills a multiprocessor's shared memory; it goes through several splits without
  // letting its pipeline run dry in between.
  pass.grid_x =
      static_cast<unsigned>(std::min(device.multiprocessors, num_splits(params.rows.vocabulary)));
  pass.threads = kDecodeThreads;
  pass.shared_bytes = static_cast<unsigned>(scratch_bytes + params.stages * stage_bytes);
  pass.params = bytes_of(params);
  Launch merge;
  merge.kernel = "head_decode_merge";
  merge.grid_x = static_cast<unsigned>(params.rows.count);
  // Of the vocabulary alone: the order of merging is part of the result.
  merge.threads = num_splits(params.rows.vocabulary) <= 32 ? 32 : kDecodeMergeThreads;
  merge.shared_bytes = kMergeScratchBytes;
  merge.params = bytes_of(params);
  return {pass, merge};
}

}  // namespace dlm_fast::cuda
