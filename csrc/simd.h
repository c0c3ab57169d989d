// Eight fp32 lanes in the compilers' portable vector extension, with loads and stores for every input dtype.
//
// FASTMTL_CLONES compiles a function for several instruction sets and picks one when the library is loaded, so that a
// wheel built anywhere is fast everywhere. What such a function calls must be inlined into it to be compiled alike.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define FASTMTL_INLINE inline __attribute__((always_inline))

// glibc's ifunc resolves the clones; "avx2" rather than an -march level, which older compilers compare by CPU brand.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__)
#define FASTMTL_CLONES __attribute__((target_clones("default", "avx2")))
#else
#define FASTMTL_CLONES
#endif

namespace fastmtl {

constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(32)));
typedef uint32_t LaneBits __attribute__((vector_size(32)));
typedef int32_t LaneMask __attribute__((vector_size(32)));
typedef uint16_t HalfBits __attribute__((vector_size(16)));

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

FASTMTL_INLINE LaneBits widen(const void* ptr) {
  HalfBits bits;
  std::memcpy(&bits, ptr, sizeof(bits));
  return __builtin_convertvector(bits, LaneBits);
}

FASTMTL_INLINE void load(const float* ptr, Lanes& lanes) { std::memcpy(&lanes, ptr, sizeof(lanes)); }

FASTMTL_INLINE void load(const BFloat16* ptr, Lanes& lanes) { lanes = (Lanes)(widen(ptr) << 16); }

FASTMTL_INLINE void load(const Half* ptr, Lanes& lanes) {
  const LaneBits half = widen(ptr);
  const LaneBits magnitude = (half & 0x7fff) << 13;
  // The exponent is re-biased by a multiplication, which also normalises subnormal halves.
  const LaneBits finite = (LaneBits)((Lanes)magnitude * 0x1p112f);
  const LaneBits special = (LaneBits)((half & 0x7c00) == 0x7c00);
  lanes = (Lanes)((special & (magnitude | 0x7f800000)) | (~special & finite) | ((half & 0x8000) << 16));
}

FASTMTL_INLINE void store(Lanes lanes, float* ptr) { std::memcpy(ptr, &lanes, sizeof(lanes)); }

FASTMTL_INLINE void store(Lanes lanes, BFloat16* ptr) {
  const LaneBits bits = (LaneBits)lanes;
  const LaneBits is_nan = (LaneBits)(lanes != lanes);
  const LaneBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const HalfBits narrow = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), HalfBits);
  std::memcpy(ptr, &narrow, sizeof(narrow));
}

FASTMTL_INLINE void store(Lanes lanes, Half* ptr) {
  for (int64_t lane = 0; lane < kLanes; ++lane) ptr[lane] = static_cast<Half>(lanes[lane]);
}

// The last count < kLanes elements, the other lanes zero.
template <typename scalar_t>
FASTMTL_INLINE void load_tail(const scalar_t* ptr, int64_t count, Lanes& lanes) {
  scalar_t padded[kLanes] = {};
  std::memcpy(padded, ptr, count * sizeof(scalar_t));
  load(padded, lanes);
}

template <typename scalar_t>
FASTMTL_INLINE void store_tail(Lanes lanes, scalar_t* ptr, int64_t count) {
  scalar_t padded[kLanes];
  store(lanes, padded);
  std::memcpy(ptr, padded, count * sizeof(scalar_t));
}

}  // namespace fastmtl
