// Gathers the cells that boxes touch from a map in the user's layout and dtype into compact scratch [cell][W
// channels], and scatters gradients from there. The element type is told apart once for each run of cells, so that
// everything else is compiled for the computation's type alone. Included only by kernels.cpp, in its instruction set's
// namespace.
#pragma once

#include "simd.h"

// Square tiles for the channels-first layout, where cells of a channel are neighbours.
template <class T>
struct TileSize {
  static constexpr int kBytes = RAKD_VECTOR_BYTES < 32 ? RAKD_VECTOR_BYTES : 32;
  static constexpr int value = kBytes / int(sizeof(T));
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// bfloat16 as integers of N lanes, which compilers turn into a few instructions; lanes one by one they do not.
template <int N>
inline typename VectorOf<float, N>::type to_accum_lanes(const BFloat16Bits* p) {
  typedef typename VectorOf<uint32_t, N>::type Wide;
  const typename VectorOf<uint16_t, N>::type bits =
      *reinterpret_cast<const typename VectorOf<uint16_t, N>::unaligned*>(p);
  return reinterpret_cast<typename VectorOf<float, N>::type>(__builtin_convertvector(bits, Wide) << 16);
}
template <int N>
inline void from_accum_lanes(typename VectorOf<float, N>::type v, BFloat16Bits* p) {
  typedef typename VectorOf<uint32_t, N>::type Wide;
  typedef typename VectorOf<uint16_t, N>::type Narrow;
  const Wide bits = reinterpret_cast<Wide>(v);
  const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Wide nan = reinterpret_cast<Wide>((bits & 0x7fffffffu) > 0x7f800000u);
  const Wide chosen = (nan & ((bits >> 16) | 0x40u)) | (~nan & rounded);
  *reinterpret_cast<typename VectorOf<uint16_t, N>::unaligned*>(p) = __builtin_convertvector(chosen, Narrow);
}

template <class E, class T, int N>
inline typename VectorOf<T, N>::type load_vector(const E* p) {
#if defined(__F16C__)
  if constexpr (kSame<E, HalfBits> && kSame<T, float> && N == 8) {
    return reinterpret_cast<typename VectorOf<T, N>::type>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
#endif
  if constexpr (kSame<E, BFloat16Bits> && kSame<T, float>) {
    return to_accum_lanes<N>(p);
  } else if constexpr (kSame<E, T>) {  // no conversion
    return *reinterpret_cast<const typename VectorOf<T, N>::unaligned*>(p);
  } else {
    T lanes[N];
    for (int i = 0; i < N; ++i) lanes[i] = to_accum<T>(p[i]);
    return *reinterpret_cast<const typename VectorOf<T, N>::unaligned*>(lanes);
  }
}

template <class E, class T, int N>
inline void store_vector(typename VectorOf<T, N>::type v, E* p) {
#if defined(__F16C__)
  if constexpr (kSame<E, HalfBits> && kSame<T, float> && N == 8) {
    const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
#endif
  if constexpr (kSame<E, BFloat16Bits> && kSame<T, float>) {
    from_accum_lanes<N>(v, p);
  } else if constexpr (kSame<E, T>) {
    *reinterpret_cast<typename VectorOf<T, N>::unaligned*>(p) = v;
  } else {
    T lanes[N];
    *reinterpret_cast<typename VectorOf<T, N>::unaligned*>(lanes) = v;
    for (int i = 0; i < N; ++i) from_accum(lanes[i], p + i);
  }
}

// Calls f with a value of the element's type. Float never meets float64 maps: a call that has any computes in double.
template <class T, class F>
inline auto with_element(Number element, const F& f) {
  if (element == Number::kHalf) return f(HalfBits{});
  if (element == Number::kBFloat16) return f(BFloat16Bits{});
  if constexpr (kSame<T, double>) {
    if (element == Number::kDouble) return f(double{});
  }
  return f(float{});
}

// Neighbouring cells of one row, for the channels of a block.
struct CellRun {
  int64_t channel, channels;    // first and count
  int64_t row, column, length;  // first and count of the cells
  int64_t room;                 // cells from the first on that may be read or written, length or more
};

template <class E>
inline E* cell_pointer(const ImageView& view, const CellRun& run) {
  return static_cast<E*>(view.data) + run.channel * view.channel_stride + run.row * view.row_stride +
         run.column * view.column_stride;
}

// Modes of gather_run(): out = a, out = a - b, out -= a.
enum class Gather { kCopy, kDifference, kSubtract };

// A run of cells of a, or of a - b, into out[length][W]. Channels beyond the run's become zero, so that they count
// nothing in any sum. With unit column stride, up to a tile's width may be written past the run's length.
template <Gather Mode, class E, class T, int W>
void gather_run(const ImageView& va, const ImageView& vb, const CellRun& run, T* out) {
  constexpr int N = TileSize<T>::value;
  constexpr bool kTwo = Mode == Gather::kDifference;
  const E *a = cell_pointer<const E>(va, run), *b = kTwo ? cell_pointer<const E>(vb, run) : nullptr;
  const int64_t length = run.length, channels = run.channels;
  typedef typename VectorOf<T, N>::unaligned Memory;
  const auto put = [](const typename VectorOf<T, N>::type& cells, T* to) {
    Memory* memory = reinterpret_cast<Memory*>(to);
    *memory = Mode == Gather::kSubtract ? *memory - cells : cells;
  };

  const bool channels_inner = va.channel_stride == 1 && (!kTwo || vb.channel_stride == 1);
  if (channels_inner && channels == W) {
    for (int64_t x = 0; x < length; ++x) {
      const E* pa = a + x * va.column_stride;
      const E* pb = kTwo ? b + x * vb.column_stride : nullptr;
      RAKD_UNROLL
      for (int c = 0; c < W; c += N) {
        auto cells = load_vector<E, T, N>(pa + c);
        if (kTwo) cells -= load_vector<E, T, N>(pb + c);
        put(cells, out + x * W + c);
      }
    }
    return;
  }
  const bool pixels_inner = va.column_stride == 1 && (!kTwo || vb.column_stride == 1);
  for (int64_t c0 = 0; c0 < W; c0 += N) {
    int64_t x = 0;
    if (pixels_inner && c0 + N <= channels) {
      for (; x < length && x + N <= run.room; x += N) {
        Tile<T, N> tile;
        RAKD_UNROLL
        for (int i = 0; i < N; ++i) {
          tile.row[i] = load_vector<E, T, N>(a + (c0 + i) * va.channel_stride + x);
          if (kTwo) tile.row[i] -= load_vector<E, T, N>(b + (c0 + i) * vb.channel_stride + x);
        }
        tile.transpose();
        RAKD_UNROLL
        for (int j = 0; j < N; ++j) put(tile.row[j], out + (x + j) * W + c0);
      }
    }
    for (; x < length; ++x) {
      for (int64_t c = c0; c < c0 + N; ++c) {
        T cell = T(0);
        if (c < channels) {
          cell = to_accum<T>(a[c * va.channel_stride + x * va.column_stride]);
          if (kTwo) cell -= to_accum<T>(b[c * vb.channel_stride + x * vb.column_stride]);
        }
        T& to = out[x * W + c];
        to = Mode == Gather::kSubtract ? to - cell : cell;
      }
    }
  }
}

template <class T>
using GatherRun = void (*)(const ImageView&, const ImageView&, const CellRun&, T*);

template <Gather Mode, class T, int W>
inline GatherRun<T> gather_function(Number element) {
  return with_element<T>(element, [](auto e) -> GatherRun<T> { return gather_run<Mode, decltype(e), T, W>; });
}

// The support cells of a - b (b may have no data) into out[cells][W]. Maps of one element type and layout are read
// together; otherwise b is taken off afterwards, each map being read in its own best order.
template <class T, int W>
void gather(const Plan<T>& plan, const ImageView& a, const ImageView& b, const ChannelBlock& block, T* out) {
  const bool together = b.data && a.element == b.element && (a.column_stride == 1) == (b.column_stride == 1);
  const GatherRun<T> first = together ? gather_function<Gather::kDifference, T, W>(a.element)
                                      : gather_function<Gather::kCopy, T, W>(a.element);
  const GatherRun<T> second = b.data && !together ? gather_function<Gather::kSubtract, T, W>(b.element) : nullptr;
  clear(out, kGap * W);
  for (int64_t n = 0; n < plan.segment_count; ++n) {
    const Segment& s = plan.segments[n];
    const int64_t length = s.end - s.begin;
    const CellRun run{block.begin, block.count, s.row, s.begin, length, plan.width - s.begin};
    T* to = out + s.offset * W;
    first(a, b, run, to);
    if (second) second(b, b, run, to);
    clear(to + length * W, kGap * W);
  }
}

// in[length][W], times sign, to a channels-first destination whose cells are neighbours. Up to run.room cells may be
// written: the caller overwrites those past the run's length afterwards.
template <class E, class T, int W>
void scatter_run(const T* in, T sign, const ImageView& view, const CellRun& run) {
  constexpr int N = TileSize<T>::value;
  E* out = cell_pointer<E>(view, run);
  for (int64_t c0 = 0; c0 < run.channels; c0 += N) {
    int64_t x = 0;
    if (c0 + N <= run.channels) {
      for (; x < run.length && x + N <= run.room; x += N) {
        Tile<T, N> tile;
        RAKD_UNROLL
        for (int j = 0; j < N; ++j) tile.row[j] = sign * load_vector<T, T, N>(in + (x + j) * W + c0);
        tile.transpose();
        RAKD_UNROLL
        for (int i = 0; i < N; ++i) store_vector<E, T, N>(tile.row[i], out + (c0 + i) * view.channel_stride + x);
      }
    }
    for (; x < run.length; ++x) {
      for (int64_t c = c0; c < c0 + N && c < run.channels; ++c) {
        from_accum(T(sign * in[x * W + c]), out + c * view.channel_stride + x);
      }
    }
  }
}

template <class T, int W>
inline auto scatter_function(Number element) {
  typedef void (*ScatterRun)(const T*, T, const ImageView&, const CellRun&);
  return with_element<T>(element, [](auto e) -> ScatterRun { return scatter_run<decltype(e), T, W>; });
}

// A channels-last gradient's cells, one channel block of each.
template <class T, int W>
class CellWriter {
 public:
  CellWriter(const ImageView& view, const ChannelBlock& block) : view_(view), begin_(block.begin), count_(block.count) {
    const bool same = view.element == (kSame<T, double> ? Number::kDouble : Number::kFloat);
    lines_ = same && W * sizeof(T) % kLine == 0 && count_ == W &&
             reinterpret_cast<uintptr_t>(static_cast<T*>(view.data) + begin_) % kLine == 0 &&
             size_t(view.column_stride) * sizeof(T) % kLine == 0;
  }
  // The block's channels of the map's cell number `cell`, counted row by row.
  inline void put(int64_t cell, const T* from, T sign) const {
    const int64_t at = cell * view_.column_stride + begin_;
    if constexpr (W * sizeof(T) % kLine == 0) {
      if (lines_) {
        T* to = static_cast<T*>(view_.data) + at;
        for (int c = 0; c < W; c += int(kLine / sizeof(T))) stream_line(from + c, sign, to + c);
        return;
      }
    }
    with_element<T>(view_.element, [&](auto e) {
      typedef decltype(e) E;
      constexpr int N = TileSize<T>::value;
      E* to = static_cast<E*>(view_.data) + at;
      int64_t c = 0;
      for (; c + N <= count_; c += N) store_vector<E, T, N>(sign * load_vector<T, T, N>(from + c), to + c);
      for (; c < count_; ++c) from_accum(T(sign * from[c]), to + c);
    });
  }

 private:
  ImageView view_;
  int64_t begin_, count_;
  bool lines_;
};

inline size_t element_size(Number element) {
  return element == Number::kDouble ? 8 : element == Number::kFloat ? 4 : 2;
}

// The gradient of one channel block. Channels-first: whole planes, zeros included, each element once. Channels-last:
// the support alone; the ops clear the others, whose channels are contiguous, in larger pieces.
template <class T, int W>
void scatter(const Plan<T>& plan, const T* in, T sign, const ChannelBlock& block, const ImageView& view) {
  if (view.column_stride != 1) {
    const CellWriter<T, W> writer(view, block);
    for (int64_t n = 0; n < plan.segment_count; ++n) {
      const Segment& s = plan.segments[n];
      const T* from = in + s.offset * W;
      for (int64_t x = s.begin; x < s.end; ++x, from += W) writer.put(s.row * plan.width + x, from, sign);
    }
    finish_streams();
    return;
  }
  const auto scatter_cells = scatter_function<T, W>(view.element);
  const auto size = static_cast<int64_t>(element_size(view.element));
  char* out = static_cast<char*>(view.data) + block.begin * view.channel_stride * size;
  const int64_t plane = plan.height * plan.width;
  int64_t written = 0;
  const auto clear_until = [&](int64_t end) {
    if (written >= end) return;
    for (int64_t c = 0; c < block.count; ++c) {
      stream_zeros(out + (c * view.channel_stride + written) * size, size_t((end - written) * size));
    }
  };
  for (int64_t n = 0; n < plan.segment_count; ++n) {
    const Segment& s = plan.segments[n];
    const int64_t begin = s.row * plan.width + s.begin, length = s.end - s.begin;
    clear_until(begin);
    scatter_cells(in + s.offset * W, sign, view,
                  CellRun{block.begin, block.count, s.row, s.begin, length, plane - begin});
    written = begin + length;
  }
  clear_until(plane);
  finish_streams();
}
