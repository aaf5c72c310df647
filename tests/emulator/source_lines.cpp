#include "source_lines.h"

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <sstream>
#include <vector>

namespace emulator {
namespace {

std::vector<std::string> output_of(const std::string& command) {
  std::vector<std::string> lines;
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  std::array<char, 4096> buffer;
  while (pipe && fgets(buffer.data(), buffer.size(), pipe.get())) {
    std::string line = buffer.data();
    if (!line.empty() && line.back() == '\n') line.pop_back();
    lines.push_back(std::move(line));
  }
  return lines;
}

std::string find_source_line(const void* code) {
  constexpr size_t kMostFrames = 4;
  Dl_info module;
  if (!dladdr(code, &module) || module.dli_fname == nullptr) return "an unknown line";
  const auto offset = reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(module.dli_fbase) - 1;
  std::ostringstream command;
  command << "addr2line -i -e '" << module.dli_fname << "' 0x" << std::hex << offset << " 2>/dev/null";
  std::ostringstream text;
  size_t frames = 0;
  for (const std::string& line : output_of(command.str())) {
    const size_t slash = line.rfind('/');
    std::string where = line.substr(slash == std::string::npos ? 0 : slash + 1);
    where = where.substr(0, where.find(' '));  // without "(discriminator 2)"
    if (where.starts_with("emulat") || where.starts_with("?")) continue;
    if (frames++ < kMostFrames) text << (frames > 1 ? " in " : "") << where;
  }
  return frames > 0 ? text.str() : "an unknown line";
}

}  // namespace

std::string source_line(const void* code) {
  static std::map<const void*, std::string> found;  // the search takes some time
  const auto [entry, is_new] = found.try_emplace(code);
  if (is_new) entry->second = find_source_line(code);
  return entry->second;
}

}  // namespace emulator
