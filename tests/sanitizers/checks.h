// How the driver fails.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace llava_st::tests {

/// What is being checked, for the message of a failure.
inline std::string current;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s: %s\n", current.c_str(), what.c_str());
  std::exit(1);
}

inline void check(bool holds, const char* what) {
  if (!holds) fail(what);
}

/// Checks all of csrc/geometry on small grids; returns how many grids, with regions, there were.
int64_t check_geometry();

/// Checks the propagation to neighbours.
void check_neighbors();

/// Checks the kernels of LAPE and the coordinate loss.
void check_positions();

}  // namespace llava_st::tests
