// gramian and combine on CPUs: one read of the task gradients J [T, P] each.
//
//   gramian  G[i, j] = sum_p J[i, p] J[j, p]        fp32 within a block, fp64 across blocks
//   combine  out[p]  = sum_t weights[t] J[t, p]     fp32
//
// J comes as T lists of K tensors and is never copied. Its P columns, all tensors in a row, are cut into pieces of
// kPiece columns; a piece belongs to one thread, its partial sums are added up in the order of the pieces, and neither
// depends on how many threads there are: equal inputs give equal bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "task_lists.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of one block times tasks: a block of fp32 rows stays in a 32 KB L1 cache.
constexpr int64_t kBlockElements = 6144;
constexpr int64_t kGroup = 4;

FASTMTL_INLINE double sum_lanes(Lanes lanes) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// One step of the inner product of kRows rows with kCols rows, or of the upper triangle of kRows rows with themselves.
template <int kRows, int kCols, bool kTriangle>
FASTMTL_INLINE void multiply_add(const Lanes* a, const Lanes* b, Lanes (&acc)[kRows][kCols]) {
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = kTriangle ? i : 0; j < kCols; ++j) acc[i][j] += a[i] * b[j];
}

template <int kRows, int kCols, bool kTriangle, typename scalar_t>
FASTMTL_INLINE void tile(const scalar_t* const* rows, int64_t row, int64_t col, int64_t begin, int64_t end,
                         int64_t num_tasks, double* partial) {
  const scalar_t* a_ptr[kRows];
  const scalar_t* b_ptr[kCols];
  for (int i = 0; i < kRows; ++i) a_ptr[i] = rows[row + i];
  for (int j = 0; j < kCols; ++j) b_ptr[j] = rows[col + j];
  Lanes acc[kRows][kCols] = {};
  Lanes a[kRows], b[kCols];
  int64_t p = begin;
  for (; p + kLanes <= end; p += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) load(a_ptr[i] + p, a[i]);
    if (!kTriangle) {
#pragma GCC unroll 4
      for (int j = 0; j < kCols; ++j) load(b_ptr[j] + p, b[j]);
    }
    multiply_add<kRows, kCols, kTriangle>(a, kTriangle ? a : b, acc);
  }
  if (p < end) {
    for (int i = 0; i < kRows; ++i) load_tail(a_ptr[i] + p, end - p, a[i]);
    for (int j = 0; j < kCols; ++j) load_tail(b_ptr[j] + p, end - p, b[j]);
    multiply_add<kRows, kCols, kTriangle>(a, b, acc);
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = kTriangle ? i : 0; j < kCols; ++j)
      partial[(row + i) * num_tasks + col + j] += sum_lanes(acc[i][j]);
}

template <typename scalar_t>
FASTMTL_INLINE void gramian_part(const scalar_t* const* __restrict rows, int64_t num_tasks, int64_t count,
                                 double* partial) {
  const int64_t block = std::max<int64_t>(kBlockElements / num_tasks / kLanes, 16) * kLanes;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = std::min(begin + block, count);
    for (int64_t row = 0; row < num_tasks; row += kGroup) {
      switch (std::min(num_tasks - row, kGroup)) {
        case 1: tile<1, 1, true>(rows, row, row, begin, end, num_tasks, partial); break;
        case 2: tile<2, 2, true>(rows, row, row, begin, end, num_tasks, partial); break;
        case 3: tile<3, 3, true>(rows, row, row, begin, end, num_tasks, partial); break;
        default: tile<4, 4, true>(rows, row, row, begin, end, num_tasks, partial);
      }
      int64_t col = row + kGroup;
      for (; col + 2 <= num_tasks; col += 2) tile<4, 2, false>(rows, row, col, begin, end, num_tasks, partial);
      if (col < num_tasks) tile<4, 1, false>(rows, row, col, begin, end, num_tasks, partial);
    }
  }
}

using Pointers = const void* const*;

FASTMTL_CLONES void gramian_float(Pointers rows, int64_t num_tasks, int64_t count, double* partial) {
  gramian_part(reinterpret_cast<const float* const*>(rows), num_tasks, count, partial);
}
FASTMTL_CLONES void gramian_bfloat16(Pointers rows, int64_t num_tasks, int64_t count, double* partial) {
  gramian_part(reinterpret_cast<const BFloat16* const*>(rows), num_tasks, count, partial);
}
FASTMTL_CLONES void gramian_half(Pointers rows, int64_t num_tasks, int64_t count, double* partial) {
  gramian_part(reinterpret_cast<const Half* const*>(rows), num_tasks, count, partial);
}
FASTMTL_CLONES void combine_float(Pointers rows, const float* weights, int64_t num_tasks, int64_t count, float* out) {
  combine_part(reinterpret_cast<const float* const*>(rows), weights, num_tasks, count, out);
}
FASTMTL_CLONES void combine_bfloat16(Pointers rows, const float* weights, int64_t num_tasks, int64_t count,
                                     BFloat16* out) {
  combine_part(reinterpret_cast<const BFloat16* const*>(rows), weights, num_tasks, count, out);
}
FASTMTL_CLONES void combine_bfloat16_float(Pointers rows, const float* weights, int64_t num_tasks, int64_t count,
                                           float* out) {
  combine_part(reinterpret_cast<const BFloat16* const*>(rows), weights, num_tasks, count, out);
}
FASTMTL_CLONES void combine_half(Pointers rows, const float* weights, int64_t num_tasks, int64_t count, Half* out) {
  combine_part(reinterpret_cast<const Half* const*>(rows), weights, num_tasks, count, out);
}
FASTMTL_CLONES void combine_half_float(Pointers rows, const float* weights, int64_t num_tasks, int64_t count,
                                       float* out) {
  combine_part(reinterpret_cast<const Half* const*>(rows), weights, num_tasks, count, out);
}

Tensor gramian(std::vector<Tensor> grads, int64_t num_tasks) {
  check_lists("gramian", grads, num_tasks);
  const int64_t num_tensors = grads.size() / num_tasks, num_entries = num_tasks * num_tasks;
  const Columns columns = columns_of(grads, num_tensors);
  const std::vector<const void*> data = pointers_to(grads);
  std::vector<double> partials(columns.num_pieces() * num_entries, 0.0);
  torch::stable::parallel_for(0, columns.num_pieces(), 1, [&](int64_t first, int64_t last) {
    std::vector<const void*> rows(num_tasks);
    for (int64_t piece = first; piece < last; ++piece) {
      double* partial = partials.data() + piece * num_entries;
      for_each_part(columns, piece, [&](int64_t tensor, int64_t begin, int64_t count) {
        gather_rows(data, num_tensors, tensor, begin * grads[tensor].element_size(), rows);
        switch (grads[tensor].scalar_type()) {
          case ScalarType::Float: return gramian_float(rows.data(), num_tasks, count, partial);
          case ScalarType::BFloat16: return gramian_bfloat16(rows.data(), num_tasks, count, partial);
          default: return gramian_half(rows.data(), num_tasks, count, partial);
        }
      });
    }
  });
  const std::vector<int64_t> size{num_tasks, num_tasks};
  Tensor gram = torch::stable::new_empty(grads[0], size, ScalarType::Float);
  float* out = static_cast<float*>(gram.mutable_data_ptr());
  for (int64_t i = 0; i < num_tasks; ++i) {
    for (int64_t j = i; j < num_tasks; ++j) {
      double sum = 0;
      for (int64_t piece = 0; piece < columns.num_pieces(); ++piece)
        sum += partials[piece * num_entries + i * num_tasks + j];
      out[i * num_tasks + j] = out[j * num_tasks + i] = static_cast<float>(sum);
    }
  }
  return gram;
}

void combine_out(std::vector<Tensor> grads, Tensor weights, std::vector<Tensor> out) {
  const int64_t num_tasks = weights.numel(), num_tensors = out.size();
  check_lists("combine_out", grads, num_tasks);
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) == num_tasks * num_tensors,
                  "combine_out: out must hold one tensor for each tensor of a task");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous() && weights.is_cpu(),
                  "combine_out: weights must be contiguous float32 on the CPU");
  for (int64_t k = 0; k < num_tensors; ++k) {
    STD_TORCH_CHECK(out[k].is_contiguous() && out[k].is_cpu() && out[k].numel() == grads[k].numel(),
                    "combine_out: out must be contiguous, on the CPU and as large as grads");
    STD_TORCH_CHECK(out[k].scalar_type() == ScalarType::Float || out[k].scalar_type() == grads[k].scalar_type(),
                    "combine_out: out must be float32 or of the dtype of grads");
  }
  const Columns columns = columns_of(grads, num_tensors);
  const std::vector<const void*> data = pointers_to(grads);
  const float* w = static_cast<const float*>(weights.const_data_ptr());
  torch::stable::parallel_for(0, columns.num_pieces(), 1, [&](int64_t first, int64_t last) {
    std::vector<const void*> rows(num_tasks);
    for (int64_t piece = first; piece < last; ++piece) {
      for_each_part(columns, piece, [&](int64_t tensor, int64_t begin, int64_t count) {
        gather_rows(data, num_tensors, tensor, begin * grads[tensor].element_size(), rows);
        void* to = static_cast<char*>(out[tensor].mutable_data_ptr()) + begin * out[tensor].element_size();
        const bool to_float = out[tensor].scalar_type() == ScalarType::Float;
        switch (grads[tensor].scalar_type()) {
          case ScalarType::Float: return combine_float(rows.data(), w, num_tasks, count, static_cast<float*>(to));
          case ScalarType::BFloat16:
            if (to_float)
              return combine_bfloat16_float(rows.data(), w, num_tasks, count, static_cast<float*>(to));
            return combine_bfloat16(rows.data(), w, num_tasks, count, static_cast<BFloat16*>(to));
          default:
            if (to_float) return combine_half_float(rows.data(), w, num_tasks, count, static_cast<float*>(to));
            return combine_half(rows.data(), w, num_tasks, count, static_cast<Half*>(to));
        }
      });
    }
  });
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("gramian", TORCH_BOX(&fastmtl::gramian));
  m.impl("combine_out", TORCH_BOX(&fastmtl::combine_out));
}
