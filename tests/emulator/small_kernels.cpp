// Small kernels of known results, for the emulator's own tests; the tests make mutants of them.

#include <stdexcept>

#include "cuda/platform.h"
#include "small_kernels.h"

namespace small {

// One sum for each block: shuffles within a warp, shared memory between warps.
template <typename T>
__global__ void block_sums(const T* __restrict__ input, T* __restrict__ sums, int count) {
  RAKD_SHARED(memory);
  T* partial = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) sum += __ldg(input + i);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (warp != 0) return;
  sum = lane < warps ? partial[lane] : T(0);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  if (lane == 0) sums[blockIdx.x] = sum;
}

// Transposes a matrix in tiles of side `tile`; any number of threads, in two dimensions.
template <typename T>
__global__ void transpose(const T* __restrict__ input, T* __restrict__ output, int rows, int columns, int tile) {
  RAKD_SHARED(memory);
  T* values = reinterpret_cast<T*>(memory);
  const int row0 = blockIdx.y * tile, column0 = blockIdx.x * tile;
  for (int r = threadIdx.y; r < tile && row0 + r < rows; r += blockDim.y) {
    for (int c = threadIdx.x; c < tile && column0 + c < columns; c += blockDim.x) {
      values[r * (tile + 1) + c] = input[int64_t{row0 + r} * columns + column0 + c];
    }
  }
  __syncthreads();
  for (int c = threadIdx.y; c < tile && column0 + c < columns; c += blockDim.y) {
    for (int r = threadIdx.x; r < tile && row0 + r < rows; r += blockDim.x) {
      output[int64_t{column0 + c} * rows + row0 + r] = values[r * (tile + 1) + c];
    }
  }
}

// Inclusive prefix sum of one int per thread, in place, by doubling steps.
__global__ void prefix_sum(int* __restrict__ values) {
  RAKD_SHARED(memory);
  int* sums = reinterpret_cast<int*>(memory);
  const int thread = threadIdx.x, count = blockDim.x;
  values += blockIdx.x * count;
  sums[thread] = values[thread];
  __syncthreads();
  for (int step = 1; step < count; step *= 2) {
    const int before = thread >= step ? sums[thread - step] : 0;
    __syncthreads();  // all have read
    sums[thread] += before;
    __syncthreads();  // all have written
  }
  values[thread] = sums[thread];
}

// The number of inputs in each of `bins` bins.
__global__ void histogram(const int* __restrict__ input, int* __restrict__ bins, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) atomicAdd(&bins[input[i]], 1);
}

// What each lane gets from each kind of shuffle: outputs of [4][threads].
template <typename T>
__global__ void shuffles(const T* __restrict__ input, T* __restrict__ output, unsigned mask, int argument, int width) {
  const int lane = threadIdx.x % 32, threads = blockDim.x;
  if ((mask >> lane & 1) == 0) return;
  const T value = input[threadIdx.x];
  output[0 * threads + threadIdx.x] = __shfl_sync(mask, value, argument, width);
  output[1 * threads + threadIdx.x] = __shfl_up_sync(mask, value, argument, width);
  output[2 * threads + threadIdx.x] = __shfl_down_sync(mask, value, argument, width);
  output[3 * threads + threadIdx.x] = __shfl_xor_sync(mask, value, argument, width);
}

// Which thread and block wrote each element: all five coordinates and sizes in one number.
__global__ void coordinates(int64_t* output) {
  const int64_t block = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t thread = (int64_t{threadIdx.z} * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  output[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      (block << 32) + threadIdx.x + (threadIdx.y << 10) + (threadIdx.z << 20);
}

__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void from_float(float value, __half* result) { *result = __float2half_rn(value); }
__device__ inline void from_float(float value, __nv_bfloat16* result) { *result = __float2bfloat16_rn(value); }

template <typename T>
__global__ void widen(const T* __restrict__ input, float* __restrict__ output, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) output[i] = to_float(input[i]);
}

template <typename T>
__global__ void narrow(const float* __restrict__ input, T* __restrict__ output, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) from_float(input[i], &output[i]);
}

// Goes wrong in the way that it is told to.
__global__ void mistaken(Mistake mistake, float* input, float* output, int shared_count) {
  RAKD_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int thread = threadIdx.x, threads = blockDim.x;
  const int64_t place = int64_t{blockIdx.x} * threads + thread;
  const bool last = place == int64_t{gridDim.x} * threads - 1;
  float value = input[place];
  switch (mistake) {
    case Mistake::none:
    case Mistake::unwritten:
      break;
    case Mistake::divergent_barrier:
      if (thread < 5) __syncthreads();
      break;
    case Mistake::two_barriers:
      if (thread < 5) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Mistake::early_return:
      if (last) return;
      __syncthreads();
      break;
    case Mistake::uninitialised:
      if (thread != 3) shared[thread] = value;
      __syncthreads();
      value = shared[thread];
      break;
    case Mistake::shared_overrun:
      shared[shared_count] = 0.0f;
      break;
    case Mistake::shared_underrun:
      shared[-1] = 0.0f;
      break;
    case Mistake::lane_missing:
      if (thread % 32 != 7) value = __shfl_xor_sync(0xFFFFFFFFu, value, 1);
      __syncthreads();
      break;
    case Mistake::lane_outside:
      value = __shfl_xor_sync(0x0000FFFFu, value, 1);
      break;
    case Mistake::masks_differ:
      value = __shfl_xor_sync(thread % 2 == 0 ? 0xFFFFFFFFu : 0xFFFFFFFEu, value, 2);
      break;
    case Mistake::shuffle_against_barrier:
      if (thread % 32 == 0) __syncthreads();
      value = __shfl_down_sync(0xFFFFFFFFu, value, 1);
      break;
    case Mistake::returned_lane:
      if (last) return;
      value = __shfl_sync(0xFFFFFFFFu, value, 0);
      break;
    case Mistake::exception:
      __syncthreads();
      if (thread == 1) throw std::out_of_range("thrown by a kernel");
      __syncthreads();
      break;
    case Mistake::global_overrun:
      if (last) output[place + 1] = 0.0f;
      break;
    case Mistake::global_underrun:
      if (place == 0) output[-1] = 0.0f;
      break;
    case Mistake::far_overrun:
      if (last) value = output[place + 500];
      break;
    case Mistake::write_input:
      input[place] = value + 1.0f;
      break;
    case Mistake::undefined:
      value = static_cast<float>(thread + 0x7FFFFFFF);
      break;
    case Mistake::block_race:
      output[thread] += 1.0f;
      return;
    case Mistake::hidden_race:
      // Every thread writes the same value, so no order of threads shows it.
      shared[0] = 1.0f;
      break;
  }
  if (mistake == Mistake::unwritten && thread == threads / 2) return;
  output[place] = value;
}

template <typename T>
void run_block_sums(const T* input, T* sums, int count, int blocks, int threads, cudaStream_t stream) {
  RAKD_LAUNCH(block_sums<T>, blocks, threads, threads / 32 * sizeof(T), stream, input, sums, count);
}

template <typename T>
void run_shuffles(const T* input, T* output, int threads, unsigned mask, int argument, int width, cudaStream_t stream) {
  RAKD_LAUNCH((shuffles<T>), 1, threads, 0, stream, input, output, mask, argument, width);
}

#define INSTANTIATE(T)                                                        \
  template void run_block_sums<T>(const T*, T*, int, int, int, cudaStream_t); \
  template void run_shuffles<T>(const T*, T*, int, unsigned, int, int, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(int32_t)
INSTANTIATE(int64_t)

template <typename T>
void run_widen(const T* input, float* output, int count, cudaStream_t stream) {
  RAKD_LAUNCH(widen<T>, (count + 255) / 256, 256, 0, stream, input, output, count);
}

template <typename T>
void run_narrow(const float* input, T* output, int count, cudaStream_t stream) {
  RAKD_LAUNCH(narrow<T>, (count + 255) / 256, 256, 0, stream, input, output, count);
}

template void run_widen<__half>(const __half*, float*, int, cudaStream_t);
template void run_widen<__nv_bfloat16>(const __nv_bfloat16*, float*, int, cudaStream_t);
template void run_narrow<__half>(const float*, __half*, int, cudaStream_t);
template void run_narrow<__nv_bfloat16>(const float*, __nv_bfloat16*, int, cudaStream_t);

void run_transpose(const float* input, float* output, int rows, int columns, int tile, dim3 block,
                   cudaStream_t stream) {
  const dim3 grid((columns + tile - 1) / tile, (rows + tile - 1) / tile);
  RAKD_LAUNCH((transpose<float>), grid, block, tile * (tile + 1) * sizeof(float), stream, input, output, rows, columns,
              tile);
}

void run_prefix_sum(int* values, int blocks, int threads, cudaStream_t stream) {
  RAKD_LAUNCH(prefix_sum, blocks, threads, threads * sizeof(int), stream, values);
}

void run_histogram(const int* input, int* bins, int count, int threads, cudaStream_t stream) {
  RAKD_LAUNCH(histogram, (count + threads - 1) / threads, threads, 0, stream, input, bins, count);
}

void run_coordinates(int64_t* output, dim3 grid, dim3 block, cudaStream_t stream) {
  RAKD_LAUNCH(coordinates, grid, block, 0, stream, output);
}

void run_mistaken(Mistake mistake, float* input, float* output, int blocks, int threads, int shared_bytes,
                  cudaStream_t stream) {
  RAKD_LAUNCH(mistaken, blocks, threads, shared_bytes, stream, mistake, input, output, shared_bytes / 4);
}

}  // namespace small
