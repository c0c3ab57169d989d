// GeGLU of rows on CPUs; the formulas are in fastmtl_kernels/geglu/api.py. Element by element, so that no result depends
// on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "rows.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 16;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kRootHalf = 0.7071067811865476f;
constexpr float kDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)
// gelu by tanh is a sigmoid(a (kLinear + kCubic a^2)), the exponent being 2 sqrt(2 / pi) (a + 0.044715 a^3).
constexpr float kLinear = 1.5957691216057308f, kCubic = 0.07135481627159756f;

// erf(x) to 3e-7. The rational approximation of Eigen's and XLA's single precision erf, for |x| <= 4; erf is 1 beyond.
FASTMTL_INLINE Lanes erf_lanes(Lanes x) {
  const Lanes most = Lanes{} + 4.0f;
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  const Lanes s = x * x;
  Lanes p = -2.72614225801306e-10f * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  Lanes q = -1.45660718464996e-05f * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

struct Pair {
  Lanes first, second;
};

// 1 / (1 + exp(-x)) and 1 / (1 + exp(x)), by the exponential of -|x|.
FASTMTL_INLINE Pair sigmoid_lanes(Lanes x) {
  const Lanes e = exp2_lanes((x < 0.0f ? x : -x) * kLog2E);
  const Lanes larger = 1.0f / (e + 1.0f), smaller = e * larger;
  return {x < 0.0f ? smaller : larger, x < 0.0f ? larger : smaller};
}

struct Gelu {
  Lanes value, slope;
};

// gelu(a), and its derivative where it is wanted.
template <bool kTanh, bool kSlope>
FASTMTL_INLINE Gelu gelu_lanes(Lanes a) {
  const Lanes s = a * a;
  if constexpr (kTanh) {
    const auto [share, rest] = sigmoid_lanes(a * (kCubic * s + kLinear));
    if constexpr (!kSlope) return {a * share, Lanes{}};
    // For a large a, rest is 0 and the other factor finite.
    return {a * share, share + rest * (a * share) * (3 * kCubic * s + kLinear)};
  } else {
    const Lanes share = 0.5f * erf_lanes(a * kRootHalf) + 0.5f;
    if constexpr (!kSlope) return {a * share, Lanes{}};
    return {a * share, share + a * kDensity * exp2_lanes(-0.5f * kLog2E * s)};
  }
}

template <bool kTanh, typename scalar_t>
FASTMTL_INLINE void forward_part(const scalar_t* x, int64_t width, int64_t first, int64_t last, scalar_t* y) {
  for (int64_t row = first; row < last; ++row) {
    const scalar_t *a = x + row * 2 * width, *b = a + width;
    for_vectors(width, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      put(gelu_lanes<kTanh, false>(get(a + c, count)).value * get(b + c, count), y + row * width + c, count);
    });
  }
}

template <bool kTanh, typename scalar_t>
FASTMTL_INLINE void backward_part(const scalar_t* dy, const scalar_t* x, int64_t width, int64_t first, int64_t last,
                                  scalar_t* dx) {
  for (int64_t row = first; row < last; ++row) {
    const scalar_t *a = x + row * 2 * width, *b = a + width;
    scalar_t *da = dx + row * 2 * width, *db = da + width;
    for_vectors(width, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      const Gelu gelu = gelu_lanes<kTanh, true>(get(a + c, count));
      const Lanes grad = get(dy + row * width + c, count);
      put(grad * get(b + c, count) * gelu.slope, da + c, count);
      put(grad * gelu.value, db + c, count);
    });
  }
}

// One function for each dtype, compiled for several instruction sets.
#define FASTMTL_GEGLU_KERNELS(scalar_t)                                                                                \
  FASTMTL_CLONES void forward_rows(const scalar_t* x, int64_t width, bool tanh, int64_t first, int64_t last,           \
                                   scalar_t* y) {                                                                      \
    if (tanh) forward_part<true>(x, width, first, last, y);                                                            \
    else forward_part<false>(x, width, first, last, y);                                                                \
  }                                                                                                                    \
  FASTMTL_CLONES void backward_rows(const scalar_t* dy, const scalar_t* x, int64_t width, bool tanh, int64_t first,    \
                                    int64_t last, scalar_t* dx) {                                                      \
    if (tanh) backward_part<true>(dy, x, width, first, last, dx);                                                      \
    else backward_part<false>(dy, x, width, first, last, dx);                                                          \
  }
FASTMTL_GEGLU_KERNELS(float)
FASTMTL_GEGLU_KERNELS(BFloat16)
FASTMTL_GEGLU_KERNELS(Half)
#undef FASTMTL_GEGLU_KERNELS

void geglu_out(Tensor x, bool tanh, Tensor y) {
  const int64_t n = x.size(0), width = x.size(1) / 2;
  check("geglu_out", "x", x, x.scalar_type(), 2 * n * width);
  check("geglu_out", "y", y, x.scalar_type(), n * width);
  for_dtype("geglu_out", x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* from = static_cast<const scalar_t*>(x.const_data_ptr());
    auto* to = static_cast<scalar_t*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, n, kChunk, [&](int64_t first, int64_t last) {
      forward_rows(from, width, tanh, first, last, to);
    });
  });
}

void geglu_backward_out(Tensor dy, Tensor x, bool tanh, Tensor dx) {
  const int64_t n = x.size(0), width = x.size(1) / 2;
  check("geglu_backward_out", "dy", dy, x.scalar_type(), n * width);
  check("geglu_backward_out", "x", x, x.scalar_type(), 2 * n * width);
  check("geglu_backward_out", "dx", dx, x.scalar_type(), 2 * n * width);
  for_dtype("geglu_backward_out", x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* grad = static_cast<const scalar_t*>(dy.const_data_ptr());
    const auto* from = static_cast<const scalar_t*>(x.const_data_ptr());
    auto* to = static_cast<scalar_t*>(dx.mutable_data_ptr());
    torch::stable::parallel_for(0, n, kChunk, [&](int64_t first, int64_t last) {
      backward_rows(grad, from, width, tanh, first, last, to);
    });
  });
}

}  // namespace
}  // namespace fastmtl

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("geglu_out", TORCH_BOX(&fastmtl::geglu_out));
  m.impl("geglu_backward_out", TORCH_BOX(&fastmtl::geglu_backward_out));
}
