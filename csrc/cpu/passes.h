// The arithmetic on scratch [pixel][W channels]: separable RoIAlign, its transpose, and the quadratic form that
// replaces both. Every sum runs in a fixed order. Included only by kernels.cpp, inside its instruction set's
// namespace.
#pragma once

#include "simd.h"

// pooled[q][p] = Σ_i Σ_t Ry[q][i] Rx[p][t] values[i][t]
template <class T, int W>
inline void pool(const Patch<T>& patch, const T* values, T* middle, T* pooled) {
  typedef Block<T, W> B;
  const Banded<T>&rx = patch.x.pool, &ry = patch.y.pool;
  const int64_t bins_x = rx.rows;
  for (int32_t i = 0; i < patch.y.count; ++i) {
    const T* row = values + patch.row_base[i] * W;
    for (int32_t p = 0; p < bins_x; ++p) {
      B sum = B::zero();
      const int32_t* cell = patch.x.cell + rx.begin[p];
      for (int32_t j = rx.offset[p]; j < rx.offset[p + 1]; ++j) {
        sum.add_product(rx.value[j], row + int64_t(*cell++) * W);
      }
      sum.store(middle + (i * bins_x + p) * W);
    }
  }
  for (int32_t q = 0; q < ry.rows; ++q) {
    const T* first = middle + ry.begin[q] * bins_x * W;
    for (int32_t p = 0; p < bins_x; ++p) {
      B sum = B::zero();
      const T* at = first + p * W;
      for (int32_t j = ry.offset[q]; j < ry.offset[q + 1]; ++j, at += bins_x * W) sum.add_product(ry.value[j], at);
      sum.store(pooled + (q * bins_x + p) * W);
    }
  }
}

// gradient[i][t] += factor * Σ_q Σ_p Ry[q][i] Rx[p][t] pooled[q][p]
template <class T, int W>
inline void spread(const Patch<T>& patch, T factor, const T* pooled, T* middle, T* gradient) {
  typedef Block<T, W> B;
  const Banded<T>&sx = patch.x.spread, &sy = patch.y.spread;
  const int64_t bins_x = patch.x.pool.rows;
  for (int32_t i = 0; i < patch.y.count; ++i) {
    for (int32_t p = 0; p < bins_x; ++p) {
      B sum = B::zero();
      const T* at = pooled + (sy.begin[i] * bins_x + p) * W;
      for (int32_t j = sy.offset[i]; j < sy.offset[i + 1]; ++j, at += bins_x * W) {
        sum.add_product(factor * sy.value[j], at);
      }
      sum.store(middle + p * W);
    }
    T* row = gradient + patch.row_base[i] * W;
    for (int32_t t = 0; t < patch.x.count; ++t) {
      T* to = row + int64_t(patch.x.cell[t]) * W;
      B sum = B::load(to);
      const T* at = middle + sx.begin[t] * W;
      for (int32_t j = sx.offset[t]; j < sx.offset[t + 1]; ++j, at += W) sum.add_product(sx.value[j], at);
      sum.store(to);
    }
  }
}

// gradient += Gy values Gx: the gradient of the patch's loss without its pooled output
template <class T, int W>
inline void apply_gram(const Patch<T>& patch, const T* values, T* middle, T* gradient) {
  typedef Block<T, W> B;
  const Banded<T>&gx = patch.x.gram, &gy = patch.y.gram;
  const int64_t columns = patch.x.count;
  for (int32_t i = 0; i < patch.y.count; ++i) {
    const T* row = values + patch.row_base[i] * W;
    for (int32_t t = 0; t < columns; ++t) {
      B sum = B::zero();
      const int32_t* cell = patch.x.cell + gx.begin[t];
      for (int32_t j = gx.offset[t]; j < gx.offset[t + 1]; ++j) {
        sum.add_product(gx.value[j], row + int64_t(*cell++) * W);
      }
      sum.store(middle + (i * columns + t) * W);
    }
  }
  for (int32_t i = 0; i < patch.y.count; ++i) {
    T* row = gradient + patch.row_base[i] * W;
    const T* first = middle + gy.begin[i] * columns * W;
    for (int32_t t = 0; t < columns; ++t) {
      T* to = row + int64_t(patch.x.cell[t]) * W;
      B sum = B::load(to);
      const T* at = first + t * W;
      for (int32_t j = gy.offset[i]; j < gy.offset[i + 1]; ++j, at += columns * W) sum.add_product(gy.value[j], at);
      sum.store(to);
    }
  }
}

// Σ a b over `pixels` scratch pixels; partial sums are short, so that float keeps its digits.
template <class T, int W>
inline double inner_product(const T* a, const T* b, int64_t pixels) {
  typedef Block<T, W> B;
  double total = 0.0;
  for (int64_t begin = 0; begin < pixels; begin += 64) {
    const int64_t end = begin + 64 < pixels ? begin + 64 : pixels;
    B sum = B::zero();
    for (int64_t p = begin; p < end; ++p) sum.add_product(B::load(a + p * W), B::load(b + p * W));
    total += sum.sum();
  }
  return total;
}
