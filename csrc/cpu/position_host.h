// Tables of anchors on their way to the CPU kernels of LAPE and the coordinate loss, and their gradients on the way
// out.
#pragma once

#include <tuple>

#include "../lape_call.h"
#include "host.h"
#include "instruction_set.h"

namespace llava_st {

using TableGradients = std::tuple<Tensor, Tensor, Tensor>;

namespace cpu {

/// The kernels' view of the tables where they do not read them.
inline Tables without_rows(const llava_st::Tables& tables, Alignment alignment) {
  return {{{nullptr, tables.temporal.size(0)}, {nullptr, tables.height.size(0)}, {nullptr, tables.width.size(0)}},
          tables.temporal.size(1),
          alignment};
}

/// The tables in the type that is computed in.
struct WideTables {
  ScalarType dtype;
  Tensor temporal, height, width;
  Tables view;

  WideTables(const llava_st::Tables& tables, ScalarType dtype, Alignment alignment)
      : dtype(dtype),
        temporal(contiguous_in(tables.temporal, dtype)),
        height(contiguous_in(tables.height, dtype)),
        width(contiguous_in(tables.width, dtype)),
        view(without_rows(tables, alignment)) {
    view.axis[0].rows = temporal.const_data_ptr();
    view.axis[1].rows = height.const_data_ptr();
    view.axis[2].rows = width.const_data_ptr();
  }
};

/// Rows that stand for those of the three tables, in the tables' dtype.
inline TableGradients split_tables(Tensor& rows, const llava_st::Tables& tables) {
  int64_t first = 0;
  const auto next = [&](const Tensor& table) {
    const Tensor part = torch::stable::narrow(rows, 0, first, table.size(0));
    first += table.size(0);
    // A copy in any case, so that no gradient is a view of another's memory.
    return torch::stable::to(part, table.scalar_type(), std::nullopt, std::nullopt, std::nullopt, false, true);
  };
  Tensor temporal = next(tables.temporal), height = next(tables.height), width = next(tables.width);
  return {std::move(temporal), std::move(height), std::move(width)};
}

}  // namespace cpu
}  // namespace llava_st
