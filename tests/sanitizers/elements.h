// The element types of the kernels, with conversions of their own: those of the kernels are under test.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/parallel_loop.h"

namespace llava_st::tests {

/// Half types take a float by cutting off its low bits. Any value of the type will do as an input.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(double value) {
    const float narrow = static_cast<float>(value);
    uint32_t wide;
    std::memcpy(&wide, &narrow, sizeof(wide));
    bits = static_cast<uint16_t>(wide >> 16);
  }
  explicit operator double() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

struct Float16 {
  uint16_t bits;

  Float16() = default;
  explicit Float16(double value) {  // of values that it holds as normal numbers, infinity or NaN; less is zero
    if (!std::isfinite(value)) {
      bits = std::isnan(value) ? 0x7e00 : value < 0 ? 0xfc00 : 0x7c00;
      return;
    }
    int exponent;
    const double fraction = std::frexp(std::fabs(value), &exponent);  // in [1/2, 1)
    const auto mantissa = static_cast<uint16_t>(std::ldexp(fraction, 11));
    bits = fraction == 0 || exponent < -13 ? 0 : static_cast<uint16_t>((exponent + 13) * 1024 + mantissa);
    if (value < 0) bits |= 0x8000;
  }
  explicit operator double() const {
    const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
    double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
    if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
    return bits & 0x8000 ? -magnitude : magnitude;
  }
};

/// Which of the kernels are for elements of type T, and what they are computed in.
template <class T>
constexpr cpu::Element kElement = cpu::kElements;
template <>
constexpr cpu::Element kElement<float> = cpu::kFloat;
template <>
constexpr cpu::Element kElement<double> = cpu::kDouble;
template <>
constexpr cpu::Element kElement<BFloat16> = cpu::kBFloat16;
template <>
constexpr cpu::Element kElement<Float16> = cpu::kFloat16;
inline constexpr const char* kElementNames[] = {"float32", "float64", "bfloat16", "float16"};

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// `unit`: half the distance from 1 to the next number; `computing`: that of the type that the kernels compute in.
/// `tiny`: the largest error where results are subnormal, or vanish.
struct Precision {
  double unit, computing, tiny;
};
template <class T>
constexpr Precision kPrecision;
template <>
constexpr Precision kPrecision<float> = {0x1p-24, 0x1p-24, 1e-36};
template <>
constexpr Precision kPrecision<double> = {0x1p-53, 0x1p-53, 1e-300};
template <>
constexpr Precision kPrecision<BFloat16> = {0x1p-8, 0x1p-24, 1e-36};
template <>
constexpr Precision kPrecision<Float16> = {0x1p-11, 0x1p-24, 0x1p-25};

}  // namespace llava_st::tests
