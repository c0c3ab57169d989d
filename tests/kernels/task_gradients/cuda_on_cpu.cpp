// The CUDA kernels of csrc/gradients_kernels.cuh on a CPU: a block's threads are fibers that take turns at barriers.
//
// It shows wrong arithmetic, wrong indices and barriers that are missing for the values read; it shows neither races
// within a barrier's interval nor anything about speed.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
using std::fmaf;
using std::min;

namespace {

struct Index {
  unsigned x, y;
};
Index threadIdx, blockIdx, gridDim;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 18);
  bool done;
};
ucontext_t scheduler;
std::vector<Fiber> fibers;
std::function<void()> kernel;
float exchanged[1024];

void barrier() {
  const unsigned self = threadIdx.x;
  swapcontext(&fibers[self].context, &scheduler);
  threadIdx.x = self;
}

void __syncthreads() { barrier(); }

float __shfl_xor_sync(unsigned, float value, int distance) {
  exchanged[threadIdx.x] = value;
  barrier();
  value = exchanged[threadIdx.x ^ distance];
  barrier();
  return value;
}

void run_fiber() {
  kernel();
  fibers[threadIdx.x].done = true;
}

void launch(Index grid, unsigned num_threads, const std::function<void()>& body) {
  kernel = body;
  fibers.resize(num_threads);
  gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        fiber.done = false;
        makecontext(&fiber.context, run_fiber, 0);
      }
      bool running = true;
      while (running) {
        running = false;
        for (unsigned thread = 0; thread < num_threads; ++thread) {
          if (fibers[thread].done) continue;
          threadIdx = {thread, 0};
          swapcontext(&scheduler, &fibers[thread].context);
          running |= !fibers[thread].done;
        }
      }
    }
  }
}

}  // namespace

#include "gradients_kernels.cuh"

namespace {

using namespace fastmtl;

// As much of a tensor as for_each_table asks for.
struct Tensor {
  void* data;
  int64_t size;
  torch::headeronly::ScalarType dtype;
  int64_t numel() const { return size; }
  torch::headeronly::ScalarType scalar_type() const { return dtype; }
  const void* const_data_ptr() const { return data; }
  void* mutable_data_ptr() const { return data; }
};

std::vector<Tensor> tensors_of(void** data, const int64_t* numel, const int* dtypes, int count, int num_tensors) {
  std::vector<Tensor> tensors;
  for (int n = 0; n < count; ++n) {
    const auto dtype = static_cast<torch::headeronly::ScalarType>(dtypes[n % num_tensors]);
    tensors.push_back({data[n], numel[n % num_tensors], dtype});
  }
  return tensors;
}

template <int kTasks>
void gramian_of(const Table& table, int num_tasks, float* partials, int first_piece, int num_pieces) {
  if constexpr (kTasks > kGroup) {
    gramian_of_groups_kernel(table, num_tasks, partials, first_piece, num_pieces);
  } else if (num_tasks == kTasks) {
    gramian_kernel<kTasks>(table, partials, first_piece, num_pieces);
  } else {
    gramian_of<kTasks + 1>(table, num_tasks, partials, first_piece, num_pieces);
  }
}

}  // namespace

// data: [T * K] addresses, numel and dtypes: [K]. Returns the number of launches that read them.
extern "C" int gramian(void** data, const int64_t* numel, const int* dtypes, int num_tasks, int num_tensors,
                       int piece_columns, float* gram) {
  const auto grads = tensors_of(data, numel, dtypes, num_tasks * num_tensors, num_tensors);
  const int num_groups = (num_tasks + kGroup - 1) / kGroup, num_pairs = num_groups * (num_groups + 1) / 2;
  int total = 0, first_piece = 0, launches = 0;
  for (int k = 0; k < num_tensors; ++k) total += num_pieces_of(grads[k], piece_columns);
  std::vector<float> partials(num_tasks * (num_tasks + 1) / 2 * total, NAN);
  for_each_table(grads, num_tasks, {}, piece_columns, [&](const Table& table, int num_pieces) {
    const unsigned num_blocks = num_pieces * (num_tasks > kGroup ? num_pairs : 1);
    launch({num_blocks, 1}, kThreads, [&] { gramian_of<1>(table, num_tasks, partials.data(), first_piece, total); });
    first_piece += num_pieces;
    ++launches;
  });
  const unsigned tasks = num_tasks;
  launch({tasks, tasks}, kThreads, [&] { sum_partials_kernel(partials.data(), total, gram); });
  return launches;
}

// out: [K] addresses, out_dtypes: [K].
extern "C" int combine(void** data, const int64_t* numel, const int* dtypes, int num_tasks, int num_tensors,
                       int piece_columns, const float* weights, void** out, const int* out_dtypes) {
  const auto grads = tensors_of(data, numel, dtypes, num_tasks * num_tensors, num_tensors);
  int launches = 0;
  for_each_table(grads, num_tasks, tensors_of(out, numel, out_dtypes, num_tensors, num_tensors), piece_columns,
                 [&](const Table& table, unsigned num_pieces) {
                   launch({num_pieces, 1}, kThreads, [&] { combine_kernel(table, weights); });
                   ++launches;
                 });
  return launches;
}
