// Operator schemas and meta implementations of torch.ops.fastmtl.
//
// Built against PyTorch's stable ABI and free of Python's headers, so that one library serves every torch >= 2.11 and
// every Python. Callers come through fastmtl_kernels.api, which validates; only what would read out of bounds is
// checked again next to the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Tensor gramian_meta(std::vector<Tensor> grads, int64_t num_tasks) {
  STD_TORCH_CHECK(!grads.empty(), "gramian: grads must not be empty");
  const std::vector<int64_t> size{num_tasks, num_tasks};
  return torch::stable::new_empty(grads[0], size, ScalarType::Float);
}

void combine_out_meta(std::vector<Tensor>, Tensor, std::vector<Tensor>) {}

}  // namespace

// Tensor lists are task-major: grads[t * K + k] is task t's gradient of tensor k, K tensors per task.
STABLE_TORCH_LIBRARY(fastmtl, m) {
  m.def("gramian(Tensor[] grads, int num_tasks) -> Tensor");
  m.def("combine_out(Tensor[] grads, Tensor weights, Tensor(a!)[] out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, Meta, m) {
  m.impl("gramian", TORCH_BOX(&gramian_meta));
  m.impl("combine_out", TORCH_BOX(&combine_out_meta));
}
