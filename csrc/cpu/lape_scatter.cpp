// lape_scatter and its gradient on the CPU: checked tensors in, the kernels' plain view of them, tensors out.
#include <torch/csrc/stable/library.h>

#include "../lape_call.h"
#include "position_host.h"

namespace llava_st {
namespace {

/// What of each token counts must exist.
void check_tokens(const char* op, const cpu::ScatterSources& sources, const Tables& tables, int64_t visuals,
                  int64_t tokens) {
  const int64_t ids = sources.words + tables.rows();
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t visual = sources.visual_index[token], id = sources.input_ids[token];
    const int axis = sources.axis[token];
    LLAVA_ST_CHECK(visual >= -1 && visual < visuals, op, ": visual_index[", token, "] must be -1 or in [0, ", visuals,
                   "), got ", visual);
    if (visual >= 0) continue;
    LLAVA_ST_CHECK(axis >= -1 && axis < 3, op, ": axis[", token, "] must be -1, 0, 1 or 2, got ", axis);
    if (axis >= 0) {
      LLAVA_ST_CHECK(sources.positions[token] == sources.positions[token], op, ": positions[", token,
                     "] must be a number where axis names a table, got nan");
    } else {
      LLAVA_ST_CHECK(id >= 0 && id < ids, op, ": input_ids[", token, "] must be in [0, ", ids, "), got ", id);
    }
  }
}

Tensor lape_scatter(const Tensor& embed, const Tensor& temporal, const Tensor& height, const Tensor& width,
                    const Tensor& input_ids, const Tensor& axis, const Tensor& positions, const Tensor& visual_index,
                    const Tensor& visual) {
  constexpr auto op = "lape_scatter";
  const Tables tables = {temporal, height, width};
  check_lape_scatter(op, embed, tables, input_ids, axis, positions, visual_index, visual);
  const cpu::Scatter kernel = cpu::position_kernels().scatter[cpu::element_of(op, {"embed", embed})];
  const int64_t tokens = input_ids.size(0), channels = embed.size(1);
  Tensor output = cpu::allocate_result(op, "the output", {tokens, channels}, embed);
  const Tensor rows = with_contiguous_rows(embed), seen = with_contiguous_rows(visual);
  const Tensor ids = cpu::contiguous_in(input_ids, ScalarType::Long);
  const Tensor index = cpu::contiguous_in(visual_index, ScalarType::Long);
  const Tensor axes = torch::stable::contiguous(axis), places = torch::stable::contiguous(positions);
  const cpu::ScatterSources sources = {rows.const_data_ptr(),
                                       seen.const_data_ptr(),
                                       rows.stride(0),
                                       seen.stride(0),
                                       rows.size(0),
                                       static_cast<const int64_t*>(ids.const_data_ptr()),
                                       static_cast<const int64_t*>(index.const_data_ptr()),
                                       static_cast<const int8_t*>(axes.const_data_ptr()),
                                       static_cast<const double*>(places.const_data_ptr())};
  check_tokens(op, sources, tables, visual.size(0), tokens);
  const cpu::WideTables wide(tables, cpu::computing_dtype(embed), Alignment::kCenters);
  kernel(wide.view, sources, tokens, output.mutable_data_ptr(), cpu::torch_loop());
  return output;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients lape_scatter_backward(const Tensor& grad_output, const Tensor& destination, const Tensor& token,
                                const Tensor& share, const Tensor& embed, const Tensor& temporal, const Tensor& height,
                                const Tensor& width, const Tensor& visual) {
  constexpr auto op = "lape_scatter_backward";
  const Tables tables = {temporal, height, width};
  check_lape_scatter_backward(op, grad_output, destination, token, share, embed, tables, visual);
  const cpu::Gather kernel = cpu::position_kernels().gather[cpu::element_of(op, {"embed", embed})];
  const int64_t channels = embed.size(1);
  Tensor grad_embed = cpu::allocate_result(op, "the gradient of embed", {embed.size(0), channels}, embed);
  Tensor grad_tables =
      allocate(op, "the gradients of the tables", {tables.rows(), channels}, embed, cpu::computing_dtype(embed));
  Tensor grad_visual = cpu::allocate_result(op, "the gradient of visual", {visual.size(0), channels}, embed);

  const Tensor g = with_contiguous_rows(grad_output);
  const Tensor to = torch::stable::contiguous(destination), from = torch::stable::contiguous(token),
               shares = torch::stable::contiguous(share);
  const cpu::ScatteredGradient gradient = {static_cast<const int64_t*>(to.const_data_ptr()),
                                           static_cast<const int64_t*>(from.const_data_ptr()),
                                           static_cast<const double*>(shares.const_data_ptr()),
                                           to.size(0),
                                           g.const_data_ptr(),
                                           g.stride(0),
                                           channels};
  for (int64_t entry = 0; entry < gradient.entries; ++entry) {
    LLAVA_ST_CHECK(gradient.token[entry] >= 0 && gradient.token[entry] < g.size(0), op, ": token[", entry,
                   "] must be in [0, ", g.size(0), "), got ", gradient.token[entry]);
    LLAVA_ST_CHECK(entry == 0 || gradient.destination[entry - 1] <= gradient.destination[entry], op,
                   ": destination must ascend, got ", gradient.destination[entry], " at entry ", entry, " after ",
                   gradient.destination[entry - 1]);
  }
  int64_t first = 0;
  const auto sum_rows = [&](Tensor& result, bool wide) {
    kernel(gradient, first, result.size(0), wide, result.mutable_data_ptr(), cpu::torch_loop());
    first += result.size(0);
  };
  sum_rows(grad_embed, false);
  sum_rows(grad_tables, true);
  sum_rows(grad_visual, false);
  auto [grad_temporal, grad_height, grad_width] = cpu::split_tables(grad_tables, tables);
  return {grad_embed, grad_temporal, grad_height, grad_width, grad_visual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llava_st, CPU, m) {
  m.impl("lape_scatter", TORCH_BOX(&lape_scatter));
  m.impl("lape_scatter_backward", TORCH_BOX(&lape_scatter_backward));
}

}  // namespace llava_st
