// Walking over rows of numbers of any supported dtype by vectors of eight fp32 lanes, and functions of such vectors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "simd.h"

namespace fastmtl {

constexpr int kUnroll = 4;
constexpr int64_t kWide = kUnroll * kLanes;

// Calls fn(first column, columns, accumulator) for vectors of kLanes columns and a last shorter one; accumulators
// 0 to kUnroll - 1 take turns, so that a sum does not wait for its own last addition.
template <typename F>
FASTMTL_INLINE void for_vectors(int64_t num_columns, const F& fn) {
  int64_t c = 0;
  for (; c + kWide <= num_columns; c += kWide) {
#pragma GCC unroll 4
    for (int k = 0; k < kUnroll; ++k) fn(c + k * kLanes, kLanes, k);
  }
  for (; c + kLanes <= num_columns; c += kLanes) fn(c, kLanes, 0);
  if (c < num_columns) fn(c, num_columns - c, 0);
}

template <typename scalar_t>
FASTMTL_INLINE Lanes get(const scalar_t* ptr, int64_t count) {
  Lanes lanes;
  if (count == kLanes) load(ptr, lanes);
  else load_tail(ptr, count, lanes);
  return lanes;
}

template <typename scalar_t>
FASTMTL_INLINE void put(Lanes lanes, scalar_t* ptr, int64_t count) {
  if (count == kLanes) store(lanes, ptr);
  else store_tail(lanes, ptr, count);
}

FASTMTL_INLINE float total(const Lanes (&acc)[kUnroll]) {
  const Lanes lanes = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// 2^x for x <= 0, to 2e-7 of its value; 0 below 2^-126. The polynomial is Cephes' exp2f.
FASTMTL_INLINE Lanes exp2_lanes(Lanes x) {
  const Lanes lowest = {-126, -126, -126, -126, -126, -126, -126, -126};
  const LaneMask too_low = x < lowest;
  const Lanes clamped = too_low ? lowest : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Lanes shifted = clamped + 0x1.8p23f;
  const Lanes f = clamped - (shifted - 0x1.8p23f);
  Lanes y = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  y = y * f + 9.618437357674640e-3f;
  y = y * f + 5.550332471162809e-2f;
  y = y * f + 2.402264791363012e-1f;
  y = y * f + 6.931472028550421e-1f;
  y = y * f + 1.0f;
  return (Lanes)(((LaneBits)y + ((LaneBits)shifted << 23)) & ~(LaneBits)too_low);
}

// Calls fn with a zero of the C++ type of a dtype.
template <typename F>
void for_dtype(const char* op, torch::headeronly::ScalarType dtype, const F& fn) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return fn(float{0});
    case ScalarType::BFloat16: return fn(BFloat16(0));
    case ScalarType::Half: return fn(Half(0));
    default: STD_TORCH_CHECK(false, op, ": rows must be float32, bfloat16 or float16");
  }
}

inline void check(const char* op, const char* name, const torch::stable::Tensor& tensor,
                  torch::headeronly::ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype && tensor.numel() == numel,
                  op, ": ", name, " must be contiguous on the CPU, of ", numel, " elements and of the right dtype");
}

}  // namespace fastmtl
