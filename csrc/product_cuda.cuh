// The matrix product behind every step of ISTA and MSSA, forward and backward, with a fused
// epilogue:
//
//     out = mask(relu(alpha * sum_t A_t B_t + beta * add - threshold))
//
// with out (M, N), A_t (M, K), B_t (K, N).
//
// v1  One thread per output, which reads its operands from memory: 2 K reads for 2 K operations.
// v2  A block computes a 64 x 64 tile from slices of 64 x 16 in shared memory. Each value read
//     serves 64 outputs, so memory traffic falls 64-fold; a thread keeps 4 x 4 sums, so 8 shared
//     reads feed 16 multiply-adds. Ships for float32.
// v3  Tensor cores: one warp instruction does 16 x 8 x 16 bf16 multiply-adds into float sums.
//     Slices arrive by 16-byte asynchronous copies, two slices ahead of the arithmetic; ldmatrix
//     hands them to the lanes, transposed where needed; the epilogue goes through shared memory, so
//     that it too moves 16 bytes at a time. Ships for bf16 on Ampere and later, with tiles of
//     128 x 128, or 64 x 64 where those would leave multiprocessors idle. A block takes 48 KB of
//     shared memory, so that two of them fit on any of these GPUs. What Hopper could do beyond it
//     is in hopper.md.
//
// Bytes at best, every operand moved once: (M K + K N + M N (1 + add + mask)) * size, for 2 M N K
// operations. For a threshold step in bf16 with many rows and h = 4 d, that is
// 2 d h / (2 d + 4 h) = 0.44 d operations per byte: d = 128 is bound by memory, so the fused
// epilogue is what counts; d = 768 is bound by arithmetic.
#pragma once
#include "cuda_common.cuh"

namespace crate_mini {

// ---- operands: matrices in memory, row-major without gaps ----

template <class S> struct Plain {
  using Element = S;
  static constexpr bool kNormed = false;
  const S* data;
  int64_t rows, columns;

  // Zero outside, so that a tail adds nothing to a sum.
  __device__ float at(int64_t r, int64_t c) const {
    return r < rows && c < columns ? to_float(data[r * columns + c]) : 0.f;
  }
  __device__ void eight(int64_t r, int64_t c, bool wide, float out[8]) const {
    if (wide && r < rows && c < columns) return load8(data + r * columns + c, out);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = at(r, c + i);
  }
};

// Of one token's d values; rstd = 1 / sqrt(variance + eps).
struct RowStats {
  float mean, rstd;
};

// LayerNorm applied while reading: the normalised rows never exist in memory.
template <class S> struct Normed {
  using Element = S;
  static constexpr bool kNormed = true;
  const S* data;
  int64_t rows, columns;
  const RowStats* stats;
  const float *weight, *bias;  // (columns,); bias may be null

  __device__ float norm(float v, RowStats s, int64_t c) const {
    return (v - s.mean) * s.rstd * weight[c] + (bias ? bias[c] : 0.f);
  }
  __device__ float at(int64_t r, int64_t c) const {
    return r < rows && c < columns ? norm(to_float(data[r * columns + c]), stats[r], c) : 0.f;
  }
  __device__ void eight(int64_t r, int64_t c, bool wide, float out[8]) const {
    if (wide && r < rows && c < columns) {
      load8(data + r * columns + c, out);
      RowStats s = stats[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = norm(out[i], s, c + i);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = at(r, c + i);
    }
  }
};

// ---- epilogue: what happens to a sum before it is stored ----

template <class T, class O> struct Epilogue {
  O* out;  // (M, N)
  float alpha = 1;
  const O* add = nullptr;  // (M, N); may be `out` itself
  float beta = 1;
  float threshold = 0;         // eta lam; with `lam` given, eta alone
  const float* lam = nullptr;  // (N,) one threshold per code
  bool relu = false;
  const T* mask = nullptr;  // (M, N); where it is not positive the result is zero

  // With <=, so that a NaN stays a NaN, as in PyTorch's relu and its gradient.
  __device__ float value(float sum, float added, float masked, int64_t column) const {
    float v = alpha * sum - (lam ? threshold * lam[column] : threshold);
    if (add) v += beta * added;
    if (relu && v <= 0.f) v = 0.f;
    return masked <= 0.f ? 0.f : v;
  }
  __device__ void one(int64_t index, int64_t column, float sum) const {
    out[index] = from_float<O>(
        value(sum, add ? to_float(add[index]) : 0.f, mask ? to_float(mask[index]) : 1.f, column));
  }
  __device__ void eight(int64_t index, int64_t column, float v[8]) const {
    float added[8] = {}, masked[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (add) load8(add + index, added);
    if (mask) load8(mask + index, masked);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = value(v[i], added[i], masked[i], column + i);
    store8<true>(out + index, v);
  }
  bool is_wide(int64_t N) const { return wide(out, N) && wide(add, N) && wide(mask, N); }
};

// ---- the product: up to three terms, possibly split along K ----
//
// Terms nest as ((A0 B0) * then[0] + A1 B1) * then[1] + A2 B2, so one set of sums serves all of
// them. With splits > 1, block row s sums its own part of K and stores it in slice s of `out`
// (splits, M, N); sum_slices adds the slices in a fixed order. That is repeatable to the bit, which
// atomic additions are not.

constexpr int kTerms = 3, kSlice = 32;

template <class A, class B, class E> struct Product {
  int64_t M, N, K;
  A a[kTerms];
  B b[kTerms];
  E epilogue;
  int terms = 1, splits = 1;
  float then[kTerms - 1] = {1, 1};
  bool wide_a = false, wide_b = false, wide_out = false;

  __host__ __device__ int64_t split_length() const {
    return ceil_div(ceil_div(K, kSlice), splits) * kSlice;
  }
};

// kAT: A lies in memory transposed, (K, M); kBT: B lies in memory transposed, (N, K).
template <bool kAT, bool kBT, class A, class B, class E>
__global__ void product_v1(Product<A, B, E> p) {
  int64_t index = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (index >= p.M * p.N) return;
  int64_t i = index / p.N, j = index % p.N;
  int64_t first = blockIdx.y * p.split_length(), last = first + p.split_length();
  float sum = 0;
  for (int t = 0; t < p.terms; ++t) {
    if (t) sum *= p.then[t - 1];
    for (int64_t k = first; k < last && k < p.K; ++k)
      sum += (kAT ? p.a[t].at(k, i) : p.a[t].at(i, k)) * (kBT ? p.b[t].at(j, k) : p.b[t].at(k, j));
  }
  p.epilogue.one(blockIdx.y * p.M * p.N + index, j, sum);
}

// Rows of shared memory are 4 values longer than the tile, so that the values of a column lie in
// different banks.
constexpr int kTile2 = 64, kSlice2 = 16, kPitch2 = kTile2 + 4;

// Load a slice of 64 outputs x 16 steps of K into tile[k][output]; neighbouring threads read
// neighbouring addresses.
template <bool kOutputsFirst, class Operand>
__device__ void load_slice_v2(float* tile, const Operand& from, int64_t output, int64_t k) {
  for (int n = threadIdx.x; n < kTile2 * kSlice2; n += blockDim.x) {
    int o = kOutputsFirst ? n / kSlice2 : n % kTile2, s = kOutputsFirst ? n % kSlice2 : n / kTile2;
    tile[s * kPitch2 + o] = kOutputsFirst ? from.at(output + o, k + s) : from.at(k + s, output + o);
  }
}

template <bool kAT, bool kBT, class A, class B, class E>
__global__ void __launch_bounds__(256, 4) product_v2(Product<A, B, E> p) {
  SHARED(memory);
  float *tile_a = reinterpret_cast<float*>(memory), *tile_b = tile_a + kSlice2 * kPitch2;
  const int64_t across = ceil_div(p.N, kTile2);
  const int64_t i0 = blockIdx.x / across * kTile2, j0 = blockIdx.x % across * kTile2;
  const int64_t first = blockIdx.y * p.split_length(), last = first + p.split_length();
  const int i = threadIdx.x / 16 * 4, j = threadIdx.x % 16 * 4;  // this thread's 4 x 4 outputs
  float sum[4][4] = {};
  for (int t = 0; t < p.terms; ++t) {
    for (int n = 0; t && n < 16; ++n) sum[n / 4][n % 4] *= p.then[t - 1];
    for (int64_t k = first; k < last && k < p.K; k += kSlice2) {
      load_slice_v2<!kAT>(tile_a, p.a[t], i0, k);
      load_slice_v2<kBT>(tile_b, p.b[t], j0, k);
      __syncthreads();  // the slices are complete
#pragma unroll
      for (int s = 0; s < kSlice2; ++s) {
        const float4 a4 = *reinterpret_cast<const float4*>(tile_a + s * kPitch2 + i);
        const float4 b4 = *reinterpret_cast<const float4*>(tile_b + s * kPitch2 + j);
        const float a[4] = {a4.x, a4.y, a4.z, a4.w}, b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
        for (int n = 0; n < 16; ++n) sum[n / 4][n % 4] += a[n / 4] * b[n % 4];
      }
      __syncthreads();  // no thread reads them any more
    }
  }
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    int64_t row = i0 + i + n / 4, column = j0 + j + n % 4;
    if (row < p.M && column < p.N)
      p.epilogue.one((blockIdx.y * p.M + row) * p.N + column, column, sum[n / 4][n % 4]);
  }
}

// Where value (row, column) of a v3 slice lies in shared memory. Eight neighbours, 16 bytes, stay
// together, but the order of these groups within a row depends on the row: the eight rows that
// ldmatrix reads at once then lie in different banks, without any padding.
template <int kColumns> __device__ __forceinline__ int place(unsigned row, unsigned column) {
  constexpr unsigned kGroups = kColumns / 8;
  const unsigned turn = kGroups < 8 ? row / (8 / kGroups) % kGroups : row % 8;
  return row * kColumns + (column / 8 ^ turn) * 8 + column % 8;
}

// The shape of a v3 block: kWarpsM x kWarpsN warps share its tile, each with kM x kN instruction
// tiles of 16 x 8. A slice keeps its order of rows and columns in memory. The sums leave through
// shared memory in kWarpsM parts, one row of warps after the other.
template <int kTileM, int kTileN, int kWarpsM, int kWarpsN, bool kAT, bool kBT> struct Shape {
  static constexpr int kThreads = kWarpsM * kWarpsN * 32, kStages = 3;
  static constexpr int kM = kTileM / kWarpsM / 16, kN = kTileN / kWarpsN / 8;
  static constexpr int kRowsA = kAT ? kSlice : kTileM, kColumnsA = kAT ? kTileM : kSlice;
  static constexpr int kRowsB = kBT ? kTileN : kSlice, kColumnsB = kBT ? kSlice : kTileN;
  static constexpr int kSizeA = kRowsA * kColumnsA;  // in bf16 values
  static constexpr int kStage = kSizeA + kRowsB * kColumnsB;
  static constexpr int kRing = kStages * kStage * int(sizeof(bf16));
  static constexpr int kRowsOut = kTileM / kWarpsM, kPitchOut = kTileN + 8;
  static constexpr int kOut = kRowsOut * kPitchOut * int(sizeof(float));
  static constexpr int kShared = kRing > kOut ? kRing : kOut;
  static_assert(kShared <= 48 << 10, "more would need cudaFuncSetAttribute");
};

// Load kRows x kColumns values from (row, column) on into shared memory; zeros outside the matrix.
template <int kRows, int kColumns, class Operand>
__device__ void load_slice_v3(bf16* tile, const Operand& from, int64_t row, int64_t column,
                              bool wide) {
  for (int n = threadIdx.x; n < kRows * kColumns / 8; n += blockDim.x) {
    int r = n / (kColumns / 8), c = n % (kColumns / 8) * 8;
    bf16* to = tile + place<kColumns>(r, c);
    if constexpr (!Operand::kNormed) {
      if (wide) {
        bool inside = row + r < from.rows && column + c < from.columns;
        copy_async16(to, from.data + (inside ? (row + r) * from.columns + column + c : 0),
                     inside ? 16 : 0);
        continue;
      }
    }
    float v[8];
    from.eight(row + r, column + c, wide, v);
    store8<false>(to, v);
  }
}

// Add one slice of K (32 steps) to a warp's sums; its part of the tile begins at (i, j).
template <class S, bool kAT, bool kBT>
__device__ __forceinline__ void multiply_slice(const bf16* a, const bf16* b, int i, int j,
                                               float sum[S::kM][S::kN][4]) {
  const int lane = threadIdx.x % 32, low = lane % 16, high = lane / 16 * 8;
  const int row8 = lane % 8 + high, half8 = lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kSlice; k += 16) {
    uint32_t fa[S::kM][4], fb[S::kN / 2][4];
#pragma unroll
    for (int m = 0; m < S::kM; ++m) {  // quadrants in the order (0,0), (8,0), (0,8), (8,8)
      const int row = kAT ? k + row8 : i + m * 16 + low;
      const int column = kAT ? i + m * 16 + half8 : k + high;
      load_matrices(fa[m], a + place<S::kColumnsA>(row, column), kAT);
    }
#pragma unroll
    for (int n = 0; n < S::kN / 2; ++n) {  // two instruction tiles, both halves of k of each
      const int row = kBT ? j + n * 16 + row8 : k + low;
      const int column = kBT ? k + half8 : j + n * 16 + high;
      load_matrices(fb[n], b + place<S::kColumnsB>(row, column), !kBT);
    }
#pragma unroll
    for (int m = 0; m < S::kM; ++m)
#pragma unroll
      for (int n = 0; n < S::kN; ++n) mma_16x8x16(sum[m][n], fa[m], fb[n / 2] + n % 2 * 2);
  }
}

// Write a warp's sums to shared memory, at column j of a part of the tile.
template <class S>
__device__ __forceinline__ void show_sums(float* part, int j, float sum[S::kM][S::kN][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < S::kM; ++m)
#pragma unroll
    for (int n = 0; n < S::kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = m * 16 + lane / 4 + e / 2 * 8, column = j + n * 8 + lane % 4 * 2 + e % 2;
        part[row * S::kPitchOut + column] = sum[m][n][e];
      }
}

// Pass a part of the tile, whose first value is (i0, j0) of `out`, through the epilogue: eight
// neighbours per thread.
template <class S, int kTileN, class P>
__device__ __forceinline__ void store_part(const float* part, const P& p, int64_t i0, int64_t j0) {
  for (int n = threadIdx.x; n < S::kRowsOut * kTileN / 8; n += blockDim.x) {
    int r = n / (kTileN / 8), c = n % (kTileN / 8) * 8;
    int64_t row = i0 + r, column = j0 + c, index = (blockIdx.y * p.M + row) * p.N + column;
    if (row >= p.M) break;
    float v[8];
    load8(part + r * S::kPitchOut + c, v);
    if (p.wide_out && column < p.N) p.epilogue.eight(index, column, v);
    for (int e = 0; !p.wide_out && e < 8 && column + e < p.N; ++e)
      p.epilogue.one(index + e, column + e, v[e]);
  }
}

// Empty on devices before Ampere, which lack its instructions; `multiply` takes v2 there.
template <int kTileM, int kTileN, int kWarpsM, int kWarpsN, bool kAT, bool kBT, class A, class B,
          class E>
__global__ void __launch_bounds__(kWarpsM * kWarpsN * 32, 2) product_v3(Product<A, B, E> p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using S = Shape<kTileM, kTileN, kWarpsM, kWarpsN, kAT, kBT>;
  SHARED(memory);
  bf16* ring = reinterpret_cast<bf16*>(memory);
  const int64_t across = ceil_div(p.N, kTileN);
  const int64_t i0 = blockIdx.x / across * kTileM, j0 = blockIdx.x % across * kTileN;
  const int64_t first = blockIdx.y * p.split_length(), left = p.K - first;
  const int slices =
      left > 0 ? int(ceil_div(left < p.split_length() ? left : p.split_length(), kSlice)) : 0;
  const int total = slices * p.terms, warp = threadIdx.x / 32;
  const int warp_row = warp / kWarpsN, i = warp_row * S::kRowsOut, j = warp % kWarpsN * S::kN * 8;
  float sum[S::kM][S::kN][4] = {};

  auto fetch =
      [&](int n) {  // start copying slice n of all terms into stage n % kStages of the ring
        if (n < total) {
          bf16* stage = ring + n % S::kStages * S::kStage;
          const int t = n / slices;
          const int64_t k = first + int64_t(n % slices) * kSlice;
          load_slice_v3<S::kRowsA, S::kColumnsA>(stage, p.a[t], kAT ? k : i0, kAT ? i0 : k,
                                                 p.wide_a);
          load_slice_v3<S::kRowsB, S::kColumnsB>(stage + S::kSizeA, p.b[t], kBT ? j0 : k,
                                                 kBT ? k : j0, p.wide_b);
        }
        copy_commit();  // even when nothing was copied, so that groups keep counting slices
      };
  for (int n = 0; n < S::kStages - 1; ++n) fetch(n);
  for (int n = 0; n < total; ++n) {
    copy_wait<S::kStages - 2>();  // this thread's part of slice n has arrived,
    __syncthreads();  // every thread's has, and no thread still reads the stage to overwrite
    fetch(n + S::kStages - 1);
    if (n && n % slices == 0)  // a new term begins
#pragma unroll
      for (int e = 0; e < S::kM * S::kN * 4; ++e)
        sum[e / 4 / S::kN][e / 4 % S::kN][e % 4] *= p.then[n / slices - 1];
    const bf16* stage = ring + n % S::kStages * S::kStage;
    multiply_slice<S, kAT, kBT>(stage, stage + S::kSizeA, i, j, sum);
  }
  copy_wait<0>();
  float* part = reinterpret_cast<float*>(memory);
  for (int w = 0; w < kWarpsM; ++w) {
    __syncthreads();  // the ring is free, or the part before has left: here comes the next
    if (warp_row == w) show_sums<S>(part, j, sum);
    __syncthreads();  // the part is complete
    store_part<S, kTileN>(part, p, i0 + w * S::kRowsOut, j0);
  }
#endif
}

// ---- choosing a version ----

#ifndef CRATE_SPLIT_ROWS  // the emulator lowers it, so that small matrices are split too
#define CRATE_SPLIT_ROWS 512
#endif

template <int kTile, int kWarpsM, int kWarpsN, bool kAT, bool kBT, class A, class B, class E>
int launch_v3(const Product<A, B, E>& p, dim3 grid, cudaStream_t stream) {
  using S = Shape<kTile, kTile, kWarpsM, kWarpsN, kAT, kBT>;
  auto kernel = product_v3<kTile, kTile, kWarpsM, kWarpsN, kAT, kBT, A, B, E>;
  LAUNCH(kernel, grid, S::kThreads, S::kShared, stream, p);
  return cudaGetLastError();
}

// Run a product. Version 0 is the best for the type and the device; v3 on float32, and on a device
// before Ampere, means v2. Returns a CUDA error code.
template <bool kAT, bool kBT, class A, class B, class E>
int multiply(Product<A, B, E> p, int version, cudaStream_t stream) {
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  constexpr bool kTensorCores = sizeof(typename B::Element) == sizeof(bf16);
  if (version < 1 || version > 3) version = 3;
  const Device device = current_device();
  if (version == 3 && (!kTensorCores || device.major < 8)) version = 2;
  const int64_t tiles2 = ceil_div(p.M, kTile2) * ceil_div(p.N, kTile2);
  const int64_t blocks = version == 1 ? ceil_div(p.M * p.N, 256) : tiles2;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  dim3 grid(static_cast<unsigned>(blocks), p.splits);
  if (version == 1) LAUNCH((product_v1<kAT, kBT, A, B, E>), grid, 256, 0, stream, p);
  if (version == 2) {
    constexpr int kShared = 2 * kSlice2 * kPitch2 * sizeof(float);
    LAUNCH((product_v2<kAT, kBT, A, B, E>), grid, 256, kShared, stream, p);
  }
  if constexpr (kTensorCores) {
    if (version == 3) {
      p.wide_a = p.wide_b = true;
      for (int t = 0; t < p.terms; ++t) {
        p.wide_a = p.wide_a && wide(p.a[t].data, p.a[t].columns);
        p.wide_b = p.wide_b && wide(p.b[t].data, p.b[t].columns);
      }
      p.wide_out = p.epilogue.is_wide(p.N);
      const int64_t large = ceil_div(p.M, 128) * ceil_div(p.N, 128);
      if (large * p.splits < device.multiprocessors)
        return launch_v3<64, 2, 2, kAT, kBT>(p, grid, stream);
      return launch_v3<128, 2, 4, kAT, kBT>(p, dim3(static_cast<unsigned>(large), p.splits),
                                            stream);
    }
  }
  return cudaGetLastError();
}

// Into how many parts to split K, each of `rows` or more, so that the tiles of an (M, N) result
// take the least time on a device that runs two blocks on each multiprocessor: tiles come in waves,
// and a wave takes as long when it is half empty. A function of the sizes and the device alone,
// because it decides the order of summation.
inline int choose_splits(int64_t M, int64_t N, int64_t K, int multiprocessors,
                         int rows = CRATE_SPLIT_ROWS) {
  constexpr int64_t kStore = 8;  // storing and adding a part, in slices of K: by their bytes
  const int64_t tiles = ceil_div(M, 128) * ceil_div(N, 128), places = 2 * int64_t(multiprocessors);
  int64_t most = ceil_div(K, rows), best = 1, least = INT64_MAX;
  if (most > places) most = places;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t slices = ceil_div(ceil_div(K, kSlice), splits) + kStore;
    const int64_t time = ceil_div(tiles * splits, places) * slices;
    if (time < least - least / 32) {  // more parts need more memory: they must gain 3 %
      best = splits;
      least = time;
    }
  }
  return static_cast<int>(best);
}

// ---- the small kernels around the products ----

// out (size,) = scale * sum over slices of parts (slices, size), always in the same order.
template <class O>
__global__ void sum_slices(O* out, const float* parts, int64_t size, int slices, float scale) {
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int s = 0; s < slices; ++s) sum += parts[s * size + i];
  out[i] = from_float<O>(scale * sum);
}

template <class O>
int add_slices(O* out, const float* parts, int64_t size, int slices, float scale,
               cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  LAUNCH((sum_slices<O>), static_cast<unsigned>(ceil_div(size, 256)), 256, 0, stream, out, parts,
         size, slices, scale);
  return cudaGetLastError();
}

// Sums of columns, for gradients of vectors that all rows share: rows are split into slices, each
// thread sums one column of one slice, and add_slices adds the slices. value(row, column) may
// combine several matrices.
inline int column_slices(int64_t rows) {
  const int64_t slices = ceil_div(rows, 64);
  return static_cast<int>(slices < 1 ? 1 : slices > 256 ? 256 : slices);
}

template <class Value>
__global__ void sum_columns(float* parts, Value value, int64_t rows, int64_t columns,
                            bool accumulate) {
  int64_t column = blockIdx.x * int64_t(blockDim.x) + threadIdx.x,
          length = ceil_div(rows, gridDim.y);
  if (column >= columns) return;
  float sum = accumulate ? parts[blockIdx.y * columns + column] : 0.f;
  for (int64_t r = blockIdx.y * length; r < rows && r < (blockIdx.y + 1) * length; ++r)
    sum += value(r, column);
  parts[blockIdx.y * columns + column] = sum;
}

template <class Value>
int add_columns(float* parts, Value value, int64_t rows, int64_t columns, bool accumulate,
                cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(ceil_div(columns, 128)), column_slices(rows));
  LAUNCH((sum_columns<Value>), grid, 128, 0, stream, parts, value, rows, columns, accumulate);
  return cudaGetLastError();
}

// A workspace divided into parts that each start on a multiple of 256 bytes. With a null base it
// only counts bytes.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <class T> T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
    return p;
  }
};

}  // namespace crate_mini
