// How the driver fails.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cpu/parallel_loop.h"

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

/// Checks the GELU behind a linear layer and its gradient.
void check_gelu();
/// Whether it reports that there is no memory for rows too long for any.
bool gelu_without_memory(const cpu::ParallelLoop& loop);

/// Checks attention over normalised keys and values.
void check_normalized();
/// Whether both passes report that there is no memory for regions too large for any.
bool normalized_without_memory(const cpu::ParallelLoop& loop);

}  // namespace llava_st::tests
