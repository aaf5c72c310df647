// lape_add and its kin on CUDA: checked tensors in, launches on the current stream, tensors out.
#include "../../lape_call.h"
#include "../element_types.h"
#include "../packed_grids.h"
#include "dispatch.h"

namespace llava_st {

namespace cuda {

// Instantiated in a file each.
#define LLAVA_ST_INSTANTIATED(T)                                                         \
  extern template void launch_resize(const ResizeArguments<T>&, void*);                  \
  extern template void launch_lape_add(const AddArguments<T>&, bool, bool, bool, void*); \
  extern template void launch_lape_add_sums(const SumArguments<T>&, bool, void*);        \
  extern template void launch_lape_add_finish(const FinishArguments<T>&, void*);
LLAVA_ST_INSTANTIATED(float)
LLAVA_ST_INSTANTIATED(Float16)
LLAVA_ST_INSTANTIATED(BFloat16)
#undef LLAVA_ST_INSTANTIATED

}  // namespace cuda

namespace {

using cuda::Device;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

/// Strides in elements, where those of dimensions with at most one entry do not count.
TokenStrides strides_of(const Tensor& tensor) {
  const auto stride = [&](int dim) { return tensor.size(dim) > 1 ? tensor.stride(dim) : 0; };
  if (tensor.dim() == 2) return {0, 0, 0, stride(0), 0};
  return {stride(0), stride(1), stride(2), stride(3), 0};
}

int64_t channels_of(const Tensor& features) { return features.size(features.dim() - 1); }

int64_t tokens_of(const Tensor& features) {
  int64_t tokens = 1;
  for (int64_t dim = 0; dim + 1 < features.dim(); ++dim) tokens *= features.size(dim);
  return tokens;
}

/// The dtypes that there are kernels for.
void check_kinds(const char* op, Argument features, const Tables& tables) {
  with_element(op, features, [](auto) {});
  with_element(op, {"temporal", tables.temporal}, [](auto) {});
}

Extent grid_of(const Tensor& features) { return {features.size(1), features.size(2), features.size(3)}; }

Tensor allocate_like(const char* op, const char* name, const Tensor& like) {
  return allocate(op, name, {like.sizes().begin(), like.sizes().end()}, like);
}

/// The grids of a packed batch on the device, and how many tiles they make.
struct PackedTiles {
  DeviceGrids grids;
  Extent tile;
  bool on_device;  // were they from the beginning
  int64_t most;    // tiles

  PackedTiles(const char* op, const Tensor& grid_thw, Argument like, Extent tile, void* stream)
      : grids(op, grid_thw.size(0), tokens_of(like.tensor), like.tensor), tile(tile) {
    const int64_t tokens = tokens_of(like.tensor);
    on_device = !cuda::on_host(grid_thw);
    if (on_device) {
      most = tokens;  // one each
      grids.locate(grid_thw, tile, stream);
    } else {
      const PackedGrids packed = read_grids(op, grid_thw, tile, tokens, like.name);
      most = packed.offsets.back().query;
      grids.upload(op, packed, like.name, stream);
    }
  }

  cuda::Tiling tiling(int64_t channels, int64_t packets) const {
    return cuda::packed_tiling(grids.videos(), most, channels, packets, tile);
  }
};

// Forward -------------------------------------------------------------------------------------------------------------

/// The tables in float, and no longer than the axes that they serve.
class FloatTables {
 public:
  /// There is no `grid` where each video has its own.
  FloatTables(const char* op, const Tables& tables, std::optional<Extent> grid, Alignment spatial, void* stream) {
    const int64_t channels = tables.temporal.size(1);
    const auto shorten = [&](const Tensor& table, int64_t Extent::* axis, Alignment alignment) {
      return Length{table.size(0), grid ? std::min(*grid.*axis, table.size(0)) : table.size(0), alignment};
    };
    const Length t = shorten(tables.temporal, &Extent::t, Alignment::kEnds);
    const Length h = shorten(tables.height, &Extent::h, spatial), w = shorten(tables.width, &Extent::w, spatial);
    memory_ = allocate(op, "scratch memory for the tables", {t.rows + h.rows + w.rows, channels}, tables.temporal,
                       ScalarType::Float);
    float* const rows = cuda::result_data<float>(memory_);
    const Tensor copies[] = {with_contiguous_rows(tables.temporal), with_contiguous_rows(tables.height),
                             with_contiguous_rows(tables.width)};
    with_element(op, {"temporal", tables.temporal}, [&](auto element) {
      using T = decltype(element);
      const cuda::ResizeArguments<T> arguments = {
          t.resize<T>(copies[0]), h.resize<T>(copies[1]), w.resize<T>(copies[2]), rows, channels,
          cuda::Divisor(channels)};
      cuda::launch_resize(arguments, stream);
    });
    cuda::check_launches();
    temporal = t.table(rows, channels);
    height = h.table(rows + t.rows * channels, channels);
    width = w.table(rows + (t.rows + h.rows) * channels, channels);
  }

  cuda::FloatTable temporal, height, width;

 private:
  /// How many anchors a table has, and how many rows it is resized to. Where these are as many as there are patches,
  /// patches are rows; else rows are the anchors. For kEnds these are the same.
  struct Length {
    int64_t anchors, rows;
    Alignment alignment;

    template <class T>
    cuda::TableToResize<T> resize(const Tensor& table) const {
      const int64_t stride = anchors > 1 ? table.stride(0) : 0;
      return {cuda::input_data<T>(table), anchors, stride, rows, rows < anchors ? alignment : Alignment::kEnds};
    }

    cuda::FloatTable table(const float* data, int64_t channels) const {
      return {data, rows, channels, rows < anchors ? Alignment::kEnds : alignment};
    }
  };

  Tensor memory_;
};

/// Whether features and output can be moved in packets of sixteen bytes, and how many packets a row has.
template <class T>
struct AddLayout {
  bool vectors;
  int64_t packets;

  AddLayout(const cuda::Operand<const T>& features, const cuda::Operand<T>& output, int64_t channels) {
    constexpr int elements = cuda::add_elements<T>();
    vectors = cuda::in_packets(features, channels, elements) && cuda::in_packets(output, channels, elements);
    packets = vectors ? channels / elements : channels;
  }

  /// The size of tiles.
  Extent tile(int64_t tokens, int64_t most_rows) const {
    return {cuda::kAddFrames, cuda::rows_to_add(tokens, packets, most_rows), cuda::kAddColumns};
  }
};

/// Adds to `features`, which have contiguous rows and are not empty, into `output`, which may be the same tensor.
void add_dense(const char* op, const Tensor& features, const Tables& tables, Tensor& output, bool in_place,
               Alignment spatial, bool round, void* stream) {
  const Extent grid = grid_of(features);
  const FloatTables in_float(op, tables, grid, spatial, stream);
  with_element(op, {"features", features}, [&](auto element) {
    using T = decltype(element);
    T* const to = in_place ? cuda::updated_data<T>(output) : cuda::result_data<T>(output);
    const cuda::Operand<const T> from = {in_place ? to : cuda::input_data<T>(features), strides_of(features)};
    cuda::AddArguments<T> arguments = {
        {}, from, {to, strides_of(output)}, in_float.temporal, in_float.height, in_float.width};
    const AddLayout<T> layout(arguments.features, arguments.output, channels_of(features));
    arguments.tiling = cuda::dense_tiling(features.size(0), grid, channels_of(features), layout.packets,
                                          layout.tile(tokens_of(features), grid.h));
    cuda::launch_lape_add(arguments, layout.vectors, round, false, stream);
  });
  cuda::check_launches();
}

Tensor lape_add(const Tensor& features, const Tensor& temporal, const Tensor& height, const Tensor& width,
                bool text_aligned, bool round_every_addition) {
  constexpr auto op = "lape_add";
  const Tables tables = {temporal, height, width};
  check_lape_add(op, {"features", features}, tables);
  check_kinds(op, {"features", features}, tables);
  const Device device(features);
  Tensor output = allocate_like(op, "the output", features);
  if (output.numel() == 0) return output;
  add_dense(op, with_contiguous_rows(features), tables, output, false, spatial_alignment(text_aligned),
            round_every_addition, device.stream);
  return output;
}

void lape_add_(const Tensor& features, const Tensor& temporal, const Tensor& height, const Tensor& width,
               bool text_aligned, bool round_every_addition) {
  constexpr auto op = "lape_add_";
  const Tables tables = {temporal, height, width};
  check_lape_add(op, {"features", features}, tables);
  check_kinds(op, {"features", features}, tables);
  check_no_overlap(op, {"features", features});
  const Device device(features);
  if (features.numel() == 0) return;
  const Tensor rows = with_contiguous_rows(features);  // a copy, where they are not
  Tensor target = features;
  const bool in_place = rows.const_data_ptr() == features.const_data_ptr();
  Tensor output = in_place ? target : allocate_like(op, "scratch memory", features);
  add_dense(op, rows, tables, output, in_place, spatial_alignment(text_aligned), round_every_addition, device.stream);
  if (!in_place) torch::stable::copy_(target, output);
}

Tensor lape_add_packed(const Tensor& features, const Tensor& temporal, const Tensor& height, const Tensor& width,
                       const Tensor& grid_thw, bool text_aligned, bool round_every_addition) {
  constexpr auto op = "lape_add_packed";
  const Tables tables = {temporal, height, width};
  check_lape_add_packed(op, {"features", features}, tables, grid_thw);
  check_kinds(op, {"features", features}, tables);
  const Device device(features);
  Tensor output = allocate_like(op, "the output", features);
  const int64_t tokens = tokens_of(features), channels = channels_of(features);
  with_element(op, {"features", features}, [&](auto element) {
    using T = decltype(element);
    const Tensor rows = with_contiguous_rows(features);
    cuda::AddArguments<T> arguments = {};
    arguments.features = {cuda::input_data<T>(rows), strides_of(rows)};
    arguments.output = {cuda::result_data<T>(output), strides_of(output)};
    const AddLayout<T> layout(arguments.features, arguments.output, channels);
    const PackedTiles tiles(op, grid_thw, {"features", features}, layout.tile(tokens, cuda::kMostAddRows),
                            device.stream);
    if (output.numel() == 0) return;
    const FloatTables in_float(op, tables, std::nullopt, spatial_alignment(text_aligned), device.stream);
    arguments.temporal = in_float.temporal;
    arguments.height = in_float.height;
    arguments.width = in_float.width;
    arguments.tiling = tiles.tiling(channels, layout.packets);
    cuda::launch_lape_add(arguments, layout.vectors, round_every_addition, tiles.on_device, device.stream);
  });
  cuda::check_launches();
  return output;
}

// Backward ------------------------------------------------------------------------------------------------------------

/// The gradients of the three tables.
struct TableGradients {
  Tensor temporal, height, width;

  TableGradients(const char* op, const Tables& tables)
      : temporal(allocate_like(op, "the gradient of temporal", tables.temporal)),
        height(allocate_like(op, "the gradient of height", tables.height)),
        width(allocate_like(op, "the gradient of width", tables.width)) {}

  Gradients all() const { return {temporal, height, width}; }
};

/// Sums over patches on their way to the gradient of one table.
struct Sums {
  const float* data;
  int64_t slices, slice, patches;
  Alignment alignment;

  template <class T>
  cuda::PatchSums<T> into(Tensor& gradient) const {
    return {data, slices, slice, patches, gradient.size(0), alignment, cuda::result_data<T>(gradient)};
  }
};

void finish(const char* op, const Sums& temporal, const Sums& height, const Sums& width, TableGradients& gradients,
            void* stream) {
  const int64_t channels = gradients.temporal.size(1);
  if (channels == 0) return;
  with_element(op, {"temporal", gradients.temporal}, [&](auto element) {
    using T = decltype(element);
    const cuda::FinishArguments<T> arguments = {temporal.into<T>(gradients.temporal),
                                                height.into<T>(gradients.height),
                                                width.into<T>(gradients.width),
                                                channels,
                                                {}};
    cuda::launch_lape_add_finish(arguments, stream);
  });
  cuda::check_launches();
}

template <class T>
struct SumLayout {
  bool vectors;
  int64_t packets;

  SumLayout(const cuda::Operand<const T>& gradient, int64_t channels)
      : vectors(cuda::in_packets(gradient, channels, cuda::sum_elements<T>())),
        packets(vectors ? channels / cuda::sum_elements<T>() : channels) {}
};

/// The tensor itself where the frames of all samples are equally far apart, else a copy in which they are.
Tensor with_frames_in_line(const Tensor& tensor) {
  const int64_t samples = tensor.size(0), frames = tensor.size(1);
  const bool in_line = samples <= 1 || frames <= 1 || tensor.stride(0) == frames * tensor.stride(1);
  return in_line ? tensor : torch::stable::contiguous(tensor);
}

/// Its strides, with all frames as those of one sample.
TokenStrides strides_in_line(const Tensor& tensor) {
  TokenStrides strides = strides_of(tensor);
  if (tensor.size(1) <= 1) strides.t = strides.sample;
  strides.sample = 0;
  return strides;
}

Gradients lape_add_backward(const Tensor& grad_output, const Tensor& temporal, const Tensor& height,
                            const Tensor& width, bool text_aligned) {
  constexpr auto op = "lape_add_backward";
  const Tables tables = {temporal, height, width};
  check_lape_add(op, {"grad_output", grad_output}, tables);
  check_kinds(op, {"grad_output", grad_output}, tables);
  const Device device(grad_output);
  TableGradients gradients(op, tables);
  const Tensor rows = with_frames_in_line(with_contiguous_rows(grad_output));
  const int64_t samples = rows.size(0), channels = channels_of(rows);
  const Extent grid = grid_of(rows);
  const Alignment spatial = spatial_alignment(text_aligned);
  Tensor scratch;
  with_element(op, {"grad_output", rows}, [&](auto element) {
    using T = decltype(element);
    cuda::SumArguments<T> arguments = {};
    arguments.gradient = {cuda::input_data<T>(rows), strides_in_line(rows)};
    const SumLayout<T> layout(arguments.gradient, channels);
    const int64_t tile_rows = cuda::rows_to_sum(tokens_of(rows), layout.packets, grid.h);
    arguments.tiling = cuda::dense_tiling(1, {samples * grid.t, grid.h, grid.w}, channels, layout.packets,
                                          {cuda::kSumFrames, tile_rows, cuda::kSumColumns});
    const Extent tiles = regions_of(arguments.tiling.grid, arguments.tiling.tile);
    const int64_t of_frames = tiles.h * tiles.w * arguments.tiling.grid.t;
    const int64_t of_rows = tiles.t * tiles.w * grid.h, of_columns = tiles.t * tiles.h * grid.w;
    scratch =
        allocate(op, "scratch memory for sums", {of_frames + of_rows + of_columns, channels}, rows, ScalarType::Float);
    arguments.frames = cuda::result_data<float>(scratch);
    arguments.rows = arguments.frames + of_frames * channels;
    arguments.columns = arguments.rows + of_rows * channels;
    cuda::launch_lape_add_sums(arguments, layout.vectors, device.stream);
    cuda::check_launches();
    // A slice of all frames holds one of each sample.
    finish(op, {arguments.frames, tiles.h * tiles.w * samples, grid.t, grid.t, Alignment::kEnds},
           {arguments.rows, tiles.t * tiles.w, grid.h, grid.h, spatial},
           {arguments.columns, tiles.t * tiles.h, grid.w, grid.w, spatial}, gradients, device.stream);
  });
  return gradients.all();
}

/// How many slices a packed batch is summed in: so that their sums take no more than 64 MiB, and not more of them than
/// there is work for.
int64_t slices_for(int64_t tokens, int64_t anchors, int64_t channels) {
  constexpr int64_t memory = int64_t{64} << 20, most = 64, tokens_per_slice = 128;
  const int64_t fit = memory / (anchors * channels * static_cast<int64_t>(sizeof(float)));
  return std::clamp<int64_t>(std::min(fit, tokens / tokens_per_slice), 1, most);
}

Gradients lape_add_packed_backward(const Tensor& grad_output, const Tensor& temporal, const Tensor& height,
                                   const Tensor& width, const Tensor& grid_thw, bool text_aligned) {
  constexpr auto op = "lape_add_packed_backward";
  const Tables tables = {temporal, height, width};
  check_lape_add_packed(op, {"grad_output", grad_output}, tables, grid_thw);
  check_kinds(op, {"grad_output", grad_output}, tables);
  const Device device(grad_output);
  TableGradients gradients(op, tables);
  const Tensor rows = with_contiguous_rows(grad_output);
  const int64_t tokens = tokens_of(rows), channels = channels_of(rows);
  const PackedTiles tiles(op, grid_thw, {"grad_output", rows}, {cuda::kSumFrames, cuda::kSliceRows, cuda::kSumColumns},
                          device.stream);
  if (channels == 0) return gradients.all();
  const int64_t slices = tokens > 0 ? slices_for(tokens, tables.rows(), channels) : 0;
  Tensor scratch = allocate(op, "scratch memory for sums", {slices, tables.rows(), channels}, rows, ScalarType::Float);
  float* const sums = cuda::result_data<float>(scratch);
  with_element(op, {"grad_output", rows}, [&](auto element) {
    using T = decltype(element);
    cuda::SumArguments<T> arguments = {};
    arguments.gradient = {cuda::input_data<T>(rows), strides_of(rows)};
    const SumLayout<T> layout(arguments.gradient, channels);
    arguments.tiling = tiles.tiling(channels, layout.packets);
    arguments.anchors = sums;
    arguments.slices = slices;
    arguments.temporal = temporal.size(0);
    arguments.height = height.size(0);
    arguments.width = width.size(0);
    arguments.spatial = spatial_alignment(text_aligned);
    cuda::launch_lape_add_sums(arguments, layout.vectors, device.stream);
  });
  cuda::check_launches();
  // These are sums of anchors already, each a patch of its own.
  const auto anchors = [&](int64_t first, const Tensor& table) -> Sums {
    return {sums + first * channels, slices, tables.rows(), table.size(0), Alignment::kEnds};
  };
  finish(op, anchors(0, temporal), anchors(temporal.size(0), height), anchors(temporal.size(0) + height.size(0), width),
         gradients, device.stream);
  return gradients.all();
}

}  // namespace

LLAVA_ST_CUDA_KERNELS(m) {
  m.impl("lape_add", TORCH_BOX(&lape_add));
  m.impl("lape_add_", TORCH_BOX(&lape_add_));
  m.impl("lape_add_backward", TORCH_BOX(&lape_add_backward));
  m.impl("lape_add_packed", TORCH_BOX(&lape_add_packed));
  m.impl("lape_add_packed_backward", TORCH_BOX(&lape_add_packed_backward));
}

}  // namespace llava_st
