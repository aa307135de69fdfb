// MSSA's projection on CUDA: u = LayerNorm(z; weight, bias, eps) U, u (N, d) read as (N, K, p), its
// heads side by side.
//
// The product is that of product_cuda.cuh with LayerNorm applied while A is read (`Normed`), so the
// normalised rows never exist in memory: v1 one thread per output, v2 shared-memory tiles, v3
// tensor cores with the normalised rows staged as bf16. A first pass over z stores mean and 1 /
// deviation of each row, 8 bytes per token.
//     python -m crate_mini.studies bench --op mssa --versions
// Bytes at best, with z float32 and the rest bf16: N d (4 + 4 + 2) + 2 d^2 forward, for 2 N d^2
// operations; the reference writes the normalised rows and reads them back, N d (2 + 2) more.
//
// Backward needs only z from the forward pass: it computes the statistics again, keeps gx = gu U^T
// in float, and normalises z again while reading it for gU = LayerNorm(z)^T gu.
#include "kernels.h"
#include "product_cuda.cuh"

namespace crate_mini {
namespace {

// One warp per row; two passes, because E[z^2] - E[z]^2 cancels for a row far from zero.
template <class Z>
__global__ void row_stats(RowStats* stats, const Z* z, int64_t N, int64_t d, float eps) {
  const int64_t row = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= N) return;  // the whole warp leaves
  float sum = 0, squares = 0;
  for (int64_t c = lane; c < d; c += 32) sum += to_float(z[row * d + c]);
  const float mean = warp_sum(sum) / d;
  for (int64_t c = lane; c < d; c += 32) {
    const float v = to_float(z[row * d + c]) - mean;
    squares += v * v;
  }
  const float variance = warp_sum(squares) / d;
  if (lane == 0) stats[row] = {mean, 1.f / sqrtf(variance + eps)};
}

// gz = rstd (g - mean(g) - xhat mean(g xhat)), g = gx weight, xhat = (z - mean) rstd. One warp per
// row.
template <class Z> __global__ void norm_backward(Z* gz, const float* gx, const Normed<Z> z) {
  const int64_t row = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32, d = z.columns;
  const int lane = threadIdx.x % 32;
  if (row >= z.rows) return;
  const RowStats s = z.stats[row];
  float sum = 0, along = 0;
  for (int64_t c = lane; c < d; c += 32) {
    const float g = gx[row * d + c] * z.weight[c];
    sum += g;
    along += g * (to_float(z.data[row * d + c]) - s.mean) * s.rstd;
  }
  sum = warp_sum(sum) / d;
  along = warp_sum(along) / d;
  for (int64_t c = lane; c < d; c += 32) {
    const float xhat = (to_float(z.data[row * d + c]) - s.mean) * s.rstd;
    gz[row * d + c] = from_float<Z>(s.rstd * (gx[row * d + c] * z.weight[c] - sum - xhat * along));
  }
}

// What an element adds to gweight = sum over rows of gx xhat.
template <class Z> struct WeightShare {
  const float* gx;
  Normed<Z> z;
  __device__ float operator()(int64_t r, int64_t c) const {
    return gx[r * z.columns + c] * (to_float(z.data[r * z.columns + c]) - z.stats[r].mean) *
           z.stats[r].rstd;
  }
};

// What an element adds to gbias = sum over rows of gx.
struct BiasShare {
  const float* gx;
  int64_t columns;
  __device__ float operator()(int64_t r, int64_t c) const { return gx[r * columns + c]; }
};

// Working memory of backward; forward has the statistics alone.
struct Space {
  Workspace space;
  RowStats* stats;  // (N,)
  float* gx;        // (N, d)
  float* parts;     // (splits, d, d)
  float* columns;   // (slices, d)
  int splits;
  Space(void* base, int64_t N, int64_t d) : space{static_cast<char*>(base)} {
    stats = space.take<RowStats>(N);
    gx = space.take<float>(N * d);
    splits = choose_splits(d, d, N, current_device().multiprocessors);
    parts = space.take<float>(splits * d * d);
    columns = space.take<float>(column_slices(N) * d);
  }
};

template <class Z>
int statistics(RowStats* stats, const Z* z, int64_t N, int64_t d, float eps, cudaStream_t stream) {
  LAUNCH((row_stats<Z>), static_cast<unsigned>(ceil_div(N, 8)), 256, 0, stream, stats, z, N, d,
         eps);
  return cudaGetLastError();
}

template <class Z, class T>
int forward(const Normed<Z>& z, RowStats* stats, float eps, const T* U, T* u, int version,
            cudaStream_t stream) {
  const int64_t N = z.rows, d = z.columns;
  if (N == 0 || d == 0) return cudaSuccess;
  TRY(statistics(stats, z.data, N, d, eps, stream));
  Epilogue<T, T> plain;
  plain.out = u;
  Product<Normed<Z>, Plain<T>, Epilogue<T, T>> p{N, d, d, {z}, {{U, d, d}}, plain};
  return multiply<false, false>(p, version, stream);
}

template <class Z, class T>
int backward(const Normed<Z>& z, const Space& w, float eps, const T* gu, const T* U, Z* gz,
             float* gweight, float* gbias, T* gU, int version, cudaStream_t stream) {
  const int64_t N = z.rows, d = z.columns;
  if (d == 0) return cudaSuccess;
  if (N > 0) {
    TRY(statistics(w.stats, z.data, N, d, eps, stream));
    Epilogue<T, float> to_gx;
    to_gx.out = w.gx;
    Product<Plain<T>, Plain<T>, Epilogue<T, float>> back{N, d, d, {{gu, N, d}}, {{U, d, d}}, to_gx};
    TRY((multiply<false, true>(back, version, stream)));
    LAUNCH((norm_backward<Z>), static_cast<unsigned>(ceil_div(N, 8)), 256, 0, stream, gz, w.gx, z);
    TRY(cudaGetLastError());
  }
  const int slices = column_slices(N);
  TRY(add_columns(w.columns, WeightShare<Z>{w.gx, z}, N, d, false, stream));
  TRY(add_slices(gweight, w.columns, d, slices, 1, stream));
  if (gbias) {
    TRY(add_columns(w.columns, BiasShare{w.gx, d}, N, d, false, stream));
    TRY(add_slices(gbias, w.columns, d, slices, 1, stream));
  }
  Epilogue<T, float> to_parts;
  to_parts.out = w.parts;
  Product<Normed<Z>, Plain<T>, Epilogue<T, float>> outer{d, d, N, {z}, {{gu, N, d}}, to_parts};
  outer.splits = w.splits;
  TRY((multiply<true, false>(outer, version, stream)));
  return add_slices(gU, w.parts, d * d, outer.splits, 1, stream);
}

template <class F> int with_types(int zdtype, int dtype, F f) {
  if (zdtype == F32 && dtype == F32) return f(float(), float());
  if (zdtype == F32 && dtype == BF16) return f(float(), bf16());
  if (zdtype == BF16 && dtype == BF16) return f(bf16(), bf16());
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t mssa_project_forward_workspace_cuda(int, int, int64_t N, int64_t) {
  return N * int64_t(sizeof(RowStats));
}

int64_t mssa_project_backward_workspace_cuda(int, int, int64_t N, int64_t d) {
  return Space(nullptr, N, d).space.used;
}

int mssa_project_forward_cuda(int zdtype, int dtype, int64_t N, int64_t d, double eps,
                              const void* z, const void* weight, const void* bias, const void* U,
                              void* u, void* workspace, int version, void* stream) {
  return with_types(zdtype, dtype, [&](auto ztype, auto type) {
    using Z = decltype(ztype);
    using T = decltype(type);
    RowStats* stats = static_cast<RowStats*>(workspace);
    Normed<Z> rows{(const Z*)z, N, d, stats, (const float*)weight, (const float*)bias};
    return forward<Z, T>(rows, stats, float(eps), (const T*)U, (T*)u, version,
                         static_cast<cudaStream_t>(stream));
  });
}

int mssa_project_backward_cuda(int zdtype, int dtype, int64_t N, int64_t d, double eps,
                               const void* gu, const void* z, const void* weight, const void* bias,
                               const void* U, void* gz, void* gweight, void* gbias, void* gU,
                               void* workspace, int version, void* stream) {
  return with_types(zdtype, dtype, [&](auto ztype, auto type) {
    using Z = decltype(ztype);
    using T = decltype(type);
    Space w(workspace, N, d);
    Normed<Z> rows{(const Z*)z, N, d, w.stats, (const float*)weight, (const float*)bias};
    return backward<Z, T>(rows, w, float(eps), (const T*)gu, (const T*)U, (Z*)gz, (float*)gweight,
                          (float*)gbias, (T*)gU, version, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace crate_mini
