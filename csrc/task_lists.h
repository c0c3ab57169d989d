// Task gradients J [T, P] as T lists of K tensors on a CPU: their checks, their columns, their weighted sum.
//
// Lists are task-major: grads[t * K + k] is task t's gradient of tensor k. J's P columns, all tensors in a row, are cut
// into pieces of kPiece columns, each for one thread.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace fastmtl {

constexpr int64_t kPiece = 1 << 16;

struct Columns {
  std::vector<int64_t> offsets;  // [K + 1], first column of every tensor
  int64_t num_pieces() const { return (offsets.back() + kPiece - 1) / kPiece; }
};

inline Columns columns_of(const std::vector<torch::stable::Tensor>& tensors, int64_t num_tensors) {
  Columns columns{{0}};
  for (int64_t k = 0; k < num_tensors; ++k) columns.offsets.push_back(columns.offsets.back() + tensors[k].numel());
  return columns;
}

// Calls fn(tensor, first element, number of elements) for the parts of tensors that make up one piece.
template <typename F>
void for_each_part(const Columns& columns, int64_t piece, const F& fn) {
  const auto& offsets = columns.offsets;
  const int64_t end = std::min((piece + 1) * kPiece, offsets.back());
  int64_t column = piece * kPiece;
  auto next = std::upper_bound(offsets.begin(), offsets.end(), column);
  while (column < end) {
    const int64_t tensor = next - offsets.begin() - 1;
    const int64_t stop = std::min(*next, end);
    if (stop > column) fn(tensor, column - offsets[tensor], stop - column);
    column = stop;
    ++next;
  }
}

// Sizes, dtypes and layout as the kernels assume them: tensor k alike in all tasks and contiguous.
inline void check_lists(const char* op, const std::vector<torch::stable::Tensor>& grads, int64_t num_tasks) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(num_tasks > 0 && !grads.empty() && grads.size() % num_tasks == 0, op,
                  ": grads must hold the same number of tensors for each of ", num_tasks, " tasks");
  const int64_t num_tensors = grads.size() / num_tasks;
  for (size_t n = 0; n < grads.size(); ++n) {
    const torch::stable::Tensor& first = grads[n % num_tensors];
    const ScalarType dtype = grads[n].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                    ": grads must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(grads[n].is_contiguous(), op, ": grads must be contiguous");
    STD_TORCH_CHECK(grads[n].is_cpu(), op, ": grads must be on the CPU");
    STD_TORCH_CHECK(grads[n].numel() == first.numel() && dtype == first.scalar_type(), op,
                    ": tensor ", n % num_tensors, " differs between tasks in size or dtype");
  }
}

inline std::vector<const void*> pointers_to(const std::vector<torch::stable::Tensor>& tensors) {
  std::vector<const void*> pointers;
  for (const torch::stable::Tensor& tensor : tensors) pointers.push_back(tensor.const_data_ptr());
  return pointers;
}

// The rows of all tasks at one element of one tensor.
inline void gather_rows(const std::vector<const void*>& data, int64_t num_tensors, int64_t tensor, size_t byte_offset,
                        std::vector<const void*>& rows) {
  for (size_t t = 0; t < rows.size(); ++t)
    rows[t] = static_cast<const char*>(data[t * num_tensors + tensor]) + byte_offset;
}

template <typename scalar_t, typename out_t>
FASTMTL_INLINE void combine_part(const scalar_t* const* __restrict rows, const float* __restrict weights,
                                 int64_t num_tasks, int64_t count, out_t* out) {
  int64_t p = 0;
  for (; p + 2 * kLanes <= count; p += 2 * kLanes) {
    Lanes acc0 = {}, acc1 = {}, x0, x1;
    for (int64_t t = 0; t < num_tasks; ++t) {
      load(rows[t] + p, x0);
      load(rows[t] + p + kLanes, x1);
      acc0 += weights[t] * x0;
      acc1 += weights[t] * x1;
    }
    store(acc0, out + p);
    store(acc1, out + p + kLanes);
  }
  for (; p < count; p += kLanes) {
    const int64_t left = std::min(count - p, kLanes);
    Lanes acc = {}, x;
    for (int64_t t = 0; t < num_tasks; ++t) {
      load_tail(rows[t] + p, left, x);
      acc += weights[t] * x;
    }
    store_tail(acc, out + p, left);
  }
}

}  // namespace fastmtl
