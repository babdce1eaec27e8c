// Nontemporal stores, which bypass the caches, for memory that is not read soon: the processor then need not fetch a
// line in order to overwrite it. All is of internal linkage, as the includers are compiled for several instruction
// sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cached_memory.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace rakd {
namespace {

[[maybe_unused]] constexpr size_t kMinStream = 32768;  // shorter runs were written faster through the caches

// Must be called before another thread may read what was written.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// One line, aligned at its destination: to[i] = factor * from[i].
template <class T>
inline void stream_line(const T* from, T factor, void* to) {
  typedef T Vector __attribute__((vector_size(16)));
  typedef T Unaligned __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  constexpr int kLanes = 16 / int(sizeof(T));
  for (int i = 0; i < 4; ++i) {
    const Vector value = factor * *reinterpret_cast<const Unaligned*>(from + i * kLanes);
#if defined(__SSE2__)
    _mm_stream_ps(static_cast<float*>(to) + 4 * i, reinterpret_cast<__m128>(value));
#else
    std::memcpy(static_cast<char*>(to) + 16 * i, &value, 16);
#endif
  }
}

inline void stream_zeros(void* begin, size_t bytes) {
  auto* to = static_cast<char*>(begin);
#if defined(__SSE2__)
  if (bytes >= kMinStream) {
    const size_t head = (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine;
    std::memset(to, 0, head);
    to += head;
    bytes -= head;
    for (; bytes >= kLine; to += kLine, bytes -= kLine) {
      for (int i = 0; i < 4; ++i) _mm_stream_ps(reinterpret_cast<float*>(to) + 4 * i, _mm_setzero_ps());
    }
  }
#endif
  std::memset(to, 0, bytes);
}

}  // namespace
}  // namespace rakd
