// The row-wise parts of attention on CPUs: loading heads, softmax, its gradient, and which entries dropout drops.
#pragma once

#include <cmath>
#include <limits>

#include "philox.h"
#include "rows.h"
#include "small_matrix.h"

namespace fastmtl {

typedef int8_t LaneBytes __attribute__((vector_size(8)));
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One head of `rows` rows as float [padded rows, padded head_dim], times a factor; zeros in the padding.
template <typename scalar_t>
FASTMTL_INLINE void gather_inline(const scalar_t* from, int64_t stride, int64_t rows, int64_t head_dim, float factor,
                                  float* to) {
  const int64_t width = round_up(head_dim, kLanes), padded_rows = round_up(rows, kLanes);
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* columns = from + row * stride;
    // The next head's columns, which are gathered next: rows are too far apart for the hardware to see it coming.
    for (int64_t d = head_dim; d < 2 * head_dim; d += 64 / sizeof(scalar_t)) __builtin_prefetch(columns + d);
    for (int64_t d = 0; d < width; d += kLanes)
      store(get(columns + d, std::min(head_dim - d, kLanes)) * factor, to + row * width + d);
  }
  std::fill(to + rows * width, to + padded_rows * width, 0.0f);
}

// The other way: rows times a factor for each, or for all where factor_stride is 0.
template <typename scalar_t>
FASTMTL_INLINE void scatter_inline(const float* from, int64_t rows, int64_t head_dim, const float* factors,
                                   int64_t factor_stride, scalar_t* to, int64_t stride) {
  const int64_t width = round_up(head_dim, kLanes);
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = factors[row * factor_stride];
    for (int64_t d = 0; d < width; d += kLanes) {
      Lanes lanes;
      load(from + row * width + d, lanes);
      put(lanes * factor, to + row * stride + d, std::min(head_dim - d, kLanes));
    }
  }
}

#define FASTMTL_GATHER_SCATTER(scalar_t)                                                                            \
  FASTMTL_FMA_CLONES(gather,                                                                                        \
                     (const scalar_t* from, int64_t stride, int64_t rows, int64_t head_dim, float factor,           \
                      float* to),                                                                                   \
                     (from, stride, rows, head_dim, factor, to))                                                    \
  FASTMTL_FMA_CLONES(scatter,                                                                                       \
                     (const float* from, int64_t rows, int64_t head_dim, const float* factors,                      \
                      int64_t factor_stride, scalar_t* to, int64_t stride),                                         \
                     (from, rows, head_dim, factors, factor_stride, to, stride))
FASTMTL_GATHER_SCATTER(float)
FASTMTL_GATHER_SCATTER(BFloat16)
FASTMTL_GATHER_SCATTER(Half)
#undef FASTMTL_GATHER_SCATTER

FASTMTL_INLINE Lanes unless_dropped(Lanes lanes, const int8_t* dropped) {
  LaneBytes bytes;
  std::memcpy(&bytes, dropped, sizeof(bytes));
  return (Lanes)((LaneBits)lanes & ~(LaneBits)__builtin_convertvector(bytes, LaneMask));
}

// All bits in the lanes before `count`.
FASTMTL_INLINE LaneMask first_lanes(int64_t count) {
  const LaneMask lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return lane < static_cast<int32_t>(std::min(count, kLanes));
}

FASTMTL_INLINE float max_lane(Lanes lanes) {
  float peak = lanes[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) peak = lanes[lane] > peak ? lanes[lane] : peak;
  return peak;
}

FASTMTL_INLINE float add_lanes(Lanes lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// 2^(factor * (scores - top)), 0 where the row has no key. top is subtracted before anything is rounded: the row's
// largest result is exactly 1, and no compiler can fuse the product, so that forward and backward get equal bits.
FASTMTL_INLINE Lanes exp2_below(Lanes scores, float top, float factor, bool partial, LaneMask is_key) {
  const Lanes power = exp2_lanes((scores - top) * factor);
  return partial ? (is_key ? power : Lanes{}) : power;
}

FASTMTL_INLINE void softmax_inline(float* scores, int64_t rows, int64_t length, float factor, const int8_t* dropped,
                                   float* stats, int64_t stats_stride) {
  const int64_t width = round_up(length, kLanes), last = width - kLanes;
  const LaneMask is_key = first_lanes(length - last);
  const Lanes minus_infinity = Lanes{} - kInfinity;
  const float sign = factor < 0 ? -1.0f : 1.0f;
  for (int64_t row = 0; row < rows; ++row) {
    float* s = scores + row * width;
    Lanes peaks = minus_infinity, total = {};
    for (int64_t n = 0; n < width; n += kLanes) {
      Lanes x;
      load(s + n, x);
      x *= sign;
      if (n == last) x = is_key ? x : minus_infinity;
      peaks = x > peaks ? x : peaks;
    }
    const float top = sign * max_lane(peaks);
    for (int64_t n = 0; n < width; n += kLanes) {
      Lanes x;
      load(s + n, x);
      x = exp2_below(x, top, factor, n == last, is_key);
      total += x;
      store(dropped ? unless_dropped(x, dropped + row * width + n) : x, s + n);
    }
    stats[row * stats_stride] = top;
    stats[row * stats_stride + 1] = 1.0f / add_lanes(total);
  }
}
// scores [rows, padded length] to 2^(factor * (scores - top)), zeros where dropped. stats of a row: top, the score whose
// share is largest, and one over the sum before anything is dropped. dropped: null where nothing is.
FASTMTL_FMA_CLONES(softmax,
                   (float* scores, int64_t rows, int64_t length, float factor, const int8_t* dropped, float* stats,
                    int64_t stats_stride),
                   (scores, rows, length, factor, dropped, stats, stats_stride))

FASTMTL_INLINE void softmax_backward_inline(float* scores, float* dp, int64_t rows, int64_t length, float factor,
                                            const int8_t* dropped, const float* stats, int64_t stats_stride) {
  const int64_t width = round_up(length, kLanes), last = width - kLanes;
  const LaneMask is_key = first_lanes(length - last);
  for (int64_t row = 0; row < rows; ++row) {
    float *s = scores + row * width, *g = dp + row * width;
    const int8_t* bytes = dropped ? dropped + row * width : nullptr;
    const float top = stats[row * stats_stride], norm = stats[row * stats_stride + 1];
    Lanes total = {};
    for (int64_t n = 0; n < width; n += kLanes) {
      Lanes x, gradient;
      load(s + n, x);
      load(g + n, gradient);
      x = exp2_below(x, top, factor, n == last, is_key) * norm;
      if (dropped) {
        gradient = unless_dropped(gradient, bytes + n);
        store(gradient, g + n);
      }
      total += x * gradient;
      store(x, s + n);
    }
    const float delta = add_lanes(total);
    for (int64_t n = 0; n < width; n += kLanes) {
      Lanes x, gradient;
      load(s + n, x);
      load(g + n, gradient);
      store(x * (gradient - delta), g + n);
      if (dropped) store(unless_dropped(x, bytes + n), s + n);
    }
  }
}
// scores to P, zeros where dropped, and dp, the gradient of Z P, to dS; both [rows, padded length].
FASTMTL_FMA_CLONES(softmax_backward,
                   (float* scores, float* dp, int64_t rows, int64_t length, float factor, const int8_t* dropped,
                    const float* stats, int64_t stats_stride),
                   (scores, dp, rows, length, factor, dropped, stats, stats_stride))

struct Philox {
  uint64_t seed;
  int32_t threshold;
};

inline void draw_dropped_portable(Philox philox, int64_t first_row, int64_t rows, int64_t first_group, int64_t groups,
                                  uint32_t head, int8_t* dropped) {
  for (int64_t n = 0; n < rows * groups; ++n) {
    uint32_t c[4] = {static_cast<uint32_t>(first_group + n % groups), static_cast<uint32_t>(first_row + n / groups), head,
                     0};
    uint32_t key_a = static_cast<uint32_t>(philox.seed), key_b = static_cast<uint32_t>(philox.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = static_cast<uint64_t>(c[0]) * kPhiloxA, b = static_cast<uint64_t>(c[2]) * kPhiloxB;
      const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key_a, static_cast<uint32_t>(b),
                                static_cast<uint32_t>(a >> 32) ^ c[3] ^ key_b, static_cast<uint32_t>(a)};
      for (int word = 0; word < 4; ++word) c[word] = next[word];
      key_a += kWeylA;
      key_b += kWeylB;
    }
    for (int word = 0; word < 4; ++word)
      dropped[4 * n + word] = static_cast<int32_t>(c[word]) < philox.threshold ? -1 : 0;
  }
}

#if defined(__x86_64__)
// Eight counters at a time, in the low halves of the 64-bit lanes of two vectors: the even ones and the odd ones.
__attribute__((target("avx2"))) inline void draw_dropped_avx2(Philox philox, int64_t first_row, int64_t rows,
                                                              int64_t first_group, int64_t groups, uint32_t head,
                                                              int8_t* dropped) {
  const __m256i mul_a = _mm256_set1_epi64x(kPhiloxA), mul_b = _mm256_set1_epi64x(kPhiloxB);
  const __m256i limit = _mm256_set1_epi32(philox.threshold);
  const __m256i last_group = _mm256_set1_epi64x(first_group + groups - 1), all_groups = _mm256_set1_epi64x(groups);
  const __m256i row_step = _mm256_set1_epi64x(8 / groups), group_step = _mm256_set1_epi64x(8 % groups);
  const auto row_of = [&](int64_t n) { return static_cast<long long>(first_row + n / groups); };
  const auto group_of = [&](int64_t n) { return static_cast<long long>(first_group + n % groups); };
  __m256i group[2], row[2];
  for (int v = 0; v < 2; ++v) {
    group[v] = _mm256_set_epi64x(group_of(6 + v), group_of(4 + v), group_of(2 + v), group_of(v));
    row[v] = _mm256_set_epi64x(row_of(6 + v), row_of(4 + v), row_of(2 + v), row_of(v));
  }
  for (int64_t n = 0; n < rows * groups; n += 8) {
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int v = 0; v < 2; ++v) {
      c0[v] = group[v];
      c1[v] = row[v];
      c2[v] = _mm256_set1_epi64x(head);
      c3[v] = _mm256_setzero_si256();
      group[v] = _mm256_add_epi64(group[v], group_step);
      const __m256i past = _mm256_cmpgt_epi64(group[v], last_group);
      group[v] = _mm256_sub_epi64(group[v], _mm256_and_si256(past, all_groups));
      row[v] = _mm256_sub_epi64(_mm256_add_epi64(row[v], row_step), past);
    }
    uint32_t key_a = static_cast<uint32_t>(philox.seed), key_b = static_cast<uint32_t>(philox.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i keys_a = _mm256_set1_epi64x(key_a), keys_b = _mm256_set1_epi64x(key_b);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m256i a = _mm256_mul_epu32(c0[v], mul_a), b = _mm256_mul_epu32(c2[v], mul_b);
        c0[v] = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(c1[v], keys_a));
        c2[v] = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(c3[v], keys_b));
        c1[v] = b;
        c3[v] = a;
      }
      key_a += kWeylA;
      key_b += kWeylB;
    }
    const auto below = [&](__m256i even, __m256i odd) __attribute__((always_inline, target("avx2"))) {
      return _mm256_cmpgt_epi32(limit, _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
    };
    // A lane is a counter, its four bytes are the four keys.
    __m256i bytes = _mm256_and_si256(below(c0[0], c0[1]), _mm256_set1_epi32(0xff));
    bytes = _mm256_or_si256(bytes, _mm256_and_si256(below(c1[0], c1[1]), _mm256_set1_epi32(0xff00)));
    bytes = _mm256_or_si256(bytes, _mm256_and_si256(below(c2[0], c2[1]), _mm256_set1_epi32(0xff0000)));
    bytes = _mm256_or_si256(bytes, _mm256_and_si256(below(c3[0], c3[1]), _mm256_set1_epi32(0xff000000)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dropped + 4 * n), bytes);
  }
}
#endif

// What dropout drops of the queries first_row:first_row + rows and of 4 * groups keys from 4 * first_group on, as
// fastmtl_kernels/varlen_attention/reference.py defines it: -1 or 0, [rows, 4 * groups], with space for 32 more.
inline void draw_dropped(Philox philox, int64_t first_row, int64_t rows, int64_t first_group, int64_t groups,
                         uint32_t head, int8_t* dropped) {
#if defined(__x86_64__)
  if (has_fma()) return draw_dropped_avx2(philox, first_row, rows, first_group, groups, head, dropped);
#endif
  draw_dropped_portable(philox, first_row, rows, first_group, groups, head, dropped);
}

}  // namespace fastmtl
