// Which accesses of the threads of a block are ordered, and which happen at the same time.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "emulator.h"

namespace emulator {

/// The time of an access: in which block, after how many block barriers, and after how many barriers of either kind the
/// thread made it. No block has number zero.
struct Stamp {
  uint32_t block = 0;
  uint32_t epoch = 0;
  uint32_t count = 0;
  int32_t thread = -1;

  /// The same time of another lane of the warp.
  Stamp of_lane(int lane) const { return {block, epoch, count, thread / kWarpSize * kWarpSize + lane}; }
};

/// Vector clocks. A block barrier orders all threads; a warp barrier orders its lanes, who also learn what the others
/// had learnt; nothing else orders anything.
class Clocks {
 public:
  void begin_block(int threads) {
    ++block_;
    epoch_ = 0;
    counts_.assign(threads, 0);
    known_.assign(threads, {});
  }

  Stamp now(int thread) const { return {block_, epoch_, counts_[thread], thread}; }

  /// Whether what was done at `then` surely comes before what `thread` does now.
  bool ordered(const Stamp& then, int thread) const {
    if (then.block != block_) return then.block == 0;
    if (then.epoch < epoch_ || then.thread == thread) return true;
    return then.thread / kWarpSize == thread / kWarpSize && known_[thread][then.thread % kWarpSize] > then.count;
  }

  void block_barrier() { ++epoch_; }

  void warp_barrier(int first, uint32_t lanes) {
    std::array<uint32_t, kWarpSize> known = {};
    for_each(lanes, [&](int lane) {
      known_[first + lane][lane] = ++counts_[first + lane];
      for (int other = 0; other < kWarpSize; ++other)
        known[other] = std::max(known[other], known_[first + lane][other]);
    });
    for_each(lanes, [&](int lane) { known_[first + lane] = known; });
  }

 private:
  template <class Visit>
  static void for_each(uint32_t lanes, const Visit& visit) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) visit(lane);
    }
  }

  uint32_t block_ = 0;
  uint32_t epoch_ = 0;
  std::vector<uint32_t> counts_;
  /// For each thread and each lane of its warp: the accesses with a smaller count are known to have happened.
  std::vector<std::array<uint32_t, kWarpSize>> known_;
};

}  // namespace emulator
