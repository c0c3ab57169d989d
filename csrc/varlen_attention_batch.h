// The arguments of attention on CPUs, checked, and the division of its work among threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "varlen_attention_rows.h"

namespace fastmtl {

// Scores of one block of queries: with dP beside them they fit a 256 KB L2 cache for up to a thousand keys.
constexpr int64_t kBlockScores = 8192;
// A block is a multiple of 12 queries, since products are made of 4, 6 or 8 rows at a time.
constexpr int64_t kMinBlock = 24, kMaxBlock = 60;
// Scores that are worth a thread.
constexpr int64_t kMinShare = 1 << 15;

struct Batch {
  const int32_t* offsets;
  int64_t num_sequences, num_rows, num_heads, head_dim, longest;
  int64_t window;         // at least the longest sequence where there is none
  std::vector<int64_t> work;  // [num_sequences + 1], running sum of about what a head of each sequence costs

  int64_t length(int64_t b) const { return int64_t{offsets[b + 1]} - offsets[b]; }
  int64_t tokens() const { return offsets[num_sequences]; }
};

struct Dropout {
  Philox philox;
  float keep_scale;
  bool active;
};

// Rotary positions and the bias; null pointers for what is absent.
struct Terms {
  const float *cos = nullptr, *sin = nullptr;  // [places, head_dim / 2]
  const float* bias = nullptr;                 // [groups, heads, bias_size]
  int64_t bias_size = 0;
  std::vector<int32_t> bounds;  // [groups + 1], the sequences of each group
  std::vector<int64_t> groups;  // [sequences]
};

// The keys of a block of queries: [begin, begin + count), padded to whole vectors, from a multiple of kLanes.
struct Keys {
  int64_t begin, count, padded;
};

inline Keys keys_of(int64_t first, int64_t rows, int64_t length, int64_t window) {
  const int64_t begin = std::max<int64_t>(first - window, 0) / kLanes * kLanes;
  const int64_t count = std::min(length, first + rows + window) - begin;
  return {begin, count, round_up(count, kLanes)};
}

// Queries in a block. A window bounds the keys of a block, so that it may have more queries.
inline int64_t block_of(int64_t length, int64_t window) {
  const int64_t keys = std::min(length, 2 * window + kMaxBlock + 2 * kLanes);
  return std::clamp<int64_t>(kBlockScores / round_up(keys, kLanes) / 12 * 12, kMinBlock, kMaxBlock);
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

inline Batch batch_of(const char* op, const torch::stable::Tensor& qkv, const torch::stable::Tensor& cu_seqlens,
                      int64_t window) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(qkv.is_cpu() && qkv.dim() == 4 && qkv.size(1) == 3 && (qkv.stride(3) == 1 || qkv.size(3) == 1), op,
                  ": qkv must be [N, 3, heads, head_dim] on the CPU with adjacent columns");
  STD_TORCH_CHECK(cu_seqlens.is_cpu() && cu_seqlens.is_contiguous() && cu_seqlens.dim() == 1 &&
                      cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.numel() > 0,
                  op, ": cu_seqlens must be contiguous int32 of at least one element on the CPU");
  Batch batch{static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
              cu_seqlens.numel() - 1, qkv.size(0), qkv.size(2), qkv.size(3), 0, 0, {0}};
  STD_TORCH_CHECK(batch.offsets[0] == 0, op, ": cu_seqlens must begin with 0");
  // No sequence has more tokens than qkv has rows.
  batch.window = window < 0 ? batch.num_rows : std::min(window, batch.num_rows);
  for (int64_t b = 0; b < batch.num_sequences; ++b) {
    const int64_t length = batch.length(b);
    STD_TORCH_CHECK(length >= 0, op, ": cu_seqlens must not descend");
    batch.longest = std::max(batch.longest, length);
    // Linear parts beside the products, in units of a score.
    batch.work.push_back(batch.work.back() + length * (std::min(length, 2 * batch.window + 1) + 16));
  }
  STD_TORCH_CHECK(batch.tokens() <= batch.num_rows, op, ": cu_seqlens must end within qkv");
  return batch;
}

inline Dropout dropout_of(const char* op, const std::optional<torch::stable::Tensor>& seed, int64_t threshold,
                          double keep_scale) {
  if (!seed) return {{0, 0}, 1.0f, false};
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == torch::headeronly::ScalarType::Long && seed->numel() == 1,
                  op, ": seed must be an int64 tensor of one element on the CPU");
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return {{key, static_cast<int32_t>(threshold)}, static_cast<float>(keep_scale), true};
}

inline Terms terms_of(const char* op, const Batch& batch, const std::optional<torch::stable::Tensor>& rotary,
                      const std::optional<torch::stable::Tensor>& bias,
                      const std::optional<torch::stable::Tensor>& bias_offsets) {
  using torch::headeronly::ScalarType;
  Terms terms;
  if (rotary) {
    STD_TORCH_CHECK(rotary->dim() == 3 && 2 * rotary->size(2) == batch.head_dim && rotary->size(1) >= batch.longest,
                    op, ": rotary must be [2, places, head_dim / 2], with a place for each token of a sequence");
    const int64_t part = rotary->size(1) * rotary->size(2);
    check(op, "rotary", *rotary, ScalarType::Float, 2 * part);
    terms.cos = static_cast<const float*>(rotary->const_data_ptr());
    terms.sin = terms.cos + part;
  }
  if (!bias) return terms;
  STD_TORCH_CHECK(bias->dim() == 3 && bias->size(1) == batch.num_heads && bias->size(2) % 2 == 1 &&
                      bias->size(2) >= 2 * batch.longest - 1,
                  op, ": bias must be [groups, heads, 2 R - 1], R at least the length of the longest sequence");
  check(op, "bias", *bias, ScalarType::Float, bias->numel());
  terms.bias = static_cast<const float*>(bias->const_data_ptr());
  terms.bias_size = bias->size(2);
  const int64_t num_groups = bias->size(0);
  if (bias_offsets) {
    check(op, "bias_offsets", *bias_offsets, ScalarType::Int, num_groups + 1);
    const auto* bounds = static_cast<const int32_t*>(bias_offsets->const_data_ptr());
    terms.bounds.assign(bounds, bounds + num_groups + 1);
  } else {
    terms.bounds = {0, static_cast<int32_t>(batch.num_sequences)};
  }
  STD_TORCH_CHECK(static_cast<int64_t>(terms.bounds.size()) == num_groups + 1 && terms.bounds.front() == 0 &&
                      terms.bounds.back() == batch.num_sequences &&
                      std::is_sorted(terms.bounds.begin(), terms.bounds.end()),
                  op, ": bias_offsets must ascend from 0 to the number of sequences, with a range for each group");
  for (int64_t group = 0; group < num_groups; ++group)
    terms.groups.insert(terms.groups.end(), terms.bounds[group + 1] - terms.bounds[group], group);
  return terms;
}

inline void check_shape(const char* op, const char* name, const torch::stable::Tensor& tensor,
                        const torch::stable::Tensor& qkv, bool contiguous) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == qkv.scalar_type() && tensor.dim() == 3 &&
                      tensor.size(0) == qkv.size(0) && tensor.size(1) == qkv.size(2) &&
                      tensor.size(2) == qkv.size(3) &&
                      (contiguous ? tensor.is_contiguous() : tensor.stride(2) == 1 || tensor.size(2) == 1),
                  op, ": ", name, " must be [N, heads, head_dim] like qkv");
}

// Calls fn(scratch, sequence, head) for every head of every sequence that has tokens, equal shares of the work to a
// thread.
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
        fn(scratch, b, head);
      }
    }
  });
}

}  // namespace fastmtl
