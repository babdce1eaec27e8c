// Vectors, register transposes and half-precision conversions of one instruction set. Included only by
// kernels.cpp, inside its instruction set's namespace, with RAKD_VECTOR_BYTES set by the compiler's flags.
#pragma once

// Before loops over a register tile: it stays in registers only where they are unrolled early.
#if defined(__clang__)
#define RAKD_UNROLL _Pragma("unroll")
#else
#define RAKD_UNROLL _Pragma("GCC unroll 16")
#endif

// GCC and Clang vector extensions: arithmetic on them is element-wise and needs no intrinsics.
template <class T, int Lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
  // For loads and stores of unaligned memory that other types may alias.
  typedef T unaligned __attribute__((vector_size(Lanes * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// W values of type T, held in as many registers as the instruction set needs.
template <class T, int W>
struct Block {
  static constexpr int kNative = RAKD_VECTOR_BYTES / int(sizeof(T));
  static constexpr int kLanes = W < kNative ? W : kNative;
  static constexpr int kCount = W / kLanes;
  typedef typename VectorOf<T, kLanes>::type Vector;
  typedef typename VectorOf<T, kLanes>::unaligned Memory;
  Vector v[kCount];

  static inline Block zero() {
    Block b;
    for (int i = 0; i < kCount; ++i) b.v[i] = Vector{};
    return b;
  }
  static inline Block load(const T* p) {
    Block b;
    for (int i = 0; i < kCount; ++i) b.v[i] = *reinterpret_cast<const Memory*>(p + i * kLanes);
    return b;
  }
  inline void store(T* p) const {
    for (int i = 0; i < kCount; ++i) *reinterpret_cast<Memory*>(p + i * kLanes) = v[i];
  }
  inline void add_product(T weight, const T* p) {
    for (int i = 0; i < kCount; ++i) v[i] += weight * *reinterpret_cast<const Memory*>(p + i * kLanes);
  }
  inline void add_scaled(T weight, const Block& b) {
    for (int i = 0; i < kCount; ++i) v[i] += weight * b.v[i];
  }
  inline Block scaled(T weight) const {
    Block b;
    for (int i = 0; i < kCount; ++i) b.v[i] = weight * v[i];
    return b;
  }
  inline void add_product(const Block& a, const Block& b) {
    for (int i = 0; i < kCount; ++i) v[i] += a.v[i] * b.v[i];
  }
  inline double sum() const {
    double total = 0.0;
    for (int i = 0; i < kCount; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) total += double(v[i][lane]);
    }
    return total;
  }
};

// Half types are loaded and stored as bits: no library type, the same rounding everywhere. (gather_scatter.h converts
// float16 in vectors where the processor does; only the bits of a NaN may differ.)
struct HalfBits {
  uint16_t bits;
};
struct BFloat16Bits {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// To the type that is computed in, and from it.
template <class T>
inline T to_accum(float value) {
  return value;
}
template <class T>
inline T to_accum(double value) {
  return value;
}
template <class T>
inline T to_accum(BFloat16Bits value) {
  return as_float(uint32_t(value.bits) << 16);
}
template <class T>
inline T to_accum(HalfBits value) {
  // Exponent and fraction move into float's places; the product rescales normal and subnormal numbers alike.
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const float scaled = as_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaN
  return as_float(sign | ((value.bits & 0x7c00u) == 0x7c00u ? special : as_bits(scaled)));
}

inline void from_accum(float value, float* out) { *out = value; }
inline void from_accum(double value, double* out) { *out = value; }
inline void from_accum(float value, BFloat16Bits* out) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = uint16_t(nan ? ((bits >> 16) | 0x40u) : rounded);
}
inline void from_accum(float value, HalfBits* out) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 aligns the fraction so that the adder rounds to nearest even.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t rebiased = magnitude - (112u << 23);
  const uint32_t normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  if (magnitude >= 0x477ff000u) result = 0x7c00u;  // rounds to infinity
  if (magnitude > 0x7f800000u) result = 0x7e00u;   // NaN
  out->bits = uint16_t(sign | result);
}
// By way of float, as torch does it.
template <class E>
inline void from_accum(double value, E* out) {
  from_accum(float(value), out);
}

// In-place transpose of a square tile held as `N` vectors: log2(N) rounds of exchanges between rows i and i + D.
template <class T, int N>
struct Tile {
  typedef typename VectorOf<T, N>::type Vector;
  Vector row[N];

  inline void transpose() { exchange<N / 2>(); }

 private:
#if defined(__clang__)
  template <int D, int... I>
  static inline Vector pick(Vector a, Vector b, bool high, std::integer_sequence<int, I...>) {
    return high ? __builtin_shufflevector(a, b, ((I & D) ? N + I : I + D)...)
                : __builtin_shufflevector(a, b, ((I & D) ? N + I - D : I)...);
  }
#else
  template <int D, int... I>
  static inline Vector pick(Vector a, Vector b, bool high, std::integer_sequence<int, I...>) {
    typedef typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type Index;
    typedef typename VectorOf<Index, N>::type Mask;
    const Mask low_mask = {Index((I & D) ? N + I - D : I)...};
    const Mask high_mask = {Index((I & D) ? N + I : I + D)...};
    return high ? __builtin_shuffle(a, b, high_mask) : __builtin_shuffle(a, b, low_mask);
  }
#endif
  template <int D>
  inline void exchange() {
    RAKD_UNROLL
    for (int i = 0; i < N; ++i) {
      if (i & D) continue;
      const Vector a = row[i], b = row[i + D];
      row[i] = pick<D>(a, b, false, std::make_integer_sequence<int, N>{});
      row[i + D] = pick<D>(a, b, true, std::make_integer_sequence<int, N>{});
    }
    if constexpr (D > 1) exchange<D / 2>();
  }
};
