// One vector per sequence of packed rows on CPUs: first row, mean or maximum; see fastmtl_kernels/pool/api.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "rows.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Mode : int64_t { kCls, kMean, kMax };

// The sequence's vector in `out` and, for kMax, in `winners` the row that gave each column.
template <typename scalar_t>
FASTMTL_INLINE void pool_part(const scalar_t* x, int64_t start, int64_t stop, int64_t d, int64_t mode, scalar_t* out,
                              int32_t* winners, float* sums) {
  std::fill(sums, sums + d, 0.0f);
  if (mode == kMax) std::fill(winners, winners + d, static_cast<int32_t>(start));
  if (start < stop) {
    for_vectors(d, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      put(get(x + start * d + c, count), sums + c, count);
    });
  }
  const int64_t end = mode == kCls ? start : stop;
  for (int64_t row = start + 1; row < end; ++row) {
    if (mode == kMean) {
      for_vectors(d, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
        put(get(sums + c, count) + get(x + row * d + c, count), sums + c, count);
      });
      continue;
    }
    for_vectors(d, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      const Lanes lanes = get(x + row * d + c, count), best = get(sums + c, count);
      // The first of the largest wins, and the first NaN over everything, as in torch.max.
      const LaneMask wins = (lanes > best) | ((lanes != lanes) & (best == best));
      LaneMask winner = {};
      std::memcpy(&winner, winners + c, count * sizeof(int32_t));
      winner = (wins & static_cast<int32_t>(row)) | (~wins & winner);
      std::memcpy(winners + c, &winner, count * sizeof(int32_t));
      put((Lanes)((wins & (LaneMask)lanes) | (~wins & (LaneMask)best)), sums + c, count);
    });
  }
  const float scale = mode == kMean && start < stop ? 1.0f / (stop - start) : 1.0f;
  for_vectors(d, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
    put(get(sums + c, count) * scale, out + c, count);
  });
}

// dx of the sequence's rows.
template <typename scalar_t>
FASTMTL_INLINE void pool_backward_part(const scalar_t* dout, int64_t start, int64_t stop, int64_t d, int64_t mode,
                                       const int32_t* winners, scalar_t* dx) {
  if (mode == kMean) {
    const float scale = 1.0f / (stop - start);
    for (int64_t row = start; row < stop; ++row)
      for_vectors(d, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
        put(get(dout + c, count) * scale, dx + row * d + c, count);
      });
    return;
  }
  std::memset(dx + start * d, 0, (stop - start) * d * sizeof(scalar_t));
  if (start == stop) return;
  if (mode == kCls) std::memcpy(dx + start * d, dout, d * sizeof(scalar_t));
  else
    for (int64_t c = 0; c < d; ++c) dx[winners[c] * d + c] = dout[c];
}

#define FASTMTL_POOL_KERNELS(scalar_t)                                                                             \
  FASTMTL_CLONES void pool_sequence(const void* x, int64_t start, int64_t stop, int64_t d, int64_t mode,           \
                                    scalar_t* out, int32_t* winners, float* sums) {                                \
    pool_part(static_cast<const scalar_t*>(x), start, stop, d, mode, out, winners, sums);                          \
  }                                                                                                                \
  FASTMTL_CLONES void pool_backward_sequence(const void* dout, int64_t start, int64_t stop, int64_t d,             \
                                             int64_t mode, const int32_t* winners, scalar_t* dx) {                 \
    pool_backward_part(static_cast<const scalar_t*>(dout), start, stop, d, mode, winners, dx);                     \
  }
FASTMTL_POOL_KERNELS(float)
FASTMTL_POOL_KERNELS(BFloat16)
FASTMTL_POOL_KERNELS(Half)
#undef FASTMTL_POOL_KERNELS

// The offsets on the host, checked against the rows there are.
const int32_t* checked_offsets(const char* op, const Tensor& cu_seqlens, int64_t num_rows) {
  const int64_t count = cu_seqlens.numel();
  check(op, "cu_seqlens", cu_seqlens, ScalarType::Int, count);
  const int32_t* offsets = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  STD_TORCH_CHECK(count >= 1 && offsets[0] == 0 && std::is_sorted(offsets, offsets + count) &&
                      offsets[count - 1] <= num_rows,
                  op, ": cu_seqlens must ascend from 0 to at most the rows there are");
  return offsets;
}

void pool_out(Tensor x, Tensor cu_seqlens, int64_t mode, Tensor out, std::optional<Tensor> winners) {
  const int64_t d = x.size(1), num_sequences = cu_seqlens.numel() - 1;
  const int32_t* offsets = checked_offsets("pool_out", cu_seqlens, x.size(0));
  check("pool_out", "x", x, x.scalar_type(), x.numel());
  check("pool_out", "out", out, x.scalar_type(), num_sequences * d);
  STD_TORCH_CHECK((mode == kMax) == winners.has_value(), "pool_out: winners must be given for the maximum alone");
  if (winners) check("pool_out", "winners", *winners, ScalarType::Int, num_sequences * d);
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  int32_t* rows = winners ? static_cast<int32_t*>(winners->mutable_data_ptr()) : nullptr;
  for_dtype("pool_out", x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    torch::stable::parallel_for(0, num_sequences, 4, [&](int64_t first, int64_t last) {
      std::vector<float> sums(d);
      for (int64_t b = first; b < last; ++b)
        pool_sequence(from, offsets[b], offsets[b + 1], d, mode, static_cast<scalar_t*>(to) + b * d,
                      rows ? rows + b * d : nullptr, sums.data());
    });
  });
}

void pool_backward_out(Tensor dout, Tensor cu_seqlens, int64_t mode, std::optional<Tensor> winners, Tensor dx) {
  const int64_t d = dx.size(1), num_sequences = cu_seqlens.numel() - 1;
  const int32_t* offsets = checked_offsets("pool_backward_out", cu_seqlens, dx.size(0));
  check("pool_backward_out", "dout", dout, dx.scalar_type(), num_sequences * d);
  check("pool_backward_out", "dx", dx, dx.scalar_type(), dx.numel());
  STD_TORCH_CHECK((mode == kMax) == winners.has_value(),
                  "pool_backward_out: winners must be given for the maximum alone");
  if (winners) check("pool_backward_out", "winners", *winners, ScalarType::Int, num_sequences * d);
  const void* from = dout.const_data_ptr();
  void* to = dx.mutable_data_ptr();
  const int32_t* rows = winners ? static_cast<const int32_t*>(winners->const_data_ptr()) : nullptr;
  for_dtype("pool_backward_out", dx.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    torch::stable::parallel_for(0, num_sequences, 4, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        pool_backward_sequence(static_cast<const scalar_t*>(from) + b * d, offsets[b], offsets[b + 1], d, mode,
                               rows ? rows + b * d : nullptr, static_cast<scalar_t*>(to));
    });
  });
  const int64_t done = offsets[num_sequences] * d * dx.element_size();
  std::memset(static_cast<char*>(to) + done, 0, dx.numel() * dx.element_size() - done);
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("pool_out", TORCH_BOX(&fastmtl::pool_out));
  m.impl("pool_backward_out", TORCH_BOX(&fastmtl::pool_backward_out));
}
