// Runs the kernels of csrc/cuda on the CPU; see kernels.h. The workspace is poisoned and guarded.
#include "kernels.h"

#include <memory>

#include "cuda/launch_gram.h"
#include "guards.h"

namespace real {
namespace {

using namespace rakd::gpu;

// Workspace arrays of one call. What no kernel wrote reads as NaN or -1.
class Workspace {
 public:
  template <class U>
  U* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(U);
    arrays_.push_back(std::make_unique<emulator::Guarded>(bytes, 512, 0));
    return reinterpret_cast<U*>(arrays_.back()->data());
  }
  void check() {
    for (const auto& array : arrays_) {
      if (const char* where = array->damage()) throw emulator::Error(std::string("write ") + where + " a workspace");
    }
  }

 private:
  std::vector<std::unique_ptr<emulator::Guarded>> arrays_;
};

template <class E>
Pyramid<E> pyramid(const std::vector<Map>& maps) {
  Pyramid<E> result{};
  for (size_t l = 0; l < maps.size(); ++l) {
    result.level[l].data = static_cast<E*>(maps[l].data);
    for (int i = 0; i < 4; ++i) result.level[l].stride[i] = maps[l].stride[i];
  }
  return result;
}

BlockSizes block_sizes(const Problem& problem) {
  return BlockSizes{problem.threads[0], problem.threads[1], problem.threads[2], problem.threads[3], problem.threads[4]};
}

template <class T>
Tables<T> describe(const Problem& problem, const std::vector<Map>& maps, const std::vector<Map>* other, double factor) {
  Tables<T> tables{};
  tables.boxes = problem.boxes;
  tables.levels = static_cast<int32_t>(maps.size());
  tables.sides = other ? 2 : 1;
  tables.images = static_cast<int32_t>(problem.images);
  tables.sampling_ratio = static_cast<int32_t>(problem.sampling_ratio);
  tables.rule = rakd::LevelRule{static_cast<rakd::Assignment>(problem.assignment), problem.sigma,
                                problem.canonical_size, problem.canonical_level};
  tables.factor = factor;
  for (int axis = 0; axis < 2; ++axis) tables.bins[axis] = static_cast<int32_t>(problem.bins[axis]);
  for (int level = 0; level < tables.levels; ++level) {
    tables.level_of[level] = std::log2(problem.strides[level]);
    for (int side = 0; side < tables.sides; ++side) {
      tables.stride[side][level] = (side == 0 ? problem.strides : problem.expert_strides)[level];
      for (int axis = 0; axis < 2; ++axis) {
        tables.size[side][level][axis] = static_cast<int32_t>((side == 0 ? maps : *other)[level].size[axis]);
      }
    }
  }
  tables.rows = problem.rows;
  tables.coefficients = problem.coefficients;
  return tables;
}

template <class T>
void allocate(Tables<T>& tables, const Problem& problem, Workspace& workspace, Keep keep, bool all_levels) {
  const WorkspaceSizes sizes = plan_workspace(tables, keep, all_levels, block_sizes(problem));
  if (sizes.ints > 0) tables.ints = workspace.take<int32_t>(sizes.ints);
  if (sizes.weights > 0) tables.weights = workspace.take<T>(sizes.weights);
  if (sizes.feeds > 0) tables.feeds = workspace.take<Feed<T>>(sizes.feeds);
  if (sizes.extents > 0) tables.extents = workspace.take<int32_t>(sizes.extents);
  if (sizes.scales > 0) tables.scales = workspace.take<double>(sizes.scales);
}

}  // namespace

template <class E>
bool run_distill(const Problem& problem, const std::vector<Map>& apprentice, const std::vector<Map>& expert,
                 const std::vector<Map>& apprentice_gradient, const std::vector<Map>& expert_gradient, double* losses,
                 double* total) {
  typedef typename Accumulator<E>::type T;
  const BlockSizes blocks = block_sizes(problem);
  bool shared = problem.strides == problem.expert_strides;
  for (size_t l = 0; l < apprentice.size(); ++l) {
    for (int axis = 0; axis < 2; ++axis) shared = shared && apprentice[l].size[axis] == expert[l].size[axis];
  }
  Workspace workspace;
  const int64_t bins = problem.bins[0] * problem.bins[1];
  const double factor = 1.0 / static_cast<double>(problem.channels * bins);
  const bool gradients = !apprentice_gradient.empty() || !expert_gradient.empty();
  Tables<T> tables = describe<T>(problem, apprentice, shared ? nullptr : &expert, factor);
  if (gradients && shared) {
    GramTables<T> gram{};
    const GramSizes sizes = plan_gram(gram, tables);
    if (choose_gram(static_cast<Form>(problem.form), gram, sizes, bins, problem.channels, blocks)) {
      allocate(tables, problem, workspace, Keep::kExtents, false);
      gram.extents = tables.extents;
      gram.scales = tables.scales;
      gram.ints = workspace.take<int32_t>(sizes.ints);
      gram.values = workspace.take<T>(sizes.values);
      GramGradient<E> call{};
      call.tables = gram;
      call.map[0] = pyramid<const E>(apprentice);
      call.map[1] = pyramid<const E>(expert);
      call.gradient[0] = pyramid<E>(apprentice_gradient);
      call.gradient[1] = pyramid<E>(expert_gradient);
      call.channels = static_cast<int32_t>(problem.channels);
      call.partial = workspace.take<double>(gram_blocks(gram, problem.channels, blocks));
      call.finished = workspace.take<int32_t>(1);
      call.total = total;
      launch_make_gram(tables, gram, call.finished, blocks, nullptr);
      launch_gram_gradient(call, blocks, nullptr);
      workspace.check();
      return true;
    }
  }
  allocate(tables, problem, workspace, gradients ? Keep::kForGradients : Keep::kNone, false);
  DistillPool<E> pool{};
  pool.tables = tables;
  const int64_t entries = problem.boxes * tables.levels;
  const Division division = divide(tables, entries, problem.channels);
  pool.map[0] = pyramid<const E>(apprentice);
  pool.map[1] = pyramid<const E>(expert);
  pool.channels = static_cast<int32_t>(problem.channels);
  pool.partial = workspace.take<double>(entries * division.groups);
  if (gradients) pool.pooled = workspace.take<T>(entries * slabs_of(problem.channels) * kSlab * bins);
  if (entries > 0) launch_distill_pool(pool, division, blocks, nullptr);
  const SumLosses<double> sum{pool.partial, problem.boxes, tables.levels * division.groups, losses, total};
  if (gradients) {
    Spread<E> spread{};
    spread.tables = tables;
    spread.gradient[0] = pyramid<E>(apprentice_gradient);
    spread.gradient[1] = pyramid<E>(expert_gradient);
    spread.channels = pool.channels;
    spread.pooled = pool.pooled;
    spread.sum = sum;
    launch_spread(spread, blocks, nullptr);
  } else {
    launch_sum_losses(sum, blocks, nullptr);
  }
  workspace.check();
  return false;
}

template <class E>
void run_align(const Problem& problem, const std::vector<Map>& features, E* output) {
  typedef typename Accumulator<E>::type T;
  Workspace workspace;
  AlignPool<E> pool{};
  pool.tables = describe<T>(problem, features, nullptr, 1.0);
  allocate(pool.tables, problem, workspace, Keep::kNone, true);
  pool.map = pyramid<const E>(features);
  pool.channels = static_cast<int32_t>(problem.channels);
  pool.output = output;
  if (problem.boxes > 0) launch_align_pool(pool, block_sizes(problem), nullptr);
  workspace.check();
}

template <class E>
void run_align_backward(const Problem& problem, const E* output_gradient, const std::vector<Map>& gradients) {
  typedef typename Accumulator<E>::type T;
  Workspace workspace;
  Spread<E> spread{};
  spread.tables = describe<T>(problem, gradients, nullptr, 1.0);
  allocate(spread.tables, problem, workspace, Keep::kForGradients, false);
  if (problem.boxes > 0) launch_tables(spread.tables, block_sizes(problem), nullptr);
  spread.gradient[0] = pyramid<E>(gradients);
  spread.channels = static_cast<int32_t>(problem.channels);
  spread.output_gradient = output_gradient;
  launch_spread(spread, block_sizes(problem), nullptr);
  workspace.check();
}

#define INSTANTIATE(E)                                                                              \
  template bool run_distill<E>(const Problem&, const std::vector<Map>&, const std::vector<Map>&,    \
                               const std::vector<Map>&, const std::vector<Map>&, double*, double*); \
  template void run_align<E>(const Problem&, const std::vector<Map>&, E*);                          \
  template void run_align_backward<E>(const Problem&, const E*, const std::vector<Map>&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace real
