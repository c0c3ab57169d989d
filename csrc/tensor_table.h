// Lists of tensors as the parameter of a CUDA kernel, and the pieces of columns that its blocks work on.
//
// Lists are task-major: grads[t * K + k] is task t's gradient of tensor k. Piece by piece, the tensors of a launch are
// numbered through; no piece holds columns of two tensors.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastmtl {

constexpr int kVectorBytes = 16;

// What a tensor holds and what combine makes of it.
enum Kind : uint8_t { kFloat, kBFloat16, kHalf, kBFloat16ToFloat, kHalfToFloat };

// The tensors of one launch, as large as the parameters of a kernel may be.
struct Table {
  static constexpr int kMaxTensors = 448;
  static constexpr int kMaxPointers = 3200;
  int64_t numel[kMaxTensors];
  const void* rows[kMaxPointers];  // [tensor][task], for combine [tensor][task..., out]
  int first_piece[kMaxTensors];
  Kind kind[kMaxTensors];
  bool aligned[kMaxTensors];
  int num_tensors;
  int row_stride;
  int piece_columns;
};
static_assert(sizeof(Table) <= 32000, "a kernel takes up to 32,764 bytes of parameters");

// The columns [begin, begin + count) of one tensor.
struct Piece {
  int tensor;
  int count;
  int64_t begin;
};

// The block's share of a launch: first_piece ascends, so that a binary search finds the tensor.
__device__ inline Piece find_piece(const Table& table, int piece) {
  int low = 0, high = table.num_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_piece[middle] <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t begin = static_cast<int64_t>(piece - table.first_piece[low]) * table.piece_columns;
  const int64_t left = table.numel[low] - begin;
  return {low, static_cast<int>(left < table.piece_columns ? left : table.piece_columns), begin};
}

inline Kind kind_of(torch::headeronly::ScalarType from, torch::headeronly::ScalarType to) {
  using torch::headeronly::ScalarType;
  if (from == ScalarType::Float) return kFloat;
  if (from == ScalarType::BFloat16) return to == ScalarType::Float ? kBFloat16ToFloat : kBFloat16;
  return to == ScalarType::Float ? kHalfToFloat : kHalf;
}

template <typename Tensor>
int num_pieces_of(const Tensor& tensor, int piece_columns) {
  return static_cast<int>((tensor.numel() + piece_columns - 1) / piece_columns);
}

// Calls launch(table, number of pieces) for as many tensors at a time as a table holds. out is empty for gramian.
template <typename Tensor, typename Launch>
void for_each_table(const std::vector<Tensor>& grads, int64_t num_tasks, const std::vector<Tensor>& out,
                    int piece_columns, const Launch& launch) {
  const int64_t num_tensors = grads.size() / num_tasks;
  Table table{};
  table.row_stride = static_cast<int>(num_tasks) + !out.empty();
  table.piece_columns = piece_columns;
  const int64_t capacity = std::min(Table::kMaxTensors, Table::kMaxPointers / table.row_stride);
  for (int64_t first = 0; first < num_tensors; first += capacity) {
    table.num_tensors = static_cast<int>(std::min(capacity, num_tensors - first));
    int num_pieces = 0;
    for (int k = 0; k < table.num_tensors; ++k) {
      const Tensor& tensor = grads[first + k];
      const auto dtype = tensor.scalar_type();
      const void** rows = table.rows + k * table.row_stride;
      for (int64_t t = 0; t < num_tasks; ++t) rows[t] = grads[t * num_tensors + first + k].const_data_ptr();
      if (!out.empty()) rows[num_tasks] = out[first + k].mutable_data_ptr();
      table.numel[k] = tensor.numel();
      table.first_piece[k] = num_pieces;
      table.kind[k] = kind_of(dtype, out.empty() ? dtype : out[first + k].scalar_type());
      table.aligned[k] = std::all_of(rows, rows + table.row_stride, [](const void* row) {
        return reinterpret_cast<uintptr_t>(row) % kVectorBytes == 0;
      });
      num_pieces += num_pieces_of(tensor, piece_columns);
    }
    if (num_pieces > 0) launch(table, num_pieces);
  }
}

}  // namespace fastmtl
