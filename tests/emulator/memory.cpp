#include "memory.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <utility>

#include "source_lines.h"

namespace emulator {
namespace {

const char* verb(Use use) {
  switch (use) {
    case Use::kRead:
    case Use::kReadOnly:
      return "reads";
    case Use::kWrite:
      return "writes";
    default:
      return "adds to";
  }
}

std::string bytes_of(const Access& access) {
  return std::to_string(access.bytes) + (access.bytes == 1 ? " byte" : " bytes");
}

}  // namespace

void Memory::allow(const void* data, size_t bytes, Space space, std::string name) {
  if (bytes == 0) return;
  auto begin = reinterpret_cast<uintptr_t>(data);
  uintptr_t end = begin + bytes;
  for (auto it = ranges_.upper_bound(begin); it != ranges_.end() && it->second.begin < end;) {
    const Range& other = it->second;
    if (space == Space::kInput && other.space != Space::kInput) {
      if (other.begin <= begin && end <= other.end) return;  // it is read and written
    } else if (space == Space::kInput) {                     // views of one tensor
      begin = std::min(begin, other.begin);
      end = std::max(end, other.end);
    } else if (space == other.space && other.begin == begin && other.end == end) {
      return;
    }
    it = ranges_.erase(it);
  }
  Range& range = ranges_[end];
  range = {begin, end, space, std::move(name), {}};
  if (space != Space::kInput) range.pages.resize((end - begin + kPageBytes - 1) / kPageBytes);
}

bool Memory::mark_written(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  Range* const range = find(begin, bytes);
  if (range == nullptr || range->space == Space::kInput) return false;
  for (uintptr_t address = begin; address < begin + bytes; ++address) cell(*range, address).written = true;
  return true;
}

void Memory::forget(const void* data) {
  const auto it = ranges_.upper_bound(reinterpret_cast<uintptr_t>(data));
  if (it != ranges_.end()) ranges_.erase(it);
}

bool Memory::is_shared(const void* data, size_t bytes) {
  const Range* const range = find(reinterpret_cast<uintptr_t>(data), bytes);
  return range != nullptr && range->space == Space::kShared;
}

Memory::Range* Memory::find(uintptr_t begin, size_t bytes) {
  const auto it = ranges_.upper_bound(begin);
  if (it == ranges_.end() || it->second.begin > begin || begin + bytes > it->second.end) return nullptr;
  return &it->second;
}

Memory::Cell& Memory::cell(Range& range, uintptr_t address) {
  const size_t offset = address - range.begin;
  std::unique_ptr<Page>& page = range.pages[offset / kPageBytes];
  if (!page) page = std::make_unique<Page>();
  if (page->launch != launch_) {
    for (Cell& cell : page->cells) cell = {{}, {}, cell.written, false};
    page->launch = launch_;
  }
  return page->cells[offset % kPageBytes];
}

std::string Memory::check(const Access& access, int thread, const Clocks& clocks) {
  Range* const range = find(access.begin, access.bytes);
  if (range == nullptr) return out_of_bounds(access);
  const bool reads = access.use == Use::kRead || access.use == Use::kReadOnly;
  if (range->space == Space::kInput) {
    return reads ? "" : std::string(verb(access.use)) + " an input, which kernels only read";
  }
  if (range->space == Space::kShared && access.use == Use::kReadOnly) {
    return "loads from " + range->name + " as from global memory";
  }
  for (uintptr_t address = access.begin; address < access.end(); ++address) {
    std::string problem = check_byte(cell(*range, address), *range, access, thread, clocks);
    if (!problem.empty()) return problem;
  }
  return "";
}

std::string Memory::check_byte(Cell& cell, const Range& range, const Access& access, int thread, const Clocks& clocks) {
  const auto place = [&] {
    std::ostringstream text;
    text << bytes_of(access) << ", number " << access.begin - range.begin << " and on, of " << range.name;
    return text.str();
  };
  const auto race = [&](const Past& past) {
    std::ostringstream text;
    text << verb(access.use) << ' ' << place() << ", which thread " << past.when.thread;
    if (past.when.block != clocks.now(thread).block) text << " of another block";
    text << ' ' << verb(past.use) << " at " << source_line(past.code) << ", with no barrier between them (a race)";
    return text.str();
  };

  const bool reads = access.use == Use::kRead || access.use == Use::kReadOnly;
  if (!clocks.ordered(cell.write.when, thread)) return race(cell.write);
  for (const PastOfLanes& past : cell.others) {
    const bool both_read = reads && past.first.use != Use::kAtomic;
    const bool both_atomic = access.use == Use::kAtomic && past.first.use == Use::kAtomic;
    if (both_read || both_atomic) continue;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Stamp when = past.first.when.of_lane(lane);
      if ((past.lanes >> lane & 1) && !clocks.ordered(when, thread))
        return race({when, past.first.code, past.first.use});
    }
  }
  if (access.use != Use::kWrite && !cell.written) {
    return std::string(verb(access.use)) + ' ' + place() + ", which nobody wrote";
  }
  const bool changed =
      cell.write.when.block != 0 || std::any_of(cell.others.begin(), cell.others.end(),
                                                [](const PastOfLanes& past) { return past.first.use == Use::kAtomic; });
  if ((access.use == Use::kReadOnly && changed) || (cell.read_only && !reads)) {
    return std::string(verb(access.use)) + ' ' + place() + ", which one launch changes and loads as read-only";
  }

  const Past now = {clocks.now(thread), access.code, reads ? Use::kRead : access.use};
  if (access.use == Use::kWrite) {
    cell.write = now;
    cell.others.clear();
  } else {
    cell.add(now, clocks);
  }
  cell.written = cell.written || !reads;
  cell.read_only = cell.read_only || access.use == Use::kReadOnly;
  return "";
}

void Memory::Cell::add(const Past& now, const Clocks& clocks) {
  const auto lane = static_cast<uint32_t>(now.when.thread % kWarpSize);
  const int warp = now.when.thread / kWarpSize;
  for (PastOfLanes& past : others) {
    const Stamp& when = past.first.when;
    const bool same = past.first.use == now.use && when.block == now.when.block && when.epoch == now.when.epoch &&
                      when.count == now.when.count && when.thread / kWarpSize == warp;
    if (!same) continue;
    past.lanes |= 1u << lane;
    past.first.code = now.code;
    return;
  }
  // Of earlier blocks two are enough: whichever block writes, one of them is another. They ran one after the other.
  uint32_t earlier[2] = {};
  std::erase_if(others, [&](const PastOfLanes& past) {
    const Stamp& when = past.first.when;
    if (past.first.use != now.use) return false;
    if (when.block != now.when.block) {
      uint32_t& place = earlier[0] == 0 ? earlier[0] : earlier[1];
      if (place != 0 || when.block == earlier[0]) return true;
      place = when.block;
      return false;
    }
    for (int other = 0; other < kWarpSize; ++other) {
      if ((past.lanes >> other & 1) && !clocks.ordered(when.of_lane(other), now.when.thread)) return false;
    }
    return true;
  });
  others.push_back({now, 1u << lane});
}

std::string Memory::out_of_bounds(const Access& access) const {
  std::ostringstream text;
  text << verb(access.use) << ' ' << bytes_of(access) << " out of bounds";
  const Range* nearest = nullptr;
  uintptr_t distance = std::numeric_limits<uintptr_t>::max();
  for (const auto& [end, range] : ranges_) {
    const uintptr_t apart = access.begin >= end          ? access.begin - end
                            : access.begin < range.begin ? range.begin - access.begin
                                                         : 0;
    if (apart >= distance) continue;
    nearest = &range;
    distance = apart;
  }
  if (nearest == nullptr) return text.str();
  if (access.begin >= nearest->end) {
    text << ", " << distance << " past the end";
  } else if (access.begin < nearest->begin) {
    text << ", " << distance << " before the beginning";
  } else {
    text << ", across the end";
  }
  text << " of " << nearest->name << " of " << nearest->end - nearest->begin << " bytes";
  return text.str();
}

}  // namespace emulator
