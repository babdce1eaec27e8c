// The Gram operator (gram_operator.h) applied to scratch [cell][W channels]. Included only by kernels.cpp, inside its
// instruction set's namespace.
//
// Neighbouring cells are worked on together, so that each value that is loaded serves all their windows; their sums
// stay in registers.
#pragma once

#include "simd.h"

// sum[i] += Σ_dx weight(i, dx) value[i + dx] for N neighbouring cells and |dx| <= Radius. A weight lies with the left
// one of its two cells.
template <class T, int W, int N, int Radius>
inline void add_row(const T* value, const T* weight, Block<T, W> (&sum)[N]) {
  constexpr int kHalf = GramOperator<T>::kHalf;
  // Hides the pointers from the compiler, which would hoist the addresses that the radii share and run out of
  // registers.
  __asm__("" : "+r"(value), "+r"(weight));
  RAKD_UNROLL
  for (int at = -Radius; at < N + Radius; ++at) {
    const auto here = Block<T, W>::load(value + at * W);
    RAKD_UNROLL
    for (int i = 0; i < N; ++i) {
      const int dx = at - i;
      if (dx < -Radius || dx > Radius) continue;
      sum[i].add_scaled(weight[dx < 0 ? at * kHalf - dx : i * kHalf + dx], here);
    }
  }
}

// out[i] = the operator's row of scratch cell u + i, times values. Not inlined, as it is the same code whatever
// becomes of the result.
template <class T, int W, int N>
__attribute__((noinline)) void apply_tile(const GramOperator<T>& gram, const GramRun& run, int64_t u, const T* values,
                                          T* out) {
  Block<T, W> sum[N];
  for (int i = 0; i < N; ++i) sum[i] = Block<T, W>::zero();
  for (const GramRow *row = gram.rows + run.row_begin, *last = gram.rows + run.row_end; row != last; ++row) {
    const T* value = values + (u + row->shift) * W;
    const T* weight = gram.weight + row->weight + u * GramOperator<T>::kHalf;
    switch (row->radius) {
      case 0:
        add_row<T, W, N, 0>(value, weight, sum);
        break;
      case 1:
        add_row<T, W, N, 1>(value, weight, sum);
        break;
      case 2:
        add_row<T, W, N, 2>(value, weight, sum);
        break;
      case 3:
        add_row<T, W, N, 3>(value, weight, sum);
        break;
      default:
        add_row<T, W, N, 4>(value, weight, sum);
    }
  }
  for (int i = 0; i < N; ++i) sum[i].store(out + i * W);
}

// gradient = operator * values for all cells of the plan; returns ⟨values, gradient⟩. put(run, u, block) stores the
// gradient of scratch cell u, W values.
template <class T, int W, class Put>
inline double apply_operator(const GramOperator<T>& gram, const T* values, const Put& put) {
  typedef Block<T, W> B;
  constexpr int N = B::kCount < 2 ? 4 : B::kCount < 8 ? 8 / B::kCount : 1;  // sums of about eight registers
  double total = 0.0;
  T out[N * W];
  for (int64_t n = 0; n < gram.run_count; ++n) {
    const GramRun& run = gram.runs[n];
    const int64_t end = run.first + run.count;
    B product = B::zero();
    const auto take = [&](int64_t u, const T* from) {
      put(run, u, from);
      product.add_product(B::load(from), B::load(values + u * W));
    };
    int64_t done = run.first;
    if (run.count >= N) {
      while (done < end) {
        // The last tile may repeat cells of the one before.
        const int64_t first = done + N <= end ? done : end - N;
        apply_tile<T, W, N>(gram, run, first, values, out);
        for (; done < first + N; ++done) take(done, out + (done - first) * W);
      }
    }
    for (; done < end; ++done) {
      apply_tile<T, W, 1>(gram, run, done, values, out);
      take(done, out);
    }
    total += product.sum();
  }
  return total;
}
