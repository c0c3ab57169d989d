// The backward of disentangled attention on CPUs; disentangled_attention_cpu.cpp has the forward.
//
// The tables' gradients are summed over chunks of sequences, which depend on the batch only, and then over chunks:
// equal inputs give equal bits for any number of threads.
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

// About how many pieces of work there are: heads of chunks.
constexpr int64_t kUnits = 64;

struct Chunk {
  int64_t first, stop, group, longest;
};

struct BackwardScratch {
  Scratch memory;
  float *q, *k, *kt, *vt, *dout, *scores, *dp, *dq, *dk, *dv, *band;
  std::vector<int8_t> dropped;
};

// Sums of the tables' gradients of one head of a chunk, [2 longest - 1, width] by distance; null for an absent table.
struct Sums {
  float *key, *query;
};

// Adds what dS [rows, keys] of a block of queries gives to dQ, dK and the sums of the tables' gradients.
void add_position_gradients(const Head& at, int64_t first, int64_t rows, const float* q, const float* k,
                            const float* ds, float* band, float* dq, float* dk, Sums sums) {
  const int64_t width = at.width;
  if (at.key) {
    const int64_t count = at.length + rows - 1, columns = round_up(count, kLanes), distance = at.length - first - rows;
    store_band(ds, rows, at.length, at.keys, band, columns);
    multiply({band, columns, 1}, at.key->rows + (at.shift + distance) * width, width, rows, width, count, dq, width,
             true);
    multiply({band, 1, columns}, q, width, count, width, rows, sums.key + distance * width, width, true);
  }
  if (!at.query) return;
  for_key_blocks(at, first, [&](int64_t key, int64_t keys, int64_t distance) {
    const int64_t count = rows + keys - 1, columns = round_up(count, kLanes);
    store_band_of_keys(ds + key, rows, keys, at.keys, band, columns);
    multiply({band, columns, 1}, at.query->rows + (at.shift + distance) * width, width, keys, width, count,
             dk + key * width, width, true);
    multiply({band, 1, columns}, k + key * width, width, count, width, keys, sums.query + distance * width, width,
             true);
  });
}

template <typename scalar_t>
void backward_head(BackwardScratch& at, const Batch& batch, const Tensor& dout, const Tensor& qkv, const Head& of,
                   const float* stats, const Dropout& dropout, float scale, int64_t start, int64_t head,
                   scalar_t* dqkv, Sums sums) {
  const int64_t length = of.length, d = of.d, width = of.width, keys = of.keys;
  const int64_t row_stride = qkv.stride(0), part = qkv.stride(1);
  const scalar_t* from =
      static_cast<const scalar_t*>(qkv.const_data_ptr()) + start * row_stride + head * qkv.stride(2);
  gather(from + 2 * part, row_stride, length, d, 1.0f, at.k);
  transpose(at.k, width, keys, width, at.vt, keys);
  gather(from + part, row_stride, length, d, 1.0f, at.k);
  transpose(at.k, width, keys, width, at.kt, keys);
  gather(from, row_stride, length, d, 1.0f, at.q);
  gather(static_cast<const scalar_t*>(dout.const_data_ptr()) + start * dout.stride(0) + head * dout.stride(1),
         dout.stride(0), length, d, dropout.keep_scale, at.dout);

  const int64_t part_out = batch.num_heads * d, stride_out = 3 * part_out;
  scalar_t* to = dqkv + start * stride_out + head * d;
  const int64_t block = block_of(length, batch.window);
  for (int64_t first = 0; first < length; first += block) {
    const int64_t rows = std::min(block, length - first), row = start + first;
    const float *q = at.q + first * width, *g = at.dout + first * width;
    multiply({q, width, 1}, at.kt, keys, rows, keys, d, at.scores, keys, false);
    add_positions(of, first, rows, q, at.k, at.band, at.scores);
    multiply({g, width, 1}, at.vt, keys, rows, keys, d, at.dp, keys, false);
    if (dropout.active) draw_dropped(dropout.philox, row, rows, 0, keys / 4, head, at.dropped.data());
    softmax_backward(at.scores, at.dp, rows, length, static_cast<float>(scale * kLog2E),
                     dropout.active ? at.dropped.data() : nullptr, stats + (row * batch.num_heads + head) * 2,
                     2 * batch.num_heads);
    multiply({at.dp, keys, 1}, at.k, width, rows, width, length, at.dq, width, false);
    multiply({at.dp, 1, keys}, q, width, length, width, rows, at.dk, width, first > 0);
    multiply({at.scores, 1, keys}, g, width, length, width, rows, at.dv, width, first > 0);
    add_position_gradients(of, first, rows, q, at.k, at.dp, at.band, at.dq, at.dk, sums);
    scatter(at.dq, rows, d, &scale, 0, to + first * stride_out, stride_out);
  }
  const float one = 1.0f;
  scatter(at.dk, length, d, &scale, 0, to + part_out, stride_out);
  scatter(at.dv, length, d, &one, 0, to + 2 * part_out, stride_out);
}

// Consecutive sequences of one group whose sums are added up by one thread; about kUnits heads of chunks in all.
std::vector<Chunk> chunks_of(const Batch& batch, const Positions& positions) {
  const int64_t share = std::max(kMinShare, batch.work.back() * batch.num_heads / kUnits) / batch.num_heads;
  std::vector<Chunk> chunks;
  for (int64_t b = 0; b < batch.num_sequences; ++b) {
    const int64_t group = positions.groups[b];
    if (chunks.empty() || chunks.back().group != group || batch.work[b] - batch.work[chunks.back().first] >= share)
      chunks.push_back({b, b, group, 0});
    chunks.back().stop = b + 1;
    chunks.back().longest = std::max(chunks.back().longest, batch.length(b));
  }
  return chunks;
}

// Writes the gradient of a table, [groups, R, heads, head_dim], from the chunks' sums by distance.
template <typename scalar_t>
void reduce_sums(const std::vector<Chunk>& chunks, const std::vector<std::vector<float>>& sums, const Batch& batch,
                 const Positions& at, float scale, bool descending, scalar_t* to) {
  const int64_t heads = batch.num_heads, d = batch.head_dim, width = round_up(d, kLanes);
  torch::stable::parallel_for(0, at.num_groups * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> table(at.num_rows * width);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / heads, head = unit % heads;
      std::fill(table.begin(), table.end(), 0.0f);
      for (size_t c = 0; c < chunks.size(); ++c) {
        if (chunks[c].group != group) continue;
        const int64_t longest = chunks[c].longest, shift = batch.longest - longest;
        const int64_t count = std::max<int64_t>(2 * longest - 1, 0);
        const float* from = sums[c * heads + head].data();
        for (int64_t n = 0; n < count; ++n) {
          float* row = table.data() + at.rows[shift + (descending ? count - 1 - n : n)] * width;
          for (int64_t column = 0; column < width; ++column) row[column] += from[n * width + column];
        }
      }
      scatter(table.data(), at.num_rows, d, &scale, 0, to + (group * at.num_rows * heads + head) * d, heads * d);
    }
  });
}

void disentangled_attention_backward_out(Tensor dout, Tensor qkv, Tensor stats, Tensor cu_seqlens,
                                         Tensor position_rows, std::optional<Tensor> pos_key,
                                         std::optional<Tensor> pos_query, std::optional<Tensor> group_offsets,
                                         std::optional<Tensor> seed, int64_t threshold, double keep_scale, double scale,
                                         Tensor dqkv, std::optional<Tensor> dpos_key,
                                         std::optional<Tensor> dpos_query) {
  const char* op = "disentangled_attention_backward_out";
  const Batch batch = batch_of(op, qkv, cu_seqlens, -1);
  const Dropout dropout = dropout_of(op, seed, threshold, keep_scale);
  STD_TORCH_CHECK((pos_key || pos_query) && pos_key.has_value() == dpos_key.has_value() &&
                      pos_query.has_value() == dpos_query.has_value(),
                  op, ": each table needs its gradient");
  const Positions positions = positions_of(op, batch, position_rows, pos_key ? *pos_key : *pos_query, group_offsets);
  check_shape(op, "dout", dout, qkv, false);
  check(op, "stats", stats, ScalarType::Float, 2 * batch.num_rows * batch.num_heads);
  check(op, "dqkv", dqkv, qkv.scalar_type(), qkv.numel());
  const int64_t heads = batch.num_heads;
  const int64_t table_size = positions.num_groups * positions.num_rows * heads * batch.head_dim;
  if (dpos_key) check(op, "dpos_key", *dpos_key, qkv.scalar_type(), table_size);
  if (dpos_query) check(op, "dpos_query", *dpos_query, qkv.scalar_type(), table_size);
  const int64_t keys = round_up(batch.longest, kLanes), width = round_up(batch.head_dim, kLanes);
  const int64_t scores = std::max(kBlockScores, kMinBlock * keys) + kLanes * keys + kKeyBlock;
  const auto make_scratch = [&] {
    BackwardScratch at;
    for (float** piece : {&at.q, &at.k, &at.kt, &at.vt, &at.dout, &at.dk, &at.dv})
      *piece = at.memory.take(keys * width);
    at.dq = at.memory.take(kMaxBlock * width);
    at.scores = at.memory.take(scores);
    at.dp = at.memory.take(scores);
    at.band = at.memory.take(band_size(batch.longest));
    at.dropped.resize(scores + 32);
    return at;
  };
  const std::vector<Chunk> chunks = chunks_of(batch, positions);
  const int64_t num_units = static_cast<int64_t>(chunks.size()) * heads;
  std::vector<std::vector<float>> key_sums(num_units), query_sums(num_units);
  for_dtype(op, qkv.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto key = tables_of<scalar_t>(op, pos_key, qkv, positions, true);
    const auto query = tables_of<scalar_t>(op, pos_query, qkv, positions, false);
    auto* to = static_cast<scalar_t*>(dqkv.mutable_data_ptr());
    const auto* stats_ptr = static_cast<const float*>(stats.const_data_ptr());
    torch::stable::parallel_for(0, num_units, 1, [&](int64_t begin, int64_t end) {
      BackwardScratch scratch = make_scratch();
      for (int64_t unit = begin; unit < end; ++unit) {
        const Chunk& chunk = chunks[unit / heads];
        const int64_t head = unit % heads, size = std::max<int64_t>(2 * chunk.longest - 1, 0) * width;
        if (key) key_sums[unit].resize(size);
        if (query) query_sums[unit].resize(size);
        for (int64_t b = chunk.first; b < chunk.stop; ++b) {
          if (batch.length(b) == 0) continue;
          const int64_t shift = (chunk.longest - batch.length(b)) * width;
          const Sums sums{key ? key_sums[unit].data() + shift : nullptr,
                          query ? query_sums[unit].data() + shift : nullptr};
          backward_head(scratch, batch, dout, qkv, head_of(batch, key, query, chunk.group, b, head), stats_ptr, dropout,
                        static_cast<float>(scale), int64_t{batch.offsets[b]}, head, to, sums);
        }
      }
    });
    const auto part = static_cast<float>(scale);
    if (key)
      reduce_sums(chunks, key_sums, batch, positions, part, true, static_cast<scalar_t*>(dpos_key->mutable_data_ptr()));
    if (query)
      reduce_sums(chunks, query_sums, batch, positions, part, false,
                  static_cast<scalar_t*>(dpos_query->mutable_data_ptr()));
    const int64_t row_size = 3 * heads * batch.head_dim;
    std::fill(to + batch.tokens() * row_size, to + batch.num_rows * row_size, zero);
  });
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("disentangled_attention_backward_out", TORCH_BOX(&fastmtl::disentangled_attention_backward_out));
}
