// Operator schemas and meta implementations of torch.ops.fastmtl.
//
// Built against PyTorch's stable ABI and free of Python's headers, so that one library serves every torch >= 2.11 and
// every Python. Callers come through the api module of each operation, which validates; only what would read out of
// bounds is checked again next to the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
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

void combined_adamw_meta(std::vector<Tensor>, Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                         std::vector<Tensor>, double, double, double, double, double, double, double) {}

void combined_adamw_rows_meta(std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>,
                              double, double, double, double, double, double, double) {}

void add_layer_norm_out_meta(Tensor, std::optional<Tensor>, std::optional<Tensor>, Tensor, std::optional<Tensor>,
                             std::optional<Tensor>, int64_t, double, double, int64_t, Tensor, Tensor, Tensor, Tensor,
                             std::optional<Tensor>) {}

void add_layer_norm_backward_out_meta(Tensor, std::optional<Tensor>, Tensor, Tensor, Tensor, Tensor,
                                      std::optional<Tensor>, double, Tensor, Tensor, std::optional<Tensor>, Tensor) {}

void layer_norm_again_out_meta(Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, int64_t, Tensor) {}

void geglu_out_meta(Tensor, bool, Tensor) {}

void geglu_backward_out_meta(Tensor, Tensor, bool, Tensor) {}

void row_dropout_out_meta(Tensor, Tensor, int64_t, double, Tensor) {}

void pool_out_meta(Tensor, Tensor, int64_t, Tensor, std::optional<Tensor>) {}

void pool_backward_out_meta(Tensor, Tensor, int64_t, std::optional<Tensor>, Tensor) {}

void varlen_attention_out_meta(Tensor, Tensor, std::optional<Tensor>, int64_t, double, double, Tensor, Tensor, int64_t,
                               std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>) {}

void varlen_attention_backward_out_meta(Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>, int64_t, double, double,
                                        Tensor, int64_t, std::optional<Tensor>, std::optional<Tensor>,
                                        std::optional<Tensor>, std::optional<Tensor>) {}

void disentangled_attention_out_meta(Tensor, Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>,
                                     std::optional<Tensor>, std::optional<Tensor>, int64_t, double, double, Tensor,
                                     Tensor) {}

void disentangled_attention_backward_out_meta(Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>,
                                              std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
                                              int64_t, double, double, Tensor, std::optional<Tensor>,
                                              std::optional<Tensor>) {}

}  // namespace

// Tensor lists are task-major: grads[t * K + k] is task t's gradient of tensor k, K tensors per task.
STABLE_TORCH_LIBRARY(fastmtl, m) {
  m.def("gramian(Tensor[] grads, int num_tasks) -> Tensor");
  m.def("combine_out(Tensor[] grads, Tensor weights, Tensor(a!)[] out) -> ()");
  m.def(
      "combined_adamw_(Tensor[] grads, Tensor weights, Tensor(a!)[] params, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, float decay, float beta1_left, float beta2, float beta2_left, "
      "float step_size, float root, float eps) -> ()");
  m.def(
      "combined_adamw_rows_(Tensor[] grads, Tensor weights, Tensor slots, Tensor(a!) param, Tensor(b!) exp_avg, "
      "Tensor(c!) exp_avg_sq, Tensor(d!)? copy, float decay, float beta1_left, float beta2, float beta2_left, "
      "float step_size, float root, float eps) -> ()");
  m.def(
      "add_layer_norm_out(Tensor residual, Tensor? x, Tensor? ts, Tensor weight, Tensor? bias, Tensor? seed, "
      "int threshold, float scale, float eps, int num_rows, "
      "Tensor(a!) y, Tensor(b!) z, Tensor(c!) mean, Tensor(d!) rstd, Tensor(e!)? mask) -> ()");
  m.def(
      "add_layer_norm_backward_out(Tensor dy, Tensor? dsum, Tensor z, Tensor mean, Tensor rstd, Tensor weight, "
      "Tensor? mask, float scale, Tensor token_offsets, Tensor(a!) dz, Tensor(b!)? dx, Tensor(c!) sums) -> ()");
  m.def(
      "layer_norm_again_out(Tensor z, Tensor mean, Tensor rstd, Tensor weight, Tensor? bias, int num_rows, "
      "Tensor(a!) y) -> ()");
  m.def("geglu_out(Tensor x, bool tanh, Tensor(a!) y) -> ()");
  m.def("geglu_backward_out(Tensor dy, Tensor x, bool tanh, Tensor(a!) dx) -> ()");
  m.def("row_dropout_out(Tensor x, Tensor seed, int threshold, float scale, Tensor(a!) out) -> ()");
  m.def("pool_out(Tensor x, Tensor cu_seqlens, int mode, Tensor(a!) out, Tensor(b!)? winners) -> ()");
  m.def("pool_backward_out(Tensor dout, Tensor cu_seqlens, int mode, Tensor? winners, Tensor(a!) dx) -> ()");
  m.def(
      "varlen_attention_out(Tensor qkv, Tensor cu_seqlens, Tensor? seed, int threshold, float keep_scale, float scale, "
      "Tensor(a!) out, Tensor(b!) stats, int window=-1, Tensor? rotary=None, Tensor? bias=None, "
      "Tensor? bias_offsets=None) -> ()");
  m.def(
      "varlen_attention_backward_out(Tensor dout, Tensor qkv, Tensor stats, Tensor cu_seqlens, Tensor? seed, "
      "int threshold, float keep_scale, float scale, Tensor(a!) dqkv, int window=-1, Tensor? rotary=None, "
      "Tensor? bias=None, Tensor? bias_offsets=None, Tensor(b!)? dbias=None) -> ()");
  m.def(
      "disentangled_attention_out(Tensor qkv, Tensor cu_seqlens, Tensor position_rows, Tensor? pos_key, "
      "Tensor? pos_query, Tensor? group_offsets, Tensor? seed, int threshold, float keep_scale, float scale, "
      "Tensor(a!) out, Tensor(b!) stats) -> ()");
  m.def(
      "disentangled_attention_backward_out(Tensor dout, Tensor qkv, Tensor stats, Tensor cu_seqlens, "
      "Tensor position_rows, Tensor? pos_key, Tensor? pos_query, Tensor? group_offsets, Tensor? seed, int threshold, "
      "float keep_scale, float scale, Tensor(a!) dqkv, Tensor(b!)? dpos_key, Tensor(c!)? dpos_query) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, Meta, m) {
  m.impl("disentangled_attention_out", TORCH_BOX(&disentangled_attention_out_meta));
  m.impl("disentangled_attention_backward_out", TORCH_BOX(&disentangled_attention_backward_out_meta));
  m.impl("gramian", TORCH_BOX(&gramian_meta));
  m.impl("combine_out", TORCH_BOX(&combine_out_meta));
  m.impl("combined_adamw_", TORCH_BOX(&combined_adamw_meta));
  m.impl("combined_adamw_rows_", TORCH_BOX(&combined_adamw_rows_meta));
  m.impl("add_layer_norm_out", TORCH_BOX(&add_layer_norm_out_meta));
  m.impl("add_layer_norm_backward_out", TORCH_BOX(&add_layer_norm_backward_out_meta));
  m.impl("layer_norm_again_out", TORCH_BOX(&layer_norm_again_out_meta));
  m.impl("geglu_out", TORCH_BOX(&geglu_out_meta));
  m.impl("geglu_backward_out", TORCH_BOX(&geglu_backward_out_meta));
  m.impl("row_dropout_out", TORCH_BOX(&row_dropout_out_meta));
  m.impl("pool_out", TORCH_BOX(&pool_out_meta));
  m.impl("pool_backward_out", TORCH_BOX(&pool_backward_out_meta));
  m.impl("varlen_attention_out", TORCH_BOX(&varlen_attention_out_meta));
  m.impl("varlen_attention_backward_out", TORCH_BOX(&varlen_attention_backward_out_meta));
}
