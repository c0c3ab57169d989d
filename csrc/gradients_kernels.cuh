// The CUDA kernels of gramian and combine; csrc/gradients.cu tells what they compute and launches them.
//
// A block works on one piece, up to piece_columns columns of one tensor. Tensors whose rows are all aligned to 16 bytes
// are read by 16-byte loads, others and tails element by element.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "tensor_table.h"

namespace fastmtl {
namespace {

constexpr int kMaxTasks = 64;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Tasks whose inner products fit in the registers of a thread.
constexpr int kGroup = 8;
// Rows that combine loads before it uses the first one.
constexpr int kRowsInFlight = 4;

// The place of G[i, j], i <= j, in the upper triangle of G, row by row.
__device__ inline int64_t entry_of(int i, int j, int num_tasks) { return i * num_tasks - i * (i - 1) / 2 + j - i; }

template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize < kVectorBytes ? sizeof(scalar_t) * kSize : kVectorBytes) Pack {
  scalar_t values[kSize];
};

// The first part of a piece that is read by vectors; the rest is read element by element.
template <typename scalar_t>
__device__ int vectorised(const Table& table, const Piece& piece) {
  constexpr int kSize = kVectorBytes / sizeof(scalar_t);
  return table.aligned[piece.tensor] ? piece.count / kSize * kSize : 0;
}

// Inner products of kRows rows with kCols rows, or of kRows rows with themselves: then the upper triangle alone.
template <int kRows, int kCols, bool kTriangle>
struct Tile {
  float sums[kRows][kCols] = {};

  template <typename scalar_t, int kSize>
  __device__ __forceinline__ void add(const scalar_t* const (&a)[kRows], const scalar_t* const (&b)[kCols], int begin,
                                      int end) {
    // Few rows leave registers for more loads in flight.
    constexpr int kUnroll = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
    using Values = Pack<scalar_t, kSize>;
#pragma unroll kUnroll
    for (int p = begin + static_cast<int>(threadIdx.x) * kSize; p < end; p += kThreads * kSize) {
      Values x[kRows], y[kCols];
#pragma unroll
      for (int i = 0; i < kRows; ++i) x[i] = *reinterpret_cast<const Values*>(a[i] + p);
      if constexpr (!kTriangle) {
#pragma unroll
        for (int j = 0; j < kCols; ++j) y[j] = *reinterpret_cast<const Values*>(b[j] + p);
      }
#pragma unroll
      for (int lane = 0; lane < kSize; ++lane) {
        float u[kRows], v[kCols];
#pragma unroll
        for (int i = 0; i < kRows; ++i) u[i] = static_cast<float>(x[i].values[lane]);
#pragma unroll
        for (int j = 0; j < kCols; ++j) v[j] = kTriangle ? u[j] : static_cast<float>(y[j].values[lane]);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = kTriangle ? i : 0; j < kCols; ++j) sums[i][j] = fmaf(u[i], v[j], sums[i][j]);
      }
    }
  }

  template <typename scalar_t>
  __device__ __forceinline__ void add_piece(const Table& table, const Piece& piece, int row, int col, int num_tasks) {
    const void* const* rows = table.rows + piece.tensor * table.row_stride;
    const scalar_t *a[kRows], *b[kCols];
    // Rows past the last one repeat it; nobody reads their sums.
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      a[i] = static_cast<const scalar_t*>(rows[min(row + i, num_tasks - 1)]) + piece.begin;
#pragma unroll
    for (int j = 0; j < kCols; ++j)
      b[j] = static_cast<const scalar_t*>(rows[min(col + j, num_tasks - 1)]) + piece.begin;
    const int split = vectorised<scalar_t>(table, piece);
    add<scalar_t, kVectorBytes / sizeof(scalar_t)>(a, b, 0, split);
    add<scalar_t, 1>(a, b, split, piece.count);
  }

  // Sums over the block's threads, always in the same order, into partials [T (T + 1) / 2, num_pieces].
  __device__ __forceinline__ void store(int row, int col, int num_tasks, float* partials, int piece, int num_pieces) {
    __shared__ float warp_sums[kRows * kCols][kWarps];
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = kTriangle ? i : 0; j < kCols; ++j) {
        float sum = sums[i][j];
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
        if (threadIdx.x % 32 == 0) warp_sums[i * kCols + j][warp] = sum;
      }
    }
    __syncthreads();
    const int i = row + threadIdx.x / kCols, j = col + threadIdx.x % kCols;
    if (threadIdx.x >= kRows * kCols || i > j || j >= num_tasks) return;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[threadIdx.x][w];
    partials[entry_of(i, j, num_tasks) * num_pieces + piece] = sum;
  }
};

template <int kRows, int kCols, bool kTriangle>
__device__ __forceinline__ void gramian_piece(const Table& table, int piece_index, int row, int col, int num_tasks,
                                              float* partials, int first_piece, int num_pieces) {
  const Piece piece = find_piece(table, piece_index);
  Tile<kRows, kCols, kTriangle> tile;
  switch (table.kind[piece.tensor]) {
    case kFloat: tile.template add_piece<float>(table, piece, row, col, num_tasks); break;
    case kBFloat16: tile.template add_piece<c10::BFloat16>(table, piece, row, col, num_tasks); break;
    default: tile.template add_piece<c10::Half>(table, piece, row, col, num_tasks);
  }
  tile.store(row, col, num_tasks, partials, first_piece + piece_index, num_pieces);
}

template <int kTasks>
__global__ void __launch_bounds__(kThreads, 2)
    gramian_kernel(const __grid_constant__ Table table, float* partials, int first_piece, int num_pieces) {
  gramian_piece<kTasks, kTasks, true>(table, blockIdx.x, 0, 0, kTasks, partials, first_piece, num_pieces);
}

// Any number of tasks: blockIdx.x counts the pairs of groups first, so that the L2 cache serves a piece's second read.
__global__ void __launch_bounds__(kThreads)
    gramian_of_groups_kernel(const __grid_constant__ Table table, int num_tasks, float* partials, int first_piece,
                             int num_pieces) {
  const int num_groups = (num_tasks + kGroup - 1) / kGroup, num_pairs = num_groups * (num_groups + 1) / 2;
  int row_group = 0, col_group = blockIdx.x % num_pairs;
  for (; col_group >= num_groups - row_group; ++row_group) col_group -= num_groups - row_group;
  col_group += row_group;
  gramian_piece<kGroup, kGroup, false>(table, blockIdx.x / num_pairs, row_group * kGroup, col_group * kGroup, num_tasks,
                                       partials, first_piece, num_pieces);
}

// Block (j, i) adds up the partial sums of G[i, j], i <= j.
__global__ void __launch_bounds__(kThreads) sum_partials_kernel(const float* partials, int num_pieces, float* gram) {
  const int num_tasks = gridDim.x, i = blockIdx.y, j = blockIdx.x;
  if (i > j) return;
  const float* entry = partials + entry_of(i, j, num_tasks) * num_pieces;
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int piece = threadIdx.x; piece < num_pieces; piece += kThreads) sum += entry[piece];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) gram[i * num_tasks + j] = gram[j * num_tasks + i] = static_cast<float>(sums[0]);
}

template <typename scalar_t, typename out_t, int kSize>
__device__ __forceinline__ void combine_columns(const void* const* rows, const float* weights, int num_tasks,
                                                int64_t offset, int begin, int end) {
  using Values = Pack<scalar_t, kSize>;
  out_t* out = static_cast<out_t*>(const_cast<void*>(rows[num_tasks])) + offset;
  for (int p = begin + static_cast<int>(threadIdx.x) * kSize; p < end; p += kThreads * kSize) {
    float sums[kSize] = {};
    for (int first = 0; first < num_tasks; first += kRowsInFlight) {
      Values x[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i)
        if (first + i < num_tasks)
          x[i] = *reinterpret_cast<const Values*>(static_cast<const scalar_t*>(rows[first + i]) + offset + p);
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (first + i >= num_tasks) break;
#pragma unroll
        for (int lane = 0; lane < kSize; ++lane)
          sums[lane] = fmaf(weights[first + i], static_cast<float>(x[i].values[lane]), sums[lane]);
      }
    }
    Pack<out_t, kSize> packed;
#pragma unroll
    for (int lane = 0; lane < kSize; ++lane) packed.values[lane] = static_cast<out_t>(sums[lane]);
    *reinterpret_cast<Pack<out_t, kSize>*>(out + p) = packed;
  }
}

template <typename scalar_t, typename out_t>
__device__ __forceinline__ void combine_piece(const Table& table, const Piece& piece, const float* weights) {
  const void* const* rows = table.rows + piece.tensor * table.row_stride;
  const int num_tasks = table.row_stride - 1, split = vectorised<scalar_t>(table, piece);
  combine_columns<scalar_t, out_t, kVectorBytes / sizeof(scalar_t)>(rows, weights, num_tasks, piece.begin, 0, split);
  combine_columns<scalar_t, out_t, 1>(rows, weights, num_tasks, piece.begin, split, piece.count);
}

__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ Table table, const float* weights_ptr) {
  __shared__ float weights[kMaxTasks];
  if (threadIdx.x < table.row_stride - 1) weights[threadIdx.x] = weights_ptr[threadIdx.x];
  __syncthreads();
  const Piece piece = find_piece(table, blockIdx.x);
  switch (table.kind[piece.tensor]) {
    case kFloat: return combine_piece<float, float>(table, piece, weights);
    case kBFloat16: return combine_piece<c10::BFloat16, c10::BFloat16>(table, piece, weights);
    case kHalf: return combine_piece<c10::Half, c10::Half>(table, piece, weights);
    case kBFloat16ToFloat: return combine_piece<c10::BFloat16, float>(table, piece, weights);
    case kHalfToFloat: return combine_piece<c10::Half, float>(table, piece, weights);
  }
}

}  // namespace
}  // namespace fastmtl
