// Products and transposes of small float matrices in scratch memory, for CPUs.
//
// Rows are padded to a multiple of kLanes columns. FASTMTL_FMA_CLONES defines a function twice, once for AVX2 with FMA,
// and picks one when it is called: target_clones has no clone for both.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

#if defined(__x86_64__)
#define FASTMTL_FMA_CLONES(name, parameters, arguments)                                              \
  __attribute__((target("avx2,fma"))) inline void name##_fma parameters { name##_inline arguments; } \
  inline void name##_portable parameters { name##_inline arguments; }                                \
  inline void name parameters { has_fma() ? name##_fma arguments : name##_portable arguments; }
#else
#define FASTMTL_FMA_CLONES(name, parameters, arguments) \
  inline void name parameters { name##_inline arguments; }
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define FASTMTL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTMTL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (LaneMask){__VA_ARGS__})
#endif

namespace fastmtl {

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

#if defined(__x86_64__)
inline bool has_fma() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#endif

// A [rows, depth] and how far apart its elements are, so that a transposed matrix is one too.
struct Operand {
  const float* data;
  int64_t row_stride, depth_stride;
};

template <int kRows, int kVectors>
FASTMTL_INLINE void multiply_tile(Operand a, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
                                  bool add) {
  Lanes sums[kRows][kVectors] = {};
  if (add) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) load(c + i * c_stride + j * kLanes, sums[i][j]);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Lanes row[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) load(b + k * b_stride + j * kLanes, row[j]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float factor = a.data[i * a.row_stride + k * a.depth_stride];
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) sums[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) store(sums[i][j], c + i * c_stride + j * kLanes);
}

// kRows rows at a time, then what is left of them.
template <int kRows, int kVectors>
FASTMTL_INLINE void multiply_rows(Operand a, const float* b, int64_t b_stride, int64_t rows, int64_t depth, float* c,
                                  int64_t c_stride, bool add) {
  for (; rows >= kRows; rows -= kRows) {
    multiply_tile<kRows, kVectors>(a, b, b_stride, depth, c, c_stride, add);
    a.data += kRows * a.row_stride;
    c += kRows * c_stride;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) multiply_rows<kRows - 1, kVectors>(a, b, b_stride, rows, depth, c, c_stride, add);
  }
}

FASTMTL_INLINE void multiply_inline(Operand a, const float* b, int64_t b_stride, int64_t rows, int64_t columns,
                                    int64_t depth, float* c, int64_t c_stride, bool add) {
  // Twelve sums or so fill the registers and the latency of the additions.
  for (int64_t vectors = columns / kLanes; vectors > 0;) {
    const int64_t taken = vectors == 4 ? 2 : std::min<int64_t>(vectors, 3);
    switch (taken) {
      case 1: multiply_rows<8, 1>(a, b, b_stride, rows, depth, c, c_stride, add); break;
      case 2: multiply_rows<6, 2>(a, b, b_stride, rows, depth, c, c_stride, add); break;
      default: multiply_rows<4, 3>(a, b, b_stride, rows, depth, c, c_stride, add);
    }
    b += taken * kLanes;
    c += taken * kLanes;
    vectors -= taken;
  }
}
// C = A B, or C += A B where `add`: A [rows, depth], B [depth, columns], C [rows, columns], columns a multiple of kLanes.
FASTMTL_FMA_CLONES(multiply,
                   (Operand a, const float* b, int64_t b_stride, int64_t rows, int64_t columns, int64_t depth, float* c,
                    int64_t c_stride, bool add),
                   (a, b, b_stride, rows, columns, depth, c, c_stride, add))

FASTMTL_INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Lanes a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) load(from + i * from_stride, a[i]);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = FASTMTL_SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = FASTMTL_SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = FASTMTL_SHUFFLE(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 1] = FASTMTL_SHUFFLE(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    a[i + 2] = FASTMTL_SHUFFLE(b[i + 1], b[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 3] = FASTMTL_SHUFFLE(b[i + 1], b[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(FASTMTL_SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11), to + i * to_stride);
    store(FASTMTL_SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15), to + (i + 4) * to_stride);
  }
}

FASTMTL_INLINE void transpose_inline(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                                     int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kLanes)
    for (int64_t column = 0; column < columns; column += kLanes)
      transpose_block(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
}
// to [columns, rows] = from [rows, columns] transposed, both counts multiples of kLanes.
FASTMTL_FMA_CLONES(transpose,
                   (const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                    int64_t to_stride),
                   (from, from_stride, rows, columns, to, to_stride))

}  // namespace fastmtl
