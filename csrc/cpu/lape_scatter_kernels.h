// lape_scatter on the CPU, and the sums of its gradient. Compiled once per instruction set.
#pragma once

#include "lape_add_kernels.h"

namespace llava_st::LLAVA_ST_ISA {

template <class T, bool streamed>
LLAVA_ST_INLINE void copy_row(const T* from, int64_t channels, T* to) {
  if constexpr (streamed) {
    for (int64_t c = 0; c < channels; c += kLanes) stream(to + c, load(from + c));
  } else {
    memcpy(to, from, channels * sizeof(T));
  }
}

template <class T, bool streamed>
void scatter_rows(const cpu::Tables& tables, const cpu::ScatterSources& sources, int64_t tokens, T* output,
                  const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t channels = tables.channels;
  cpu::run_parallel(loop, tokens, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      T* const to = output + token * channels;
      const int64_t visual = sources.visual_index[token];
      const int axis = sources.axis[token];
      if (visual >= 0) {
        copy_row<T, streamed>(static_cast<const T*>(sources.visual) + visual * sources.visual_stride, channels, to);
      } else if (axis >= 0) {
        const cpu::Table& table = tables.axis[axis];
        blend(static_cast<const S*>(table.rows), channels, coordinate_between(sources.positions[token], table.count),
              to);
      } else if (sources.input_ids[token] < sources.words) {
        copy_row<T, streamed>(static_cast<const T*>(sources.embed) + sources.input_ids[token] * sources.embed_stride,
                              channels, to);
      } else {
        int64_t row = sources.input_ids[token] - sources.words;
        const cpu::Table* table = tables.axis;
        while (row >= table->count) row -= table++->count;
        blend(static_cast<const S*>(table->rows), channels, Between<double>{row, row, 0}, to);
      }
    }
    if constexpr (streamed) stream_fence();
    return true;
  });
}

template <class T>
void scatter(const cpu::Tables& tables, const cpu::ScatterSources& sources, int64_t tokens, void* output,
             const cpu::ParallelLoop& loop) {
  const bool streamed = can_stream<T>(output, {0, 0, 0, tables.channels, 0}, tables.channels);
  (streamed ? scatter_rows<T, true> : scatter_rows<T, false>)(tables, sources, tokens, static_cast<T*>(output), loop);
}

/// The first entry whose destination is not less.
LLAVA_ST_INLINE int64_t first_entry(const cpu::ScatteredGradient& gradient, int64_t destination) {
  int64_t low = 0, high = gradient.entries;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (gradient.destination[middle] < destination) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Channels that are summed at a time: their sums stay in the cache.
constexpr int64_t kTile = 256;

/// Every destination is written once, by one thread, in the order of its entries.
template <class T, class To>
void gather_rows(const cpu::ScatteredGradient& gradient, int64_t first, int64_t count, To* output,
                 const cpu::ParallelLoop& loop) {
  using S = Scalar<T>;
  const int64_t channels = gradient.channels;
  cpu::run_parallel(loop, count, [&](int64_t begin, int64_t end) {
    int64_t entry = first_entry(gradient, first + begin);
    for (int64_t row = begin; row < end; ++row) {
      To* const to = output + row * channels;
      const int64_t entries_begin = entry;
      while (entry < gradient.entries && gradient.destination[entry] == first + row) ++entry;
      if (entry == entries_begin) {
        memset(to, 0, channels * sizeof(To));
        continue;
      }
      for (int64_t c = 0; c < channels; c += kTile) {
        const int64_t width = smaller(kTile, channels - c);
        S sum[kTile] = {};
        for (int64_t i = entries_begin; i < entry; ++i) {
          const T* const from = static_cast<const T*>(gradient.rows) + gradient.token[i] * gradient.stride + c;
          add_scaled(from, static_cast<S>(gradient.share[i]), width, sum);
        }
        write_scaled<false>(sum, static_cast<S>(1), width, to + c);
      }
    }
    return true;
  });
}

template <class T>
void gather(const cpu::ScatteredGradient& gradient, int64_t first, int64_t count, bool wide, void* output,
            const cpu::ParallelLoop& loop) {
  if (wide) {
    gather_rows<T>(gradient, first, count, static_cast<Scalar<T>*>(output), loop);
  } else {
    gather_rows<T>(gradient, first, count, static_cast<T*>(output), loop);
  }
}

}  // namespace llava_st::LLAVA_ST_ISA
