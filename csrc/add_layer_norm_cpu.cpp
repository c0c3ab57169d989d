// Residual LayerNorm and row-wise dropout on CPUs; the formulas are in fastmtl_kernels/add_layer_norm/api.py.
//
// A row stays in the L1 cache between its passes, so memory is read and written once. Rows are cut into chunks of
// kChunk; a chunk belongs to one thread, and neither the chunks nor the order in which their partial sums are added up
// depend on how many threads there are: equal inputs give equal bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "philox.h"
#include "rows.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 64;
// The bytes that a row's bits of what is dropped take.
int64_t mask_bytes(int64_t num_columns) { return (num_columns + kDroppedBlock - 1) / kDroppedBlock * kDroppedBlock / 8; }

// Zeros the lanes, which begin at column c, that are dropped.
FASTMTL_INLINE Lanes drop(Lanes lanes, const uint8_t* dropped, int64_t c) {
  const LaneBits bit = {1, 2, 4, 8, 16, 32, 64, 128};
  const LaneBits byte = LaneBits{} + dropped[c / kLanes];
  return (Lanes)((LaneBits)((byte & bit) == 0) & (LaneBits)lanes);
}

struct Dropout {
  uint64_t seed;
  int32_t threshold;
  float scale;  // of what is kept
  bool active;

  // What is dropped of a row; zeros, once and for all, where nothing is.
  void draw(int64_t row, int64_t num_columns, uint8_t* dropped) const {
    if (active) dropped_row(seed, static_cast<uint32_t>(row), threshold, num_columns, dropped);
  }
};

Dropout dropout_of(const std::optional<Tensor>& seed, int64_t threshold, double scale) {
  if (!seed) return {0, 0, 1.0f, false};
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed must be an int64 tensor of one element on the CPU");
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return {key, static_cast<int32_t>(threshold), static_cast<float>(scale), true};
}

struct ForwardArgs {
  const void *residual, *x, *ts;  // x, ts: null where there is none; z is residual itself where there is neither
  const float *weight, *bias;
  void *y, *z;
  float *mean, *rstd;
  uint8_t* mask;  // keeps the bits of what is dropped; null where backward does not need them
  int64_t num_columns;
  float eps;
  Dropout dropout;
};

// One row of y from z: a row that is made again has the bits that it had.
template <typename scalar_t>
FASTMTL_INLINE void normalise(const scalar_t* z, float mean, float rstd, const float* weight, const float* bias,
                              int64_t num_columns, scalar_t* y) {
  for_vectors(num_columns, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
    const Lanes h = (get(z + c, count) - mean) * rstd;
    put(h * get(weight + c, count) + get(bias + c, count), y + c, count);
  });
}

template <typename scalar_t>
FASTMTL_INLINE void forward_part(const ForwardArgs& args, int64_t first, int64_t last, uint8_t* row_dropped,
                                 scalar_t* zeros) {
  const int64_t d = args.num_columns;
  for (int64_t row = first; row < last; ++row) {
    const scalar_t* residual = static_cast<const scalar_t*>(args.residual) + row * d;
    const scalar_t* x = args.x ? static_cast<const scalar_t*>(args.x) + row * d : zeros;
    const scalar_t* ts = args.ts ? static_cast<const scalar_t*>(args.ts) + row * d : zeros;
    scalar_t* z = static_cast<scalar_t*>(args.z) + row * d;
    scalar_t* y = static_cast<scalar_t*>(args.y) + row * d;
    uint8_t* dropped = args.mask ? args.mask + row * mask_bytes(d) : row_dropped;
    args.dropout.draw(row, d, dropped);
    Lanes sums[kUnroll] = {}, squares[kUnroll] = {};
    for_vectors(d, [&](int64_t c, int64_t count, int k) __attribute__((always_inline)) {
      if (z != residual) {
        const Lanes f = drop(get(x + c, count) * args.dropout.scale, dropped, c);
        put(get(residual + c, count) + f + get(ts + c, count), z + c, count);
      }
      sums[k] += get(z + c, count);
    });
    const float mean = total(sums) / d;
    for_vectors(d, [&](int64_t c, int64_t count, int k) __attribute__((always_inline)) {
      // Filled up with the mean, so that what is past the last column adds nothing.
      Lanes lanes = get(z + c, count);
      for (int64_t lane = count; lane < kLanes; ++lane) lanes[lane] = mean;
      squares[k] += (lanes - mean) * (lanes - mean);
    });
    const float rstd = 1.0f / std::sqrt(total(squares) / d + args.eps);
    normalise(z, mean, rstd, args.weight, args.bias, d, y);
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
}

struct BackwardArgs {
  const void *dy, *dsum, *z;  // dsum: null where z was no result
  const float *mean, *rstd, *weight;
  void *dz, *dx;  // dx: null where it is not wanted
  const uint8_t* mask;
  int64_t num_columns;
  float scale;
};

// Adds to sums [2, num_columns]: the gradients of weight and bias.
template <bool kHasSum, typename scalar_t>
FASTMTL_INLINE void backward_part(const BackwardArgs& args, int64_t first, int64_t last, float* sums) {
  const int64_t d = args.num_columns;
  float *dweight = sums, *dbias = sums + d;
  for (int64_t row = first; row < last; ++row) {
    const scalar_t* dy = static_cast<const scalar_t*>(args.dy) + row * d;
    const scalar_t* z = static_cast<const scalar_t*>(args.z) + row * d;
    const scalar_t* dsum = kHasSum ? static_cast<const scalar_t*>(args.dsum) + row * d : nullptr;
    scalar_t* dz = static_cast<scalar_t*>(args.dz) + row * d;
    const float mean = args.mean[row], rstd = args.rstd[row];
    Lanes sum_g[kUnroll] = {}, sum_gh[kUnroll] = {};
    for_vectors(d, [&](int64_t c, int64_t count, int k) __attribute__((always_inline)) {
      const Lanes grad = get(dy + c, count), h = (get(z + c, count) - mean) * rstd;
      const Lanes g = grad * get(args.weight + c, count);
      sum_g[k] += g;
      sum_gh[k] += g * h;
      put(get(dweight + c, count) + grad * h, dweight + c, count);
      put(get(dbias + c, count) + grad, dbias + c, count);
    });
    const float mean_g = total(sum_g) / d, mean_gh = total(sum_gh) / d;
    const auto dz_at = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      const Lanes h = (get(z + c, count) - mean) * rstd;
      Lanes lanes = (get(dy + c, count) * get(args.weight + c, count) - mean_g - h * mean_gh) * rstd;
      if constexpr (kHasSum) lanes += get(dsum + c, count);
      put(lanes, dz + c, count);
      return lanes;
    };
    if (!args.dx) {
      for_vectors(d, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) { dz_at(c, count); });
      continue;
    }
    scalar_t* dx = static_cast<scalar_t*>(args.dx) + row * d;
    const uint8_t* dropped = args.mask + row * mask_bytes(d);
    for_vectors(d, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      put(drop(dz_at(c, count) * args.scale, dropped, c), dx + c, count);
    });
  }
}

template <typename scalar_t>
FASTMTL_INLINE void dropout_part(const void* x, void* out, int64_t d, const Dropout& dropout, int64_t first,
                                 int64_t last, uint8_t* dropped) {
  for (int64_t row = first; row < last; ++row) {
    dropout.draw(row, d, dropped);
    const scalar_t* from = static_cast<const scalar_t*>(x) + row * d;
    scalar_t* to = static_cast<scalar_t*>(out) + row * d;
    for_vectors(d, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      put(drop(get(from + c, count) * dropout.scale, dropped, c), to + c, count);
    });
  }
}

struct NormaliseArgs {
  const void* z;
  const float *mean, *rstd, *weight, *bias;
  void* y;
  int64_t num_columns;
};

template <typename scalar_t>
FASTMTL_INLINE void normalise_part(const NormaliseArgs& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * args.num_columns;
    normalise(static_cast<const scalar_t*>(args.z) + at, args.mean[row], args.rstd[row], args.weight, args.bias,
              args.num_columns, static_cast<scalar_t*>(args.y) + at);
  }
}

// One function for each dtype, compiled for several instruction sets.
#define FASTMTL_ROW_KERNELS(scalar_t)                                                                               \
  FASTMTL_CLONES void forward_rows(const ForwardArgs& args, int64_t first, int64_t last, uint8_t* dropped,          \
                                   scalar_t* zeros) {                                                               \
    forward_part<scalar_t>(args, first, last, dropped, zeros);                                                      \
  }                                                                                                                 \
  FASTMTL_CLONES void normalise_rows(const NormaliseArgs& args, int64_t first, int64_t last, scalar_t) {            \
    normalise_part<scalar_t>(args, first, last);                                                                    \
  }                                                                                                                 \
  FASTMTL_CLONES void backward_rows(const BackwardArgs& args, int64_t first, int64_t last, float* sums, scalar_t) { \
    if (args.dsum) backward_part<true, scalar_t>(args, first, last, sums);                                          \
    else backward_part<false, scalar_t>(args, first, last, sums);                                                   \
  }                                                                                                                 \
  FASTMTL_CLONES void dropout_rows(const void* x, void* out, int64_t d, const Dropout& dropout, int64_t first,      \
                                   int64_t last, uint8_t* dropped, scalar_t) {                                      \
    dropout_part<scalar_t>(x, out, d, dropout, first, last, dropped);                                               \
  }
FASTMTL_ROW_KERNELS(float)
FASTMTL_ROW_KERNELS(BFloat16)
FASTMTL_ROW_KERNELS(Half)
#undef FASTMTL_ROW_KERNELS

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

const void* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// The bias, or zeros in its place.
class Bias {
 public:
  Bias(const char* op, const std::optional<Tensor>& bias, int64_t num_columns)
      : zeros_(bias ? 0 : num_columns, 0.0f), data_(bias ? floats(*bias) : zeros_.data()) {
    if (bias) check(op, "bias", *bias, ScalarType::Float, num_columns);
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> zeros_;
  const float* data_;
};

// z and y of rows past num_rows are zeros. Without x and ts, z may be residual, which is not written then.
void add_layer_norm_out(Tensor residual, std::optional<Tensor> x, std::optional<Tensor> ts, Tensor weight,
                        std::optional<Tensor> bias, std::optional<Tensor> seed, int64_t threshold, double scale,
                        double eps, int64_t num_rows, Tensor y, Tensor z, Tensor mean, Tensor rstd,
                        std::optional<Tensor> mask) {
  const char* op = "add_layer_norm_out";
  const int64_t n = residual.size(0), d = residual.size(1);
  const ScalarType dtype = residual.scalar_type();
  STD_TORCH_CHECK(num_rows >= 0 && num_rows <= n, op, ": num_rows must be at most the rows there are");
  check(op, "residual", residual, dtype, n * d);
  if (x) check(op, "x", *x, dtype, n * d);
  if (ts) check(op, "ts", *ts, dtype, n * d);
  check(op, "weight", weight, ScalarType::Float, d);
  const Bias added(op, bias, d);
  check(op, "y", y, dtype, n * d);
  check(op, "z", z, dtype, n * d);
  const bool in_place = n > 0 && z.const_data_ptr() == residual.const_data_ptr();
  STD_TORCH_CHECK(!in_place || (!x && !ts), op, ": z must not be residual where there is a sum");
  check(op, "mean", mean, ScalarType::Float, n);
  check(op, "rstd", rstd, ScalarType::Float, n);
  if (mask) check(op, "mask", *mask, ScalarType::Byte, n * mask_bytes(d));
  const ForwardArgs args{residual.const_data_ptr(), data_or_null(x), data_or_null(ts),
                         floats(weight), added.data(), y.mutable_data_ptr(), z.mutable_data_ptr(),
                         static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()),
                         mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr, d, static_cast<float>(eps),
                         dropout_of(seed, threshold, scale)};
  for_dtype(op, dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    torch::stable::parallel_for(0, num_rows, kChunk, [&](int64_t first, int64_t last) {
      std::vector<uint8_t> dropped(mask_bytes(d), 0);
      std::vector<scalar_t> zeros(d, zero);
      forward_rows(args, first, last, dropped.data(), zeros.data());
    });
  });
  const int64_t done = num_rows * d * y.element_size(), rest = (n - num_rows) * d * y.element_size();
  std::memset(static_cast<char*>(args.y) + done, 0, rest);
  if (!in_place) std::memset(static_cast<char*>(args.z) + done, 0, rest);
}

void layer_norm_again_out(Tensor z, Tensor mean, Tensor rstd, Tensor weight, std::optional<Tensor> bias,
                          int64_t num_rows, Tensor y) {
  const char* op = "layer_norm_again_out";
  const int64_t n = z.size(0), d = z.size(1);
  const ScalarType dtype = z.scalar_type();
  STD_TORCH_CHECK(num_rows >= 0 && num_rows <= n, op, ": num_rows must be at most the rows there are");
  check(op, "z", z, dtype, n * d);
  check(op, "mean", mean, ScalarType::Float, n);
  check(op, "rstd", rstd, ScalarType::Float, n);
  check(op, "weight", weight, ScalarType::Float, d);
  const Bias added(op, bias, d);
  check(op, "y", y, dtype, n * d);
  const NormaliseArgs args{z.const_data_ptr(), floats(mean), floats(rstd), floats(weight), added.data(),
                           y.mutable_data_ptr(), d};
  for_dtype(op, dtype, [&](auto zero) {
    torch::stable::parallel_for(0, num_rows, kChunk, [&](int64_t first, int64_t last) {
      normalise_rows(args, first, last, zero);
    });
  });
  std::memset(static_cast<char*>(args.y) + num_rows * d * y.element_size(), 0, (n - num_rows) * d * y.element_size());
}

// sums [2, T, d]: gradients of weight and bias over the rows of each task. mask: forward's, where dx is given.
// dsum: the gradient of z, where z was a result as well.
void add_layer_norm_backward_out(Tensor dy, std::optional<Tensor> dsum, Tensor z, Tensor mean, Tensor rstd,
                                 Tensor weight, std::optional<Tensor> mask, double scale, Tensor token_offsets,
                                 Tensor dz, std::optional<Tensor> dx, Tensor sums) {
  const char* op = "add_layer_norm_backward_out";
  const int64_t n = dy.size(0), d = dy.size(1), num_tasks = token_offsets.numel() - 1;
  const ScalarType dtype = dy.scalar_type();
  check(op, "dy", dy, dtype, n * d);
  if (dsum) check(op, "dsum", *dsum, dtype, n * d);
  check(op, "z", z, dtype, n * d);
  check(op, "mean", mean, ScalarType::Float, n);
  check(op, "rstd", rstd, ScalarType::Float, n);
  check(op, "weight", weight, ScalarType::Float, d);
  check(op, "token_offsets", token_offsets, ScalarType::Int, num_tasks + 1);
  check(op, "dz", dz, dtype, n * d);
  STD_TORCH_CHECK(dx.has_value() == mask.has_value(), op, ": dx must be given with mask, and is dz without it");
  if (dx) check(op, "dx", *dx, dtype, n * d);
  if (mask) check(op, "mask", *mask, ScalarType::Byte, n * mask_bytes(d));
  check(op, "sums", sums, ScalarType::Float, 2 * num_tasks * d);
  const int32_t* offsets = static_cast<const int32_t*>(token_offsets.const_data_ptr());
  STD_TORCH_CHECK(num_tasks >= 1 && offsets[0] == 0 && std::is_sorted(offsets, offsets + num_tasks + 1) &&
                      offsets[num_tasks] <= n, op, ": token_offsets must ascend from 0 to at most the rows there are");
  const BackwardArgs args{dy.const_data_ptr(), data_or_null(dsum), z.const_data_ptr(), floats(mean), floats(rstd),
                          floats(weight), dz.mutable_data_ptr(), dx ? dx->mutable_data_ptr() : nullptr,
                          static_cast<const uint8_t*>(data_or_null(mask)), d, static_cast<float>(scale)};
  const int64_t num_rows = offsets[num_tasks], num_chunks = (num_rows + kChunk - 1) / kChunk;
  // Chunk p's part of task t is slot p + t: along the rows one of the two grows with every part.
  std::vector<float> partials((num_chunks + num_tasks) * 2 * d, 0.0f);
  for_dtype(op, dtype, [&](auto zero) {
    torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        for (int64_t t = 0; t < num_tasks; ++t) {
          const int64_t begin = std::max<int64_t>(chunk * kChunk, offsets[t]);
          const int64_t end = std::min<int64_t>((chunk + 1) * kChunk, offsets[t + 1]);
          if (begin < end)
            backward_rows(args, begin, end, partials.data() + (chunk + t) * 2 * d, zero);
        }
      }
    });
  });
  float* out = static_cast<float*>(sums.mutable_data_ptr());
  std::fill(out, out + 2 * num_tasks * d, 0.0f);
  for (int64_t t = 0; t < num_tasks; ++t) {
    if (offsets[t] == offsets[t + 1]) continue;
    for (int64_t slot = offsets[t] / kChunk + t; slot <= (offsets[t + 1] - 1) / kChunk + t; ++slot)
      for (int64_t k = 0; k < 2; ++k)
        for (int64_t c = 0; c < d; ++c) out[(k * num_tasks + t) * d + c] += partials[(slot * 2 + k) * d + c];
  }
  const int64_t done = num_rows * d * dy.element_size(), rest = (n - num_rows) * d * dy.element_size();
  std::memset(static_cast<char*>(args.dz) + done, 0, rest);
  if (args.dx) std::memset(static_cast<char*>(args.dx) + done, 0, rest);
}

void row_dropout_out(Tensor x, Tensor seed, int64_t threshold, double scale, Tensor out) {
  const int64_t n = x.size(0), d = x.size(1);
  check("row_dropout_out", "x", x, x.scalar_type(), n * d);
  check("row_dropout_out", "out", out, x.scalar_type(), n * d);
  const Dropout dropout = dropout_of(seed, threshold, scale);
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  for_dtype("row_dropout_out", x.scalar_type(), [&](auto zero) {
    torch::stable::parallel_for(0, n, kChunk, [&](int64_t first, int64_t last) {
      std::vector<uint8_t> dropped(mask_bytes(d), 0);
      dropout_rows(from, to, d, dropout, first, last, dropped.data(), zero);
    });
  });
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("add_layer_norm_out", TORCH_BOX(&fastmtl::add_layer_norm_out));
  m.impl("add_layer_norm_backward_out", TORCH_BOX(&fastmtl::add_layer_norm_backward_out));
  m.impl("layer_norm_again_out", TORCH_BOX(&fastmtl::layer_norm_again_out));
  m.impl("row_dropout_out", TORCH_BOX(&fastmtl::row_dropout_out));
}
