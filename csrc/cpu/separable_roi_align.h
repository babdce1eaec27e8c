// The arithmetic on scratch [cell][W channels]: separable RoIAlign, its transpose, and both at once. Included only by
// kernels.cpp, inside its instruction set's namespace.
//
// A patch is worked on column of bins by column of bins: the cells that such a column weighs in each support row, then
// the rows that each bin weighs. One column's values stay in the first-level cache, its weights along x in registers.
// Every sum runs in a fixed order.
#pragma once

#include "simd.h"

// The weights of a column of bins in one row of cells, for N neighbours in the list of support cells.
template <class T, int W, int N>
struct Taps {
  T weight[N];
  int64_t at[N];

  inline Taps(const Axis<T>& x, int32_t first, int32_t cell) {
    for (int j = 0; j < N; ++j) {
      weight[j] = x.weight[first + j];
      at[j] = int64_t(x.cell[cell + j]) * W;
    }
  }
};

// sums[i] (+)= Σ_j weight[j] values[i][j], for all support rows
template <class T, int W, int N, bool Add>
inline void weigh_cells(const Patch<T>& patch, const Taps<T, W, N> taps, const T* values, T* sums) {
  typedef Block<T, W> B;
  const int64_t* base = patch.row_base;
  for (const int64_t* end = base + patch.y.count; base != end; ++base, sums += W) {
    const T* row = values + *base * W;
    B sum = Add ? B::load(sums) : B::zero();
    for (int j = 0; j < N; ++j) sum.add_product(taps.weight[j], row + taps.at[j]);
    sum.store(sums);
  }
}

// gradient[i][j] += weight[j] sums[i], for all support rows, which lie in `gradient` as `base` says
template <class T, int W, int N>
inline void cells_backward(const Patch<T>& patch, const Taps<T, W, N> taps, const T* sums, const int64_t* base,
                           T* gradient) {
  typedef Block<T, W> B;
  for (const int64_t* end = base + patch.y.count; base != end; ++base, sums += W) {
    T* row = gradient + *base * W;
    const B sum = B::load(sums);
    for (int j = 0; j < N; ++j) {
      B cell = B::load(row + taps.at[j]);
      cell.add_scaled(taps.weight[j], sum);
      cell.store(row + taps.at[j]);
    }
  }
}

// Four cells of a column of bins at a time, which is all there are at a sampling ratio of 2.
template <class T, int W, class F>
inline void for_each_taps(const Axis<T>& x, int32_t bin, const F& f) {
  int32_t first = x.offset[bin], cell = x.begin[bin];
  int32_t left = x.offset[bin + 1] - first;
  for (; left > 4; left -= 4, first += 4, cell += 4) f(Taps<T, W, 4>(x, first, cell));
  if (left == 4) f(Taps<T, W, 4>(x, first, cell));
  if (left == 3) f(Taps<T, W, 3>(x, first, cell));
  if (left == 2) f(Taps<T, W, 2>(x, first, cell));
  if (left == 1) f(Taps<T, W, 1>(x, first, cell));
}

// Column `bin` of Rx applied to all support rows: sums[i] = Σ_t Rx[bin][t] values[i][t]
template <class T, int W>
inline void pool_column(const Patch<T>& patch, int32_t bin, const T* values, T* sums) {
  if (patch.x.offset[bin] == patch.x.offset[bin + 1]) {
    clear(sums, int64_t(patch.y.count) * W);
    return;
  }
  bool add = false;
  for_each_taps<T, W>(patch.x, bin, [&](const auto& taps) {
    constexpr int N = sizeof(taps.at) / sizeof(taps.at[0]);
    add ? weigh_cells<T, W, N, true>(patch, taps, values, sums)
        : weigh_cells<T, W, N, false>(patch, taps, values, sums);
    add = true;
  });
}

// Its transpose: gradient[i][t] += Rx[bin][t] sums[i]
template <class T, int W>
inline void column_backward(const Patch<T>& patch, int32_t bin, const T* sums, const int64_t* base, T* gradient) {
  for_each_taps<T, W>(patch.x, bin, [&](const auto& taps) {
    constexpr int N = sizeof(taps.at) / sizeof(taps.at[0]);
    cells_backward<T, W, N>(patch, taps, sums, base, gradient);
  });
}

// One bin of a column: Σ_i Ry[bin][i] sums[i]
template <class T, int W>
inline Block<T, W> pool_bin(const Axis<T>& y, int32_t bin, const T* sums) {
  auto sum = Block<T, W>::zero();
  const T* row = sums + int64_t(y.begin[bin]) * W;
  for (int32_t j = y.offset[bin]; j < y.offset[bin + 1]; ++j, row += W) sum.add_product(y.weight[j], row);
  return sum;
}

// Its transpose: sums[i] (+)= Ry[bin][i] value; rows that no earlier bin touched are written, the others added to.
template <class T, int W>
inline void bin_backward(const Axis<T>& y, int32_t bin, const Block<T, W>& value, T* sums) {
  typedef Block<T, W> B;
  T* row = sums + int64_t(y.begin[bin]) * W;
  const int32_t end = y.offset[bin + 1], fresh = y.offset[bin] + y.fresh[bin] - y.begin[bin];
  int32_t j = y.offset[bin];
  for (; j < fresh && j < end; ++j, row += W) {
    B sum = B::load(row);
    sum.add_scaled(y.weight[j], value);
    sum.store(row);
  }
  for (; j < end; ++j, row += W) value.scaled(y.weight[j]).store(row);
}

// pooled[q][p] = RoIAlign of the patch
template <class T, int W>
inline void pool(const Patch<T>& patch, const T* values, T* sums, T* pooled) {
  for (int32_t p = 0; p < patch.x.bins; ++p) {
    pool_column<T, W>(patch, p, values, sums);
    for (int32_t q = 0; q < patch.y.bins; ++q) {
      pool_bin<T, W>(patch.y, q, sums).store(pooled + (int64_t(q) * patch.x.bins + p) * W);
    }
  }
}

// gradient += factor * transpose of the above
template <class T, int W>
inline void pool_backward(const Patch<T>& patch, T factor, const T* pooled, T* sums, T* gradient) {
  typedef Block<T, W> B;
  for (int32_t p = 0; p < patch.x.bins; ++p) {
    for (int32_t q = 0; q < patch.y.bins; ++q) {
      bin_backward<T, W>(patch.y, q, B::load(pooled + (int64_t(q) * patch.x.bins + p) * W).scaled(factor), sums);
    }
    column_backward<T, W>(patch, p, sums, patch.row_base, gradient);
  }
}

// Σ pooled² without storing pooled values: take_bin(q, value) gets the bins of a column, end_column(p) follows them.
template <class T, int W, class TakeBin, class EndColumn>
inline double pool_squares(const Patch<T>& patch, const T* values, T* sums, const TakeBin& take_bin,
                           const EndColumn& end_column) {
  typedef Block<T, W> B;
  double total = 0.0;
  for (int32_t p = 0; p < patch.x.bins; ++p) {
    pool_column<T, W>(patch, p, values, sums);
    B squares = B::zero();
    for (int32_t q = 0; q < patch.y.bins; ++q) {
      const B value = pool_bin<T, W>(patch.y, q, sums);
      squares.add_product(value, value);
      take_bin(q, value);
    }
    total += squares.sum();
    end_column(p);
  }
  return total;
}

// Σ pooled² alone.
template <class T, int W>
inline double pool_squares(const Patch<T>& patch, const T* values, T* sums) {
  return pool_squares<T, W>(patch, values, sums, [](int32_t, const Block<T, W>&) {}, [](int32_t) {});
}

// gradient += factor * pool_backward(pool(values)); returns Σ pooled². The patch's rows lie in `gradient` as `base`
// says.
template <class T, int W>
inline double pool_forward_backward(const Patch<T>& patch, T factor, const T* values, T* sums, T* backward_sums,
                                    const int64_t* base, T* gradient) {
  const auto take_bin = [&](int32_t q, const Block<T, W>& value) {
    bin_backward<T, W>(patch.y, q, value.scaled(factor), backward_sums);
  };
  const auto end_column = [&](int32_t p) { column_backward<T, W>(patch, p, backward_sums, base, gradient); };
  return pool_squares<T, W>(patch, values, sums, take_bin, end_column);
}

// Σ a b over `cells` scratch cells; partial sums are short, so that float keeps its digits.
template <class T, int W>
inline double inner_product(const T* a, const T* b, int64_t cells) {
  typedef Block<T, W> B;
  double total = 0.0;
  for (int64_t begin = 0; begin < cells; begin += 64) {
    const int64_t end = begin + 64 < cells ? begin + 64 : cells;
    B sum = B::zero();
    for (int64_t p = begin; p < end; ++p) sum.add_product(B::load(a + p * W), B::load(b + p * W));
    total += sum.sum();
  }
  return total;
}
