// ISTA on CUDA: the equations of ista_naive.cpp as matrix products.
//
// Every product is one call of `multiply` (product_cuda.cuh) with the threshold, residual or mask
// in its epilogue, so the (N, h) pre-activations never reach memory. `version` picks the product:
// v1 naive, v2 shared-memory tiles, v3 tensor cores, 0 the best for the type. On a GPU,
//     python -m crate_mini.studies bench --op ista --versions
// checks and times them. Two steps on N rows are 4 products forward and 8 backward of 2 N d h
// operations each, 24 N d h in all. Values moved forward, at best: a_1 written once and read twice,
// a_2 written and read, x and r twice each, y once: about 5 N h + 5 N d, plus D four times. (A v4
// that keeps a tile of rows on the chip through all four products would save most of the 5 N h: an
// exercise.)
//
// ista_decode reads all of D for one or a few rows and computes little with it, so memory bounds
// it; its products that read codes fetch only the atoms of non-zero codes.
#include "kernels.h"
#include "product_cuda.cuh"

namespace crate_mini {
namespace {

// The sizes and settings of a call.
template <class T> struct Problem {
  int64_t N, d, h;
  float eta;
  int version;
  cudaStream_t stream;

  Plain<T> codes(const T* p) const { return {p, N, h}; }
  Plain<T> rows(const T* p) const { return {p, N, d}; }
  Plain<T> dictionary(const T* p) const { return {p, d, h}; }

  // out (N, h) = epilogue(r D)
  int to_codes(const T* r, const T* D, const Epilogue<T, T>& epilogue) const {
    Product<Plain<T>, Plain<T>, Epilogue<T, T>> p{N, h, d, {rows(r)}, {dictionary(D)}, epilogue};
    return multiply<false, false>(p, version, stream);
  }
  // out (N, d) = epilogue(a D^T)
  int to_rows(const T* a, const T* D, const Epilogue<T, T>& epilogue) const {
    Product<Plain<T>, Plain<T>, Epilogue<T, T>> p{N, d, h, {codes(a)}, {dictionary(D)}, epilogue};
    return multiply<false, true>(p, version, stream);
  }
  int splits() const { return choose_splits(d, h, N, current_device().multiprocessors); }
};

// parts (splits, d, h) (+)= sum of +- r^T a over up to three pairs of r and a.
template <class T> struct DictionaryGradient {
  Product<Plain<T>, Plain<T>, Epilogue<T, float>> p;
  float sign = 1;  // of the sum so far

  explicit DictionaryGradient(const Problem<T>& s) {
    p.M = s.d;
    p.N = s.h;
    p.K = s.N;
    p.terms = 0;
    p.splits = s.splits();
  }

  void term(const Problem<T>& s, const T* r, const T* a, float term_sign) {
    if (p.terms) p.then[p.terms - 1] = sign * term_sign;  // (A0 B0 s0 s1 + A1 B1) s1 s2 + ...
    p.a[p.terms] = s.rows(r);
    p.b[p.terms] = s.codes(a);
    ++p.terms;
    sign = term_sign;
  }
  int run(const Problem<T>& s, float* parts, bool accumulate) {
    p.epilogue.out = parts;
    p.epilogue.alpha = sign;
    p.epilogue.add = accumulate ? parts : nullptr;
    return multiply<true, false>(p, s.version, s.stream);
  }
};

// The elements of a matrix, for add_columns.
template <class T> struct Value {
  const T* data;
  int64_t columns;
  __device__ float operator()(int64_t r, int64_t c) const {
    return to_float(data[r * columns + c]);
  }
};

// out = scale * g where code is positive (or NaN), else zero; g may be null.
template <class T>
__global__ void mask_gradient(T* out, const T* g, const T* code, float scale, int64_t size) {
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < size)
    out[i] = from_float<T>(!g || to_float(code[i]) <= 0.f ? 0.f : scale * to_float(g[i]));
}

template <class T> __global__ void add_into(T* out, const T* addend, int64_t size) {
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < size) out[i] = from_float<T>(to_float(out[i]) + to_float(addend[i]));
}

template <class T> struct BackwardSpace {
  Workspace space;
  T* G;              // (N, h)
  T* gr;             // (N, d)
  float* parts;      // (splits, d, h)
  float* lam_parts;  // (slices, h)
  BackwardSpace(void* base, const Problem<T>& s) : space{static_cast<char*>(base)} {
    G = space.take<T>(s.N * s.h);
    gr = space.take<T>(s.N * s.d);
    parts = space.take<float>(s.splits() * s.d * s.h);
    lam_parts = space.take<float>(column_slices(s.N) * s.h);
  }
};

template <class T>
int forward(const Problem<T>& s, int64_t S, float lam, const T* x, const T* D, const T* decoder,
            const float* lams, T* y, T* a, T* trail_a, T* trail_r, T* scratch_r) {
  const float threshold = lams ? s.eta : s.eta * lam;
  const T* before = nullptr;
  for (int64_t t = 1; t <= S; ++t) {
    // Without a trail each step overwrites a.
    T* codes = trail_a && t < S ? trail_a + (t - 1) * s.N * s.h : a;
    T* r = trail_r && t > 1 ? trail_r + (t - 2) * s.N * s.d : scratch_r;
    if (t > 1) {
      Epilogue<T, T> residual;
      residual.out = r;
      residual.alpha = -1;
      residual.add = x;
      TRY(s.to_rows(before, D, residual));
    }
    Epilogue<T, T> step;
    step.out = codes;
    step.alpha = s.eta;
    step.add = before;
    step.threshold = threshold;
    step.lam = lams;
    step.relu = true;
    TRY(s.to_codes(t > 1 ? r : x, D, step));
    before = codes;
  }
  Epilogue<T, T> plain;
  plain.out = y;
  return s.to_rows(a, decoder ? decoder : D, plain);
}

// G_S = eta m_S (decoder^T gy + ga)
template <class T>
int first_gradient(const Problem<T>& s, const T* gy, const T* ga, const T* decoder, const T* a,
                   T* G) {
  if (s.N * s.h == 0) return cudaSuccess;
  if (gy) {
    Epilogue<T, T> e;
    e.out = G;
    e.alpha = s.eta;
    e.beta = s.eta;
    e.add = ga;
    e.mask = a;
    return s.to_codes(gy, decoder, e);
  }
  const unsigned blocks = static_cast<unsigned>(ceil_div(s.N * s.h, 256));
  LAUNCH((mask_gradient<T>), blocks, 256, 0, s.stream, G, ga, a, s.eta, s.N * s.h);
  return cudaGetLastError();
}

template <class T>
int backward(const Problem<T>& s, int64_t S, const T* gy, const T* ga, const T* x, const T* D,
             const T* decoder, const T* a, const T* trail_a, const T* trail_r, T* gx, T* gD,
             T* gdec, float* glam, void* workspace) {
  BackwardSpace<T> w(workspace, s);
  const int slices = column_slices(s.N);
  if (gdec) {
    DictionaryGradient<T> g(s);
    if (gy) g.term(s, gy, a, 1);
    TRY(g.run(s, w.parts, false));
    TRY(add_slices(gdec, w.parts, s.d * s.h, s.splits(), 1, s.stream));
  }
  TRY(first_gradient(s, gy, ga, decoder ? decoder : D, a, w.G));
  for (int64_t t = S; t >= 1; --t) {
    T* gr = t == S ? gx : w.gr;  // gr_S starts the sum gx = sum_t gr_t
    Epilogue<T, T> back;
    back.out = t == 1 ? gx : gr;
    back.add = t == 1 && S > 1 ? gx : nullptr;
    DictionaryGradient<T> g(s);
    const T* codes = t > 1 ? trail_a + (t - 2) * s.N * s.h : nullptr;
    TRY(s.to_rows(w.G, D, back));
    g.term(s, t > 1 ? trail_r + (t - 2) * s.N * s.d : x, w.G, 1);
    if (t > 1) g.term(s, gr, codes, -1);
    if (t == S && !gdec && gy) g.term(s, gy, a, 1);
    TRY(g.run(s, w.parts, t < S));
    if (glam) TRY(add_columns(w.lam_parts, Value<T>{w.G, s.h}, s.N, s.h, t < S, s.stream));
    if (t == 1) break;
    if (t < S && s.N * s.d > 0) {
      const unsigned blocks = static_cast<unsigned>(ceil_div(s.N * s.d, 256));
      LAUNCH((add_into<T>), blocks, 256, 0, s.stream, gx, gr, s.N * s.d);
      TRY(cudaGetLastError());
    }
    Epilogue<T, T> before;  // G_{t-1} = m_{t-1} (G_t - eta gr D), in place
    before.out = w.G;
    before.add = w.G;
    before.alpha = -s.eta;
    before.mask = codes;
    TRY(s.to_codes(gr, D, before));
  }
  if (glam) TRY(add_slices(glam, w.lam_parts, s.h, slices, -1, s.stream));
  return add_slices(gD, w.parts, s.d * s.h, s.splits(), 1, s.stream);
}

// ---- decoding: one or a few rows ----

// out (N, h) = ReLU(a + eta D^T r - threshold). A block computes 64 codes of one row: 8 threads
// read 8 columns each of row k of D, 32 such groups take every 32nd k, and shared memory collects
// their sums. D is read once, 16 bytes at a time.
template <class T>
__global__ void decode_step(const Plain<T> D, const T* r, Epilogue<T, T> epilogue, bool wide) {
  SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);  // [32][64]
  const int64_t row = blockIdx.y, column = blockIdx.x * 64 + threadIdx.x % 8 * 8;
  const int group = threadIdx.x / 8;
  float sum[8] = {}, atom[8];
  for (int64_t k = group; k < D.rows; k += 32) {
    const float v = to_float(r[row * D.rows + k]);
    D.eight(k, column, wide, atom);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] += v * atom[i];
  }
  for (int i = 0; i < 8; ++i) sums[group * 64 + threadIdx.x % 8 * 8 + i] = sum[i];
  __syncthreads();
  const int64_t code = blockIdx.x * 64 + threadIdx.x;
  if (threadIdx.x >= 64 || code >= D.columns) return;
  float total = 0;
  for (int g = 0; g < 32; ++g) total += sums[g * 64 + threadIdx.x];
  epilogue.one(row * D.columns + code, code, total);
}

// out (N, d) = base + scale * Dt^T a, Dt (h, d): reads only the atoms of non-zero codes. A block
// computes 64 columns of one row; each of its 16 warps takes 32 codes at a time, finds the non-zero
// ones by a ballot and walks through them.
template <class T>
__global__ void decode_sparse(const Plain<T> Dt, const T* a, const T* base, float scale, T* out) {
  SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);  // [16][64]
  const int64_t row = blockIdx.y, column = blockIdx.x * 64;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum[2] = {};
  for (int64_t k = warp * 32; k < Dt.rows; k += 16 * 32) {
    const float code = k + lane < Dt.rows ? to_float(a[row * Dt.rows + k + lane]) : 0.f;
    unsigned non_zero = __ballot_sync(kAllLanes, code != 0.f);
    for (; non_zero; non_zero &= non_zero - 1) {
      const int from = __ffs(non_zero) - 1;
      const float v = __shfl_sync(kAllLanes, code, from);
      sum[0] += v * Dt.at(k + from, column + lane);
      sum[1] += v * Dt.at(k + from, column + 32 + lane);
    }
  }
  sums[warp * 64 + lane] = sum[0];
  sums[warp * 64 + 32 + lane] = sum[1];
  __syncthreads();
  const int64_t j = column + threadIdx.x, index = row * Dt.columns + j;
  if (threadIdx.x >= 64 || j >= Dt.columns) return;
  float total = 0;
  for (int w = 0; w < 16; ++w) total += sums[w * 64 + threadIdx.x];
  out[index] = from_float<T>((base ? to_float(base[index]) : 0.f) + scale * total);
}

template <class T>
int decode(const Problem<T>& s, int64_t S, float lam, const T* x, const T* D, const T* Dt,
           const T* dect, const float* lams, T* y, T* a, T* r) {
  if (s.N == 0) return cudaSuccess;
  if (s.N > 65535) return cudaErrorInvalidValue;
  const Plain<T> dictionary = s.dictionary(D), atoms{Dt, s.h, s.d}, decoder_atoms{dect, s.h, s.d};
  const dim3 code_grid(static_cast<unsigned>(ceil_div(s.h, 64)), static_cast<unsigned>(s.N));
  const dim3 row_grid(static_cast<unsigned>(ceil_div(s.d, 64)), static_cast<unsigned>(s.N));
  const bool is_wide = wide(D, s.h);
  Epilogue<T, T> step;
  step.out = a;
  step.alpha = s.eta;
  step.relu = true;
  step.threshold = lams ? s.eta : s.eta * lam;
  step.lam = lams;
  for (int64_t t = 1; t <= S; ++t) {
    if (t > 1 && s.d > 0)
      LAUNCH((decode_sparse<T>), row_grid, 512, 16 * 64 * 4, s.stream, atoms, a, x, -1.f, r);
    if (s.h > 0)
      LAUNCH((decode_step<T>), code_grid, 256, 32 * 64 * 4, s.stream, dictionary, t > 1 ? r : x,
             step, is_wide);
    step.add = a;
  }
  const T* nothing = nullptr;
  if (s.d > 0)
    LAUNCH((decode_sparse<T>), row_grid, 512, 16 * 64 * 4, s.stream, decoder_atoms, a, nothing, 1.f,
           y);
  return cudaGetLastError();
}

// Call f with a Problem of the type that a dtype code names, and a value of that type.
template <class F>
int with_type(int dtype, int64_t N, int64_t d, int64_t h, double eta, int version, void* stream,
              F f) {
  const float step = static_cast<float>(eta);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (dtype == F32) return f(Problem<float>{N, d, h, step, version, s}, float());
  if (dtype == BF16) return f(Problem<bf16>{N, d, h, step, version, s}, bf16());
  return cudaErrorInvalidValue;
}

}  // namespace

// Residuals of one step: forward with a trail keeps them elsewhere.
int64_t ista_forward_workspace_cuda(int dtype, int64_t N, int64_t d, int64_t) {
  return N * d * (dtype == BF16 ? sizeof(bf16) : sizeof(float));
}

int64_t ista_decode_workspace_cuda(int dtype, int64_t N, int64_t d, int64_t h) {
  return ista_forward_workspace_cuda(dtype, N, d, h);
}

int64_t ista_backward_workspace_cuda(int dtype, int64_t N, int64_t d, int64_t h) {
  int64_t bytes = 0;
  with_type(dtype, N, d, h, 0, 0, nullptr, [&](auto s, auto type) {
    bytes = BackwardSpace<decltype(type)>(nullptr, s).space.used;
    return 0;
  });
  return bytes;
}

int ista_forward_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                      const void* x, const void* D, const void* decoder, const void* lams, void* y,
                      void* a, void* trail_a, void* trail_r, void* workspace, int version,
                      void* stream) {
  return with_type(dtype, N, d, h, eta, version, stream, [&](auto s, auto type) {
    using T = decltype(type);
    return forward<T>(s, S, float(lam), (const T*)x, (const T*)D, (const T*)decoder,
                      (const float*)lams, (T*)y, (T*)a, (T*)trail_a, (T*)trail_r, (T*)workspace);
  });
}

int ista_backward_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta,
                       const void* gy, const void* ga, const void* x, const void* D,
                       const void* decoder, const void* a, const void* trail_a, const void* trail_r,
                       void* gx, void* gD, void* gdec, void* glam, void* workspace, int version,
                       void* stream) {
  return with_type(dtype, N, d, h, eta, version, stream, [&](auto s, auto type) {
    using T = decltype(type);
    return backward<T>(s, S, (const T*)gy, (const T*)ga, (const T*)x, (const T*)D,
                       (const T*)decoder, (const T*)a, (const T*)trail_a, (const T*)trail_r, (T*)gx,
                       (T*)gD, (T*)gdec, (float*)glam, workspace);
  });
}

int ista_decode_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                     const void* x, const void* D, const void* Dt, const void* dect,
                     const void* lams, void* y, void* a, void* workspace, int version,
                     void* stream) {
  return with_type(dtype, N, d, h, eta, version, stream, [&](auto s, auto type) {
    using T = decltype(type);
    return decode<T>(s, S, float(lam), (const T*)x, (const T*)D, (const T*)Dt, (const T*)dect,
                     (const float*)lams, (T*)y, (T*)a, (T*)workspace);
  });
}

}  // namespace crate_mini
