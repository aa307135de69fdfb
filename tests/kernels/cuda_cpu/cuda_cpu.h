// A CUDA device for g++: just enough of the language to run the kernels of csrc/ on any CPU, for
// tests. This file holds the keywords and instructions; fibers.h the machine, with what it checks
// and what it does not model.
#pragma once
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emu::current->index)
#define blockIdx emu::block_index
#define blockDim emu::block_size
#define gridDim emu::grid_size
#define SHARED(name) unsigned char* name = emu::shared_memory
#define LAUNCH(kernel, grid, block, shared, stream, ...)                  \
  emu::launch(reinterpret_cast<const void*>(kernel), grid, block, shared, \
              [&] { kernel(__VA_ARGS__); })

inline int cudaGetLastError() {
  int code = emu::error;
  emu::error = cudaSuccess;
  return code;
}
template <class Kernel> int cudaFuncSetAttribute(Kernel* kernel, int, int bytes) {
  if (size_t(bytes) > emu::kSharedLimit) return emu::error = cudaErrorInvalidValue;
  emu::shared_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
inline int cudaGetDevice(int* number) { return *number = 0; }
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emu::multiprocessors : emu::major;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "as CUDA puts it"; }
inline int cudaDriverGetVersion(int* number) { return *number = 12020, 0; }
inline int cudaRuntimeGetVersion(int* number) { return *number = 13000, 0; }

inline void __syncthreads() { emu::wait_for(emu::kBlock, 0); }
inline void __syncwarp() { emu::exchange(1, nullptr, 0); }
template <class T> T __shfl_sync(unsigned, T v, int lane) {
  T out;
  memcpy(&out, emu::exchange(2, &v, sizeof v)[lane & 31].bytes, sizeof v);
  return out;
}
template <class T> T __shfl_xor_sync(unsigned all, T v, int bits) {
  return __shfl_sync(all, v, (emu::current->number % 32) ^ bits);
}
inline unsigned __ballot_sync(unsigned, int yes) {
  const emu::Lane* lanes = emu::exchange(3, &yes, sizeof yes);
  unsigned out = 0;
  for (int i = 0; i < 32; ++i)
    out |= unsigned(*reinterpret_cast<const int*>(lanes[i].bytes) != 0) << i;
  return out;
}
inline int __ffs(unsigned v) { return v ? __builtin_ctz(v) + 1 : 0; }

// Emulations of what cuda_common.cuh writes in PTX.
inline uint4 load16(const void* p) {
  return emu::aligned16(p) ? *static_cast<const uint4*>(p) : uint4{};
}
inline void store16(void* p, uint4 v) {
  if (emu::aligned16(p)) *static_cast<uint4*>(p) = v;
}
inline void store16_global(void* p, uint4 v) { store16(p, v); }

inline void land(const emu::Copy& c) {
  memset(c.to, 0, 16);
  memcpy(c.to, c.from, c.bytes);
}
inline void copy_async16(void* to, const void* from, int bytes) {
  emu::needs(8);
  if (!emu::aligned16(to) || !emu::aligned16(from)) return;
  emu::Copy c{to, from, bytes, emu::current->group};
  if (emu::random() & 1)
    land(c);
  else
    emu::current->copies.push_back(c);
}
inline void copy_commit() { ++emu::current->group; }
template <int kPending> void copy_wait() {
  auto& copies = emu::current->copies;
  auto due = [](const emu::Copy& c) { return c.group < emu::current->group - kPending; };
  for (auto& c : copies)
    if (due(c)) land(c);
  copies.erase(std::remove_if(copies.begin(), copies.end(), due), copies.end());
}

inline void load_matrices(uint32_t out[4], const void* row, bool transposed) {
  emu::aligned16(row);
  const emu::Lane* lanes = emu::exchange(transposed ? 5 : 4, &row, sizeof row);
  emu::check_banks(lanes);
  int lane = emu::current->number % 32, major = lane / 4, minor = lane % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    uint16_t two[2];
    for (int i = 0; i < 2; ++i) {
      int r = transposed ? minor + i : major, c = transposed ? major : minor + i;
      two[i] = (*reinterpret_cast<const uint16_t* const*>(lanes[m * 8 + r].bytes))[c];
    }
    memcpy(out + m, two, 4);
  }
}
inline void mma_16x8x16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  emu::needs(8);
  uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const emu::Lane* lanes = emu::exchange(6, words, sizeof words);
  int lane = emu::current->number % 32;
  // The bf16 in one half of one register of a lane.
  auto value = [&](int from, int word, int half) {
    auto halves = reinterpret_cast<const uint16_t*>(lanes[from].bytes);
    uint32_t bits = uint32_t(halves[word * 2 + half]) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  };
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      c[i] += value(row * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k % 2) *
              value(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
  }
}
