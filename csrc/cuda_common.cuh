// What the CUDA files share: the launch macro, bf16, 16-byte accesses, warp sums, and tensor-core
// instructions, each wrapped in one inline function. Without nvcc the same kernels compile as plain
// C++ against tests/kernels/cuda_cpu/cuda_cpu.h, which runs every CUDA thread as a fiber and
// emulates each of these functions.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_cpu.h"
#endif

namespace crate_mini {

// ---- numbers ----

// The upper half of a float.
struct bf16 {
  uint16_t bits;
};

__host__ __device__ __forceinline__ float to_float(float v) { return v; }
__host__ __device__ __forceinline__ float to_float(bf16 v) {
  union {
    uint32_t bits;
    float value;
  } u = {uint32_t(v.bits) << 16};
  return u.value;
}

template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
// To nearest, ties to even.
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  union {
    float value;
    uint32_t bits;
  } u = {v};
  if (v != v) return {uint16_t(u.bits >> 16 | 0x40)};  // rounding could turn a NaN into infinity
  return {uint16_t((u.bits + 0x7FFF + (u.bits >> 16 & 1)) >> 16)};
#endif
}

// Return the first CUDA error from the calling host function.
#define TRY(call) \
  if (int error_ = static_cast<int>(call)) return error_

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a launch has to know of the current device; zeros if there is none, which the launch itself
// then reports.
struct Device {
  int major = 0;  // of its compute capability
  int multiprocessors = 0;
};
inline Device current_device() {
  Device device;
  int number = 0;
  cudaGetDevice(&number);
  cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, number);
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, number);
  return device;
}

// ---- memory: eight neighbours at once ----

#ifdef __CUDACC__
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// In PTX, because nvcc 13 splits the plain store of packed bf16 into four.
__device__ __forceinline__ void store16_global(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
#endif

// 16 bytes of bf16, 32 of float.
template <class T> struct alignas(16) Eight {
  T value[8];
};

// Whether rows of `columns` values can be read 16 bytes at a time: every row starts on a multiple
// of 16.
template <class T> __host__ __device__ bool wide(const T* p, int64_t columns) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && columns * int64_t(sizeof(T)) % 16 == 0;
}

template <class T> __device__ __forceinline__ void load8(const T* p, float out[8]) {
  union {
    uint4 raw[sizeof(T) / 2];
    Eight<T> eight;
  } u;
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) / 2; ++i)
    u.raw[i] = load16(reinterpret_cast<const uint4*>(p) + i);
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = to_float(u.eight.value[i]);
}

template <bool kGlobal, class T> __device__ __forceinline__ void store8(T* p, const float in[8]) {
  union {
    uint4 raw[sizeof(T) / 2];
    Eight<T> eight;
  } u;
#pragma unroll
  for (int i = 0; i < 8; ++i) u.eight.value[i] = from_float<T>(in[i]);
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) / 2; ++i)
    (kGlobal ? store16_global : store16)(reinterpret_cast<uint4*>(p) + i, u.raw[i]);
}

// ---- one warp ----

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Every lane receives the sum; the order is fixed.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}

// ---- tensor cores (Ampere and later) ----
//
// Only kernels that are empty on older devices may call these: see product_v3.
//
// A fragment is the layout in which 32 lanes together hold a small matrix; see "Matrix Fragments
// for mma.m16n8k16" in the PTX ISA manual.

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Start copying `bytes` (0 to 16) to shared memory, filled up to 16 with zeros. Complete only after
// copy_wait.
__device__ __forceinline__ void copy_async16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait for all of this thread's copies except those of the last kPending committed groups.
template <int kPending> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Load four 8x8 matrices of bf16 from shared memory into fragments. Lane i passes the address of
// row i % 8 of matrix i / 8, aligned to 16 bytes. Lane l receives elements [l / 4][l % 4 * 2 + (0,
// 1)] of each matrix, or of its transpose.
__device__ __forceinline__ void load_matrices(uint32_t out[4], const void* row, bool transposed) {
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16x8, float) += a (16x16, bf16) b (16x8, bf16). Lane l holds rows l / 4 and l / 4 + 8 of c,
// columns l % 4 * 2 and the next; the 8x8 quadrants (0,0), (8,0), (0,8), (8,8) of a as
// load_matrices returns them; and, of b given as its transpose, the halves k < 8 and k >= 8.
__device__ __forceinline__ void mma_16x8x16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace crate_mini
