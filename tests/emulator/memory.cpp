#include "memory.h"

#include <cstdlib>
#include <limits>
#include <sstream>
#include <utility>

#include "source_lines.h"

namespace emulator {
namespace {

const char* verb(Use use) {
  switch (use) {
    case Use::kRead:
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

void Memory::allow(const void* data, size_t bytes, bool writable, bool written, std::string name) {
  if (bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + bytes;
  const auto known = ranges_.find(end);
  if (known != ranges_.end() && known->second.begin == begin && known->second.writable == writable) return;
  // Views of one tensor overlap each other; what replaces an older range has been allocated since.
  for (auto it = ranges_.upper_bound(begin); it != ranges_.end() && it->second.begin < end;) {
    const bool keep = !writable && !it->second.writable;
    if (keep) {
      const uintptr_t first = std::min(begin, it->second.begin), last = std::max(end, it->second.end);
      ranges_.erase(it);
      return allow(reinterpret_cast<const void*>(first), last - first, false, true, std::move(name));
    }
    it = ranges_.erase(it);
  }
  ranges_[end] = {begin, end, writable, written, std::move(name), {}};
  if (writable) ranges_[end].pages.resize((bytes + kPageBytes - 1) / kPageBytes);
}

void Memory::mark_written(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  Range* const range = find(begin, bytes);
  if (range == nullptr || !range->writable) return;
  for (uintptr_t address = begin; address < begin + bytes; ++address) cell(*range, address).written = true;
}

void Memory::forget(const void* data) {
  const auto it = ranges_.upper_bound(reinterpret_cast<uintptr_t>(data));
  if (it != ranges_.end()) ranges_.erase(it);
}

Memory::Range* Memory::find(uintptr_t begin, size_t bytes) {
  const auto it = ranges_.upper_bound(begin);
  if (it == ranges_.end() || it->second.begin > begin || begin + bytes > it->second.end) return nullptr;
  return &it->second;
}

Memory::Cell& Memory::cell(Range& range, uintptr_t address) {
  const size_t offset = address - range.begin;
  std::unique_ptr<Page>& page = range.pages[offset / kPageBytes];
  if (!page) {
    page = std::make_unique<Page>();
    for (Cell& cell : page->cells) cell.written = range.written;
    page->launch = launch_;
  }
  if (page->launch != launch_) {
    for (Cell& cell : page->cells) cell = {{}, {}, cell.written};
    page->launch = launch_;
  }
  return page->cells[offset % kPageBytes];
}

std::string Memory::check(const Access& access, int thread, const Clocks& clocks) {
  Range* const range = find(access.begin, access.bytes);
  if (range == nullptr) return out_of_bounds(access);
  if (!range->writable) {
    return access.use == Use::kRead ? "" : std::string(verb(access.use)) + " an input, which kernels only read";
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
  const auto races = [&](const Past& past) {
    return !clocks.ordered(past.when, thread) && !(past.use == Use::kAtomic && access.use == Use::kAtomic);
  };
  const auto race = [&](const Past& past) {
    std::ostringstream text;
    text << verb(access.use) << ' ' << place() << ", which thread " << past.when.thread;
    if (past.when.block != clocks.now(thread).block) text << " of another block";
    text << ' ' << verb(past.use) << " at " << source_line(past.code) << ", with no barrier between them (a race)";
    return text.str();
  };

  const Past now = {clocks.now(thread), access.code, access.use};
  if (races(cell.write)) return race(cell.write);
  if (access.use == Use::kRead || access.use == Use::kAtomic) {
    if (!cell.written) return std::string(verb(access.use)) + ' ' + place() + ", which nobody wrote";
  }
  if (access.use == Use::kRead) {
    const bool second = !clocks.ordered(cell.reads[0].when, thread);
    cell.reads[second] = now;
    return "";
  }
  for (const Past& read : cell.reads) {
    if (races(read)) return race(read);
  }
  cell = {now, {}, true};
  return "";
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
