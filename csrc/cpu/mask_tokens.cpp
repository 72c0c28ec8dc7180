// Monte-Carlo masks: counts by sampler, then per copy the l smallest of one random key per maskable
// token. Traffic: 9 bytes read and 8 written per token and copy; half a Philox block per maskable
// token.
#include "dlm_fast/mask_tokens.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/mask_numbers.h"
#include "common/parallel_for.h"
#include "dlm_fast/check.h"

namespace dlm_fast::cpu {
namespace {

struct Stream {
  PhiloxKey key;
  PhiloxWord draw;

  PhiloxWide sample_number(int64_t sample) const {
    return wide_from_block(philox4x32(kSampleNumber, 0, static_cast<PhiloxWord>(sample), draw, key),
                           0);
  }
  PhiloxWide sequence_offset() const {
    return wide_from_block(philox4x32(kSequenceOffset, 0, 0, draw, key), 0);
  }
  // Calls use(rank, 64-bit key) for every maskable token.
  template <typename Use>
  void token_keys(int64_t sample, int64_t num_maskable, const Use& use) const {
    for (int64_t rank = 0; rank < num_maskable; rank += 2) {
      const PhiloxBlock block = token_key_block(static_cast<PhiloxWord>(rank >> 1),
                                                static_cast<PhiloxWord>(sample), draw, key);
      use(rank, wide_from_block(block, 0));
      if (rank + 1 < num_maskable) use(rank + 1, wide_from_block(block, 1));
    }
  }
};

// floor(u + slot * range / num_slots) mod range with u uniform in [0, range): the point of one slot
// of a systematic sample. Integer arithmetic throughout, so that every point is uniform exactly.
int64_t stratified(PhiloxWide offset, int64_t range, int64_t slot, int64_t num_slots) {
  const auto wide_range = static_cast<PhiloxWide>(range);
  const auto wide_slots = static_cast<PhiloxWide>(num_slots);
  // u with 32 bits behind the point
  const PhiloxWide u = wide_range * (offset >> 32) + ((wide_range * (offset & 0xFFFFFFFFu)) >> 32);
  const PhiloxWide shift = static_cast<PhiloxWide>(slot) * wide_range;
  const PhiloxWide whole = shift / wide_slots;
  const PhiloxWide rest = shift % wide_slots;
  const bool carry = (u & 0xFFFFFFFFu) * wide_slots >= ((wide_slots - rest) << 32);
  return static_cast<int64_t>(((u >> 32) + whole + (carry ? 1 : 0)) % wide_range);
}

// round(start + slot * range / num_slots), half to even.
int64_t linspace_point(int64_t start, int64_t range, int64_t slot, int64_t num_slots) {
  const int64_t below_it = start + slot * range / num_slots;
  const int64_t twice_rest = 2 * (slot * range % num_slots);
  if (twice_rest == num_slots) return below_it + (below_it & 1);
  return below_it + (twice_rest > num_slots ? 1 : 0);
}

struct Sample {
  int64_t count;
  double weight;
};

Sample elbo_sample(int64_t count, int64_t length) {
  return {count, static_cast<double>(length) / static_cast<double>(count)};
}

Sample coupled_sample(int64_t sample, int64_t first_side, int64_t length) {
  const int64_t count = sample % 2 == 0 ? first_side : length - first_side;
  return {count, count == 0 ? 0.0 : static_cast<double>(length + 1) / static_cast<double>(count)};
}

// Bernoulli masks with probability t: the tokens whose keys lie below t, which are the smallest.
Sample bernoulli_sample(const Stream& stream, double min_t, int64_t sample, int64_t length) {
  const auto unit = [](PhiloxWide wide) {
    return (static_cast<double>(wide >> 11) + 0.5) * 0x1p-53;
  };
  const double t = min_t + (1.0 - min_t) * unit(stream.sample_number(sample));
  int64_t count = 0;
  stream.token_keys(sample, length,
                    [&](int64_t, PhiloxWide key) { count += unit(key) < t ? 1 : 0; });
  return {count, 1.0 / t};
}

Sample draw_sample(const MaskShape& shape, MaskSampler sampler, const Stream& stream, double min_t,
                   const double* quadrature, int64_t sample, int64_t length) {
  const int64_t n = shape.num_samples;
  switch (sampler) {
    case MaskSampler::kIid:
      return elbo_sample(1 + static_cast<int64_t>(below(static_cast<PhiloxWide>(length),
                                                        stream.sample_number(sample))),
                         length);
    case MaskSampler::kStrat:
      return elbo_sample(1 + stratified(stream.sequence_offset(), length, sample, n), length);
    case MaskSampler::kLinspace: {
      const auto start = 1 + static_cast<int64_t>(
                                 below(static_cast<PhiloxWide>(length), stream.sequence_offset()));
      return elbo_sample((linspace_point(start, length, sample, n) - 1) % length + 1, length);
    }
    case MaskSampler::kCoupled:
      return coupled_sample(sample,
                            static_cast<int64_t>(below(static_cast<PhiloxWide>(length + 1),
                                                       stream.sample_number(sample / 2))),
                            length);
    case MaskSampler::kCoupledStrat:
      return coupled_sample(
          sample, stratified(stream.sequence_offset(), length + 1, sample / 2, n / 2), length);
    case MaskSampler::kBernT:
      return bernoulli_sample(stream, min_t, sample, length);
    case MaskSampler::kQuadT: {
      const double nearest = std::nearbyint(quadrature[sample] * static_cast<double>(length));
      Sample drawn = elbo_sample(std::max<int64_t>(1, static_cast<int64_t>(nearest)), length);
      drawn.weight *= static_cast<double>(n) * quadrature[n + sample];
      return drawn;
    }
  }
  return {0, 0.0};
}

struct KeyedToken {
  PhiloxWide key;
  int32_t rank;

  bool operator<(const KeyedToken& other) const {
    return key != other.key ? key < other.key : rank < other.rank;
  }
};

// Marks the tokens (by rank among the maskable ones) that copy `sample` masks.
void choose_tokens(const MaskShape& shape, const Stream& stream, int64_t sample, int64_t count,
                   std::vector<KeyedToken>& tokens, std::vector<uint8_t>& masked) {
  const auto length = static_cast<int64_t>(masked.size());
  // The second side of a pair masks what the first leaves.
  const bool complement = shape.paired && sample % 2 == 1;
  const int64_t smallest = complement ? length - count : count;
  std::fill(masked.begin(), masked.end(), complement ? 1 : 0);
  if (smallest == 0) return;
  if (smallest < length) {
    tokens.resize(masked.size());
    stream.token_keys(
        shape.paired ? sample / 2 : sample, length,
        [&](int64_t rank, PhiloxWide key) { tokens[rank] = {key, static_cast<int32_t>(rank)}; });
    std::nth_element(tokens.begin(), tokens.begin() + smallest, tokens.end());
    for (int64_t k = 0; k < smallest; ++k) masked[tokens[k].rank] = complement ? 0 : 1;
  } else {
    std::fill(masked.begin(), masked.end(), complement ? 0 : 1);
  }
}

}  // namespace

void mask_counts(const MaskShape& shape, MaskSampler sampler, double min_t, const int64_t* keys,
                 const int64_t* num_maskable, const double* quadrature, int32_t* counts,
                 float* weights, int num_threads) {
  parallel_for(shape.sequences, num_threads, [&](int64_t r) {
    const Stream stream{philox_key(static_cast<PhiloxWide>(keys[r])), shape.draw};
    for (int64_t j = 0; j < shape.count; ++j) {
      Sample drawn{0, 0.0};
      if (num_maskable[r] > 0)
        drawn = draw_sample(shape, sampler, stream, min_t, quadrature, shape.first + j,
                            num_maskable[r]);
      counts[r * shape.count + j] = static_cast<int32_t>(drawn.count);
      weights[r * shape.count + j] = static_cast<float>(drawn.weight);
    }
  });
}

void mask_fill(const MaskShape& shape, int64_t mask_id, int64_t num_masked, const int64_t* keys,
               const int64_t* start, const int64_t* token_ids, const bool* maskable,
               const int32_t* counts, int64_t* noisy_ids, int32_t* rows, int64_t* targets,
               int num_threads) {
  const int64_t copies = shape.sequences * shape.count;
  std::vector<int64_t> first_row(static_cast<size_t>(copies) + 1, 0);
  for (int64_t c = 0; c < copies; ++c) first_row[c + 1] = first_row[c] + counts[c];
  DLM_CHECK(first_row[copies] == num_masked, "mask_tokens: num_masked must be the sum of counts");

  parallel_for(copies, num_threads, [&](int64_t c) {
    static thread_local std::vector<KeyedToken> tokens;
    static thread_local std::vector<uint8_t> masked;
    const int64_t r = c / shape.count;
    const int64_t length = start[r + 1] - start[r];
    const int64_t* clean = token_ids + start[r];
    const bool* open = maskable + start[r];
    const int64_t packed = shape.count * start[r] + (c % shape.count) * length;
    masked.resize(static_cast<size_t>(std::count(open, open + length, true)));
    const Stream stream{philox_key(static_cast<PhiloxWide>(keys[r])), shape.draw};
    choose_tokens(shape, stream, shape.first + c % shape.count, counts[c], tokens, masked);

    int64_t n = first_row[c];
    int64_t rank = 0;
    for (int64_t i = 0; i < length; ++i) {
      const bool hide = open[i] && masked[rank++];
      noisy_ids[packed + i] = hide ? mask_id : clean[i];
      if (!hide) continue;
      rows[n] = static_cast<int32_t>(packed + i);
      targets[n] = clean[i];
      ++n;
    }
  });
}

}  // namespace dlm_fast::cpu
