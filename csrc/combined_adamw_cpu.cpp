// AdamW's update from task gradients on CPUs: one read of J [T, P], weights and moments, one write of these.
//
//   g = sum_t weights[t] J[t]
//   m += (1 - beta1) (g - m)      v = beta2 v + (1 - beta2) g^2
//   p = decay p - step_size m / (sqrt(v) root + eps)
//
// decay = 1 - lr weight_decay, step_size = lr / (1 - beta1^step), root = 1 / sqrt(1 - beta2^step). fp32; J also fp16 and
// bf16, and so is the copy of p that may be kept. Every element by itself: equal bits for any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "task_lists.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The merged gradient exists for this many columns at a time, in the L1 cache.
constexpr int64_t kBlock = 1024;

struct Update {
  float decay, beta1_left, beta2, beta2_left, step_size, root, eps;
};

// What is written of one tensor; copy is null where none is kept.
struct Target {
  float* param;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;
  ScalarType copy_dtype;

  Target from(int64_t element) const {
    char* at = copy ? static_cast<char*>(copy) + 2 * element : nullptr;
    return {param + element, exp_avg + element, exp_avg_sq + element, at, copy_dtype};
  }
};

FASTMTL_INLINE Lanes root_of(Lanes x) {
  Lanes root;
  for (int64_t lane = 0; lane < kLanes; ++lane) root[lane] = __builtin_sqrtf(x[lane]);
  return root;
}

FASTMTL_INLINE void update_lanes(Lanes gradient, const Update& u, Lanes& p, Lanes& m, Lanes& v) {
  m += u.beta1_left * (gradient - m);
  v = u.beta2 * v + u.beta2_left * gradient * gradient;
  p = u.decay * p - u.step_size * m / (root_of(v) * u.root + u.eps);
}

FASTMTL_CLONES void update_part(const float* gradient, int64_t count, const Update& u, const Target& to) {
  Lanes p, m, v, g;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    load(gradient + i, g);
    load(to.param + i, p);
    load(to.exp_avg + i, m);
    load(to.exp_avg_sq + i, v);
    update_lanes(g, u, p, m, v);
    store(p, to.param + i);
    store(m, to.exp_avg + i);
    store(v, to.exp_avg_sq + i);
  }
  if (i < count) {
    const int64_t left = count - i;
    load_tail(gradient + i, left, g);
    load_tail(to.param + i, left, p);
    load_tail(to.exp_avg + i, left, m);
    load_tail(to.exp_avg_sq + i, left, v);
    update_lanes(g, u, p, m, v);
    store_tail(p, to.param + i, left);
    store_tail(m, to.exp_avg + i, left);
    store_tail(v, to.exp_avg_sq + i, left);
  }
}

using Pointers = const void* const*;

FASTMTL_CLONES void merge_float(Pointers rows, const float* weights, int64_t num_tasks, int64_t count, float* out) {
  combine_part(reinterpret_cast<const float* const*>(rows), weights, num_tasks, count, out);
}
FASTMTL_CLONES void merge_bfloat16(Pointers rows, const float* weights, int64_t num_tasks, int64_t count, float* out) {
  combine_part(reinterpret_cast<const BFloat16* const*>(rows), weights, num_tasks, count, out);
}
FASTMTL_CLONES void merge_half(Pointers rows, const float* weights, int64_t num_tasks, int64_t count, float* out) {
  combine_part(reinterpret_cast<const Half* const*>(rows), weights, num_tasks, count, out);
}

constexpr float kOne[] = {1.0f};

FASTMTL_CLONES void copy_bfloat16(const float* param, int64_t count, BFloat16* copy) {
  combine_part(&param, kOne, 1, count, copy);
}
FASTMTL_CLONES void copy_half(const float* param, int64_t count, Half* copy) {
  combine_part(&param, kOne, 1, count, copy);
}

// num_tasks 0: the gradient is zero. rows is left at the end of what was read.
void update_columns(std::vector<const void*>& rows, ScalarType dtype, const float* weights, int64_t num_tasks,
                    int64_t count, const Update& update, const Target& target) {
  float gradient[kBlock];
  const size_t size = dtype == ScalarType::Float ? 4 : 2;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t some = std::min(kBlock, count - begin);
    switch (dtype) {
      case ScalarType::Float: merge_float(rows.data(), weights, num_tasks, some, gradient); break;
      case ScalarType::BFloat16: merge_bfloat16(rows.data(), weights, num_tasks, some, gradient); break;
      default: merge_half(rows.data(), weights, num_tasks, some, gradient);
    }
    const Target to = target.from(begin);
    update_part(gradient, some, update, to);
    if (to.copy && to.copy_dtype == ScalarType::BFloat16) copy_bfloat16(to.param, some, static_cast<BFloat16*>(to.copy));
    if (to.copy && to.copy_dtype == ScalarType::Half) copy_half(to.param, some, static_cast<Half*>(to.copy));
    for (int64_t t = 0; t < num_tasks; ++t) rows[t] = static_cast<const char*>(rows[t]) + some * size;
  }
}

Target target_of(const char* op, const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                 const std::optional<Tensor>& copy) {
  for (const Tensor* tensor : {&param, &exp_avg, &exp_avg_sq}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && tensor->is_cpu() &&
                        tensor->numel() == param.numel(),
                    op, ": weights and moments must be contiguous float32 on the CPU, of one size");
  }
  Target target{static_cast<float*>(param.mutable_data_ptr()), static_cast<float*>(exp_avg.mutable_data_ptr()),
                static_cast<float*>(exp_avg_sq.mutable_data_ptr()), nullptr, ScalarType::Float};
  if (copy) {
    target.copy_dtype = copy->scalar_type();
    STD_TORCH_CHECK((target.copy_dtype == ScalarType::BFloat16 || target.copy_dtype == ScalarType::Half) &&
                        copy->is_contiguous() && copy->is_cpu() && copy->numel() == param.numel(),
                    op, ": copies must be contiguous bfloat16 or float16 on the CPU, as large as the weights");
    target.copy = copy->mutable_data_ptr();
  }
  return target;
}

const float* task_weights(const char* op, const Tensor& weights) {
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous() && weights.is_cpu(), op,
                  ": weights must be contiguous float32 on the CPU");
  return static_cast<const float*>(weights.const_data_ptr());
}

Update update_of(double decay, double beta1_left, double beta2, double beta2_left, double step_size, double root,
                 double eps) {
  return {static_cast<float>(decay),     static_cast<float>(beta1_left), static_cast<float>(beta2),
          static_cast<float>(beta2_left), static_cast<float>(step_size),  static_cast<float>(root),
          static_cast<float>(eps)};
}

void combined_adamw(std::vector<Tensor> grads, Tensor weights, std::vector<Tensor> params,
                    std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> copies,
                    double decay, double beta1_left, double beta2, double beta2_left, double step_size, double root,
                    double eps) {
  constexpr auto op = "combined_adamw_";
  const int64_t num_tasks = weights.numel(), num_tensors = params.size();
  check_lists(op, grads, num_tasks);
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) == num_tasks * num_tensors && exp_avgs.size() == params.size() &&
                      exp_avg_sqs.size() == params.size() && (copies.empty() || copies.size() == params.size()),
                  op, ": params, moments and copies must hold one tensor for each tensor of a task");
  const float* w = task_weights(op, weights);
  std::vector<Target> targets;
  for (int64_t k = 0; k < num_tensors; ++k) {
    STD_TORCH_CHECK(grads[k].numel() == params[k].numel(), op, ": params must be as large as grads");
    targets.push_back(target_of(op, params[k], exp_avgs[k], exp_avg_sqs[k],
                                copies.empty() ? std::nullopt : std::optional<Tensor>(copies[k])));
  }
  const Columns columns = columns_of(grads, num_tensors);
  const std::vector<const void*> data = pointers_to(grads);
  const Update update = update_of(decay, beta1_left, beta2, beta2_left, step_size, root, eps);
  torch::stable::parallel_for(0, columns.num_pieces(), 1, [&](int64_t first, int64_t last) {
    std::vector<const void*> rows(num_tasks);
    for (int64_t piece = first; piece < last; ++piece) {
      for_each_part(columns, piece, [&](int64_t tensor, int64_t begin, int64_t count) {
        gather_rows(data, num_tensors, tensor, begin * grads[tensor].element_size(), rows);
        update_columns(rows, grads[tensor].scalar_type(), w, num_tasks, count, update, targets[tensor].from(begin));
      });
    }
  });
}

void combined_adamw_rows(std::vector<Tensor> grads, Tensor weights, Tensor slots, Tensor param, Tensor exp_avg,
                         Tensor exp_avg_sq, std::optional<Tensor> copy, double decay, double beta1_left, double beta2,
                         double beta2_left, double step_size, double root, double eps) {
  constexpr auto op = "combined_adamw_rows_";
  const int64_t num_tasks = weights.numel();
  check_lists(op, grads, num_tasks);
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) == num_tasks && param.dim() == 2 && grads[0].dim() == 2 &&
                      grads[0].size(1) == param.size(1),
                  op, ": grads must be one tensor [n, d] for each task and the weights [V, d]");
  STD_TORCH_CHECK(slots.scalar_type() == ScalarType::Int && slots.is_contiguous() && slots.is_cpu() &&
                      slots.dim() == 1 && slots.size(0) == param.size(0),
                  op, ": slots must be contiguous int32 [V] on the CPU");
  const float* w = task_weights(op, weights);
  const Target target = target_of(op, param, exp_avg, exp_avg_sq, copy);
  const Update update = update_of(decay, beta1_left, beta2, beta2_left, step_size, root, eps);
  const int64_t num_rows = param.size(0), width = param.size(1), num_slots = grads[0].size(0);
  const int32_t* slot_of = static_cast<const int32_t*>(slots.const_data_ptr());
  for (int64_t row = 0; row < num_rows; ++row)
    STD_TORCH_CHECK(slot_of[row] < num_slots, op, ": slots must be below the ", num_slots, " rows of grads");
  const std::vector<const void*> data = pointers_to(grads);
  const int64_t rows_of_piece = std::max<int64_t>(kPiece / std::max<int64_t>(width, 1), 1);
  torch::stable::parallel_for(0, num_rows, rows_of_piece, [&](int64_t first, int64_t last) {
    std::vector<const void*> rows(num_tasks);
    for (int64_t row = first; row < last;) {
      const bool present = slot_of[row] >= 0;
      int64_t end = row + 1;
      while (!present && end < last && slot_of[end] < 0) ++end;
      if (present) gather_rows(data, 1, 0, slot_of[row] * width * grads[0].element_size(), rows);
      update_columns(rows, grads[0].scalar_type(), w, present ? num_tasks : 0, (end - row) * width, update,
                     target.from(row * width));
      row = end;
    }
  });
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("combined_adamw_", TORCH_BOX(&fastmtl::combined_adamw));
  m.impl("combined_adamw_rows_", TORCH_BOX(&fastmtl::combined_adamw_rows));
}
