// Host side of the kernels: layouts of the workspace, grids, launches. Free of torch, so that the emulator's bindings
// and the registered ops launch the same things in the same way.
//
//   prepare_boxes            1 launch, before all others
//   loss and its gradient    build_tables, roi_align_forward, roi_align_backward
//   loss alone               build_tables, roi_align_forward, roi_align_backward with no block but that of the losses
//   pooling                  build_tables, roi_align_forward; its gradient: build_tables, roi_align_backward
//   backward of the loss     scale_gradients, or the first line again where the factor must be in the weights
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "prepare.cuh"
#include "roi_align_backward.cuh"
#include "scale_gradients.cuh"

namespace rakd {
namespace gpu {

constexpr int64_t kTargetBlocks = 4096;        // pooling blocks take more channels each when there are more of them
constexpr int64_t kMaxBlocks = INT32_MAX - 1;  // of a grid, and bytes of one box's tables
constexpr int64_t kScaleBlocks = 1024;         // at most; they end at once where there is nothing to scale

// Threads of a block, multiples of 32. On a GPU, `pool` and `backward` are at most the values here, and no block takes
// more than 48 KiB of shared memory, which every architecture gives without being asked. Results are right for any
// others as well (the tests run several).
struct BlockSizes {
  int tables = 64, pool = kPoolThreads, backward = kBackwardThreads;
};

// One level's maps [B, C, H, W]; strides in elements.
struct Map {
  void* data;
  Number type;
  int64_t size[4], stride[4];
};
typedef std::vector<Map> Maps;  // [levels], or empty: not wanted

struct Problem {
  int64_t boxes, images;
  std::vector<double> strides[2];  // of the apprentice's and of the expert's levels, pixels a cell
  int64_t bins[2];                 // y, x
  int64_t sampling_ratio;
  const double* rows;    // [boxes, 5 + levels]
  const int32_t* index;  // [images + 1 + boxes]
};

inline void require(bool good, const char* message) {
  if (!good) throw std::runtime_error(message);
}

inline Pyramid pyramid(const Maps& maps) {
  Pyramid result{};
  for (size_t l = 0; l < maps.size(); ++l) {
    const int64_t* stride = maps[l].stride;
    result.level[l] =
        MapView{maps[l].data, stride[0], stride[1], static_cast<uint32_t>(stride[2]), static_cast<uint32_t>(stride[3])};
    result.type[l] = maps[l].type;
  }
  return result;
}

// Tables without memory, and the memory that they need.
template <class T>
struct TablePlan {
  BuildTables<T> build{};
  Tables<T>& tables = build.tables;
  int64_t slice_bytes = 0;  // of all slices
  int64_t pooled = 0;       // elements of pooled differences
  bool fits = true;         // whether kernels can count a box's tables, and the boxes

  // `expert`: maps that are compared with the first (the weights are then those of the loss), or nullptr.
  TablePlan(const Problem& problem, const Maps& maps, const Maps* expert) {
    tables.boxes = problem.boxes;
    tables.levels = static_cast<int32_t>(maps.size());
    tables.images = static_cast<int32_t>(problem.images);
    tables.sampling_ratio = static_cast<int32_t>(problem.sampling_ratio);
    tables.rows = problem.rows;
    tables.index = problem.index;
    for (int axis = 0; axis < 2; ++axis) tables.bins[axis] = static_cast<int32_t>(problem.bins[axis]);
    const int64_t bins = problem.bins[0] * problem.bins[1];
    for (size_t l = 0; l < maps.size(); ++l) {
      Level& level = tables.level[l];
      const auto same = [&](int axis) { return maps[l].size[2 + axis] == (*expert)[l].size[2 + axis]; };
      const bool shared = !expert || (same(0) && same(1) && problem.strides[0][l] == problem.strides[1][l]);
      level.sides = shared ? 1 : 2;
      level.channels = static_cast<int32_t>(maps[l].size[1]);
      level.pooled = pooled;
      level.first = slice_bytes;
      pooled += problem.boxes * channel_blocks(level.channels) * kChannelBlock * bins;
      build.normalizer[l] = expert ? 1.0 / (static_cast<double>(level.channels) * static_cast<double>(bins)) : 1.0;
      int64_t bytes = 0;
      for (int i = 0; i < 2 * level.sides; ++i) {
        const int side = i / 2, axis = i % 2;
        const int64_t size = (side == 0 ? maps[l] : (*expert)[l]).size[2 + axis];
        const AxisCapacity capacity = axis_capacity(size, problem.bins[axis], problem.sampling_ratio);
        fits = fits && capacity.weights <= kMaxBlocks;
        if (!fits) return;
        level.axis[side][axis] = AxisLayout{static_cast<int32_t>(size), static_cast<int32_t>(capacity.cells),
                                            static_cast<int32_t>(capacity.weights), static_cast<int32_t>(bytes)};
        bytes += axis_bytes<T>(capacity.cells, capacity.weights, problem.bins[axis]);
        fits = fits && bytes <= kMaxBlocks;
        build.stride[side][l] = problem.strides[side][l];
      }
      level.bytes = static_cast<int32_t>(bytes);
      slice_bytes += problem.boxes * bytes;
    }
    fits = fits && problem.boxes * tables.levels <= kMaxBlocks;
  }

  // Takes the memory; before a launch.
  template <class Memory>
  void place(Memory& memory) {
    require(fits, "maps: too many boxes, or rows and columns for the tables of one box");
    tables.slices = memory.template take<unsigned char>(slice_bytes);
    tables.extents = memory.template take<int32_t>(2 * tables.levels * kExtent * tables.boxes);
    tables.scales = memory.template take<double>(tables.levels * tables.boxes);
  }

  void launch(const BlockSizes& blocks, cudaStream_t stream) const {
    const dim3 grid(static_cast<unsigned>(tables.levels * tables.boxes));
    if (tables.boxes > 0) RAKD_LAUNCH((build_tables<T>), grid, dim3(blocks.tables), 0, stream, build);
  }
};

// Sets call.group and returns the blocks of roi_align_forward<T, kLoss>.
template <bool kLoss, class T>
unsigned choose_blocks(RoiAlignForward<T>& call) {
  const Tables<T>& tables = call.tables;
  const int levels = kLoss ? tables.levels : 1;  // pooling takes all levels of a box at once, which are as wide
  int64_t most = 1, count = 0;
  for (int l = 0; l < levels; ++l) most = std::max<int64_t>(most, channel_blocks(tables.level[l].channels));
  const int64_t groups = std::max<int64_t>(1, kTargetBlocks / std::max<int64_t>(1, tables.boxes * levels));
  call.group = static_cast<int32_t>((most + groups - 1) / groups);
  for (int l = 0; l < levels; ++l) count += tables.boxes * groups_of(tables.level[l], call.group);
  require(count <= kMaxBlocks, "boxes: too many for one call");
  return static_cast<unsigned>(count);
}

template <bool kLoss, class T>
void launch_forward(const RoiAlignForward<T>& call, unsigned grid, const BlockSizes& blocks, cudaStream_t stream) {
  static_assert(sizeof(call) <= 4096, "parameters of a kernel");
  if (grid == 0) return;
  const size_t bytes = pool_shared_bytes<T>(blocks.pool, call.tables.bins[1]);
  RAKD_LAUNCH((roi_align_forward<T, kLoss>), dim3(grid), dim3(blocks.pool), bytes, stream, call);
}

// Tiles of so many channels, rows and columns, for all images.
template <class T>
int64_t tile_count(const Tables<T>& tables, const Level& level, int side, int64_t channels, int64_t rows,
                   int64_t columns) {
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const AxisLayout* axis = level.axis[side];
  return tables.images * parts(level.channels, channels) * parts(axis[0].size, rows) * parts(axis[1].size, columns);
}

// Fills call.first_tile, writes the gradients that have memory, and adds the losses where call.sum has a total. E: see
// the kernel.
template <class T, class E>
void launch_backward(RoiAlignBackward<T> call, const BlockSizes& blocks, cudaStream_t stream) {
  static_assert(sizeof(call) <= 4096, "parameters of a kernel");
  const Tables<T>& tables = call.tables;
  int64_t tiles = 0;
  for (int map = 0; map < 2 * tables.levels; ++map) {
    const int side = map / tables.levels, l = map % tables.levels;
    const Level& level = tables.level[l];
    const auto has = [&](int of) { return call.gradient[of].level[l].data != nullptr; };
    const bool wanted = level.sides == 1 ? side == 0 && (has(0) || has(1)) : has(side);
    if (wanted) tiles += tile_count(tables, level, side, kChannelBlock, blocks.backward / 32, kTileColumns);
    require(tiles <= kMaxBlocks, "maps: too many images, channels, rows and columns for one call");
    call.first_tile[map + 1] = static_cast<int32_t>(tiles);
  }
  const int64_t grid = tiles + (call.sum.total ? 1 : 0);
  if (grid == 0) return;
  RAKD_LAUNCH((roi_align_backward<T, E>), dim3(static_cast<unsigned>(grid)), dim3(blocks.backward),
              backward_shared_bytes<T>(blocks.backward), stream, call);
}

// Memory: lay_out(f) calls f(memory), as often as it needs, and memory.take<U>(count) gives arrays of the workspace.
template <class T, class Memory>
void align(Memory& memory, const Problem& problem, const Maps& maps, void* output, const BlockSizes& blocks,
           cudaStream_t stream) {
  TablePlan<T> plan(problem, maps, nullptr);
  if (problem.boxes == 0) return;
  memory.lay_out([&](auto& arena) { plan.place(arena); });
  plan.launch(blocks, stream);
  RoiAlignForward<T> forward{};
  forward.tables = plan.tables;
  forward.map[0] = pyramid(maps);
  forward.output = output;
  const unsigned grid = choose_blocks<false>(forward);
  launch_forward<false>(forward, grid, blocks, stream);
}

// output_gradient: of the gradients' element type, which is one for all levels.
template <class Memory>
void align_backward(Memory& memory, const Problem& problem, const void* output_gradient, const Maps& gradients,
                    const BlockSizes& blocks, cudaStream_t stream) {
  with_element_type<double>(gradients[0].type, [&](auto element) {
    typedef decltype(element) E;
    typedef decltype(to_accum(element)) T;
    TablePlan<T> plan(problem, gradients, nullptr);
    memory.lay_out([&](auto& arena) { plan.place(arena); });
    plan.launch(blocks, stream);
    RoiAlignBackward<T> backward{};
    backward.tables = plan.tables;
    backward.gradient[0] = pyramid(gradients);
    backward.output_gradient = output_gradient;
    launch_backward<T, E>(backward, blocks, stream);
  });
}

// One call of the loss.
struct Distillation {
  Problem problem;
  Maps map[2], gradient[2];  // apprentice, expert; gradients that are not wanted are empty
  Numbers factor;            // of all weights: [K], or one number (stride 0), or not given
  void* losses = nullptr;    // out [K]; only without gradients
  void* total = nullptr;     // out [1]; both of the accumulation type
};

// The loss, with the gradients that are wanted.
template <class T, class Memory>
void distill(Memory& memory, const Distillation& call, const BlockSizes& blocks, cudaStream_t stream) {
  const bool gradients = !call.gradient[0].empty() || !call.gradient[1].empty();
  TablePlan<T> plan(call.problem, call.map[0], &call.map[1]);
  plan.build.factor = call.factor;
  RoiAlignForward<T> forward{};
  forward.tables = plan.tables;
  const unsigned grid = choose_blocks<true>(forward);
  memory.lay_out([&](auto& arena) {
    plan.place(arena);
    forward.partial = arena.template take<double>(grid);
    if (gradients) forward.pooled = arena.template take<T>(plan.pooled);
  });
  forward.tables = plan.tables;  // with their memory
  for (int side = 0; side < 2; ++side) forward.map[side] = pyramid(call.map[side]);
  plan.launch(blocks, stream);
  launch_forward<true>(forward, grid, blocks, stream);
  RoiAlignBackward<T> backward{};  // adds the losses even where no gradient is wanted
  backward.tables = plan.tables;
  for (int side = 0; side < 2; ++side) backward.gradient[side] = pyramid(call.gradient[side]);
  backward.pooled = forward.pooled;
  backward.sum = {forward.partial, forward.group, static_cast<T*>(call.losses), static_cast<T*>(call.total)};
  launch_backward<T, void>(backward, blocks, stream);
}

// Scales call.data[0] to call.data[arrays - 1], whose types and counts are there.
template <class T>
void launch_scale(const ScaleGradients<T>& call, int arrays, cudaStream_t stream) {
  int64_t most = 0;  // blocks of the largest array
  for (int i = 0; i < arrays; ++i) {
    const int64_t of_block = kScaleThreads * (kVectorBytes / element_bytes(call.type[i]));
    most = std::max(most, (call.count[i] + of_block - 1) / of_block);
  }
  if (most == 0) return;
  const dim3 grid(static_cast<unsigned>(std::min(most, kScaleBlocks)), static_cast<unsigned>(arrays));
  RAKD_LAUNCH((scale_gradients<T>), grid, dim3(kScaleThreads), 0, stream, call);
}

// Calls f(call, boxes) for each launch, whose parameters hold up to kMaxLists lists.
template <class F>
void for_each_launch(const Preparation& preparation, const BoxLists& boxes, const F& f) {
  PrepareBoxes call{};
  call.preparation = preparation;
  call.boxes = boxes.total;
  const size_t total = boxes.list.size();
  for (size_t first = 0; first < total; first += kMaxLists) {
    const size_t lists = std::min<size_t>(total - first, kMaxLists);
    call.lists = boxes.whole ? 0 : static_cast<int32_t>(lists);
    call.first_image = static_cast<int32_t>(first);
    if (first > 0) call.first_box[0] = call.first_box[kMaxLists];
    for (size_t i = 0; i < lists; ++i) {
      call.list[i] = boxes.list[first + i];
      call.first_box[i + 1] = call.first_box[i] + boxes.count[first + i];
    }
    f(call, call.first_box[lists] - call.first_box[0]);
  }
}

inline dim3 prepare_grid(int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kPrepareThreads - 1) / kPrepareThreads));
}

// rows, index: see PrepareBoxes.
inline void launch_prepare(const Preparation& preparation, const BoxLists& boxes, double* rows, int32_t* index,
                           cudaStream_t stream) {
  for_each_launch(preparation, boxes, [&](PrepareBoxes& call, int64_t count) {
    call.rows = rows;
    call.index = index;
    // Ranges of images have threads of their own.
    const int64_t threads = boxes.whole ? count + preparation.images + 1 : std::max<int64_t>(count, call.lists + 1);
    RAKD_LAUNCH(prepare_boxes, prepare_grid(threads), dim3(kPrepareThreads), kPrepareThreads * sizeof(int32_t), stream,
                call);
  });
}

template <class T>
void launch_level_weights(const Preparation& preparation, const BoxLists& boxes, T* weights, cudaStream_t stream) {
  for_each_launch(preparation, boxes, [&](const PrepareBoxes& call, int64_t count) {
    if (count == 0) return;
    RAKD_LAUNCH((box_level_weights<T>), prepare_grid(count), dim3(kPrepareThreads), 0, stream, call, weights);
  });
}

}  // namespace gpu
}  // namespace rakd
