// A chunk of keys and values in registers, and the scores of a query over it.
#pragma once

#include "layout.cuh"
#include "site.cuh"

namespace llava_st::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

/// The lanes over rows of queries and keys, and over those of values and outputs.
template <class L>
struct Lanes {
  Lane<L> key, value;

  LLAVA_ST_DEVICE explicit Lanes(const AttentionProblem& problem)
      : key(problem.head_dim), value(L::EXTENDED ? problem.value_dim : problem.head_dim) {}
};

/// The keys and values of one region.
template <class L>
struct RegionKeys {
  using T = typename L::Element;
  const AttentionProblem& problem;
  const Site& site;
  Places places;
  RegionRows<const T> key, value;
  const Operand<const T>& bias;

  LLAVA_ST_DEVICE RegionKeys(const AttentionProblem& problem, const Site& site, const Operand<const T>& key,
                             const Operand<const T>& value, const Operand<const T>& bias)
      : problem(problem),
        site(site),
        places(site.region.size),
        key(problem, site, key),
        value(problem, site, value),
        bias(bias) {}

  LLAVA_ST_DEVICE bool biased() const { return L::EXTENDED && bias.data != nullptr; }
  LLAVA_ST_DEVICE int64_t count() const { return places.count; }

  LLAVA_ST_DEVICE Place place(int64_t i) const { return places.at<!L::MANY>(i); }
};

template <class L>
struct Chunk {
  RowPackets<L> key[L::STEPS], value[L::STEPS];
  bool exists[L::STEPS];  // and is not masked
  bool masked[L::STEPS];  // of extended layouts, like the bias
  float bias[L::STEPS];

  /// Starts all loads of the chunk that begins with key number `begin`.
  LLAVA_ST_DEVICE void load(const RegionKeys<L>& keys, const Lanes<L>& lanes, int64_t begin) {
    const Lane<L>& lane = lanes.key;
    const int64_t left = keys.count() - begin;
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) exists[step] = step * L::GROUPS + lane.group < left;
    if (keys.site.cut_short) {
      LLAVA_ST_UNROLL
      for (int step = 0; step < L::STEPS; ++step) {
        exists[step] = exists[step] && keys.site.key_exists(keys.problem, keys.place(number(lane, begin, step)));
      }
    }
    if constexpr (L::EXTENDED) load_bias(keys, lane, begin);
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) {
      const Place place = keys.place(number(lane, begin, step));
      key[step] = load_row<L>(keys.key.at(place), lane, exists[step]);
      value[step] = load_row<L>(keys.value.at(place), lanes.value, exists[step]);
    }
  }

  /// Reads the bias, and takes masked keys for such as do not exist: whatever they hold, they take no part.
  LLAVA_ST_DEVICE void load_bias(const RegionKeys<L>& keys, const Lane<L>& lane, int64_t begin) {
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) bias[step] = 0.0f;
    if (keys.biased()) {
      const RegionRows<const typename L::Element> rows(keys.problem, keys.site, keys.bias);
      LLAVA_ST_UNROLL
      for (int step = 0; step < L::STEPS; ++step) {
        bias[step] = float_of(load_once(rows.at(keys.place(number(lane, begin, step))), exists[step]));
      }
    }
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) {
      masked[step] = exists[step] && bias[step] == -INFINITY;
      exists[step] = exists[step] && !masked[step];
    }
  }

  /// Which key of the region this lane has at a step.
  static LLAVA_ST_DEVICE int64_t number(const Lane<L>& lane, int64_t begin, int step) {
    return begin + step * L::GROUPS + lane.group;
  }

  /// The inner products of a query with the keys, minus infinity for keys that do not exist.
  LLAVA_ST_DEVICE void score(const RowFloats<L>& query, float (&scores)[L::STEPS]) const {
    LLAVA_ST_UNROLL
    for (int step = 0; step < L::STEPS; ++step) {
      float score = query.dot(key[step]);
      if constexpr (L::EXTENDED) score += bias[step] * kLog2E;
      scores[step] = exists[step] ? score : -INFINITY;
    }
  }
};

/// The running maximum of the scores of all keys seen, the same in the whole warp. It works in powers of two: scores
/// carry the factor log2(e).
struct RunningMaximum {
  float largest = -INFINITY;

  /// What scores are taken relative to. As long as no score is above minus infinity that is zero, not minus infinity:
  /// the weights are then 0 instead of NaN, and a finite score yet to come still counts.
  LLAVA_ST_DEVICE float base() const { return largest == -INFINITY ? 0.0f : largest; }

  LLAVA_ST_DEVICE float weight(float score) const { return exp2(score - base()); }

  /// Takes in the scores of a chunk; returns the factor that corrects sums over earlier keys. NaN is passed over here
  /// and comes back in the weights.
  template <class L>
  LLAVA_ST_DEVICE float include(const float (&scores)[L::STEPS]) {
    float chunk = scores[0];
    LLAVA_ST_UNROLL
    for (int step = 1; step < L::STEPS; ++step) chunk = maximum(chunk, scores[step]);
    const float before = largest;
    largest = maximum(before, maximum_over_groups<L>(chunk));
    return exp2(before - base());
  }
};

}  // namespace llava_st::cuda
