// The position terms of disentangled attention on CPUs: checked arguments, tables, and what they add to the scores.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "disentangled_attention_rows.h"
#include "varlen_attention_batch.h"

namespace fastmtl {

constexpr double kLog2E = 1.4426950408889634;
// Keys of one band of position to content, a multiple of kLanes.
constexpr int64_t kKeyBlock = 64;

// The relative positions of a batch.
struct Positions {
  const int32_t* rows;  // of the distances 1 - longest to longest - 1
  int64_t count, num_groups, num_rows;
  std::vector<int64_t> groups;  // [sequences]
};

inline Positions positions_of(const char* op, const Batch& batch, const torch::stable::Tensor& position_rows,
                              const torch::stable::Tensor& table,
                              const std::optional<torch::stable::Tensor>& group_offsets) {
  check(op, "position_rows", position_rows, torch::headeronly::ScalarType::Int, position_rows.numel());
  const int64_t count = std::max<int64_t>(2 * batch.longest - 1, 0);
  STD_TORCH_CHECK(position_rows.numel() >= count, op, ": position_rows must have a row for each distance");
  Positions at{static_cast<const int32_t*>(position_rows.const_data_ptr()) + (position_rows.numel() - count) / 2, count,
               table.size(0), table.size(1), {}};
  STD_TORCH_CHECK(std::all_of(at.rows, at.rows + count, [&](int32_t row) { return row >= 0 && row < at.num_rows; }), op,
                  ": position_rows must be rows of the tables");
  if (!group_offsets) {
    STD_TORCH_CHECK(at.num_groups == 1, op, ": group_offsets must be given for several groups");
    at.groups.assign(batch.num_sequences, 0);
    return at;
  }
  check(op, "group_offsets", *group_offsets, torch::headeronly::ScalarType::Int, at.num_groups + 1);
  const auto* bounds = static_cast<const int32_t*>(group_offsets->const_data_ptr());
  STD_TORCH_CHECK(bounds[0] == 0 && bounds[at.num_groups] == batch.num_sequences &&
                      std::is_sorted(bounds, bounds + at.num_groups + 1),
                  op, ": group_offsets must ascend from 0 to the number of sequences");
  for (int64_t group = 0; group < at.num_groups; ++group)
    at.groups.insert(at.groups.end(), bounds[group + 1] - bounds[group], group);
  return at;
}

template <typename scalar_t>
std::optional<Tables> tables_of(const char* op, const std::optional<torch::stable::Tensor>& table,
                                const torch::stable::Tensor& qkv, const Positions& at, bool descending) {
  if (!table) return std::nullopt;
  STD_TORCH_CHECK(table->is_cpu() && table->scalar_type() == qkv.scalar_type() && table->dim() == 4 &&
                      table->size(0) == at.num_groups && table->size(1) == at.num_rows &&
                      table->size(2) == qkv.size(2) && table->size(3) == qkv.size(3) &&
                      (table->stride(3) == 1 || table->size(3) == 1),
                  op, ": tables must be [groups, rows, heads, head_dim] of qkv's dtype with adjacent columns");
  const int64_t strides[3] = {table->stride(0), table->stride(1), table->stride(2)};
  return Tables(static_cast<const scalar_t*>(table->const_data_ptr()), strides, at.num_groups, at.num_rows,
                qkv.size(2), qkv.size(3), at.rows, at.count, descending);
}

inline int64_t band_size(int64_t longest) {
  return std::max(kMaxBlock * round_up(longest + kMaxBlock, kLanes),
                  (kKeyBlock + kLanes) * round_up(kMaxBlock + kKeyBlock, kLanes)) + 2 * kLanes;
}

// One head of one sequence, with what its position terms read. shift: the distances of longer sequences.
struct Head {
  int64_t length, d, width, keys, shift;
  std::optional<ByDistance> key, query;
  int64_t key_stride, query_stride;
};

inline Head head_of(const Batch& batch, const std::optional<Tables>& key, const std::optional<Tables>& query,
                    int64_t group, int64_t b, int64_t head) {
  const int64_t length = batch.length(b), d = batch.head_dim;
  Head at{length, d, round_up(d, kLanes), round_up(length, kLanes), batch.longest - length, {}, {}, 0, 0};
  if (key) at.key = key->of(group, head), at.key_stride = key->stride();
  if (query) at.query = query->of(group, head), at.query_stride = query->stride();
  return at;
}

// Calls fn(first key, keys, first distance) for the blocks of keys of a block of queries; distances from the smallest.
template <typename F>
void for_key_blocks(const Head& at, int64_t first, const F& fn) {
  for (int64_t key = 0; key < at.length; key += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, at.length - key);
    fn(key, keys, first - key - keys + at.length);
  }
}

// Adds the position terms of queries q [rows, width] to their scores [rows, keys].
inline void add_positions(const Head& at, int64_t first, int64_t rows, const float* q, const float* k, float* band,
                   float* scores) {
  if (at.key) {
    const int64_t columns = round_up(at.length + rows - 1, kLanes);
    multiply({q, at.width, 1}, at.key->transposed + at.shift + at.length - first - rows, at.key_stride, rows, columns,
             at.d, band, columns, false);
    add_band(band, columns, rows, at.keys, scores);
  }
  if (!at.query) return;
  for_key_blocks(at, first, [&](int64_t key, int64_t keys, int64_t distance) {
    const int64_t columns = round_up(rows + keys - 1, kLanes);
    multiply({k + key * at.width, at.width, 1}, at.query->transposed + at.shift + distance, at.query_stride, keys,
             columns, at.d, band, columns, false);
    add_band_of_keys(band, columns, rows, keys, at.keys, scores + key);
  });
}

}  // namespace fastmtl
