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

enum class Use { kRead, kWrite, kAtomic };

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
  void allow(const void* data, size_t bytes, bool writable, bool written, std::string name);
  void forget() { ranges_.clear(); }
  void forget(const void* data);
  void mark_written(const void* data, size_t bytes);

  /// Accesses of earlier launches come before all of this one.
  void begin_launch() { ++launch_; }

  /// Says what is wrong with an access, or nothing.
  std::string check(const Access& access, int thread, const Clocks& clocks);

 private:
  struct Past {
    Stamp when;
    const void* code = nullptr;
    Use use = Use::kRead;
  };

  /// What happened to one byte. Of reads that no later one is ordered after, two are kept.
  struct Cell {
    Past write;
    Past reads[2];
    bool written = false;
  };

  static constexpr size_t kPageBytes = 256;

  struct Page {
    uint64_t launch = 0;
    Cell cells[kPageBytes];
  };

  struct Range {
    uintptr_t begin, end;
    bool writable, written;
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
