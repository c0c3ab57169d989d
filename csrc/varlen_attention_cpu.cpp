// Attention over packed sequences on CPUs; the formulas are in fastmtl_kernels/varlen_attention/cpp.py.
//
// One head of one sequence at a time, in float scratch memory that stays in the caches: no token is padded, only rows
// of scores to whole vectors. Blocks of queries bound the scores that exist at once. A head of a sequence is one
// thread's from beginning to end: equal inputs give equal bits for any number of threads.
#include "varlen_attention_batch.h"
#include "varlen_attention_positions.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kLog2E = 1.4426950408889634;

// Reads of a table by relative position are whole vectors, with as many numbers as keys around the middle.
int64_t distances_of(int64_t keys) { return 2 * keys + kLanes; }

// One head of one sequence, and how its scores become probabilities.
struct Head {
  int64_t start, length, index, window;
  const float *cos, *sin;
  const float* bias;  // of distance 0, null for none
  float scale, factor;

  Head(const Batch& batch, const Terms& terms, double scale, int64_t b, int64_t head, float* table)
      : start(batch.offsets[b]), length(batch.length(b)), index(head), window(batch.window), cos(terms.cos),
        sin(terms.sin), bias(nullptr), scale(static_cast<float>(scale)) {
    if (terms.bias) {
      // A copy, since vectors read past the last distance.
      const float* middle =
          terms.bias + (terms.groups[b] * batch.num_heads + head) * terms.bias_size + terms.bias_size / 2;
      std::copy(middle - (length - 1), middle + length, table);
      bias = table + length - 1;
    }
    // Scores with terms are scaled before softmax.
    factor = static_cast<float>(has_terms() ? kLog2E : scale * kLog2E);
  }

  bool has_terms() const { return bias || window < length - 1; }

  // Q or K of the rows from `first` on, rotated, or their gradients rotated back.
  void turn(float* x, int64_t first, int64_t rows, int64_t head_dim, float direction) const {
    const int64_t half = head_dim / 2;
    if (cos) rotate(x, rows, head_dim, cos + first * half, sin + first * half, direction);
  }

  void finish_scores(float* scores, int64_t first, int64_t rows, const Keys& keys) const {
    if (!has_terms()) return;
    const int64_t place = first - keys.begin;
    add_terms(scores, rows, keys.count, scale, bias ? bias - place : nullptr, place - window, place + window);
  }
};

struct ForwardScratch {
  Scratch memory;
  float *q, *kt, *v, *scores, *out, *factors, *table;
  std::vector<int8_t> dropped;
};

template <typename scalar_t>
void forward_head(ForwardScratch& at, const Batch& batch, const Tensor& qkv, const Dropout& dropout, const Head& head,
                  scalar_t* out, float* stats) {
  const int64_t start = head.start, length = head.length, stats_stride = 2 * batch.num_heads;
  const int64_t d = batch.head_dim, width = round_up(d, kLanes), padded = round_up(length, kLanes);
  const int64_t row_stride = qkv.stride(0), part = qkv.stride(1), out_stride = batch.num_heads * d;
  const scalar_t* from =
      static_cast<const scalar_t*>(qkv.const_data_ptr()) + start * row_stride + head.index * qkv.stride(2);
  gather(from + part, row_stride, length, d, 1.0f, at.v);
  head.turn(at.v, 0, length, d, 1.0f);
  transpose(at.v, width, padded, width, at.kt, padded);
  gather(from, row_stride, length, d, 1.0f, at.q);
  head.turn(at.q, 0, length, d, 1.0f);
  gather(from + 2 * part, row_stride, length, d, 1.0f, at.v);
  const int64_t block = block_of(length, head.window);
  for (int64_t first = 0; first < length; first += block) {
    const int64_t rows = std::min(block, length - first), row = start + first;
    const Keys keys = keys_of(first, rows, length, head.window);
    multiply({at.q + first * width, width, 1}, at.kt + keys.begin, padded, rows, keys.padded, d, at.scores, keys.padded,
             false);
    head.finish_scores(at.scores, first, rows, keys);
    if (dropout.active)
      draw_dropped(dropout.philox, row, rows, keys.begin / 4, keys.padded / 4, head.index, at.dropped.data());
    float* row_stats = stats + (row * batch.num_heads + head.index) * 2;
    softmax(at.scores, rows, keys.count, head.factor, dropout.active ? at.dropped.data() : nullptr, row_stats,
            stats_stride);
    multiply({at.scores, keys.padded, 1}, at.v + keys.begin * width, width, rows, width, keys.count, at.out, width,
             false);
    for (int64_t i = 0; i < rows; ++i) at.factors[i] = dropout.keep_scale * row_stats[stats_stride * i + 1];
    scatter(at.out, rows, d, at.factors, 1, out + row * out_stride + head.index * d, out_stride);
  }
}

void varlen_attention_out(Tensor qkv, Tensor cu_seqlens, std::optional<Tensor> seed, int64_t threshold,
                          double keep_scale, double scale, Tensor out, Tensor stats, int64_t window,
                          std::optional<Tensor> rotary, std::optional<Tensor> bias,
                          std::optional<Tensor> bias_offsets) {
  const char* op = "varlen_attention_out";
  const Batch batch = batch_of(op, qkv, cu_seqlens, window);
  const Dropout dropout = dropout_of(op, seed, threshold, keep_scale);
  const Terms terms = terms_of(op, batch, rotary, bias, bias_offsets);
  check_shape(op, "out", out, qkv, true);
  check(op, "stats", stats, ScalarType::Float, 2 * batch.num_rows * batch.num_heads);
  const int64_t keys = round_up(batch.longest, kLanes), width = round_up(batch.head_dim, kLanes);
  const int64_t scores = std::max(kBlockScores, kMinBlock * keys);
  const auto make_scratch = [&] {
    ForwardScratch at;
    at.q = at.memory.take(keys * width);
    at.kt = at.memory.take(keys * width);
    at.v = at.memory.take(keys * width);
    at.scores = at.memory.take(scores);
    at.out = at.memory.take(kMaxBlock * width);
    at.factors = at.memory.take(kMaxBlock);
    at.table = terms.bias ? at.memory.take(distances_of(keys)) : nullptr;
    at.dropped.resize(scores + 32);
    return at;
  };
  for_dtype(op, qkv.scalar_type(), [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(out.mutable_data_ptr());
    auto* stats_ptr = static_cast<float*>(stats.mutable_data_ptr());
    for_each_head(batch, make_scratch, [&](ForwardScratch& at, int64_t b, int64_t head) {
      forward_head(at, batch, qkv, dropout, Head(batch, terms, scale, b, head, at.table), to, stats_ptr);
    });
    const int64_t row_size = batch.num_heads * batch.head_dim;
    std::fill(to + batch.tokens() * row_size, to + batch.num_rows * row_size, zero);
  });
}

struct BackwardScratch {
  Scratch memory;
  float *q, *k, *kt, *vt, *dout, *scores, *dp, *dq, *dk, *dv, *table, *dtable;
  std::vector<int8_t> dropped;
};

// dbias: of this head of this sequence, [2 length - 1] by distance; null for none.
template <typename scalar_t>
void backward_head(BackwardScratch& at, const Batch& batch, const Tensor& dout, const Tensor& qkv, const float* stats,
                   const Dropout& dropout, const Head& head, scalar_t* dqkv, float* dbias) {
  const int64_t start = head.start, length = head.length, stats_stride = 2 * batch.num_heads;
  const int64_t d = batch.head_dim, width = round_up(d, kLanes), padded = round_up(length, kLanes);
  const int64_t row_stride = qkv.stride(0), part = qkv.stride(1);
  const scalar_t* from =
      static_cast<const scalar_t*>(qkv.const_data_ptr()) + start * row_stride + head.index * qkv.stride(2);
  gather(from + 2 * part, row_stride, length, d, 1.0f, at.k);
  transpose(at.k, width, padded, width, at.vt, padded);
  gather(from + part, row_stride, length, d, 1.0f, at.k);
  head.turn(at.k, 0, length, d, 1.0f);
  transpose(at.k, width, padded, width, at.kt, padded);
  gather(from, row_stride, length, d, 1.0f, at.q);
  head.turn(at.q, 0, length, d, 1.0f);
  // Z is keep times keep_scale; both products that Z is part of take it from here.
  gather(static_cast<const scalar_t*>(dout.const_data_ptr()) + start * dout.stride(0) + head.index * dout.stride(1),
         dout.stride(0), length, d, dropout.keep_scale, at.dout);

  const int64_t part_out = batch.num_heads * d, stride_out = 3 * part_out;
  scalar_t* to = dqkv + start * stride_out + head.index * d;
  const int64_t block = block_of(length, head.window);
  // The first block of queries writes dK and dV, unless it sees only some of the keys.
  const bool windowed = keys_of(0, std::min(block, length), length, head.window).count < length;
  if (windowed)
    for (float* gradient : {at.dk, at.dv}) std::fill(gradient, gradient + length * width, 0.0f);
  if (dbias) std::fill(at.dtable, at.dtable + distances_of(padded), 0.0f);
  for (int64_t first = 0; first < length; first += block) {
    const int64_t rows = std::min(block, length - first), row = start + first;
    const Keys keys = keys_of(first, rows, length, head.window);
    const float *q = at.q + first * width, *g = at.dout + first * width;
    multiply({q, width, 1}, at.kt + keys.begin, padded, rows, keys.padded, d, at.scores, keys.padded, false);
    multiply({g, width, 1}, at.vt + keys.begin, padded, rows, keys.padded, d, at.dp, keys.padded, false);
    head.finish_scores(at.scores, first, rows, keys);
    if (dropout.active)
      draw_dropped(dropout.philox, row, rows, keys.begin / 4, keys.padded / 4, head.index, at.dropped.data());
    softmax_backward(at.scores, at.dp, rows, keys.count, head.factor, dropout.active ? at.dropped.data() : nullptr,
                     stats + (row * batch.num_heads + head.index) * 2, stats_stride);
    if (dbias) add_diagonals(at.dp, rows, keys.count, at.dtable + length - 1 - first + keys.begin);
    multiply({at.dp, keys.padded, 1}, at.k + keys.begin * width, width, rows, width, keys.count, at.dq, width, false);
    head.turn(at.dq, first, rows, d, -1.0f);
    scatter(at.dq, rows, d, &head.scale, 0, to + first * stride_out, stride_out);
    const int64_t seen = keys.begin * width;
    const bool add = windowed || first > 0;
    multiply({at.dp, 1, keys.padded}, q, width, keys.count, width, rows, at.dk + seen, width, add);
    multiply({at.scores, 1, keys.padded}, g, width, keys.count, width, rows, at.dv + seen, width, add);
  }
  const float one = 1.0f;
  head.turn(at.dk, 0, length, d, -1.0f);
  scatter(at.dk, length, d, &head.scale, 0, to + part_out, stride_out);
  scatter(at.dv, length, d, &one, 0, to + 2 * part_out, stride_out);
  if (dbias) std::copy(at.dtable, at.dtable + 2 * length - 1, dbias);
}

// The gradient of the bias: the sum over the sequences of each group, in their order for any number of threads.
// parts: of each head of each sequence, 2 length numbers a head.
void add_parts(const Batch& batch, const Terms& terms, const std::vector<float>& parts, float* dbias) {
  const int64_t heads = batch.num_heads, size = terms.bias_size;
  const int64_t num_groups = static_cast<int64_t>(terms.bounds.size()) - 1;
  torch::stable::parallel_for(0, num_groups * heads, kMinShare / size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t group = n / heads, head = n % heads;
      float* to = dbias + n * size;
      std::fill(to, to + size, 0.0f);
      for (int64_t b = terms.bounds[group]; b < terms.bounds[group + 1]; ++b) {
        const int64_t length = batch.length(b);
        const float* part = parts.data() + 2 * (batch.offsets[b] * heads + head * length);
        for (int64_t i = 0; i < 2 * length - 1; ++i) to[size / 2 - (length - 1) + i] += part[i];
      }
    }
  });
}

void varlen_attention_backward_out(Tensor dout, Tensor qkv, Tensor stats, Tensor cu_seqlens, std::optional<Tensor> seed,
                                   int64_t threshold, double keep_scale, double scale, Tensor dqkv, int64_t window,
                                   std::optional<Tensor> rotary, std::optional<Tensor> bias,
                                   std::optional<Tensor> bias_offsets, std::optional<Tensor> dbias) {
  const char* op = "varlen_attention_backward_out";
  const Batch batch = batch_of(op, qkv, cu_seqlens, window);
  const Dropout dropout = dropout_of(op, seed, threshold, keep_scale);
  const Terms terms = terms_of(op, batch, rotary, bias, bias_offsets);
  check_shape(op, "dout", dout, qkv, false);
  check(op, "stats", stats, ScalarType::Float, 2 * batch.num_rows * batch.num_heads);
  check(op, "dqkv", dqkv, qkv.scalar_type(), qkv.numel());
  if (dbias) check(op, "dbias", *dbias, ScalarType::Float, bias ? bias->numel() : -1);
  std::vector<float> parts(dbias ? 2 * batch.tokens() * batch.num_heads : 0);
  const int64_t keys = round_up(batch.longest, kLanes), width = round_up(batch.head_dim, kLanes);
  const int64_t scores = std::max(kBlockScores, kMinBlock * keys);
  const auto make_scratch = [&] {
    BackwardScratch at;
    for (float** piece : {&at.q, &at.k, &at.kt, &at.vt, &at.dout, &at.dk, &at.dv})
      *piece = at.memory.take(keys * width);
    at.dq = at.memory.take(kMaxBlock * width);
    at.scores = at.memory.take(scores);
    at.dp = at.memory.take(scores);
    at.table = terms.bias ? at.memory.take(distances_of(keys)) : nullptr;
    at.dtable = dbias ? at.memory.take(distances_of(keys)) : nullptr;
    at.dropped.resize(scores + 32);
    return at;
  };
  for_dtype(op, qkv.scalar_type(), [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(dqkv.mutable_data_ptr());
    const auto* stats_ptr = static_cast<const float*>(stats.const_data_ptr());
    for_each_head(batch, make_scratch, [&](BackwardScratch& at, int64_t b, int64_t head) {
      float* part =
          dbias ? parts.data() + 2 * (batch.offsets[b] * batch.num_heads + head * batch.length(b)) : nullptr;
      const Head one(batch, terms, static_cast<float>(scale), b, head, at.table);
      backward_head(at, batch, dout, qkv, stats_ptr, dropout, one, to, part);
    });
    const int64_t row_size = 3 * batch.num_heads * batch.head_dim;
    std::fill(to + batch.tokens() * row_size, to + batch.num_rows * row_size, zero);
  });
  if (dbias) add_parts(batch, terms, parts, static_cast<float*>(dbias->mutable_data_ptr()));
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("varlen_attention_out", TORCH_BOX(&fastmtl::varlen_attention_out));
  m.impl("varlen_attention_backward_out", TORCH_BOX(&fastmtl::varlen_attention_backward_out));
}
