// Switches between the kernels as they are and their mutants, at run time: one build holds all of
// them. mutants.py writes the calls; the build includes this file in front of every source.
#pragma once

#include <type_traits>

namespace dlm_mutant {

// The number of the mutant in force, 0 for none; kRecord notes whose places are executed.
constexpr int kRecord = -1, kMost = 1 << 14;
inline int active = 0;
inline unsigned char reached[kMost];

inline bool on(int id) {
  if (active == kRecord) reached[id] = 1;
  return active == id;
}

// Added to a step or a literal: one more for `id`, one less for `id` + 1.
template <int id>
constexpr int shift() {
  if (__builtin_is_constant_evaluated()) return 0;
  return on(id) ? 1 : on(id + 1) ? -1 : 0;
}

struct LessThan {
  template <typename T, typename U>
  static constexpr bool compare(const T& left, const U& right) {
    return left < right;
  }
};
struct AtMost {
  template <typename T, typename U>
  static constexpr bool compare(const T& left, const U& right) {
    return left <= right;
  }
};
struct MoreThan {
  template <typename T, typename U>
  static constexpr bool compare(const T& left, const U& right) {
    return left > right;
  }
};
struct AtLeast {
  template <typename T, typename U>
  static constexpr bool compare(const T& left, const U& right) {
    return left >= right;
  }
};
struct Same {
  template <typename T, typename U>
  static constexpr bool compare(const T& left, const U& right) {
    return left == right;
  }
};
struct Other {
  template <typename T, typename U>
  static constexpr bool compare(const T& left, const U& right) {
    return left != right;
  }
};

// Written `left < Compare<...>() < right`, which keeps the precedence of the operator; for == and
// != with == in both places. Mutants `id`: the other operator, `id` + 1: `by` added to the right
// side, `id` + 2: subtracted from it (of < and its like one of the two is the other operator).
template <int id, typename Operator, typename Swapped, bool kMore, bool kLess>
struct Compare {};

template <typename Site, typename T>
struct Left {
  T value;
};

template <typename T>
constexpr bool shiftable() {
  return std::is_integral<T>::value && !std::is_same<T, bool>::value;
}

template <int id, typename Operator, typename Swapped, bool kMore, bool kLess, typename T,
          typename U>
constexpr bool decide(const T& left, const U& right) {
  if (__builtin_is_constant_evaluated()) return Operator::compare(left, right);
  if (on(id)) return Swapped::compare(left, right);
  if constexpr (shiftable<T>() && shiftable<U>()) {
    if (kMore && on(id + 1)) return Operator::compare(left, right + 1);
    if (kLess && on(id + 2)) return Operator::compare(left, right - 1);
  }
  return Operator::compare(left, right);
}

#define DLM_COMPARE_WITH(op)                                                                       \
  template <typename T, int id, typename O, typename S, bool m, bool l>                            \
  constexpr Left<Compare<id, O, S, m, l>, T> operator op(const T& left, Compare<id, O, S, m, l>) { \
    return {left};                                                                                 \
  }                                                                                                \
  template <typename T, typename U, int id, typename O, typename S, bool m, bool l>                \
  constexpr bool operator op(const Left<Compare<id, O, S, m, l>, T>& left, const U& right) {       \
    return decide<id, O, S, m, l>(left.value, right);                                              \
  }
DLM_COMPARE_WITH(<)
DLM_COMPARE_WITH(==)
#undef DLM_COMPARE_WITH

}  // namespace dlm_mutant

extern "C" {
__attribute__((visibility("default"), used)) inline void dlm_set_mutant(int id) {
  dlm_mutant::active = id;
}
// What was executed since the last call, one byte per mutant.
__attribute__((visibility("default"), used)) inline void dlm_take_reached(unsigned char* out) {
  for (int id = 0; id < dlm_mutant::kMost; ++id) {
    out[id] = dlm_mutant::reached[id];
    dlm_mutant::reached[id] = 0;
  }
}
}
