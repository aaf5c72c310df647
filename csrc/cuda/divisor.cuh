// Division by a number that the host knows.
#pragma once

#include "../geometry/regions.h"
#include "hardware.cuh"

namespace llava_st::cuda {

/// Divides numbers below 2^31 by multiplication, in a tenth of the instructions of a division.
///
/// With d <= 2^s and m = ceil(2^(31+s) / d), m d exceeds 2^(31+s) by less than d <= 2^s, so n m / 2^(31+s) exceeds n /
/// d by less than n / 2^31 / d < 1 / d and has the same integer part.
struct Divisor {
  int64_t divisor = 1;
  uint32_t multiplier = 0;  // zero where the divisor is too large
  int shift = 0;

  Divisor() = default;

  explicit Divisor(int64_t divisor) : divisor(divisor) {
    if (divisor < 1 || divisor > kLimit) return;
    while ((int64_t{1} << shift) < divisor) ++shift;
    shift += 31;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) - 1) / static_cast<uint64_t>(divisor) + 1);
  }

  /// n / divisor for n >= 0.
  LLAVA_ST_DEVICE int64_t quotient(int64_t n) const {
    if (multiplier != 0 && n < kLimit) {
      return small_quotient(static_cast<int>(n));
    }
    return n / divisor;
  }

  /// The same where n and the divisor are below 2^31, without the code of a division for where they are not.
  LLAVA_ST_DEVICE int small_quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> shift);
  }

 private:
  static constexpr int64_t kLimit = int64_t{1} << 31;
};

}  // namespace llava_st::cuda
