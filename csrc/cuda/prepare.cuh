// Preparation of boxes on the GPU: one launch turns boxes, box weights and level weights as the caller has them into
// the rows of ../prepare.h, and sorts box numbers by image. A box that is wrong contributes zero; its values are not
// looked at on the host, which would wait for the device.
#pragma once

#include "elements.cuh"

namespace rakd {
namespace gpu {

constexpr int kMaxLists = 64;  // of boxes in one launch, as they fit a kernel's parameters
constexpr int kPrepareThreads = 256;

struct PrepareBoxes {
  Preparation preparation;
  int64_t boxes;                     // K, of all launches of the call
  int32_t lists;                     // of this launch; 0: all boxes are one [K, 5], in list[0]
  int32_t first_image;               // that of the first list
  Numbers list[kMaxLists];           // [K_b, 4] each
  int64_t first_box[kMaxLists + 1];  // of each list; then the end
  double* rows;                      // out [K, 5 + levels]
  int32_t* index;                    // out [images + 1 + K]: ranges of images, then box numbers sorted by image
};

// Reads box k of the call as (image, x1, y1, x2, y2).
__device__ __forceinline__ void read_box(const PrepareBoxes& call, int64_t k, double* box) {
  if (call.lists == 0) {
    for (int i = 0; i < 5; ++i) box[i] = call.list[0].at(k, i);
    return;
  }
  int list = 0;
  while (k >= call.first_box[list + 1]) ++list;
  box[0] = static_cast<double>(call.first_image + list);
  for (int i = 0; i < 4; ++i) box[1 + i] = call.list[list].at(k - call.first_box[list], i);
}

// How many boxes come before (image, position) when boxes are sorted stably by image. Boxes of no image come last.
// Called by the whole block; images[] is shared memory of a number a thread. Each thread compares with all boxes: they
// are few, and the order then needs neither atomics nor a second launch.
__device__ __forceinline__ int32_t rank_of(const PrepareBoxes& call, int64_t image, int64_t position, int32_t* images) {
  int32_t rank = 0;
  for (int64_t begin = 0; begin < call.boxes; begin += blockDim.x) {
    const int64_t k = begin + threadIdx.x;
    __syncthreads();  // images[] is written anew
    if (k < call.boxes) {
      double box[5];
      read_box(call, k, box);
      const bool good = box_fault(call.preparation, box) == Fault::kNone;
      images[threadIdx.x] = static_cast<int32_t>(good ? box[0] : static_cast<double>(call.preparation.images));
    }
    __syncthreads();
    const int64_t left = call.boxes - begin, earlier = position - begin;
    for (int32_t j = 0; j < blockDim.x && j < left; ++j) rank += images[j] < image + (j < earlier ? 1 : 0) ? 1 : 0;
  }
  return rank;
}

// A thread a box; of one [K, 5], images + 1 further threads find the ranges. A list's boxes keep their order, those
// that are wrong included: their rows say that they count nothing.
__global__ void __launch_bounds__(kPrepareThreads) prepare_boxes(PrepareBoxes call) {
  RAKD_SHARED(shared);
  const Preparation& preparation = call.preparation;
  const int64_t number = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t k = call.first_box[0] + number, end = call.first_box[call.lists == 0 ? 1 : call.lists];
  int32_t* order = call.index + preparation.images + 1;
  double box[5];
  Fault fault = Fault::kNone;
  if (k < end) {
    read_box(call, k, box);
    fault = box_fault(preparation, box);
    prepare_row(preparation, box, k, call.rows + k * (5 + preparation.levels));
  }
  if (call.lists > 0) {
    if (k < end) order[k] = static_cast<int32_t>(k);
    if (number <= call.lists) call.index[call.first_image + number] = static_cast<int32_t>(call.first_box[number]);
    return;
  }
  const bool is_box = k < end;
  const int64_t image = !is_box ? k - end : fault == Fault::kNone ? static_cast<int64_t>(box[0]) : preparation.images;
  const int32_t rank = rank_of(call, image, is_box ? k : 0, reinterpret_cast<int32_t*>(shared));
  if (is_box) {
    order[rank] = static_cast<int32_t>(k);
  } else if (image <= preparation.images) {
    call.index[image] = rank;
  }
}

// The level weights alone, of boxes of any image; a thread a box.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads) box_level_weights(PrepareBoxes call, T* weights /* out [K, L] */) {
  const int64_t k = call.first_box[0] + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= call.first_box[call.lists == 0 ? 1 : call.lists]) return;
  double box[5], row[5 + kMaxLevels];
  read_box(call, k, box);
  prepare_row(call.preparation, box, k, row);
  const int32_t levels = call.preparation.levels;
  for (int32_t l = 0; l < levels; ++l) weights[k * levels + l] = static_cast<T>(row[5 + l]);
}

}  // namespace gpu
}  // namespace rakd
