// lape_add and its kin on the CPU: checked tensors in, the kernels' plain view of them, tensors out.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../lape_call.h"
#include "position_host.h"

namespace llava_st {
namespace {

using cpu::Videos;

TokenStrides dense_strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3), 0};
}

/// The kernels' view of a dense tensor. They only write to results.
Videos dense_videos(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()),
          tensor.size(0),
          {tensor.size(1), tensor.size(2), tensor.size(3)},
          dense_strides(tensor)};
}

/// The same of packed videos, one by one.
std::vector<Videos> packed_videos(const Tensor& tensor, const PackedGrids& packed) {
  const int64_t token = tensor.stride(0), bytes = token * static_cast<int64_t>(tensor.element_size());
  auto* const data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  std::vector<Videos> videos;
  for (size_t i = 0; i < packed.grids.size(); ++i) {
    const Extent grid = packed.grids[i];
    videos.push_back({data + packed.offsets[i].key * bytes, 1, grid, packed_strides(grid, token, 0)});
  }
  return videos;
}

PackedGrids grids_of(const char* op, const Tensor& grid_thw, const Tensor& features) {
  return read_grids(op, grid_thw, {1, 1, 1}, features.size(0), "features");
}

/// Adds the tables to groups of videos, `from[i]` to `to[i]`.
void add_all(const char* op, const Tensor& features, const Tables& tables, bool text_aligned, bool round,
             const std::vector<Videos>& from, const std::vector<Videos>& to) {
  const cpu::Add add = cpu::position_kernels().add[cpu::element_of(op, {"features", features})];
  const cpu::WideTables wide(tables, cpu::computing_dtype(features), spatial_alignment(text_aligned));
  int64_t rows = 0;
  for (const Videos& each : from) rows = std::max(rows, each.grid.t + each.grid.h + each.grid.w);
  const Tensor resized = allocate(op, "the resized tables", {rows, wide.view.channels}, features, wide.dtype);
  for (size_t i = 0; i < from.size(); ++i) {
    if (from[i].samples * from[i].grid.count() == 0) continue;
    add(wide.view, from[i], to[i], round, const_cast<void*>(resized.const_data_ptr()), cpu::torch_loop());
  }
}

Tensor lape_add(const Tensor& features, const Tensor& temporal, const Tensor& height, const Tensor& width,
                bool text_aligned, bool round_every_addition) {
  constexpr auto op = "lape_add";
  const Tables tables = {temporal, height, width};
  check_lape_add(op, {"features", features}, tables);
  Tensor output = cpu::allocate_result(op, "the output", {features.sizes().begin(), features.sizes().end()}, features);
  const Tensor x = with_contiguous_rows(features);
  add_all(op, x, tables, text_aligned, round_every_addition, {dense_videos(x)}, {dense_videos(output)});
  return output;
}

void lape_add_(Tensor features, const Tensor& temporal, const Tensor& height, const Tensor& width, bool text_aligned,
               bool round_every_addition) {
  constexpr auto op = "lape_add_";
  const Tables tables = {temporal, height, width};
  check_lape_add(op, {"features", features}, tables);
  check_no_overlap(op, {"features", features});
  const Tensor x = with_contiguous_rows(features);  // perhaps a copy
  add_all(op, x, tables, text_aligned, round_every_addition, {dense_videos(x)}, {dense_videos(x)});
  if (x.const_data_ptr() != features.const_data_ptr()) torch::stable::copy_(features, x);
}

Tensor lape_add_packed(const Tensor& features, const Tensor& temporal, const Tensor& height, const Tensor& width,
                       const Tensor& grid_thw, bool text_aligned, bool round_every_addition) {
  constexpr auto op = "lape_add_packed";
  const Tables tables = {temporal, height, width};
  check_lape_add_packed(op, {"features", features}, tables, grid_thw);
  const PackedGrids packed = grids_of(op, grid_thw, features);
  Tensor output = cpu::allocate_result(op, "the output", {features.size(0), features.size(1)}, features);
  const Tensor x = with_contiguous_rows(features);
  add_all(op, x, tables, text_aligned, round_every_addition, packed_videos(x, packed), packed_videos(output, packed));
  return output;
}

/// Cuts videos into segments of at least two frames, at most 64 of them if there is one video: enough to be shared by
/// threads, and so large that their sums are little beside what is summed. Depends on sizes alone, as roundings must.
std::vector<cpu::Segment> segments_of(const std::vector<Videos>& groups) {
  std::vector<cpu::Segment> segments;
  int64_t first = 0;
  for (size_t group = 0; group < groups.size(); ++group) {
    const Extent grid = groups[group].grid;
    const int64_t rows = grid.w == 0 ? 0 : groups[group].samples * grid.t * grid.h;
    const int64_t step = std::max(2 * grid.h, ceil_div(rows, 64));
    for (int64_t begin = 0; begin < rows; begin += step) {
      segments.push_back({static_cast<int64_t>(group), begin, std::min(begin + step, rows), first});
      first += segments.back().scratch_rows(grid);
    }
  }
  return segments;
}

TableGradients sum_all(const char* op, const Tensor& grad_output, const Tables& tables, bool text_aligned,
                       const std::vector<Videos>& gradients) {
  const cpu::AddBackward kernel =
      cpu::position_kernels().add_backward[cpu::element_of(op, {"grad_output", grad_output})];
  const cpu::Tables view = cpu::without_rows(tables, spatial_alignment(text_aligned));
  const std::vector<cpu::Segment> segments = segments_of(gradients);
  const int64_t rows =
      segments.empty() ? 0
                       : segments.back().first + segments.back().scratch_rows(gradients[segments.back().group].grid);
  Tensor scratch = allocate(op, "scratch memory", {rows * cpu::segment_stride(view.channels)}, grad_output,
                            cpu::computing_dtype(grad_output));
  Tensor sums = allocate(op, "the sums", {view.rows(), view.channels}, grad_output, ScalarType::Double);
  kernel(view, gradients.data(), segments.data(), static_cast<int64_t>(segments.size()), scratch.mutable_data_ptr(),
         static_cast<double*>(sums.mutable_data_ptr()), cpu::torch_loop());
  return cpu::split_tables(sums, tables);
}

TableGradients lape_add_backward(const Tensor& grad_output, const Tensor& temporal, const Tensor& height,
                                 const Tensor& width, bool text_aligned) {
  constexpr auto op = "lape_add_backward";
  const Tables tables = {temporal, height, width};
  check_lape_add(op, {"grad_output", grad_output}, tables);
  const Tensor g = with_contiguous_rows(grad_output);
  return sum_all(op, g, tables, text_aligned, {dense_videos(g)});
}

TableGradients lape_add_packed_backward(const Tensor& grad_output, const Tensor& temporal, const Tensor& height,
                                        const Tensor& width, const Tensor& grid_thw, bool text_aligned) {
  constexpr auto op = "lape_add_packed_backward";
  const Tables tables = {temporal, height, width};
  check_lape_add_packed(op, {"grad_output", grad_output}, tables, grid_thw);
  const PackedGrids packed = grids_of(op, grid_thw, grad_output);
  const Tensor g = with_contiguous_rows(grad_output);
  return sum_all(op, g, tables, text_aligned, packed_videos(g, packed));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llava_st, CPU, m) {
  m.impl("lape_add", TORCH_BOX(&lape_add));
  m.impl("lape_add_", TORCH_BOX(&lape_add_));
  m.impl("lape_add_backward", TORCH_BOX(&lape_add_backward));
  m.impl("lape_add_packed", TORCH_BOX(&lape_add_packed));
  m.impl("lape_add_packed_backward", TORCH_BOX(&lape_add_packed_backward));
}

}  // namespace llava_st
