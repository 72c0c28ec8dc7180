// Top-k and top-p of a row of logits by radix selection: which columns a draw may choose from.
//
// Columns are kept in one order: larger logits first, then lower ids. A filter keeps the shortest
// leading part whose weight reaches a goal: columns for top_k, mass for top_p. Digits of the logits
// are found from the highest on by histograms of integer weights, so that sums do not depend on the
// order of their terms.
#pragma once

#include "cuda/device/token_choice.cuh"
#include "cuda/row_draw_params.h"

namespace dlm_fast::device {

using cuda::RowDrawParams;

// The mass of the largest logit; 2^24 columns of it stay below 2^64.
constexpr float kUnitMass = 0x1p39f;
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
// Most logits share a few leading digits; copies of the histogram spread the atomics.
constexpr int kCopies = 8;
constexpr int kLastId = 0x7FFFFFFF;

// Kept: larger keys than `key`, and equal ones up to `id`.
struct Cut {
  unsigned key;
  int id;
};

struct SelectScratch {
  Wide weight[kBins][kCopies];
  int bin;
  Wide before, inside;
  Wide total;
};

// Integers in the order of the numbers; both zeros are the same.
DLM_DEVICE unsigned order_key(float z) {
  const unsigned bits = bits_of(z + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DLM_DEVICE bool is_kept(const Cut& cut, float z, int id) {
  if (!(z > -infinity_of<float>())) return false;
  const unsigned key = order_key(z);
  return key > cut.key || (key == cut.key && id <= cut.id);
}

// One row as the block sees it.
struct DrawRow {
  const RowDrawParams& params;
  const float* logits;

  DLM_DEVICE explicit DrawRow(const RowDrawParams& given)
      : params(given), logits(given.logits + block_x() * given.row_stride) {}

  // z of four columns from `first`, a multiple of 4, on.
  DLM_DEVICE void read(int first, float (&z)[kNoiseColumns]) const {
    const TokenRows& rows = params.rows;
    const unsigned excluded = excluded_columns(rows, first);
    Quad<float> quad = {};
    if (first + kNoiseColumns <= rows.vocabulary)
      quad = *reinterpret_cast<const Quad<float>*>(logits + first);
    else
      for (int i = 0; first + i < rows.vocabulary; ++i) quad.value[i] = logits[first + i];
    for (int i = 0; i < kNoiseColumns; ++i) {
      const bool out = excluded >> i & 1;
      const float bias = rows.bias && !out ? rows.bias[first + i] : 0.0f;
      z[i] = out ? -infinity_of<float>()
                 : tempered(quad.value[i] + bias, rows.inverse, rows.inverse_low);
    }
  }

  // visit(first, z) for every group of four columns, each by one thread.
  template <typename Visit>
  DLM_DEVICE void visit_fours(const Visit& visit) const {
    const int step = static_cast<int>(thread_count()) * kNoiseColumns;
    for (int first = static_cast<int>(thread_index()) * kNoiseColumns;
         first < params.rows.vocabulary; first += step) {
      float z[kNoiseColumns];
      read(first, z);
      visit(first, z);
    }
  }

  // visit(id, z) for every column that the cut keeps.
  template <typename Visit>
  DLM_DEVICE void visit_kept(const Cut& cut, const Visit& visit) const {
    visit_fours([&](int first, const float (&z)[kNoiseColumns]) {
      for (int i = 0; i < kNoiseColumns; ++i)
        if (is_kept(cut, z[i], first + i)) visit(first + i, z[i]);
    });
  }
};

struct Digit {
  int bin;      // -1: all weights together stay below the goal
  Wide before;  // weight of the bins above
  Wide inside;
};

// By the first warp: the bin, from the highest down, in which the sum of weights reaches the goal.
// Where there is none the scratch stays as it is.
DLM_DEVICE void choose_bin(SelectScratch& scratch, Wide goal) {
  constexpr int kLaneBins = kBins / static_cast<int>(kWarp);
  const int lane = static_cast<int>(thread_index()), highest = kBins - 1 - lane * kLaneBins;
  Wide own[kLaneBins], sum = 0;
  for (int i = 0; i < kLaneBins; ++i) {
    own[i] = 0;
    for (int copy = 0; copy < kCopies; ++copy) own[i] += scratch.weight[highest - i][copy];
    sum += own[i];
  }
  Wide through = sum;
  for (int distance = 1; distance < static_cast<int>(kWarp); distance *= 2) {
    const Wide other = shuffle(through, static_cast<unsigned>(lane - distance) % kWarp);
    if (lane >= distance) through += other;
  }
  Wide before = through - sum;
  for (int i = 0; i < kLaneBins; ++i) {
    if (before < goal && before + own[i] >= goal) {
      scratch.bin = highest - i;
      scratch.before = before;
      scratch.inside = own[i];
    }
    before += own[i];
  }
}

// This thread's way to the histogram.
struct Histogram {
  SelectScratch& scratch;
  DLM_DEVICE void operator()(unsigned bin, Wide weight) const {
    atomic_add(&scratch.weight[bin][thread_index() % kCopies], weight);
  }
};

// fill(add) calls add(bin, weight) for this thread's columns. Called by all threads.
template <typename Fill>
DLM_DEVICE Digit find_digit(SelectScratch& scratch, Wide goal, const Fill& fill) {
  for (int i = static_cast<int>(thread_index()); i < kBins * kCopies;
       i += static_cast<int>(thread_count()))
    scratch.weight[i / kCopies][i % kCopies] = 0;
  sync_block();  // all have read what the search before this one has found
  if (thread_index() == 0) scratch.bin = -1;
  fill(Histogram{scratch});
  sync_block();
  if (thread_index() < kWarp) choose_bin(scratch, goal);
  sync_block();
  return {scratch.bin, scratch.before, scratch.inside};
}

// Whether the digits above `shift` are those of the prefix.
DLM_DEVICE bool same_above(unsigned number, unsigned prefix, int shift) {
  const int above = shift + kDigitBits;
  return above >= 32 || (number ^ prefix) >> above == 0;
}

// The id of the count-th column with the cut's key; there are more of them.
DLM_DEVICE int select_tie(const DrawRow& row, SelectScratch& scratch, unsigned key, Wide count) {
  unsigned id = 0;
  for (int shift = 16; shift >= 0; shift -= kDigitBits) {  // the plan refuses ids of 25 bits
    const Digit digit = find_digit(scratch, count, [&](const Histogram& add) {
      row.visit_kept({key, kLastId}, [&](int other, float z) {
        const auto number = static_cast<unsigned>(other);
        if (order_key(z) == key && same_above(number, id, shift))
          add(kBins - 1 - (number >> shift & (kBins - 1)), Wide{1});
      });
    });
    id |= static_cast<unsigned>(kBins - 1 - digit.bin) << shift;
    count -= digit.before;
  }
  return static_cast<int>(id);
}

// The shortest leading part of what `cut` keeps whose weight reaches the goal; `cut` itself where
// the weight of all stays below it. weight(z) is the same for equal logits.
template <typename Weight>
DLM_DEVICE Cut select(const DrawRow& row, SelectScratch& scratch, const Cut& cut, Wide goal,
                      const Weight& weight) {
  unsigned key = 0;
  Wide inside = 0;
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    const Digit digit = find_digit(scratch, goal, [&](const Histogram& add) {
      row.visit_kept(cut, [&](int, float z) {
        const unsigned other = order_key(z);
        if (same_above(other, key, shift)) add(other >> shift & (kBins - 1), weight(z));
      });
    });
    if (digit.bin < 0) return cut;
    key |= static_cast<unsigned>(digit.bin) << shift;
    goal -= digit.before;
    inside = digit.inside;
  }
  const unsigned bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
  const Wide one = weight(float_of_bits(bits));
  const Wide wanted = (goal + one - 1) / one, equal = inside / one;
  if (wanted >= equal) return {key, key == cut.key ? cut.id : kLastId};
  return {key, select_tie(row, scratch, key, wanted)};
}

DLM_DEVICE Wide sum_of_block(SelectScratch& scratch, Wide value) {
  if (thread_index() == 0) scratch.total = 0;
  sync_block();
  for (unsigned mask = 1; mask < kWarp; mask *= 2) value += shuffle_xor(value, mask);
  if (thread_index() % kWarp == 0) atomic_add(&scratch.total, value);
  sync_block();
  return scratch.total;
}

// What top_k, and then top_p of the rest, leave of a row whose largest z is `max`.
DLM_DEVICE Cut filters_cut(const DrawRow& row, SelectScratch& scratch, float max) {
  const RowDrawParams& params = row.params;
  Cut cut = {0, kLastId};
  if (params.top_k < params.rows.vocabulary)
    cut = select(row, scratch, cut, static_cast<Wide>(params.top_k), [](float) { return Wide{1}; });
  if (params.top_p >= 1) return cut;
  const auto mass = [&](float z) {
    // between 0 and 1; a row with NaN has no masses
    const float share = exp_of((z - max) * params.rows.draw_inverse);
    return share <= 1 ? static_cast<Wide>(share * kUnitMass) : Wide{0};
  };
  Wide own = 0;
  row.visit_kept(cut, [&](int, float z) { own += mass(z); });
  const Wide total = sum_of_block(scratch, own);
  const double share = params.top_p * static_cast<double>(total);
  Wide goal = static_cast<Wide>(share);
  if (static_cast<double>(goal) < share) ++goal;
  // 0 only of a row without masses, where no search reaches it and the cut stays
  return select(row, scratch, cut, smaller_of(goal, total), mass);
}

}  // namespace dlm_fast::device
