// The kernels of LAPE and the coordinate loss, on every instruction set and element type, in several threads, against
// loops from the definition.
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/instruction_set.h"
#include "elements.h"
#include "matrix.h"
#include "threads.h"

namespace llava_st::tests {
namespace {

using cpu::PositionKernels;

template <class T>
void expect(const T& actual, double expected, double magnitude, double terms, const char* what) {
  const Precision p = kPrecision<T>;
  const double bound = p.unit * (std::fabs(expected) + p.tiny) + terms * p.computing * magnitude;
  check(std::fabs(static_cast<double>(actual) - expected) <= bound, what);
}

/// Row i of a table of rows resized to `size`.
template <class S>
double resized(const Matrix<S>& table, int64_t i, int64_t size, Alignment alignment, int64_t channel) {
  const auto between = patch_between<double>(i, size, table.rows, alignment);
  return (1 - between.ratio) * table.at(between.low, channel) + between.ratio * table.at(between.high, channel);
}

struct Problem {
  Extent grid;
  int64_t samples, channels, gap;
  Alignment alignment;
};

template <class T>
void check_add(const PositionKernels& kernels, const ParallelLoop& loop, const Problem& p) {
  using S = Wide<T>;
  const int64_t counts[] = {5, 9, 4};
  const Matrix<S> t(counts[0], p.channels), h(counts[1], p.channels, 0, 1), w(counts[2], p.channels, 0, 2);
  const cpu::Tables tables = {
      {{t.data.get(), counts[0]}, {h.data.get(), counts[1]}, {w.data.get(), counts[2]}}, p.channels, p.alignment};
  const int64_t tokens = p.samples * p.grid.count();
  const Matrix<T> x(tokens, p.channels, p.gap), y(tokens, p.channels, 0, 5);
  const auto videos = [&](const Matrix<T>& rows) {
    return cpu::Videos{
        rows.data.get(),
        p.samples,
        p.grid,
        {p.grid.count() * rows.stride, p.grid.h * p.grid.w * rows.stride, p.grid.w * rows.stride, rows.stride, 0}};
  };
  const std::unique_ptr<S[]> scratch(new S[(p.grid.t + p.grid.h + p.grid.w) * p.channels]);
  const auto value = [&](int64_t token, int64_t c) {
    const int64_t at_w = token % p.grid.w, at_h = token / p.grid.w % p.grid.h,
                  at_t = token / p.grid.w / p.grid.h % p.grid.t;
    return static_cast<double>(x.at(token, c)) + resized(t, at_t, p.grid.t, Alignment::kEnds, c) +
           resized(h, at_h, p.grid.h, p.alignment, c) + resized(w, at_w, p.grid.w, p.alignment, c);
  };
  for (const bool round : {false, true}) {
    kernels.add[kElement<T>](tables, videos(x), videos(y), round, scratch.get(), loop);
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t c = 0; c < p.channels; ++c) {
        const double terms = round ? 6 * kPrecision<T>.unit / kPrecision<T>.computing : 8;
        expect(y.at(i, c), value(i, c), 4, terms, "a sum of features and tables is off");
      }
    }
  }

  std::vector<cpu::Segment> segments;
  int64_t rows = 0;
  const int64_t all = p.samples * p.grid.t * p.grid.h, step = 2 * p.grid.h + 1;  // some begin inside a frame
  for (int64_t begin = 0; begin < all; begin += step) {
    segments.push_back({0, begin, smaller(begin + step, all), rows});
    rows += segments.back().scratch_rows(p.grid);
  }
  const std::unique_ptr<S[]> sums(new S[rows * cpu::segment_stride(p.channels)]);
  const int64_t anchors = tables.rows();
  const Matrix<double> result(anchors, p.channels), expected(anchors, p.channels);
  for (int64_t i = 0; i < anchors * p.channels; ++i) expected.data[i] = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t at[] = {i / p.grid.w / p.grid.h % p.grid.t, i / p.grid.w % p.grid.h, i % p.grid.w};
    const int64_t sizes[] = {p.grid.t, p.grid.h, p.grid.w};
    for (int64_t axis = 0, first = 0; axis < 3; first += counts[axis++]) {
      const auto b =
          patch_between<double>(at[axis], sizes[axis], counts[axis], axis == 0 ? Alignment::kEnds : p.alignment);
      for (int64_t c = 0; c < p.channels; ++c) {
        expected.at(first + b.low, c) += (1 - b.ratio) * static_cast<double>(x.at(i, c));
        expected.at(first + b.high, c) += b.ratio * static_cast<double>(x.at(i, c));
      }
    }
  }
  const cpu::Videos gradients = videos(x);
  kernels.add_backward[kElement<T>](tables, &gradients, segments.data(), static_cast<int64_t>(segments.size()),
                                    sums.get(), result.data.get(), loop);
  for (int64_t i = 0; i < anchors; ++i) {
    for (int64_t c = 0; c < p.channels; ++c) {
      const double bound = kPrecision<S>.unit * 8 * static_cast<double>(tokens);
      check(std::fabs(result.at(i, c) - expected.at(i, c)) <= bound, "a gradient of a table is off");
    }
  }
}

template <class T>
void check_scatter(const PositionKernels& kernels, const ParallelLoop& loop, int64_t channels) {
  using S = Wide<T>;
  const Matrix<T> embed(6, channels, 3), visual(4, channels, 1, 9);
  const Matrix<S> t(3, channels), h(2, channels, 0, 1), w(5, channels, 0, 2);
  const cpu::Tables tables = {{{t.data.get(), 3}, {h.data.get(), 2}, {w.data.get(), 5}}, channels, Alignment::kCenters};
  const std::vector<int64_t> ids = {5, 0, 7, 15, -1, -1, -1}, index = {-1, -1, -1, -1, -1, -1, 3};
  const std::vector<int8_t> axis = {-1, -1, -1, -1, 0, 2, 9};
  const std::vector<double> positions = {NAN, NAN, NAN, NAN, 0.3, 1.5, NAN};
  const auto tokens = static_cast<int64_t>(ids.size());
  const cpu::ScatterSources sources = {embed.data.get(), visual.data.get(), embed.stride, visual.stride,   embed.rows,
                                       ids.data(),       index.data(),      axis.data(),  positions.data()};
  const Matrix<T> output(tokens, channels, 0, 4);
  kernels.scatter[kElement<T>](tables, sources, tokens, output.data.get(), loop);
  for (int64_t c = 0; c < channels; ++c) {
    const double at = 0.3 * 2, ratio = at - std::floor(at);
    const double blended = (1 - ratio) * t.at(0, c) + ratio * t.at(1, c);
    const double expected[] = {static_cast<double>(embed.at(5, c)),
                               static_cast<double>(embed.at(0, c)),
                               t.at(1, c),
                               w.at(4, c),
                               blended,
                               w.at(4, c),
                               static_cast<double>(visual.at(3, c))};
    for (int64_t i = 0; i < tokens; ++i) expect(output.at(i, c), expected[i], 1, 4, "an embedding is off");
  }

  const std::vector<int64_t> destination = {1, 1, 1, 3, 4, 9}, token = {0, 5, 2, 6, 1, 3};
  const std::vector<double> share = {1, 0.25, 0.5, 1, 1, 1};
  const cpu::ScatteredGradient gradient = {
      destination.data(), token.data(),  share.data(), static_cast<int64_t>(token.size()),
      output.data.get(),  output.stride, channels};
  const Matrix<T> narrow(3, channels);
  const Matrix<S> wide(3, channels);
  kernels.gather[kElement<T>](gradient, 1, 3, false, narrow.data.get(), loop);
  kernels.gather[kElement<T>](gradient, 1, 3, true, wide.data.get(), loop);
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (size_t e = 0; e < token.size(); ++e) {
        if (destination[e] == row + 1) sum += share[e] * static_cast<double>(output.at(token[e], c));
      }
      expect(narrow.at(row, c), sum, 2, 4, "a sum of gradients is off");
      expect(wide.at(row, c), sum, 2, 4, "a sum of gradients is off");
    }
  }
}

template <class S>
void check_loss(const PositionKernels& kernels, const ParallelLoop& loop, int64_t classes) {
  constexpr int which = std::is_same_v<S, double>;
  const int64_t tokens = 5, first = classes / 2;
  const Matrix<S> logits(tokens, classes);
  const std::vector<int64_t> low = {0, classes - 1, -1, first, 0}, high = {0, classes - 1, -1, classes - 1, 0};
  const std::vector<double> ratio = {0, 0, 0, 0.25, 0};
  std::vector<S> largest(tokens, -INFINITY), sum(tokens, 0), target(tokens, 0), total(tokens), grad(tokens, S(0.5));
  const std::vector<std::pair<int64_t, int64_t>> tiles = {{0, first}, {first, classes - first}};
  const auto for_tiles = [&](auto visit) {
    for (const auto& [begin, count] : tiles) {
      if (count == 0) continue;
      const Matrix<S> tile(tokens, count);
      for (int64_t i = 0; i < tokens; ++i) {
        for (int64_t c = 0; c < count; ++c) tile.at(i, c) = logits.at(i, begin + c);
      }
      visit(tile, cpu::Logits{tile.data.get(), tokens, count, begin});
    }
  };
  const cpu::Targets targets = {low.data(), high.data(), ratio.data()};
  for_tiles([&](const Matrix<S>&, const cpu::Logits& view) {
    kernels.update_statistics[which](view, targets, {largest.data(), sum.data(), target.data()}, loop);
  });
  std::vector<double> exact(tokens, 0);
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t c = 0; c < classes; ++c) exact[i] += std::exp(static_cast<double>(logits.at(i, c)));
    if (low[i] < 0) continue;
    total[i] = largest[i] + std::log(sum[i]);
    expect(total[i], std::log(exact[i]), 8, 8, "a logsumexp is off");
    const double wanted = (1 - ratio[i]) * logits.at(i, low[i]) + ratio[i] * logits.at(i, high[i]);
    expect(target[i], wanted, 1, 4, "a target's logit is off");
  }
  for_tiles([&](const Matrix<S>& tile, const cpu::Logits& view) {
    kernels.logit_gradient[which](view, targets, total.data(), grad.data(), loop);
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t c = 0; c < tile.channels; ++c) {
        const int64_t number = view.first + c;
        double wanted = std::exp(static_cast<double>(logits.at(i, number))) / exact[i];
        if (number == low[i]) wanted -= 1 - ratio[i];
        if (number == high[i]) wanted -= ratio[i];
        expect(tile.at(i, c), low[i] < 0 ? 0 : 0.5 * wanted, 1, 16, "a gradient of a logit is off");
      }
    }
  });
  const Matrix<S> to(3, classes), from(3, classes, 0, 1);
  kernels.accumulate[which](to.data.get(), from.data.get(), 3 * classes, loop);
  const Matrix<S> before(3, classes);
  for (int64_t i = 0; i < 3 * classes; ++i) {
    check(to.data[i] == before.data[i] + from.data[i], "a sum of products is off");
  }
}

template <class T>
void check_element(const PositionKernels& kernels, const ParallelLoop& loop) {
  for (const Problem& p :
       {Problem{{3, 4, 5}, 2, 40, 0, Alignment::kCenters}, Problem{{1, 3, 7}, 1, 7, 2, Alignment::kText},
        Problem{{6, 1, 2}, 1, 33, 0, Alignment::kCenters}, Problem{{1, 1, 1}, 3, 1, 0, Alignment::kText}}) {
    check_add<T>(kernels, loop, p);
  }
  for (const int64_t channels : {1, 7, 8, 300}) check_scatter<T>(kernels, loop, channels);
}

void check_kernels(const char* set, const PositionKernels& kernels) {
  for (const NamedLoop& named : kLoops) {
    current = std::string("positions, ") + set + ", " + named.name;
    check_element<float>(kernels, named.loop);
    check_element<double>(kernels, named.loop);
    check_element<BFloat16>(kernels, named.loop);
    check_element<Float16>(kernels, named.loop);
    for (const int64_t classes : {1, 3, 8, 100, 5000}) {
      check_loss<float>(kernels, named.loop, classes);
      check_loss<double>(kernels, named.loop, classes);
    }
  }
}

}  // namespace

void check_positions() {
  check_kernels("baseline", cpu::baseline_position_kernels());
#if defined(__x86_64__)
  if (cpu::wants_avx2()) check_kernels("avx2", cpu::avx2_position_kernels());
#endif
}

}  // namespace llava_st::tests
