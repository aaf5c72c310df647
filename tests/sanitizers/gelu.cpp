// The GELU behind a linear layer and its gradient, on every instruction set and element type, in several threads,
// against the definition.
//
// With a = |x|, what lies below -a of the normal distribution falls like exp(-a^2 / 2). It is computed from a^2, or
// from a / sqrt(2), which is rounded twice: that makes it be off by the fraction 2 a^2 u at most. A few more operations
// follow. What lies below a is 1 less that.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/instruction_set.h"
#include "elements.h"
#include "matrix.h"
#include "threads.h"

namespace llava_st::tests {
namespace {

using cpu::ParallelLoop;
using cpu::PositionKernels;
using Real = long double;

/// A number and how far off it may be before it is rounded to its type.
struct Off {
  Real value, off;
};

/// Of the normal distribution at x: what lies below, and the density; u is the rounding of the type computed in.
struct Normal {
  Off below, density;

  Normal(Real x, Real u) {
    const Real fraction = (2 * x * x + 16) * u;
    const Real tail = std::erfc(std::fabs(x) * std::sqrt(0.5L)) / 2;
    below = {x > 0 ? 1 - tail : tail, tail * fraction};
    if (x > 0) below.off += u;
    const Real bell = std::exp(-x * x / 2) * 0.398942280401432677939946L;
    density = {bell, bell * fraction};
  }
};

Off gelu(Real x, Real u) {
  const Normal at(x, u);
  return {x * at.below.value, std::fabs(x) * (at.below.off + u * at.below.value)};
}

Off gelu_slope(Real x, Real u) {
  const Normal at(x, u);
  const Real product = x * at.density.value, sum = at.below.value + product;
  return {sum, at.below.off + std::fabs(x) * at.density.off + u * (std::fabs(product) + std::fabs(sum))};
}

template <class T>
void expect(const T& actual, Off expected, const char* what) {
  const Precision p = kPrecision<T>;
  const Real got = static_cast<double>(actual), want = expected.value;
  if (std::isnan(want) || std::isinf(want)) {
    check(std::isnan(want) ? std::isnan(got) : got == want, what);
    return;
  }
  const Real allowed = expected.off + p.unit * (std::fabs(want) + expected.off) + p.tiny;
  if (std::fabs(got - want) <= allowed) return;
  char numbers[120];
  std::snprintf(numbers, sizeof(numbers), ": %Lg instead of %Lg, off by %Lg, allowed %Lg", got, want,
                std::fabs(got - want), allowed);
  fail(what + std::string(numbers));
}

template <class T>
void copy(const Matrix<T>& from, const Matrix<T>& to) {
  for (int64_t i = 0; i < from.rows; ++i) {
    for (int64_t c = 0; c < from.channels; ++c) to.at(i, c) = from.at(i, c);
  }
}

template <class T>
void check_same(const Matrix<T>& a, const Matrix<T>& b, const char* what) {
  const auto bytes = static_cast<size_t>(a.rows * a.channels) * sizeof(T);
  check(std::memcmp(static_cast<const void*>(a.data.get()), static_cast<const void*>(b.data.get()), bytes) == 0, what);
}

constexpr double kInfinity = std::numeric_limits<double>::infinity();
/// Numbers to try; those that a type cannot hold are left out.
const std::vector<double> kNumbers = {0,    -0.0, 0x1p-14, -0x1p-14, 0.75,      -0.75,     -0.7517916, 1,    -1,
                                      2.5,  -2.5, 4,       -4,       5.5,       -5.5,      8,          -8,   13,
                                      -13,  13.5, 14,      -14,      -20,       20,        200,        -200, 6e4,
                                      -6e4, 3e38, -3e38,   NAN,      kInfinity, -kInfinity};

template <class T>
bool holds(double number) {
  return !std::is_same_v<T, Float16> || !std::isfinite(number) || std::fabs(number) < 65504;
}

/// Replaces every third number of a matrix by one of those above, in turn.
template <class T>
void mix_in(const Matrix<T>& matrix) {
  size_t next = 0;
  for (int64_t i = 0; i < matrix.rows; ++i) {
    for (int64_t c = 0; c < matrix.channels; ++c) {
      if ((i * matrix.channels + c) % 3 != 2) continue;
      while (!holds<T>(kNumbers[next % kNumbers.size()])) ++next;
      matrix.at(i, c) = T(kNumbers[next++ % kNumbers.size()]);
    }
  }
}

/// Where the product and the preactivation are.
enum Place { kApart, kInActivation, kInPreactivation, kNotKept, kNotKeptInActivation, kPlaces };

template <class T>
void check_position_gelu(const PositionKernels& kernels, const std::string& what, Extent grid, int64_t samples,
                         int64_t channels) {
  using S = Wide<T>;
  const int64_t tokens = samples * grid.count();
  const Matrix<T> product(tokens, channels, 0, 0, 8);
  mix_in(product);
  const Matrix<S> bias(1, channels, 0, 1), t(grid.t, channels, 0, 2), h(grid.h, channels, 0, 3),
      w(grid.w, channels, 0, 4);
  const Matrix<T> first_activation(tokens, channels), first_kept(tokens, channels);
  bool first = true;
  for (const NamedLoop& named : kLoops) {
    for (int place = 0; place < kPlaces; ++place) {
      current = what + ", place " + std::to_string(place) + ", " + named.name;
      const Matrix<T> source(tokens, channels), kept(tokens, channels), activation(tokens, channels);
      const bool keeps = place != kNotKept && place != kNotKeptInActivation;
      const Matrix<T>& from = place == kInPreactivation                                 ? kept
                              : place == kInActivation || place == kNotKeptInActivation ? activation
                                                                                        : source;
      copy(product, from);
      const cpu::PositionGelu call = {from.data.get(),
                                      keeps ? kept.data.get() : nullptr,
                                      activation.data.get(),
                                      bias.data.get(),
                                      t.data.get(),
                                      h.data.get(),
                                      w.data.get(),
                                      samples,
                                      grid,
                                      channels};
      check(kernels.position_gelu[kElement<T>](call, named.loop), "no memory");
      if (&from == &source) check_same(source, product, "the product is written to");
      if (!first) {
        check_same(activation, first_activation, "an activation is not the same as at first");
        if (keeps) check_same(kept, first_kept, "a preactivation is not the same as at first");
        continue;
      }
      first = false;
      copy(activation, first_activation);
      copy(kept, first_kept);
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t at_t = i / grid.w / grid.h % grid.t, at_h = i / grid.w % grid.h, at_w = i % grid.w;
        for (int64_t c = 0; c < channels; ++c) {
          const Real terms[] = {static_cast<double>(product.at(i, c)), bias.at(0, c), t.at(at_t, c), h.at(at_h, c),
                                w.at(at_w, c)};
          const Real u = kPrecision<T>.computing;
          Off x = {0, 0};
          for (const Real term : terms) x = {x.value + term, x.off + 4 * u * std::fabs(term)};
          Off y = gelu(x.value, u);
          y.off += 1.2L * x.off;  // the slope is no more than 1.13
          expect(kept.at(i, c), x, "a preactivation is off");
          expect(activation.at(i, c), y, "an activation is off");
        }
      }
    }
  }
}

template <class T>
void check_gradient(const PositionKernels& kernels, const std::string& what, int64_t tokens, int64_t channels,
                    int64_t gap) {
  const Matrix<T> before(tokens, channels, gap, 0, 14), grad(tokens, channels, 0, 1, 2);
  mix_in(before);
  const Matrix<T> first_gradient(tokens, channels), first_activation(tokens, channels);
  bool first = true;
  for (const NamedLoop& named : kLoops) {
    current = what + ", " + named.name;
    const Matrix<T> gradient(tokens, channels), activation(tokens, channels);
    copy(grad, gradient);
    kernels.gelu_gradient[kElement<T>](
        {gradient.data.get(), activation.data.get(), before.data.get(), tokens, channels, before.stride}, named.loop);
    if (!first) {
      check_same(gradient, first_gradient, "a gradient is not the same as at first");
      check_same(activation, first_activation, "an activation is not the same as at first");
      continue;
    }
    first = false;
    copy(gradient, first_gradient);
    copy(activation, first_activation);
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        const Real x = static_cast<double>(before.at(i, c)), u = kPrecision<T>.computing;
        const Real of_activation = static_cast<double>(grad.at(i, c));
        const Off slope = gelu_slope(x, u);
        const Real value = slope.value * of_activation;
        expect(activation.at(i, c), gelu(x, u), "an activation is off");
        expect(gradient.at(i, c), {value, slope.off * std::fabs(of_activation) + u * std::fabs(value)},
               "a gradient is off");
      }
    }
  }
}

template <class T>
void check_element(const char* set, const PositionKernels& kernels) {
  for (const int64_t channels : {1, 7, 8, 13, 64, 300}) {
    const std::string of =
        std::string(" of ") + std::to_string(channels) + " channels, " + kElementNames[kElement<T>] + ", " + set;
    check_position_gelu<T>(kernels, "gelu at positions" + of, {3, 4, 5}, 2, channels);
    check_position_gelu<T>(kernels, "gelu at positions of an image" + of, {1, 2, 7}, 3, channels);
    check_position_gelu<T>(kernels, "gelu at one position" + of, {1, 1, 1}, 1, channels);
    for (const int64_t tokens : {1, 2, 37}) {
      const std::string rows = ", " + std::to_string(tokens) + " rows";
      check_gradient<T>(kernels, "gradient of gelu" + of + rows, tokens, channels, 0);
      check_gradient<T>(kernels, "gradient of gelu" + of + rows + " with gaps", tokens, channels, 3);
    }
  }
}

void check_kernels(const char* set, const PositionKernels& kernels) {
  check_element<float>(set, kernels);
  check_element<double>(set, kernels);
  check_element<BFloat16>(set, kernels);
  check_element<Float16>(set, kernels);
}

}  // namespace

void check_gelu() {
  check_kernels("baseline", cpu::baseline_position_kernels());
#if defined(__x86_64__)
  if (cpu::wants_avx2()) check_kernels("avx2", cpu::avx2_position_kernels());
#endif
}

bool gelu_without_memory(const ParallelLoop& loop) {
  cpu::PositionGelu call = {};
  call.samples = 2;
  call.grid = {2, 2, 2};
  call.channels = int64_t{1} << 48;
  return !cpu::position_kernels().position_gelu[cpu::kBFloat16](call, loop);
}

}  // namespace llava_st::tests
