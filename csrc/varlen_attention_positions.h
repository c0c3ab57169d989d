// What position terms do to scratch memory of attention on CPUs: rotations, a bias and a window of the scores, and the
// gradient of the bias. The formulas are in fastmtl_kernels/varlen_attention/reference.py.
#pragma once

#include "rows.h"
#include "varlen_attention_rows.h"

namespace fastmtl {

FASTMTL_INLINE void rotate_inline(float* x, int64_t rows, int64_t head_dim, const float* cos, const float* sin,
                                  float direction) {
  const int64_t width = round_up(head_dim, kLanes), half = head_dim / 2;
  for (int64_t row = 0; row < rows; ++row) {
    float *first = x + row * width, *second = first + half;
    for (int64_t c = 0; c < half; c += kLanes) {
      const int64_t count = std::min(half - c, kLanes);
      const Lanes a = get(first + c, count), b = get(second + c, count);
      const Lanes cosines = get(cos + row * half + c, count), sines = get(sin + row * half + c, count) * direction;
      put(a * cosines - b * sines, first + c, count);
      put(b * cosines + a * sines, second + c, count);
    }
  }
}
// x [rows, padded head_dim] rotated in place: cos and sin [rows, head_dim / 2]; direction 1, or -1 for the way back.
FASTMTL_FMA_CLONES(rotate,
                   (float* x, int64_t rows, int64_t head_dim, const float* cos, const float* sin, float direction),
                   (x, rows, head_dim, cos, sin, direction))

FASTMTL_INLINE void add_terms_inline(float* scores, int64_t rows, int64_t count, float scale, const float* bias,
                                     int64_t low, int64_t high) {
  const int64_t width = round_up(count, kLanes);
  const LaneMask lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const Lanes minus_infinity = Lanes{} - kInfinity;
  for (int64_t row = 0; row < rows; ++row) {
    float* s = scores + row * width;
    const int32_t first = static_cast<int32_t>(low + row), last = static_cast<int32_t>(high + row);
    Lanes term = {};
    for (int64_t n = 0; n < width; n += kLanes) {
      Lanes x;
      load(s + n, x);
      if (bias) load(bias - row + n, term);
      const LaneMask column = lane + static_cast<int32_t>(n);
      store((column >= first) & (column <= last) ? x * scale + term : minus_infinity, s + n);
    }
  }
}
// scores [rows, padded count] to scale * scores + bias, -inf outside the window. Row 0 sees the columns low to high,
// each further row one column further on; bias is that of row 0 and column 0 (null for none), one less in each row.
FASTMTL_FMA_CLONES(add_terms,
                   (float* scores, int64_t rows, int64_t count, float scale, const float* bias, int64_t low,
                    int64_t high),
                   (scores, rows, count, scale, bias, low, high))

FASTMTL_INLINE void add_diagonals_inline(const float* ds, int64_t rows, int64_t count, float* sums) {
  const int64_t width = round_up(count, kLanes);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < width; n += kLanes) {
      Lanes gradient, sum;
      load(ds + row * width + n, gradient);
      load(sums - row + n, sum);
      store(sum + gradient, sums - row + n);
    }
}
// Adds ds [rows, padded count] to the gradient of the bias: sums is that of row 0 and column 0, one less in each row.
FASTMTL_FMA_CLONES(add_diagonals, (const float* ds, int64_t rows, int64_t count, float* sums),
                   (ds, rows, count, sums))

}  // namespace fastmtl
