// Moves between a map in the user's layout and dtype and the compact scratch [pixel][channel of the block] that
// the passes work on. Included only by kernels.cpp, inside its instruction set's namespace.
#pragma once

#include "simd.h"

// Square tiles for the channels-first layout, where pixels of a channel are neighbours.
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
inline typename VectorOf<float, N>::type widen_lanes(const BFloat16Bits* p) {
  typedef typename VectorOf<uint32_t, N>::type Wide;
  const typename VectorOf<uint16_t, N>::type bits =
      *reinterpret_cast<const typename VectorOf<uint16_t, N>::unaligned*>(p);
  return reinterpret_cast<typename VectorOf<float, N>::type>(__builtin_convertvector(bits, Wide) << 16);
}
template <int N>
inline void narrow_lanes(typename VectorOf<float, N>::type v, BFloat16Bits* p) {
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
  if constexpr (kSame<E, HalfBits> && N == 8) {
    return reinterpret_cast<typename VectorOf<T, N>::type>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
#endif
  if constexpr (kSame<E, BFloat16Bits>) {
    return widen_lanes<N>(p);
  } else if constexpr (sizeof(E) == sizeof(T)) {  // no conversion
    return *reinterpret_cast<const typename VectorOf<T, N>::unaligned*>(p);
  } else {
    T lanes[N];
    for (int i = 0; i < N; ++i) lanes[i] = widen<T>(p[i]);
    return *reinterpret_cast<const typename VectorOf<T, N>::unaligned*>(lanes);
  }
}

template <class E, class T, int N>
inline void store_vector(typename VectorOf<T, N>::type v, E* p) {
#if defined(__F16C__)
  if constexpr (kSame<E, HalfBits> && N == 8) {
    const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
#endif
  if constexpr (kSame<E, BFloat16Bits>) {
    narrow_lanes<N>(v, p);
  } else if constexpr (sizeof(E) == sizeof(T)) {
    *reinterpret_cast<typename VectorOf<T, N>::unaligned*>(p) = v;
  } else {
    T lanes[N];
    *reinterpret_cast<typename VectorOf<T, N>::unaligned*>(lanes) = v;
    for (int i = 0; i < N; ++i) narrow(lanes[i], p + i);
  }
}

// What gather() does with its source: out = a, out = a - b, or out -= a.
enum class Gather { kCopy, kDifference, kSubtract };

// `length` neighbouring pixels of one row into out[length][W]. Channels beyond `channels` become zero, so that
// they count nothing in any sum. With unit column stride up to `room` pixels may be read, and up to a tile's
// width may be written past `length`.
template <Gather Mode, class E, class T, int W>
inline void gather_run(const E* a, const ImageView& va, const E* b, const ImageView& vb, int64_t length, int64_t room,
                       int64_t channels, T* out) {
  constexpr int N = TileSize<T>::value;
  const auto value = [&](int64_t c, int64_t x) {
    const T first = widen<T>(a[c * va.channel_stride + x * va.column_stride]);
    if (Mode == Gather::kDifference) return first - widen<T>(b[c * vb.channel_stride + x * vb.column_stride]);
    return first;
  };

  const bool channels_inner = va.channel_stride == 1 && (Mode != Gather::kDifference || vb.channel_stride == 1);
  if (channels_inner && channels == W) {
    for (int64_t x = 0; x < length; ++x) {
      const E* pa = a + x * va.column_stride;
      const E* pb = Mode == Gather::kDifference ? b + x * vb.column_stride : nullptr;
      RAKD_UNROLL
      for (int c = 0; c < W; c += N) {
        auto cells = load_vector<E, T, N>(pa + c);
        if (Mode == Gather::kDifference) cells -= load_vector<E, T, N>(pb + c);
        typename VectorOf<T, N>::unaligned* to = reinterpret_cast<typename VectorOf<T, N>::unaligned*>(out + x * W + c);
        *to = Mode == Gather::kSubtract ? *to - cells : cells;
      }
    }
    return;
  }
  const bool pixels_inner = va.column_stride == 1 && (Mode != Gather::kDifference || vb.column_stride == 1);
  for (int64_t c0 = 0; c0 < W; c0 += N) {
    int64_t x = 0;
    if (pixels_inner && c0 + N <= channels && Mode != Gather::kSubtract) {
      for (; x < length && x + N <= room; x += N) {
        Tile<T, N> tile;
        RAKD_UNROLL
        for (int i = 0; i < N; ++i) {
          tile.row[i] = load_vector<E, T, N>(a + (c0 + i) * va.channel_stride + x);
          if (Mode == Gather::kDifference) {
            tile.row[i] -= load_vector<E, T, N>(b + (c0 + i) * vb.channel_stride + x);
          }
        }
        tile.transpose();
        RAKD_UNROLL
        for (int j = 0; j < N; ++j) store_vector<T, T, N>(tile.row[j], out + (x + j) * W + c0);
      }
    }
    for (; x < length; ++x) {
      for (int64_t c = c0; c < c0 + N; ++c) {
        const T cell = c < channels ? value(c, x) : T(0);
        T& to = out[x * W + c];
        to = Mode == Gather::kSubtract ? to - cell : cell;
      }
    }
  }
}

template <Gather Mode, class E, class T, int W>
void gather_segments(const Plan<T>& plan, const ImageView& va, const ImageView& vb, const ChannelBlock& block, T* out) {
  clear(out, kGap * W);
  for (int64_t n = 0; n < plan.segment_count; ++n) {
    const Segment& s = plan.segments[n];
    const E* a = static_cast<const E*>(va.data) + block.begin * va.channel_stride + s.row * va.row_stride +
                 s.begin * va.column_stride;
    const E* b = Mode == Gather::kDifference ? static_cast<const E*>(vb.data) + block.begin * vb.channel_stride +
                                                   s.row * vb.row_stride + s.begin * vb.column_stride
                                             : nullptr;
    gather_run<Mode, E, T, W>(a, va, b, vb, s.end - s.begin, plan.width - s.begin, block.count, out + s.offset * W);
    clear(out + (s.offset + s.end - s.begin) * W, kGap * W);
  }
}

// The touched cells of a - b (b may have no data) into out[pixels][W].
template <class E, class T, int W>
void gather(const Plan<T>& plan, const ImageView& a, const ImageView& b, const ChannelBlock& block, T* out) {
  if (!b.data) {
    gather_segments<Gather::kCopy, E, T, W>(plan, a, b, block, out);
  } else if ((a.column_stride == 1) == (b.column_stride == 1)) {
    gather_segments<Gather::kDifference, E, T, W>(plan, a, b, block, out);
  } else {  // one channels-first, one channels-last: each in its own best order
    gather_segments<Gather::kCopy, E, T, W>(plan, a, b, block, out);
    gather_segments<Gather::kSubtract, E, T, W>(plan, b, b, block, out);
  }
}

// `length` pixels of in[length][W], times sign, to a channels-first destination whose pixels are neighbours. Up to
// `room` pixels may be written: the caller overwrites what spills past `length` afterwards.
template <class E, class T, int W>
inline void scatter_run(const T* in, T sign, int64_t length, int64_t room, int64_t channels, E* out,
                        int64_t channel_stride) {
  constexpr int N = TileSize<T>::value;
  for (int64_t c0 = 0; c0 < channels; c0 += N) {
    int64_t x = 0;
    if (c0 + N <= channels) {
      for (; x < length && x + N <= room; x += N) {
        Tile<T, N> tile;
        RAKD_UNROLL
        for (int j = 0; j < N; ++j) tile.row[j] = sign * load_vector<T, T, N>(in + (x + j) * W + c0);
        tile.transpose();
        RAKD_UNROLL
        for (int i = 0; i < N; ++i) store_vector<E, T, N>(tile.row[i], out + (c0 + i) * channel_stride + x);
      }
    }
    for (; x < length; ++x) {
      for (int64_t c = c0; c < c0 + N && c < channels; ++c) {
        narrow(T(sign * in[x * W + c]), out + c * channel_stride + x);
      }
    }
  }
}

// A channels-last gradient's pixels, one channel block of each.
template <class E, class T, int W>
class PixelWriter {
 public:
  PixelWriter(const ImageView& view, const ChannelBlock& block)
      : out_(static_cast<E*>(view.data) + block.begin * view.channel_stride),
        stride_(view.column_stride),
        count_(block.count) {
    lines_ = sizeof(E) == sizeof(T) && W * sizeof(T) % kLine == 0 && count_ == W &&
             reinterpret_cast<uintptr_t>(out_) % kLine == 0 && size_t(stride_) * sizeof(E) % kLine == 0;
  }
  // The map's cell, counted row by row.
  inline void put(int64_t cell, const T* from, T sign) const {
    E* to = out_ + cell * stride_;
    if constexpr (sizeof(E) == sizeof(T) && W * sizeof(T) % kLine == 0) {
      if (lines_) {
        for (int c = 0; c < W; c += int(kLine / sizeof(T))) stream_line(from + c, sign, to + c);
        return;
      }
    }
    constexpr int N = TileSize<T>::value;
    if (count_ == W) {
      RAKD_UNROLL
      for (int c = 0; c < W; c += N) store_vector<E, T, N>(sign * load_vector<T, T, N>(from + c), to + c);
      return;
    }
    int64_t c = 0;
    for (; c + N <= count_; c += N) store_vector<E, T, N>(sign * load_vector<T, T, N>(from + c), to + c);
    for (; c < count_; ++c) narrow(T(sign * from[c]), to + c);
  }

 private:
  E* out_;
  int64_t stride_, count_;
  bool lines_;
};

// The gradient of one channel block. Channels-first: whole planes, zeros included, each element once.
// Channels-last: touched pixels only; the ops fill the others, whose channels are contiguous, in larger pieces.
template <class E, class T, int W>
void scatter(const Plan<T>& plan, const T* in, T sign, const ChannelBlock& block, const ImageView& view) {
  if (view.column_stride != 1) {
    const PixelWriter<E, T, W> writer(view, block);
    for (int64_t n = 0; n < plan.segment_count; ++n) {
      const Segment& s = plan.segments[n];
      const T* from = in + s.offset * W;
      for (int64_t x = s.begin; x < s.end; ++x, from += W) writer.put(s.row * plan.width + x, from, sign);
    }
    finish_streams();
    return;
  }
  E* out = static_cast<E*>(view.data) + block.begin * view.channel_stride;
  const int64_t plane = plan.height * plan.width;
  const auto clear = [&](int64_t from, int64_t to) {
    if (from >= to) return;
    for (int64_t c = 0; c < block.count; ++c) {
      stream_zeros(out + c * view.channel_stride + from, size_t(to - from) * sizeof(E));
    }
  };
  int64_t written = 0;
  for (int64_t n = 0; n < plan.segment_count; ++n) {
    const Segment& s = plan.segments[n];
    const int64_t begin = s.row * plan.width + s.begin;
    clear(written, begin);
    scatter_run<E, T, W>(in + s.offset * W, sign, s.end - s.begin, plane - begin, block.count, out + begin,
                         view.channel_stride);
    written = begin + s.end - s.begin;
  }
  clear(written, plane);
  finish_streams();
}
