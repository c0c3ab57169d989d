// Attention over packed sequences on CPUs; the formulas are in fastmtl_kernels/varlen_attention/cpp.py.
//
// One head of one sequence at a time, in float scratch memory that stays in the caches: no token is padded, only rows
// of scores to whole vectors. Blocks of queries bound the scores that exist at once. A head of a sequence is one
// thread's from beginning to end: equal inputs give equal bits for any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "varlen_attention_rows.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kLog2E = 1.4426950408889634;
// Scores of one block of queries: with dP beside them they fit a 256 KB L2 cache for up to a thousand keys.
constexpr int64_t kBlockScores = 8192;
// A block is a multiple of 12 queries, since products are made of 4, 6 or 8 rows at a time.
constexpr int64_t kMinBlock = 24, kMaxBlock = 60;
// Scores that are worth a thread.
constexpr int64_t kMinShare = 1 << 15;

struct Batch {
  const int32_t* offsets;
  int64_t num_sequences, num_rows, num_heads, head_dim, longest;
  std::vector<int64_t> work;  // [num_sequences + 1], running sum of about what a head of each sequence costs
};

struct Dropout {
  Philox philox;
  float keep_scale;
  bool active;
};

int64_t block_of(int64_t length) {
  return std::clamp<int64_t>(kBlockScores / round_up(length, kLanes) / 12 * 12, kMinBlock, kMaxBlock);
}

// Scratch memory of a thread, one allocation cut into pieces that begin at cache lines.
class Scratch {
 public:
  float* take(int64_t count) {
    pieces_.emplace_back(count + 16);
    const auto address = reinterpret_cast<uintptr_t>(pieces_.back().data());
    return pieces_.back().data() + (-address % 64) / sizeof(float);
  }

 private:
  std::vector<std::vector<float>> pieces_;
};

Batch batch_of(const char* op, const Tensor& qkv, const Tensor& cu_seqlens) {
  STD_TORCH_CHECK(qkv.is_cpu() && qkv.dim() == 4 && qkv.size(1) == 3 && (qkv.stride(3) == 1 || qkv.size(3) == 1), op,
                  ": qkv must be [N, 3, heads, head_dim] on the CPU with adjacent columns");
  STD_TORCH_CHECK(cu_seqlens.is_cpu() && cu_seqlens.is_contiguous() && cu_seqlens.dim() == 1 &&
                      cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.numel() > 0,
                  op, ": cu_seqlens must be contiguous int32 of at least one element on the CPU");
  Batch batch{static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
              cu_seqlens.numel() - 1, qkv.size(0), qkv.size(2), qkv.size(3), 0, {0}};
  STD_TORCH_CHECK(batch.offsets[0] == 0, op, ": cu_seqlens must begin with 0");
  for (int64_t b = 0; b < batch.num_sequences; ++b) {
    const int64_t length = int64_t{batch.offsets[b + 1]} - batch.offsets[b];
    STD_TORCH_CHECK(length >= 0, op, ": cu_seqlens must not descend");
    batch.longest = std::max(batch.longest, length);
    // Linear parts beside the products, in units of a score.
    batch.work.push_back(batch.work.back() + length * (length + 16));
  }
  STD_TORCH_CHECK(batch.offsets[batch.num_sequences] <= batch.num_rows, op, ": cu_seqlens must end within qkv");
  return batch;
}

Dropout dropout_of(const char* op, const std::optional<Tensor>& seed, int64_t threshold, double keep_scale) {
  if (!seed) return {{0, 0}, 1.0f, false};
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
                  ": seed must be an int64 tensor of one element on the CPU");
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return {{key, static_cast<int32_t>(threshold)}, static_cast<float>(keep_scale), true};
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& qkv, bool contiguous) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == qkv.scalar_type() && tensor.dim() == 3 &&
                      tensor.size(0) == qkv.size(0) && tensor.size(1) == qkv.size(2) &&
                      tensor.size(2) == qkv.size(3) &&
                      (contiguous ? tensor.is_contiguous() : tensor.stride(2) == 1 || tensor.size(2) == 1),
                  op, ": ", name, " must be [N, heads, head_dim] like qkv");
}

// Calls fn(scratch, first row, length, head) for every head of every sequence, equal shares of the work to a thread.
template <typename MakeScratch, typename F>
void for_each_head(const Batch& batch, const MakeScratch& make_scratch, const F& fn) {
  const std::vector<int64_t>& work = batch.work;
  const int64_t heads = batch.num_heads;
  torch::stable::parallel_for(0, work.back() * heads, kMinShare, [&](int64_t begin, int64_t end) {
    auto scratch = make_scratch();
    int64_t b = std::upper_bound(work.begin(), work.end(), begin / heads) - work.begin() - 1;
    for (; b < batch.num_sequences && work[b] * heads < end; ++b) {
      // A head belongs to the share that its first unit of work is in.
      const int64_t head_work = work[b + 1] - work[b];
      if (head_work == 0) continue;
      const int64_t before = std::max<int64_t>(begin - work[b] * heads, 0);
      for (int64_t head = (before + head_work - 1) / head_work; head < heads; ++head) {
        if (work[b] * heads + head * head_work >= end) return;
        fn(scratch, int64_t{batch.offsets[b]}, int64_t{batch.offsets[b + 1]} - batch.offsets[b], head);
      }
    }
  });
}

struct ForwardScratch {
  Scratch memory;
  float *q, *kt, *v, *scores, *out, *factors;
  std::vector<int8_t> dropped;
};

template <typename scalar_t>
void forward_head(ForwardScratch& at, const Batch& batch, const Tensor& qkv, const Dropout& dropout, float factor,
                  int64_t start, int64_t length, int64_t head, scalar_t* out, float* stats) {
  const int64_t d = batch.head_dim, width = round_up(d, kLanes), keys = round_up(length, kLanes);
  const int64_t row_stride = qkv.stride(0), part = qkv.stride(1), out_stride = batch.num_heads * d;
  const scalar_t* from =
      static_cast<const scalar_t*>(qkv.const_data_ptr()) + start * row_stride + head * qkv.stride(2);
  gather(from + part, row_stride, length, d, 1.0f, at.v);
  transpose(at.v, width, keys, width, at.kt, keys);
  gather(from, row_stride, length, d, 1.0f, at.q);
  gather(from + 2 * part, row_stride, length, d, 1.0f, at.v);
  const int64_t block = block_of(length);
  for (int64_t first = 0; first < length; first += block) {
    const int64_t rows = std::min(block, length - first), row = start + first;
    multiply({at.q + first * width, width, 1}, at.kt, keys, rows, keys, d, at.scores, keys, false);
    if (dropout.active) draw_dropped(dropout.philox, row, rows, keys / 4, head, at.dropped.data());
    float* row_stats = stats + (row * batch.num_heads + head) * 2;
    softmax(at.scores, rows, length, factor, dropout.active ? at.dropped.data() : nullptr, row_stats,
            2 * batch.num_heads);
    multiply({at.scores, keys, 1}, at.v, width, rows, width, length, at.out, width, false);
    for (int64_t i = 0; i < rows; ++i) at.factors[i] = dropout.keep_scale * row_stats[2 * batch.num_heads * i + 1];
    scatter(at.out, rows, d, at.factors, 1, out + row * out_stride + head * d, out_stride);
  }
}

void varlen_attention_out(Tensor qkv, Tensor cu_seqlens, std::optional<Tensor> seed, int64_t threshold,
                          double keep_scale, double scale, Tensor out, Tensor stats) {
  const char* op = "varlen_attention_out";
  const Batch batch = batch_of(op, qkv, cu_seqlens);
  const Dropout dropout = dropout_of(op, seed, threshold, keep_scale);
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
    at.dropped.resize(scores + 32);
    return at;
  };
  for_dtype(op, qkv.scalar_type(), [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(out.mutable_data_ptr());
    auto* stats_ptr = static_cast<float*>(stats.mutable_data_ptr());
    for_each_head(batch, make_scratch, [&](ForwardScratch& at, int64_t start, int64_t length, int64_t head) {
      forward_head(at, batch, qkv, dropout, static_cast<float>(scale * kLog2E), start, length, head, to, stats_ptr);
    });
    const int64_t row_size = batch.num_heads * batch.head_dim;
    std::fill(to + batch.offsets[batch.num_sequences] * row_size, to + batch.num_rows * row_size, zero);
  });
}

struct BackwardScratch {
  Scratch memory;
  float *q, *k, *kt, *vt, *dout, *scores, *dp, *dq, *dk, *dv;
  std::vector<int8_t> dropped;
};

template <typename scalar_t>
void backward_head(BackwardScratch& at, const Batch& batch, const Tensor& dout, const Tensor& qkv, const float* stats,
                   const Dropout& dropout, float scale, int64_t start, int64_t length, int64_t head, scalar_t* dqkv) {
  const int64_t d = batch.head_dim, width = round_up(d, kLanes), keys = round_up(length, kLanes);
  const int64_t row_stride = qkv.stride(0), part = qkv.stride(1);
  const scalar_t* from =
      static_cast<const scalar_t*>(qkv.const_data_ptr()) + start * row_stride + head * qkv.stride(2);
  gather(from + 2 * part, row_stride, length, d, 1.0f, at.k);
  transpose(at.k, width, keys, width, at.vt, keys);
  gather(from + part, row_stride, length, d, 1.0f, at.k);
  transpose(at.k, width, keys, width, at.kt, keys);
  gather(from, row_stride, length, d, 1.0f, at.q);
  // Z is keep times keep_scale; both products that Z is part of take it from here.
  gather(static_cast<const scalar_t*>(dout.const_data_ptr()) + start * dout.stride(0) + head * dout.stride(1),
         dout.stride(0), length, d, dropout.keep_scale, at.dout);

  const int64_t part_out = batch.num_heads * d, stride_out = 3 * part_out;
  scalar_t* to = dqkv + start * stride_out + head * d;
  const int64_t block = block_of(length);
  for (int64_t first = 0; first < length; first += block) {
    const int64_t rows = std::min(block, length - first), row = start + first;
    const float *q = at.q + first * width, *g = at.dout + first * width;
    multiply({q, width, 1}, at.kt, keys, rows, keys, d, at.scores, keys, false);
    multiply({g, width, 1}, at.vt, keys, rows, keys, d, at.dp, keys, false);
    if (dropout.active) draw_dropped(dropout.philox, row, rows, keys / 4, head, at.dropped.data());
    softmax_backward(at.scores, at.dp, rows, length, static_cast<float>(scale * kLog2E),
                     dropout.active ? at.dropped.data() : nullptr, stats + (row * batch.num_heads + head) * 2,
                     2 * batch.num_heads);
    multiply({at.dp, keys, 1}, at.k, width, rows, width, length, at.dq, width, false);
    scatter(at.dq, rows, d, &scale, 0, to + first * stride_out, stride_out);
    multiply({at.dp, 1, keys}, q, width, length, width, rows, at.dk, width, first > 0);
    multiply({at.scores, 1, keys}, g, width, length, width, rows, at.dv, width, first > 0);
  }
  const float one = 1.0f;
  scatter(at.dk, length, d, &scale, 0, to + part_out, stride_out);
  scatter(at.dv, length, d, &one, 0, to + 2 * part_out, stride_out);
}

void varlen_attention_backward_out(Tensor dout, Tensor qkv, Tensor stats, Tensor cu_seqlens, std::optional<Tensor> seed,
                                   int64_t threshold, double keep_scale, double scale, Tensor dqkv) {
  const char* op = "varlen_attention_backward_out";
  const Batch batch = batch_of(op, qkv, cu_seqlens);
  const Dropout dropout = dropout_of(op, seed, threshold, keep_scale);
  check_shape(op, "dout", dout, qkv, false);
  check(op, "stats", stats, ScalarType::Float, 2 * batch.num_rows * batch.num_heads);
  check(op, "dqkv", dqkv, qkv.scalar_type(), qkv.numel());
  const int64_t keys = round_up(batch.longest, kLanes), width = round_up(batch.head_dim, kLanes);
  const int64_t scores = std::max(kBlockScores, kMinBlock * keys);
  const auto make_scratch = [&] {
    BackwardScratch at;
    for (float** piece : {&at.q, &at.k, &at.kt, &at.vt, &at.dout, &at.dk, &at.dv})
      *piece = at.memory.take(keys * width);
    at.dq = at.memory.take(kMaxBlock * width);
    at.scores = at.memory.take(scores);
    at.dp = at.memory.take(scores);
    at.dropped.resize(scores + 32);
    return at;
  };
  for_dtype(op, qkv.scalar_type(), [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(dqkv.mutable_data_ptr());
    const auto* stats_ptr = static_cast<const float*>(stats.const_data_ptr());
    for_each_head(batch, make_scratch, [&](BackwardScratch& at, int64_t start, int64_t length, int64_t head) {
      backward_head(at, batch, dout, qkv, stats_ptr, dropout, static_cast<float>(scale), start, length, head, to);
    });
    const int64_t row_size = 3 * batch.num_heads * batch.head_dim;
    std::fill(to + batch.offsets[batch.num_sequences] * row_size, to + batch.num_rows * row_size, zero);
  });
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("varlen_attention_out", TORCH_BOX(&fastmtl::varlen_attention_out));
  m.impl("varlen_attention_backward_out", TORCH_BOX(&fastmtl::varlen_attention_backward_out));
}
