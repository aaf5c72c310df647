// Between the compiler's instrumentation and the emulator: every access to memory by a thread of a kernel.
#pragma once

#include <cstdint>

#include "fibre.h"
#include "memory.h"

namespace emulator {

/// Whether a kernel's thread runs, and not the host or the emulator.
extern bool accesses_are_checked;

/// For as long as the emulator works on behalf of a thread, accesses are its own. (It is not instrumented, but shares
/// the inline functions of the standard library with kernels, which are.)
class Pause {
 public:
  Pause() : before_(accesses_are_checked) { accesses_are_checked = false; }
  ~Pause() { accesses_are_checked = before_; }
  Pause(const Pause&) = delete;
  Pause& operator=(const Pause&) = delete;

 private:
  const bool before_;
};

/// The stack of the thread that runs.
extern AddressRange stack;

/// Ends the launch if the running thread may not make this access.
void check_access(const void* address, size_t bytes, Use use, const void* code);

/// Ends the launch; for what a launcher does, check_launchers throws.
void report_undefined_behaviour(const char* what, const char* file, int line);

}  // namespace emulator
