// y = D a, where a are the codes of x after two ISTA steps from zero, in one kernel: a tile of rows
// stays in shared memory through all four products. Compiles with nvcc, and with g++ against
// tests/kernels/cuda_cpu/.
#include "cuda_common.cuh"

using namespace crate_mini;

constexpr int kRows = 8, kThreads = 128;

// x, y (N, d), D (d, h). Shared memory holds kRows * (d + h) floats.
__global__ void fused(int64_t N, int64_t d, int64_t h, float eta, float lam, const float* x,
                      const float* D, float* y) {
  SHARED(memory);
  float* r = reinterpret_cast<float*>(memory);  // (kRows, d)
  float* a = r + kRows * d;                     // (kRows, h)
  // begin solution
  const int64_t first = int64_t(blockIdx.x) * kRows;
  const int64_t rows = N - first < kRows ? N - first : kRows;
  x += first * d;
  y += first * d;
  for (int step = 0; step < 2; ++step) {
    // r = x - D a
    for (int64_t i = threadIdx.x; i < rows * d; i += blockDim.x) {
      float sum = 0;
      for (int64_t j = 0; step > 0 && j < h; ++j) sum += D[i % d * h + j] * a[i / d * h + j];
      r[i] = x[i] - sum;
    }
    __syncthreads();
    // a = ReLU(a + eta D^T r - eta lam)
    for (int64_t i = threadIdx.x; i < rows * h; i += blockDim.x) {
      float sum = 0;
      for (int64_t k = 0; k < d; ++k) sum += r[i / h * d + k] * D[k * h + i % h];
      const float code = (step > 0 ? a[i] : 0) + eta * sum - eta * lam;
      a[i] = code < 0 ? 0 : code;  // a NaN stays
    }
    __syncthreads();
  }
  // y = D a
  for (int64_t i = threadIdx.x; i < rows * d; i += blockDim.x) {
    float sum = 0;
    for (int64_t j = 0; j < h; ++j) sum += D[i % d * h + j] * a[i / d * h + j];
    y[i] = sum;
  }
  // end solution
}

// Returns a CUDA error code, 0 for none.
extern "C" int fused_forward(int64_t N, int64_t d, int64_t h, float eta, float lam, const float* x,
                             const float* D, float* y, void* stream) {
  if (N == 0) return 0;
  const int shared = int(kRows * (d + h) * sizeof(float));
  TRY(cudaFuncSetAttribute(fused, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const dim3 grid(static_cast<unsigned>(ceil_div(N, kRows)));
  LAUNCH(fused, grid, kThreads, shared, static_cast<cudaStream_t>(stream), N, d, h, eta, lam, x, D,
         y);
  return cudaGetLastError();
}
