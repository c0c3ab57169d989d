// Disentangled attention over packed sequences on CPUs; the formulas are in
// fastmtl_kernels/disentangled_attention/cpp.py.
//
// As varlen_attention_cpu.cpp: one head of one sequence at a time, in float scratch memory. Products with the tables
// give bands (disentangled_attention_rows.h), of blocks of queries and of blocks of keys.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "disentangled_attention_positions.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct ForwardScratch {
  Scratch memory;
  float *q, *k, *kt, *v, *scores, *out, *factors, *band;
  std::vector<int8_t> dropped;
};

template <typename scalar_t>
void forward_head(ForwardScratch& at, const Batch& batch, const Tensor& qkv, const Head& of, const Dropout& dropout,
                  float factor, int64_t start, int64_t head, scalar_t* out, float* stats) {
  const auto [length, d, width, keys, shift, key, query, key_stride, query_stride] = of;
  const int64_t row_stride = qkv.stride(0), part = qkv.stride(1), out_stride = batch.num_heads * d;
  const scalar_t* from =
      static_cast<const scalar_t*>(qkv.const_data_ptr()) + start * row_stride + head * qkv.stride(2);
  gather(from, row_stride, length, d, 1.0f, at.q);
  gather(from + part, row_stride, length, d, 1.0f, at.k);
  gather(from + 2 * part, row_stride, length, d, 1.0f, at.v);
  transpose(at.k, width, keys, width, at.kt, keys);
  const int64_t block = block_of(length, batch.window);
  for (int64_t first = 0; first < length; first += block) {
    const int64_t rows = std::min(block, length - first), row = start + first;
    const float* q = at.q + first * width;
    multiply({q, width, 1}, at.kt, keys, rows, keys, d, at.scores, keys, false);
    add_positions(of, first, rows, q, at.k, at.band, at.scores);
    if (dropout.active) draw_dropped(dropout.philox, row, rows, 0, keys / 4, head, at.dropped.data());
    float* row_stats = stats + (row * batch.num_heads + head) * 2;
    softmax(at.scores, rows, length, factor, dropout.active ? at.dropped.data() : nullptr, row_stats,
            2 * batch.num_heads);
    multiply({at.scores, keys, 1}, at.v, width, rows, width, length, at.out, width, false);
    for (int64_t i = 0; i < rows; ++i) at.factors[i] = dropout.keep_scale * row_stats[2 * batch.num_heads * i + 1];
    scatter(at.out, rows, d, at.factors, 1, out + row * out_stride + head * d, out_stride);
  }
}

void disentangled_attention_out(Tensor qkv, Tensor cu_seqlens, Tensor position_rows, std::optional<Tensor> pos_key,
                                std::optional<Tensor> pos_query, std::optional<Tensor> group_offsets,
                                std::optional<Tensor> seed, int64_t threshold, double keep_scale, double scale,
                                Tensor out, Tensor stats) {
  const char* op = "disentangled_attention_out";
  const Batch batch = batch_of(op, qkv, cu_seqlens, -1);
  const Dropout dropout = dropout_of(op, seed, threshold, keep_scale);
  STD_TORCH_CHECK(pos_key || pos_query, op, ": a table must be given");
  const Positions positions = positions_of(op, batch, position_rows, pos_key ? *pos_key : *pos_query, group_offsets);
  check_shape(op, "out", out, qkv, true);
  check(op, "stats", stats, ScalarType::Float, 2 * batch.num_rows * batch.num_heads);
  const int64_t keys = round_up(batch.longest, kLanes), width = round_up(batch.head_dim, kLanes);
  const int64_t scores = std::max(kBlockScores, kMinBlock * keys) + kKeyBlock;
  const auto make_scratch = [&] {
    ForwardScratch at;
    for (float** piece : {&at.q, &at.k, &at.kt, &at.v}) *piece = at.memory.take(keys * width);
    at.scores = at.memory.take(scores);
    at.out = at.memory.take(kMaxBlock * width);
    at.factors = at.memory.take(kMaxBlock);
    at.band = at.memory.take(band_size(batch.longest));
    at.dropped.resize(scores + 32);
    return at;
  };
  for_dtype(op, qkv.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto key = tables_of<scalar_t>(op, pos_key, qkv, positions, true);
    const auto query = tables_of<scalar_t>(op, pos_query, qkv, positions, false);
    auto* to = static_cast<scalar_t*>(out.mutable_data_ptr());
    auto* stats_ptr = static_cast<float*>(stats.mutable_data_ptr());
    for_each_head(batch, make_scratch, [&](ForwardScratch& at, int64_t b, int64_t head) {
      forward_head(at, batch, qkv, head_of(batch, key, query, positions.groups[b], b, head), dropout,
                   static_cast<float>(scale * kLog2E), int64_t{batch.offsets[b]}, head, to, stats_ptr);
    });
    const int64_t row_size = batch.num_heads * batch.head_dim;
    std::fill(to + batch.tokens() * row_size, to + batch.num_rows * row_size, zero);
  });
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("disentangled_attention_out", TORCH_BOX(&fastmtl::disentangled_attention_out));
}
