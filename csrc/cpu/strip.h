// How the CPU kernels walk through memory: in strips of neighbouring regions. Compiled once per instruction set.
#pragma once

#include "attention_problem.h"
#include "vectors.h"

namespace llava_st::LLAVA_ST_ISA {

using cpu::AttentionProblem;
using cpu::NormalizedProblem;
using cpu::Operand;

/// The tokens of one region in one tensor: the address of the first one's first row, and strides in elements.
template <class T>
struct Tokens {
  T* first;
  TokenStrides strides;
};

/// Neighbouring regions along the width that are worked on together, so that memory is read in long runs: whole rows of
/// tokens, and not the few tokens of each region's row. All but the last have the width of a full region.
struct Strip {
  int64_t query;   // number of the first query
  int64_t count;   // how many regions
  int64_t sample;  // dense: number in the batch; packed: number of the video
  Extent grid;
  Region first;   // the first region
  int64_t width;  // tokens along the width, of all regions together
  Extent region;  // tokens of all regions but the last, which may be less wide

  /// The strip that begins at `query` and has at most `most` regions.
  LLAVA_ST_INLINE Strip(const AttentionProblem& problem, int64_t query, int64_t most) : query(query) {
    int64_t within;  // number of the region within its sample
    if (problem.packed()) {
      sample = video_of_query(problem.offsets, problem.videos, query);
      grid = problem.grids[sample];
      within = query - problem.offsets[sample].query;
    } else {
      const int64_t per_sample = regions_of(problem.grid, problem.region).count();
      sample = query / per_sample;
      grid = problem.grid;
      within = query % per_sample;
    }
    first = region_at(grid, problem.region, within);
    count = smaller(most, regions_of(grid, problem.region).w - first.at.w);
    width = smaller(count * problem.region.w, grid.w - first.first.w);
    region = {first.size.t, first.size.h, smaller(problem.region.w, width)};
  }

  /// How far apart the weights of two regions lie.
  LLAVA_ST_INLINE int64_t stride() const { return region.count(); }

  LLAVA_ST_INLINE int64_t width_of(int64_t r) const { return r + 1 < count ? region.w : width - r * region.w; }
  LLAVA_ST_INLINE int64_t tokens_of(int64_t r) const { return region.t * region.h * width_of(r); }

  template <class T>
  LLAVA_ST_INLINE Tokens<T> keys_of(const AttentionProblem& problem, const Operand& operand) const {
    TokenStrides strides = operand.strides;
    int64_t first_token = sample * strides.sample;
    if (problem.packed()) {
      first_token = problem.offsets[sample].key * operand.strides.w;
      strides = packed_strides(grid, operand.strides.w, operand.strides.head);
    }
    return {static_cast<T*>(operand.data) + first_token + strides.offset(first.first), strides};
  }

  template <class T>
  LLAVA_ST_INLINE Tokens<T> queries_of(const AttentionProblem& problem, const Operand& operand) const {
    const int64_t first_query = problem.packed() ? query * operand.strides.w
                                                 : sample * operand.strides.sample + operand.strides.offset(first.at);
    return {static_cast<T*>(operand.data) + first_query, operand.strides};
  }

  /// Calls `visit(r, j, offset)` for every token in memory order: token j of region r, `offset` elements from the
  /// first.
  template <class Visit>
  LLAVA_ST_INLINE void for_tokens(const TokenStrides& strides, Visit visit) const {
    for (int64_t t = 0; t < region.t; ++t) {
      for (int64_t h = 0; h < region.h; ++h) {
        int64_t offset = strides.offset({t, h, 0});
        for (int64_t r = 0; r < count; ++r) {
          const int64_t in_row = width_of(r);
          for (int64_t w = 0; w < in_row; ++w, offset += strides.w) visit(r, (t * region.h + h) * in_row + w, offset);
        }
      }
    }
  }
};

}  // namespace llava_st::LLAVA_ST_ISA
