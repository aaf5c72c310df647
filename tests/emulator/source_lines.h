// From addresses of code to lines of the source, for error messages.
#pragma once

#include <string>

namespace emulator {

/// The line that a call returning to `code` was made from, and the lines that it was inlined into, such as
/// "layout.cuh:86 in chunk.cuh:50". Lines of the emulator itself are left out.
std::string source_line(const void* code);

}  // namespace emulator
