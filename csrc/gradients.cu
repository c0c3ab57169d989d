// gramian and combine on NVIDIA GPUs: one read of the task gradients J [T, P] each (gramian: for up to 8 tasks).
//
//   gramian  G[i, j] = sum_p J[i, p] J[j, p]        fp32 within a piece, fp64 across pieces
//   combine  out[p]  = sum_t weights[t] J[t, p]     fp32
//
// J comes as T lists of K tensors and is never copied: their addresses travel by value in the kernel's parameters, so
// that hundreds of tensors take one launch, need no copy to the device and can be captured in a CUDA graph. Every tensor
// is cut into pieces of columns, one block each. A piece's partial sums go to a workspace and are added up in a fixed
// order without atomics; nothing depends on timing or on the number of multiprocessors: equal inputs give equal bits.
#ifndef USE_CUDA
#define USE_CUDA  // torch declares its shims of CUDA under this macro only
#endif
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "gradients_kernels.cuh"

#if CUDART_VERSION < 12010
#error "csrc/gradients.cu needs CUDA 12.1 or newer: its kernels take more than 4 KB of parameters"
#endif

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of a piece. With more than kGroup tasks there are many blocks for each piece and many partial sums.
constexpr int kPiece = 1 << 14;
constexpr int kPieceOfGroups = 1 << 17;

// Sizes, dtypes, layout and device as the kernels assume them: tensor k alike in all tasks and contiguous.
void check_lists(const char* op, const std::vector<Tensor>& grads, int64_t num_tasks) {
  STD_TORCH_CHECK(num_tasks > 0 && num_tasks <= kMaxTasks && !grads.empty() && grads.size() % num_tasks == 0, op,
                  ": grads must hold the same number of tensors for each of ", num_tasks, " tasks, ", kMaxTasks,
                  " at most");
  const int64_t num_tensors = grads.size() / num_tasks;
  const auto device = grads[0].get_device_index();
  for (size_t n = 0; n < grads.size(); ++n) {
    const Tensor& first = grads[n % num_tensors];
    const ScalarType dtype = grads[n].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                    ": grads must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(grads[n].is_contiguous(), op, ": grads must be contiguous");
    STD_TORCH_CHECK(grads[n].is_cuda() && grads[n].get_device_index() == device, op, ": grads must be on one GPU");
    STD_TORCH_CHECK(grads[n].numel() == first.numel() && dtype == first.scalar_type(), op, ": tensor ",
                    n % num_tensors, " differs between tasks in size or dtype");
  }
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor gramian(std::vector<Tensor> grads, int64_t num_tasks) {
  check_lists("gramian", grads, num_tasks);
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const cudaStream_t stream = current_stream(grads[0].get_device_index());
  const int tasks = static_cast<int>(num_tasks), num_groups = (tasks + kGroup - 1) / kGroup;
  const int piece_columns = num_groups == 1 ? kPiece : kPieceOfGroups, num_pairs = num_groups * (num_groups + 1) / 2;
  int total_pieces = 0;
  for (size_t k = 0; k < grads.size() / tasks; ++k) total_pieces += num_pieces_of(grads[k], piece_columns);

  const std::vector<int64_t> partial_size{tasks * (tasks + 1) / 2, total_pieces}, size{tasks, tasks};
  const Tensor partials = torch::stable::new_empty(grads[0], partial_size, ScalarType::Float);
  const Tensor gram = torch::stable::new_empty(grads[0], size, ScalarType::Float);
  float* partials_ptr = static_cast<float*>(partials.mutable_data_ptr());
  constexpr decltype(&gramian_kernel<1>) kernels[kGroup] = {
      gramian_kernel<1>, gramian_kernel<2>, gramian_kernel<3>, gramian_kernel<4>,
      gramian_kernel<5>, gramian_kernel<6>, gramian_kernel<7>, gramian_kernel<8>};
  int first_piece = 0;
  for_each_table(grads, num_tasks, {}, piece_columns, [&](const Table& table, int num_pieces) {
    if (num_groups == 1) {
      kernels[tasks - 1]<<<num_pieces, kThreads, 0, stream>>>(table, partials_ptr, first_piece, total_pieces);
    } else {
      gramian_of_groups_kernel<<<num_pieces * num_pairs, kThreads, 0, stream>>>(table, tasks, partials_ptr,
                                                                               first_piece, total_pieces);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    first_piece += num_pieces;
  });
  sum_partials_kernel<<<dim3(tasks, tasks), kThreads, 0, stream>>>(partials_ptr, total_pieces,
                                                                   static_cast<float*>(gram.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return gram;
}

void combine_out(std::vector<Tensor> grads, Tensor weights, std::vector<Tensor> out) {
  const int64_t num_tasks = weights.numel(), num_tensors = out.size();
  check_lists("combine_out", grads, num_tasks);
  const int32_t device = grads[0].get_device_index();
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) == num_tasks * num_tensors,
                  "combine_out: out must hold one tensor for each tensor of a task");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous() && weights.is_cuda() &&
                      weights.get_device_index() == device,
                  "combine_out: weights must be contiguous float32 on the GPU of grads");
  for (int64_t k = 0; k < num_tensors; ++k) {
    STD_TORCH_CHECK(out[k].is_contiguous() && out[k].is_cuda() && out[k].get_device_index() == device &&
                        out[k].numel() == grads[k].numel(),
                    "combine_out: out must be contiguous, on the GPU of grads and as large as grads");
    STD_TORCH_CHECK(out[k].scalar_type() == ScalarType::Float || out[k].scalar_type() == grads[k].scalar_type(),
                    "combine_out: out must be float32 or of the dtype of grads");
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const float* weights_ptr = static_cast<const float*>(weights.const_data_ptr());
  for_each_table(grads, num_tasks, out, kPiece, [&](const Table& table, int num_pieces) {
    combine_kernel<<<num_pieces, kThreads, 0, stream>>>(table, weights_ptr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) {
  m.impl("gramian", TORCH_BOX(&fastmtl::gramian));
  m.impl("combine_out", TORCH_BOX(&fastmtl::combine_out));
}
