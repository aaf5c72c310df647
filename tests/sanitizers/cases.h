// The problems that the CPU kernels are run on.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "cpu/attention_problem.h"

namespace llava_st::tests {

/// A problem to solve.
struct Case {
  const char* name;
  bool packed;
  std::vector<Extent> grids;  // of each video; those of a dense batch are all the same
  Extent region;
  int64_t heads, dim;
  double scale = 0;  // 0: 1 / sqrt(dim)
  bool biased = false;
  int64_t own_value_dim = 0;  // 0: that of keys

  int64_t value_dim() const { return own_value_dim != 0 ? own_value_dim : dim; }
};

constexpr bool kDense = false, kPacked = true;
inline const std::vector<Case> kCases = {
    {"one of everything", kDense, {{1, 1, 1}}, {1, 3, 3}, 1, 1},
    {"spatial", kDense, {{1, 6, 9}, {1, 6, 9}}, {1, 3, 3}, 2, 128},
    {"temporal", kDense, {{10, 3, 3}}, {5, 1, 1}, 3, 64},
    {"joint: few queries, heads are shared out", kDense, {{5, 6, 6}}, {5, 3, 3}, 5, 24},
    {"partial at every edge", kDense, {{3, 7, 5}, {3, 7, 5}}, {2, 3, 3}, 3, 40},
    {"less than a vector", kDense, {{3, 4, 5}}, {2, 2, 2}, 2, 7},
    {"one key per region", kDense, {{4, 3, 2}, {4, 3, 2}, {4, 3, 2}}, {1, 1, 1}, 2, 72},
    {"less than one region", kDense, {{3, 5, 6}}, {9, 9, 9}, 4, 24},
    {"long strips, the last region partial", kDense, {{1, 4, 62}, {1, 4, 62}}, {1, 3, 3}, 2, 16},
    {"strips of whole rows", kDense, {{2, 2, 34}}, {2, 2, 2}, 3, 72},
    {"many keys", kDense, {{7, 11, 13}}, {7, 11, 13}, 2, 8},
    {"scores far apart", kDense, {{2, 4, 4}}, {2, 2, 2}, 2, 43, 10},
    {"negative scale", kDense, {{2, 4, 4}}, {2, 2, 2}, 2, 16, -0.5},
    {"one video", kPacked, {{1, 6, 9}}, {1, 3, 3}, 2, 128},
    {"empty videos", kPacked, {{0, 3, 3}, {2, 6, 9}, {1, 0, 2}, {2, 0, 0}, {3, 7, 5}, {4, 4, 0}}, {2, 3, 3}, 3, 40},
    {"videos of one token", kPacked, {{1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}, {3, 3, 3}, 5, 1},
    {"videos of all sizes", kPacked, {{3, 4, 5}, {1, 1, 62}, {1, 9, 1}, {8, 2, 3}}, {2, 2, 2}, 2, 7},
    {"packed strips", kPacked, {{1, 3, 32}, {1, 2, 7}, {1, 5, 29}}, {1, 3, 3}, 2, 72},
    {"packed many keys", kPacked, {{7, 7, 7}, {2, 2, 2}}, {7, 7, 7}, 3, 16},
    {"biased", kDense, {{1, 6, 9}, {1, 6, 9}}, {1, 3, 3}, 2, 128, 0, true},
    {"biased, partial at every edge", kDense, {{3, 7, 5}, {3, 7, 5}}, {2, 3, 3}, 3, 40, 0, true},
    {"biased, heads are shared out", kDense, {{5, 6, 6}}, {5, 3, 3}, 5, 24, 0, true},
    {"biased, less than a vector", kPacked, {{3, 4, 5}, {1, 9, 1}}, {2, 2, 2}, 2, 7, 0, true, 3},
    {"values wider than keys", kDense, {{1, 4, 62}, {1, 4, 62}}, {1, 3, 3}, 2, 16, 0, false, 72},
    {"values less wide than keys", kPacked, {{1, 3, 32}, {1, 2, 7}}, {1, 3, 3}, 2, 72, 0, true, 8},
    {"the widest heads", kDense, {{2, 3, 4}}, {1, 3, 3}, 2, 1152, 0, true},
};

/// Where the rows of a tensor are: its sizes (sample, t, h, w; packed: 1, 1, 1, tokens) and each row's place in them.
struct Rows {
  std::array<int64_t, 4> sizes;
  std::vector<std::array<int64_t, 4>> places;

  Rows(const std::vector<Extent>& grids, bool packed) {
    for (size_t video = 0; video < grids.size(); ++video) {
      const Extent grid = grids[video];
      for (int64_t at = 0; at < grid.count(); ++at) {
        const auto number = static_cast<int64_t>(places.size());
        if (packed) {
          places.push_back({0, 0, 0, number});
        } else {
          places.push_back({static_cast<int64_t>(video), at / grid.w / grid.h, at / grid.w % grid.h, at % grid.w});
        }
      }
    }
    sizes = {static_cast<int64_t>(grids.size()), grids[0].t, grids[0].h, grids[0].w};
    if (packed) sizes = {1, 1, 1, static_cast<int64_t>(places.size())};
  }
};

/// A case with all that follows from it. The arithmetic is simpler than that of regions.h, and not the same.
struct Layout {
  std::vector<Extent> query_grids;
  std::vector<PackedOffset> offsets;
  std::vector<std::vector<int64_t>> regions;  // the tokens of each query
  size_t largest_region = 0;

  explicit Layout(const Case& a) : offsets(a.grids.size() + 1) {
    const auto blocks = [](int64_t size, int64_t step) { return size / step + (size % step != 0); };
    for (size_t video = 0; video < a.grids.size(); ++video) {
      const Extent grid = a.grids[video];
      const PackedOffset begin = offsets[video];
      Extent queries = {blocks(grid.t, a.region.t), blocks(grid.h, a.region.h), blocks(grid.w, a.region.w)};
      if (grid.count() == 0) queries = {0, 0, 0};
      regions.resize(static_cast<size_t>(begin.query + queries.count()));
      for (int64_t n = 0; n < grid.count(); ++n) {
        const int64_t t = n / (grid.h * grid.w), h = n / grid.w % grid.h, w = n % grid.w;
        const int64_t query = (t / a.region.t * queries.h + h / a.region.h) * queries.w + w / a.region.w;
        regions[static_cast<size_t>(begin.query + query)].push_back(begin.key + n);
      }
      query_grids.push_back(queries);
      offsets[video + 1] = {begin.key + grid.count(), begin.query + queries.count()};
    }
    for (const auto& tokens : regions) largest_region = std::max(largest_region, tokens.size());
  }
};

inline double scale_of(const Case& a) { return a.scale != 0 ? a.scale : 1 / std::sqrt(static_cast<double>(a.dim)); }

inline cpu::AttentionProblem problem_of(const Case& a, const Layout& layout) {
  cpu::AttentionProblem problem = {};
  problem.queries = static_cast<int64_t>(layout.regions.size());
  problem.heads = a.heads;
  problem.head_dim = a.dim;
  problem.value_dim = a.value_dim();
  problem.scale = scale_of(a);
  problem.region = a.region;
  problem.largest_region = static_cast<int64_t>(layout.largest_region);
  if (a.packed) {
    problem.offsets = layout.offsets.data();
    problem.grids = a.grids.data();
    problem.videos = static_cast<int64_t>(a.grids.size());
  } else {
    problem.grid = a.grids[0];
  }
  return problem;
}

}  // namespace llava_st::tests
