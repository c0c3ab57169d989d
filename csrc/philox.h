// Which elements of a row dropout drops: Philox4x32-10, as fastmtl_kernels/philox.py defines it.
//
//   words = Philox4x32-10(key = seed, counter = (column // 4, row, 0, 1))
//   dropped[column] = int32(words[column % 4]) < threshold      as bit column % 8 of byte column / 8
//
// The AVX2 path keeps a word in the low half of each 64-bit lane, where a multiplication gives both halves of the
// product at once, and four counters to a vector.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmtl {

constexpr uint32_t kPhiloxA = 0xD2511F53, kPhiloxB = 0xCD9E8D57, kWeylA = 0x9E3779B9, kWeylB = 0xBB67AE85;
// Columns that dropped_row writes at once: rows of bits have space for a multiple of these.
constexpr int64_t kDroppedBlock = 64;

inline void dropped_row_portable(uint64_t seed, uint32_t row, int32_t threshold, int64_t num_columns,
                                 uint8_t* dropped) {
  for (int64_t group = 0; 4 * group < num_columns; ++group) {
    uint32_t c[4] = {static_cast<uint32_t>(group), row, 0, 1};
    uint32_t key_a = static_cast<uint32_t>(seed), key_b = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = static_cast<uint64_t>(c[0]) * kPhiloxA, b = static_cast<uint64_t>(c[2]) * kPhiloxB;
      const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key_a, static_cast<uint32_t>(b),
                                static_cast<uint32_t>(a >> 32) ^ c[3] ^ key_b, static_cast<uint32_t>(a)};
      for (int word = 0; word < 4; ++word) c[word] = next[word];
      key_a += kWeylA;
      key_b += kWeylB;
    }
    uint8_t bits = group % 2 ? dropped[group / 2] : 0;
    for (int word = 0; word < 4; ++word)
      bits |= (static_cast<int32_t>(c[word]) < threshold) << (group % 2 * 4 + word);
    dropped[group / 2] = bits;
  }
}

#if defined(__x86_64__)
// Four vectors at a time, so that one's multiplications fill the other's latency.
__attribute__((target("avx2"))) inline void dropped_row_avx2(uint64_t seed, uint32_t row, int32_t threshold,
                                                             int64_t num_columns, uint8_t* dropped) {
  const __m256i mul_a = _mm256_set1_epi64x(kPhiloxA), mul_b = _mm256_set1_epi64x(kPhiloxB);
  const __m256i limit = _mm256_set1_epi32(threshold);
  for (int64_t group = 0; 4 * group < num_columns; group += 16) {
    __m256i c0[4], c1[4], c2[4], c3[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t first = group + 4 * v;
      // In this order two interleavings give the sixteen words in the order of their columns.
      c0[v] = _mm256_set_epi64x(first + 3, first + 1, first + 2, first);
      c1[v] = _mm256_set1_epi64x(row);
      c2[v] = _mm256_setzero_si256();
      c3[v] = _mm256_set1_epi64x(1);
    }
    uint32_t key_a = static_cast<uint32_t>(seed), key_b = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i keys_a = _mm256_set1_epi64x(key_a), keys_b = _mm256_set1_epi64x(key_b);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m256i a = _mm256_mul_epu32(c0[v], mul_a), b = _mm256_mul_epu32(c2[v], mul_b);
        c0[v] = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(c1[v], keys_a));
        c2[v] = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(c3[v], keys_b));
        c1[v] = b;
        c3[v] = a;
      }
      key_a += kWeylA;
      key_b += kWeylB;
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i w01 = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xaa);
      const __m256i w23 = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xaa);
      const __m256i low = _mm256_cmpgt_epi32(limit, _mm256_unpacklo_epi64(w01, w23));
      const __m256i high = _mm256_cmpgt_epi32(limit, _mm256_unpackhi_epi64(w01, w23));
      dropped[group / 2 + 2 * v] = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(low)));
      dropped[group / 2 + 2 * v + 1] = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(high)));
    }
  }
}
#endif

// dropped: bytes for num_columns rounded up to kDroppedBlock; the bits past num_columns may be anything.
inline void dropped_row(uint64_t seed, uint32_t row, int32_t threshold, int64_t num_columns, uint8_t* dropped) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return dropped_row_avx2(seed, row, threshold, num_columns, dropped);
#endif
  dropped_row_portable(seed, row, threshold, num_columns, dropped);
}

}  // namespace fastmtl
