// Where rows of a resized table, and coordinates in text, lie among a table's anchors: shared by the CPU kernels, the
// CUDA kernels and the tests.
#pragma once

#include "regions.h"

namespace llava_st {

/// Between two anchors: (1 - ratio) of `low` and ratio of `high`. Where ratio is 0 both are the same, and a blend must
/// give that anchor to the bit.
template <class Ratio>
struct Between {
  int64_t low, high;
  Ratio ratio;
};

/// How `size` patches lie among `count` anchors.
enum class Alignment {
  kEnds,     // patch i at anchor (count - 1) i / (size - 1), the only one at anchor 0: frames, as in text
  kCenters,  // at (i + 1/2) count / size - 1/2, clamped: half-pixel centres, as F.interpolate has them
  kText,     // at (count - 1) (i + 1/2) / size: where a text coordinate puts the patch's centre
};

/// Patch `i`, in [0, size). Calculated in fractions of integers, so that the ratio is rounded once.
template <class Ratio>
LLAVA_ST_HOST_DEVICE Between<Ratio> patch_between(int64_t i, int64_t size, int64_t count, Alignment alignment) {
  int64_t numerator, denominator;
  if (alignment == Alignment::kEnds) {
    numerator = i * (count - 1);
    denominator = size > 1 ? size - 1 : 1;
  } else {
    denominator = 2 * size;
    numerator = (2 * i + 1) * (alignment == Alignment::kText ? count - 1 : count);
    if (alignment == Alignment::kCenters) {
      numerator = numerator > size ? smaller(numerator - size, (count - 1) * denominator) : 0;
    }
  }
  int64_t low, rest;
  if (numerator < int64_t{1} << 32 && denominator < int64_t{1} << 32) {  // a GPU divides these in a third of the time
    const auto n = static_cast<uint32_t>(numerator), d = static_cast<uint32_t>(denominator);
    low = n / d;
    rest = n % d;
  } else {
    low = numerator / denominator;
    rest = numerator % denominator;
  }
  return {low, rest > 0 ? low + 1 : low, static_cast<Ratio>(rest) / static_cast<Ratio>(denominator)};
}

/// A coordinate: a fraction of the axis, clipped to [0, 1]. NaN, which callers must have caught, is anchor 0 with a
/// ratio of NaN.
LLAVA_ST_HOST_DEVICE Between<double> coordinate_between(double position, int64_t count) {
  if (position != position) return {0, 0, position};
  const double clipped = position < 0 ? 0 : position > 1 ? 1 : position;
  const double anchor = clipped * static_cast<double>(count - 1);
  const auto low = static_cast<int64_t>(anchor);
  const double ratio = anchor - static_cast<double>(low);
  return {low, ratio > 0 ? low + 1 : low, ratio};
}

}  // namespace llava_st
