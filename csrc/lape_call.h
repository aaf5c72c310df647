// What calls of lape_add and lape_scatter, and of their backward ops, must fulfil: for the CPU and the CUDA library.
#pragma once

#include <array>
#include <initializer_list>

#include "geometry/anchors.h"
#include "grids.h"

namespace llava_st {

/// The three tables of anchors: of one dtype, which need not be that of anything else.
struct Tables {
  const Tensor &temporal, &height, &width;

  std::array<Argument, 3> all() const { return {{{"temporal", temporal}, {"height", height}, {"width", width}}}; }
  int64_t rows() const { return temporal.size(0) + height.size(0) + width.size(0); }
};

inline void check_tables(const char* op, const Tables& tables, int64_t channels, Argument model) {
  for (const Argument& table : tables.all()) {
    check_rank(op, table, 2, "[anchors, C]");
    check_shape(op, table, {table.tensor.size(0), channels});
    LLAVA_ST_CHECK(table.tensor.size(0) > 0, op, ": ", table.name, " must have at least one row, got ",
                   to_text(table.tensor.sizes()));
    LLAVA_ST_CHECK(same_device(table.tensor, model.tensor), op, ": ", table.name, " must be on the device of ",
                   model.name, ", ", device_text(model.tensor), ", got ", device_text(table.tensor));
    check_same_kind(op, table, {"temporal", tables.temporal});
  }
}

inline void check_vector(const char* op, Argument argument, int64_t size, std::initializer_list<ScalarType> dtypes,
                         Argument model) {
  check_shape(op, argument, {size});
  bool fits = false;
  std::string wanted;
  for (const ScalarType dtype : dtypes) {
    fits = fits || argument.tensor.scalar_type() == dtype;
    wanted += (wanted.empty() ? "" : " or ") + to_text(dtype);
  }
  LLAVA_ST_CHECK(fits, op, ": ", argument.name, " must be ", wanted, ", got ", to_text(argument.tensor.scalar_type()));
  LLAVA_ST_CHECK(same_device(argument.tensor, model.tensor), op, ": ", argument.name, " must be on the device of ",
                 model.name, ", ", device_text(model.tensor), ", got ", device_text(argument.tensor));
}

/// features, or a gradient like them: `[B, T, H, W, C]`.
inline void check_lape_add(const char* op, Argument features, const Tables& tables) {
  check_rank(op, features, 5, "[B, T, H, W, C]");
  check_tables(op, tables, features.tensor.size(4), features);
}

/// Packed: `[tokens, C]`.
inline void check_lape_add_packed(const char* op, Argument features, const Tables& tables, const Tensor& grid_thw) {
  check_rank(op, features, 2, "[tokens, C]");
  check_tables(op, tables, features.tensor.size(1), features);
  check_grid_thw(op, grid_thw, features);
}

/// How the height and the width lie among their anchors; the time has Alignment::kEnds.
inline Alignment spatial_alignment(bool text_aligned) { return text_aligned ? Alignment::kText : Alignment::kCenters; }

/// What both scatter ops gather rows from, or scatter gradients to: embed `[V, C]`, the tables, visual `[M, C]`.
inline void check_scatter_sources(const char* op, const Tensor& embed, const Tables& tables, const Tensor& visual) {
  const Argument model = {"embed", embed};
  check_rank(op, model, 2, "[V, C]");
  check_tables(op, tables, embed.size(1), model);
  check_rank(op, {"visual", visual}, 2, "[M, C]");
  check_shape(op, {"visual", visual}, {visual.size(0), embed.size(1)});
  check_same_kind(op, {"visual", visual}, model);
}

inline void check_lape_scatter(const char* op, const Tensor& embed, const Tables& tables, const Tensor& input_ids,
                               const Tensor& axis, const Tensor& positions, const Tensor& visual_index,
                               const Tensor& visual) {
  const Argument model = {"embed", embed};
  check_scatter_sources(op, embed, tables, visual);
  check_rank(op, {"input_ids", input_ids}, 1, "[N]");
  const int64_t tokens = input_ids.size(0);
  check_vector(op, {"input_ids", input_ids}, tokens, {ScalarType::Int, ScalarType::Long}, model);
  check_vector(op, {"axis", axis}, tokens, {ScalarType::Char}, model);
  check_vector(op, {"positions", positions}, tokens, {ScalarType::Double}, model);
  check_vector(op, {"visual_index", visual_index}, tokens, {ScalarType::Int, ScalarType::Long}, model);
}

/// The gradient flows to rows of embed, the three tables and visual, numbered through in this order. Of `entries`
/// entries, ascending by `destination`, each adds row `token` of grad_output, times `share`, to one of them; what has
/// no destination has a number past the last.
inline void check_lape_scatter_backward(const char* op, const Tensor& grad_output, const Tensor& destination,
                                        const Tensor& token, const Tensor& share, const Tensor& embed,
                                        const Tables& tables, const Tensor& visual) {
  const Argument model = {"embed", embed};
  check_scatter_sources(op, embed, tables, visual);
  check_rank(op, {"grad_output", grad_output}, 2, "[N, C]");
  check_shape(op, {"grad_output", grad_output}, {grad_output.size(0), embed.size(1)});
  check_same_kind(op, {"grad_output", grad_output}, model);
  check_rank(op, {"destination", destination}, 1, "[entries]");
  const int64_t entries = destination.size(0);
  check_vector(op, {"destination", destination}, entries, {ScalarType::Long}, model);
  check_vector(op, {"token", token}, entries, {ScalarType::Long}, model);
  check_vector(op, {"share", share}, entries, {ScalarType::Double}, model);
}

}  // namespace llava_st
