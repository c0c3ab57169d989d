// Runs what csrc/varlen_attention_rows.h, csrc/varlen_attention_positions.h and csrc/small_matrix.h are made of as CPUs without AVX2 and FMA would, beside
// what this CPU takes. Prints every function that differs, and fails; prints how many calls were compared otherwise.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "varlen_attention_positions.h"

using namespace fastmtl;

#if defined(__x86_64__)
namespace {

std::mt19937 generator(0);
int compared = 0, differing = 0;

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  for (float& value : values) value = distribution(generator);
  return values;
}

void expect_near(const char* name, const std::vector<float>& a, const std::vector<float>& b) {
  bool near = a.size() == b.size();
  for (size_t i = 0; near && i < a.size(); ++i) near = std::abs(a[i] - b[i]) <= 1e-5f * (1 + std::abs(b[i]));
  ++compared;
  if (!near) {
    ++differing;
    std::printf("%s differs\n", name);
  }
}

template <typename scalar_t>
void compare_gather_and_scatter(int64_t rows, int64_t head_dim) {
  using Call = void (*)(const scalar_t*, int64_t, int64_t, int64_t, float, float*);
  const int64_t stride = head_dim + 3, width = round_up(head_dim, kLanes), padded = round_up(rows, kLanes);
  const std::vector<float> values = normal(rows * stride), factors = normal(rows);
  const std::vector<scalar_t> from(values.begin(), values.end());
  std::vector<float> gathered[2], scattered[2];
  for (int portable = 0; portable < 2; ++portable) {
    gathered[portable] = normal(padded * width);
    const Call call = portable ? static_cast<Call>(gather_portable) : static_cast<Call>(gather);
    call(from.data(), stride, rows, head_dim, 0.5f, gathered[portable].data());
    std::vector<scalar_t> to(rows * stride, scalar_t(7));
    if (portable) scatter_portable(gathered[0].data(), rows, head_dim, factors.data(), 1, to.data(), stride);
    else scatter(gathered[0].data(), rows, head_dim, factors.data(), 1, to.data(), stride);
    scattered[portable].assign(to.begin(), to.end());
  }
  expect_near("gather", gathered[1], gathered[0]);
  expect_near("scatter", scattered[1], scattered[0]);
}

// Forward's P and backward's have equal bits for scores that float knows to some units only, or P adds up to no 1.
void compare_large_scores(int64_t rows, int64_t length) {
  const int64_t keys = round_up(length, kLanes);
  std::vector<float> scores = normal(rows * keys);
  for (float& score : scores) score *= 1e5f;
  for (const bool portable : {false, true})
    for (const float factor : {0.17f, -0.17f}) {
      std::vector<float> p = scores, s = scores, g = normal(rows * keys), stats(2 * rows);
      (portable ? softmax_portable : softmax)(p.data(), rows, length, factor, nullptr, stats.data(), 2);
      (portable ? softmax_backward_portable : softmax_backward)(s.data(), g.data(), rows, length, factor, nullptr,
                                                                stats.data(), 2);
      for (int64_t i = 0; i < rows * keys; ++i) p[i] *= stats[2 * (i / keys) + 1];
      ++compared;
      if (p == s) continue;
      ++differing;
      std::printf("P of large scores differs\n");
    }
}

void compare_position_terms(int64_t rows, int64_t length, int64_t head_dim) {
  const int64_t keys = round_up(length, kLanes), width = round_up(head_dim, kLanes), half = head_dim / 2;
  const std::vector<float> cos = normal(rows * half), sin = normal(rows * half), unturned = normal(rows * width);
  std::vector<float> turned[2] = {unturned, unturned};
  rotate(turned[0].data(), rows, head_dim, cos.data(), sin.data(), -1.0f);
  rotate_portable(turned[1].data(), rows, head_dim, cos.data(), sin.data(), -1.0f);
  expect_near("rotate", turned[1], turned[0]);

  const std::vector<float> table = normal(rows + keys), plain = normal(rows * keys), sums = normal(rows + keys);
  for (const float* bias : {static_cast<const float*>(nullptr), table.data() + rows}) {
    std::vector<float> scores[2] = {plain, plain};
    add_terms(scores[0].data(), rows, length, 0.3f, bias, -5, 7);
    add_terms_portable(scores[1].data(), rows, length, 0.3f, bias, -5, 7);
    // An infinity is near no number, not even itself.
    for (std::vector<float>& one : scores)
      for (float& score : one) score = std::isinf(score) ? -1e5f : score;
    expect_near("add_terms", scores[1], scores[0]);
  }
  std::vector<float> added[2] = {sums, sums};
  add_diagonals(plain.data(), rows, length, added[0].data() + rows);
  add_diagonals_portable(plain.data(), rows, length, added[1].data() + rows);
  expect_near("add_diagonals", added[1], added[0]);
}

void compare(int64_t rows, int64_t length, int64_t head_dim) {
  compare_gather_and_scatter<float>(rows, head_dim);
  compare_gather_and_scatter<BFloat16>(rows, head_dim);
  compare_gather_and_scatter<Half>(rows, head_dim);

  const int64_t keys = round_up(length, kLanes), width = round_up(head_dim, kLanes);
  const std::vector<float> a = normal(rows * length), b = normal(length * width), start = normal(rows * width);
  for (const bool add : {false, true}) {
    std::vector<float> c[2] = {start, start}, exact = start;
    multiply({a.data(), length, 1}, b.data(), width, rows, width, length, c[0].data(), width, add);
    multiply_portable({a.data(), length, 1}, b.data(), width, rows, width, length, c[1].data(), width, add);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; ++j) {
        double sum = add ? start[i * width + j] : 0;
        for (int64_t k = 0; k < length; ++k) sum += double(a[i * length + k]) * b[k * width + j];
        exact[i * width + j] = sum;
      }
    expect_near("multiply", c[0], exact);
    expect_near("multiply_portable", c[1], exact);
  }

  const std::vector<float> square = normal(keys * width);
  std::vector<float> transposed[2] = {normal(keys * width), normal(keys * width)}, expected(keys * width);
  transpose(square.data(), width, keys, width, transposed[0].data(), keys);
  transpose_portable(square.data(), width, keys, width, transposed[1].data(), keys);
  for (int64_t i = 0; i < keys; ++i)
    for (int64_t j = 0; j < width; ++j) expected[j * keys + i] = square[i * width + j];
  expect_near("transpose", transposed[0], expected);
  expect_near("transpose_portable", transposed[1], expected);

  std::vector<int8_t> dropped[2];
  for (int portable = 0; portable < 2; ++portable) {
    dropped[portable].resize(rows * keys + 32);
    (portable ? draw_dropped_portable : draw_dropped)({0x123456789abcdefull, -1000000000}, 77, rows, 6, keys / 4, 5,
                                                      dropped[portable].data());
    dropped[portable].resize(rows * keys);
  }
  expect_near("draw_dropped", std::vector<float>(dropped[1].begin(), dropped[1].end()),
              std::vector<float>(dropped[0].begin(), dropped[0].end()));

  const std::vector<float> scores = normal(rows * keys), gradients = normal(rows * keys);
  for (const int8_t* drops : {static_cast<const int8_t*>(nullptr), static_cast<const int8_t*>(dropped[0].data())}) {
    std::vector<float> p[2] = {scores, scores}, s[2] = {scores, scores}, g[2] = {gradients, gradients}, stats[2];
    for (int portable = 0; portable < 2; ++portable) {
      stats[portable].resize(3 * rows);
      (portable ? softmax_portable : softmax)(p[portable].data(), rows, length, -2.0f, drops, stats[portable].data(), 3);
      (portable ? softmax_backward_portable : softmax_backward)(s[portable].data(), g[portable].data(), rows, length,
                                                                -2.0f, drops, stats[0].data(), 3);
    }
    expect_near("softmax", p[1], p[0]);
    expect_near("its maxima and sums", stats[1], stats[0]);
    expect_near("softmax_backward's P", s[1], s[0]);
    expect_near("softmax_backward's dS", g[1], g[0]);
  }
  compare_large_scores(rows, length);
  compare_position_terms(rows, length, head_dim);
}

}  // namespace

int main() {
  for (const int64_t rows : {1, 5, 24, 47})
    for (const int64_t length : {1, 8, 13, 35, 70})
      for (const int64_t head_dim : {1, 11, 32, 64}) compare(rows, length, head_dim);
  std::printf("%d compared\n", compared);
  return differing > 0;
}
#else
int main() { std::printf("0 compared\n"); }
#endif
