// Which memory a kernel may use, and who used it when: finds accesses out of bounds, reads of what nobody wrote, and
// races.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"

namespace emulator {

/// How a thread uses memory. Read-only loads go past the caches that see the launch's own stores.
enum class Use { kRead, kReadOnly, kWrite, kAtomic };

enum class Space { kInput, kResult, kShared };

/// One access, by the thread that is running.
struct Access {
  uintptr_t begin;
  size_t bytes;
  Use use;
  const void* code;  // where the access is made
  uintptr_t end() const { return begin + bytes; }
};

class Memory {
 public:
  /// What kernels may use from now on. Inputs may overlap each other, and a result that is an input as well.
  void allow(const void* data, size_t bytes, Space space, std::string name);
  void forget() { ranges_.clear(); }
  void forget(const void* data);

  /// Notes that the host wrote there; false if kernels could not.
  bool mark_written(const void* data, size_t bytes);

  /// Accesses of earlier launches come before all of this one.
  void begin_launch() { ++launch_; }

  /// Says what is wrong with an access, or nothing.
  std::string check(const Access& access, int thread, const Clocks& clocks);

  bool is_shared(const void* data, size_t bytes);

 private:
  struct Past {
    Stamp when;
    const void* code = nullptr;
    Use use = Use::kRead;
  };

  /// Accesses of several lanes of a warp, at the same time.
  struct PastOfLanes {
    Past first;
    uint32_t lanes = 0;
  };

  /// What happened to one byte in this launch: the last write, and the reads and atomic accesses since then, but for
  /// those that a later one of the same kind comes after.
  struct Cell {
    Past write;
    std::vector<PastOfLanes> others;
    bool written = false;  // ever
    bool read_only = false;

    void add(const Past& now, const Clocks& clocks);
  };

  static constexpr size_t kPageBytes = 256;

  struct Page {
    uint64_t launch = 0;
    Cell cells[kPageBytes];
  };

  struct Range {
    uintptr_t begin, end;
    Space space;
    std::string name;
    std::vector<std::unique_ptr<Page>> pages;  // made when first used
  };

  Range* find(uintptr_t begin, size_t bytes);
  Cell& cell(Range& range, uintptr_t address);
  std::string check_byte(Cell& cell, const Range& range, const Access& access, int thread, const Clocks& clocks);
  std::string out_of_bounds(const Access& access) const;

  std::map<uintptr_t, Range> ranges_;  // by their end
  uint64_t launch_ = 1;
};

}  // namespace emulator
