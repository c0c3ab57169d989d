// Position terms of disentangled attention on CPUs: tables by distance, and bands of scores.
//
// A band holds the products of rows with consecutive distances. Query i and key j have the distance i - j, so that the
// entries of a row of scores lie side by side in the band, one entry further on (or back) than those of the row before.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "varlen_attention_rows.h"

namespace fastmtl {

FASTMTL_INLINE void add_band_inline(const float* band, int64_t band_stride, int64_t rows, int64_t width,
                                    float* scores) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = band + row * band_stride + rows - 1 - row;
    for (int64_t n = 0; n < width; n += kLanes) {
      Lanes x, term;
      load(scores + row * width + n, x);
      load(from + n, term);
      store(x + term, scores + row * width + n);
    }
  }
}
// scores [rows, width] += band[row, rows - 1 - row + column]. Reads up to kLanes past the band.
FASTMTL_FMA_CLONES(add_band, (const float* band, int64_t band_stride, int64_t rows, int64_t width, float* scores),
                   (band, band_stride, rows, width, scores))

FASTMTL_INLINE void add_band_of_keys_inline(const float* band, int64_t band_stride, int64_t rows, int64_t keys,
                                            int64_t width, float* scores) {
  float tile[kLanes * kLanes];
  for (int64_t key = 0; key < keys; key += kLanes)
    for (int64_t row = 0; row < rows; row += kLanes) {
      transpose_block(band + key * band_stride + keys - 1 - key + row, band_stride - 1, tile, kLanes);
      for (int64_t r = 0; r < std::min(kLanes, rows - row); ++r) {
        float* to = scores + (row + r) * width + key;
        Lanes x, term;
        load(to, x);
        load(tile + r * kLanes, term);
        store(x + term, to);
      }
    }
}
// scores [rows, width] += band[key, keys - 1 - key + row] in the first `keys` columns, and anything in the columns up
// to the next multiple of kLanes. Reads up to kLanes rows past the band.
FASTMTL_FMA_CLONES(add_band_of_keys,
                   (const float* band, int64_t band_stride, int64_t rows, int64_t keys, int64_t width, float* scores),
                   (band, band_stride, rows, keys, width, scores))

// The other way: band[row, rows - 1 - row + column] = ds [rows, width] in its first `length` columns, zeros elsewhere.
inline void store_band(const float* ds, int64_t rows, int64_t length, int64_t width, float* band, int64_t band_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    float *to = band + row * band_stride, *first = to + rows - 1 - row;
    std::fill(to, first, 0.0f);
    std::memcpy(first, ds + row * width, length * sizeof(float));
    std::fill(first + length, to + band_stride, 0.0f);
  }
}

FASTMTL_INLINE void store_band_of_keys_inline(const float* ds, int64_t rows, int64_t keys, int64_t width, float* band,
                                              int64_t band_stride) {
  std::fill(band, band + keys * band_stride, 0.0f);
  float tile[kLanes * kLanes];
  for (int64_t key = 0; key < keys; key += kLanes)
    for (int64_t row = 0; row < rows; row += kLanes) {
      transpose_block(ds + row * width + key, width, tile, kLanes);
      const int64_t count = std::min(kLanes, rows - row);
      for (int64_t k = 0; k < std::min(kLanes, keys - key); ++k)
        std::memcpy(band + (key + k) * band_stride + keys - 1 - key - k + row, tile + k * kLanes,
                    count * sizeof(float));
    }
}
// The other way: band[key, keys - 1 - key + row] = ds [rows, width] in its first `keys` columns, zeros elsewhere. Reads
// up to kLanes rows past ds.
FASTMTL_FMA_CLONES(store_band_of_keys,
                   (const float* ds, int64_t rows, int64_t keys, int64_t width, float* band, int64_t band_stride),
                   (ds, rows, keys, width, band, band_stride))

// A table of one head, [count, padded head_dim] by distance, and its transpose [padded head_dim, stride].
struct ByDistance {
  const float *rows, *transposed;
};

// The tables of all heads and groups by distance: from the smallest distance up, or from the largest one down.
class Tables {
 public:
  // from: the first element of a table [groups, R, heads, head_dim] with adjacent columns.
  template <typename scalar_t>
  Tables(const scalar_t* from, const int64_t (&strides)[3], int64_t groups, int64_t num_rows, int64_t heads,
         int64_t head_dim, const int32_t* position_rows, int64_t count, bool descending)
      : heads_(heads),
        width_(round_up(head_dim, kLanes)),
        stride_(round_up(count, kLanes) + kLanes),
        size_(2 * stride_ * width_),
        values_(groups * heads * size_) {
    torch::stable::parallel_for(0, groups * heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> table(round_up(num_rows, kLanes) * width_);
      for (int64_t unit = begin; unit < end; ++unit) {
        gather(from + unit / heads * strides[0] + unit % heads * strides[2], strides[1], num_rows, head_dim, 1.0f,
               table.data());
        float* rows = values_.data() + unit * size_;
        for (int64_t n = 0; n < count; ++n) {
          const int64_t row = position_rows[descending ? count - 1 - n : n];
          std::memcpy(rows + n * width_, table.data() + row * width_, width_ * sizeof(float));
        }
        transpose(rows, width_, stride_, width_, rows + stride_ * width_, stride_);
      }
    });
  }

  int64_t stride() const { return stride_; }

  ByDistance of(int64_t group, int64_t head) const {
    const float* rows = values_.data() + (group * heads_ + head) * size_;
    return {rows, rows + stride_ * width_};
  }

 private:
  int64_t heads_, width_, stride_, size_;
  std::vector<float> values_;
};

}  // namespace fastmtl
