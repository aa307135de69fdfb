// Included by product_cpu.cpp once per instruction set, with these macros defined:
//   ISA            name of the namespace
//   VEC_BYTES      bytes of a register: 64 AVX512, 32 AVX2, 16 SSE2 and NEON
//   ROWS           rows of C held in registers, two vectors each: 24 sums in 32 registers, 12 in 16
//   FMA32 FMA64    multiply-add of two vectors into a third
//   NATIVE_BF16    1: one instruction multiplies pairs of bf16 and adds both products in float
// No include guard, and nothing of the standard library: a library template compiled here would
// contain these instructions, and the linker might pick that copy for a machine that lacks them.

namespace crate_mini {
namespace ISA {

template <class A> struct VecOf {
  typedef A type __attribute__((vector_size(VEC_BYTES)));
};
template <class T> using Vec = typename VecOf<Acc<T>>::type;
template <class T> constexpr int64_t W = VEC_BYTES / sizeof(Acc<T>);  // lanes
typedef uint32_t Words __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VEC_BYTES / 2)));
using VecF = VecOf<float>::type;
using VecD = VecOf<double>::type;

inline VecF multiply_add(VecF a, VecF b, VecF c) { return FMA32(a, b, c); }
inline VecD multiply_add(VecD a, VecD b, VecD c) { return FMA64(a, b, c); }

// ---- memory to registers and back, converting any type to the type of sums ----
template <class T> inline Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <> inline VecF load(const bf16* p) {
  Halves narrow;
  memcpy(&narrow, p, sizeof narrow);
#if VEC_BYTES == 64  // one instruction, where the code below becomes several
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)narrow), 16);
#else
  return (VecF)(__builtin_convertvector(narrow, Words) << 16);
#endif
}
inline void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
inline void store(double* p, VecD v) { memcpy(p, &v, sizeof v); }
inline void store(bf16* p, VecF v) {
#if NATIVE_BF16
  auto narrow = _mm512_cvtneps_pbh((__m512)v);
#else
  Words wide = (Words)v, rounded = wide + 0x7fff + ((wide >> 16) & 1);
  rounded = (v != v) ? (wide | 0x400000) : rounded;
  Halves narrow = __builtin_convertvector(rounded >> 16, Halves);
#endif
  memcpy(p, &narrow, sizeof narrow);
}
// n < W values, then zeros
template <class T> inline Vec<T> load_part(const T* p, int64_t n) {
  Acc<T> lanes[W<T>] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = lift(p[i]);
  return load(lanes);
}
template <class T> inline void store_part(T* p, Vec<T> v, int64_t n) {
  Acc<T> lanes[W<T>];
  store(lanes, v);
  for (int64_t i = 0; i < n; i++) lower(lanes[i], p[i]);
}
template <class T> inline Vec<T> load(const T* p, int64_t n) {
  return n >= W<T> ? load(p) : load_part(p, n);
}
template <class T> inline void store(T* p, Vec<T> v, int64_t n) {
  if (n >= W<T>)
    store(p, v);
  else
    store_part(p, v, n);
}

// ---- the inner loop: sums[i] = sum_k A[i][k] B[k], R rows by V vectors in registers ----
//
// A function of its own that leaves its sums in memory, once per tile: together with the epilogue,
// the compiler would run out of registers and spill inside the loop. For the same reason only every
// third row of A has a pointer; the two after it are reached from there.
template <class T, int R> struct Rows {
  const T* third[(R + 2) / 3];
  int64_t row;
  inline Rows(const T* A, int64_t row) : row(row) {
    for (int i = 0; i < (R + 2) / 3; i++) {
      third[i] = A + 3 * i * row;
      asm("" : "+r"(third[i]));  // keeps the compiler from computing all R addresses in advance
    }
  }
  inline const T* operator[](int i) const { return third[i / 3] + i % 3 * row; }
  inline void advance(int64_t by) {
    for (int i = 0; i < (R + 2) / 3; i++) third[i] += by;
  }
};

// Written out: with "= {}" or memcpy the compiler fills and copies the sums in memory.
template <class V, int R, int N> inline void clear(V (&c)[R][N]) {
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int v = 0; v < N; v++) c[i][v] = V{};
}
template <class V, int R, int N> inline void keep(const V (&c)[R][N], V* sums) {
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
#pragma GCC unroll 2
    for (int v = 0; v < N; v++) sums[i * N + v] = c[i][v];
}

// V of the panel's two vectors: 1 where the second is empty.
template <class T, int R, int V>
__attribute__((noinline)) void accumulate(int64_t K, const T* A, int64_t row, int64_t next,
                                          const Acc<T>* B, Vec<T>* sums) {
  Vec<T> c[R][V], b[V];
  clear(c);
  Rows<T, R> rows(A, row);
  for (int64_t k = 0; k < K; k++, rows.advance(next), B += 2 * W<T>) {
    for (int v = 0; v < V; v++) b[v] = load(B + v * W<T>);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      Vec<T> a = lift(*rows[i]) - Vec<T>{};  // in every lane; x - 0 is x for every x
      for (int v = 0; v < V; v++) c[i][v] = multiply_add(a, b[v], c[i][v]);
    }
  }
  keep(c, sums);
}

#if NATIVE_BF16
// BYTES 4: a pair of neighbours along k; 2: the odd last one.
template <int R, int V, int BYTES>
inline void pair_step(const Rows<bf16, R>& rows, const bf16* B, VecF (&c)[R][V]) {
  __m512i b[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) b[v] = _mm512_loadu_si512(B + v * 32);
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) {
    uint32_t pair = 0;
    memcpy(&pair, rows[i], BYTES);
    __m512bh a = (__m512bh)_mm512_set1_epi32(int(pair));
#pragma GCC unroll 2
    for (int v = 0; v < V; v++)
      c[i][v] = (VecF)_mm512_dpbf16_ps((__m512)c[i][v], a, (__m512bh)b[v]);
  }
}
template <class T, int R, int V>
__attribute__((noinline)) void accumulate(int64_t K, const bf16* A, int64_t row, int64_t next,
                                          const bf16* B, VecF* sums) {
  VecF c[R][V];
  clear(c);
  Rows<bf16, R> rows(A, row);
  for (int64_t k = 0; k + 1 < K; k += 2, rows.advance(next), B += 64)
    pair_step<R, V, 4>(rows, B, c);
  if (K % 2) pair_step<R, V, 2>(rows, B, c);
  keep(c, sums);
}
#endif

// The type that B is packed as: bf16 where an instruction takes it, else the type of sums.
template <class T> struct PackedOf {
  using type = Acc<T>;
};
#if NATIVE_BF16
template <> struct PackedOf<bf16> {
  using type = bf16;
};
#endif
template <class T> using Packed = typename PackedOf<T>::type;
template <class T> constexpr int64_t GROUP = sizeof(Packed<T>) == 2 ? 2 : 1;

// Packing copies bits where it can and converts elsewhere.
inline void assign(bf16 v, bf16& out) { out = v; }
template <class T, class A> inline void assign(T v, A& out) { out = lift(v); }

// Two rows of B as pairs along k, written as one word: the compiler vectorises this loop. k1 null:
// zeros.
inline void pack_rows(int64_t n, const bf16* k0, const bf16* k1, bf16* dst) {
  for (int64_t j = 0; j < n; j++) {
    uint32_t pair = k0[j].bits | (k1 ? uint32_t(k1[j].bits) << 16 : 0);
    memcpy(dst + 2 * j, &pair, 4);
  }
}

// Columns of src as rows of B. One cache line of a column is read to its end before the next,
// because lines of neighbouring columns may compete for the same places in the cache.
template <class T, int64_t C>
inline void pack_columns(int64_t K, int64_t n, const T* src, int64_t col, Packed<T>* dst) {
  constexpr int64_t G = GROUP<T>, LINE = 64 / sizeof(T);
  for (int64_t k = 0; k < K; k += LINE) {
    int64_t deep = K - k < LINE ? K - k : LINE;
    for (int64_t j = 0; j < n; j++) {
      if (k + 3 * LINE < K) __builtin_prefetch(src + k + 3 * LINE + j * col);
      for (int64_t i = 0; i < deep; i += G)
        if (G == 2 && i + 1 < deep)
          memcpy(dst + (k + i) * C + j * G, src + k + i + j * col, 4);
        else
          assign(src[k + i + j * col], dst[(k + i) * C + j * G]);
    }
  }
}

template <class T>
void pack(int64_t K, int64_t n, const T* src, int64_t row, int64_t col, void* panel) {
  constexpr int64_t C = 2 * W<T>, G = GROUP<T>;
  auto* dst = static_cast<Packed<T>*>(panel);
  if (K && (n < C || K % G)) memset(panel, 0, size_t((K + G - 1) / G * G * C) * sizeof *dst);
  if (row == 1) return pack_columns<T, C>(K, n, src, col, dst);
  for (int64_t k = 0; k < K; k += G)
    if constexpr (G == 2) {
      const T *k0 = src + k * row, *k1 = k + 1 < K ? k0 + row : nullptr;
      if (n == C)
        pack_rows(C, k0, k1, dst + k * C);
      else
        pack_rows(n, k0, k1, dst + k * C);
    } else {
      for (int64_t j = 0; j < n; j++) assign(src[k * row + j], dst[k * C + j]);
    }
}

// n columns of a strip; n 0: `columns` of them, at the ragged end.
template <class T, int64_t n>
inline void strip_rows(int64_t M, int64_t stride, int64_t columns, const T* X, bool negate, T* to) {
  constexpr int64_t G = GROUP<T>;
  for (int64_t i = 0; i < M; i += G, X += G * stride, to += G * ROWS)
    for (int64_t j = 0; j < (n ? n : columns); j++)
      for (int64_t g = 0; g < G; g++) {
        T v = i + g < M ? X[g * stride + j] : T{};
        to[j * G + g] = negate ? minus(v) : v;
      }
}

template <class T>
void interleave(int64_t K, int64_t k, int64_t M, int64_t n, const T* X, bool negate, T* strips) {
  constexpr int64_t G = GROUP<T>;
  for (int64_t j = 0; j < n; j += ROWS) {
    T* to = strips + j * ((K + G - 1) / G * G) + k * ROWS;
    if (n - j >= ROWS)
      strip_rows<T, ROWS>(M, n, ROWS, X + j, negate, to);
    else
      strip_rows<T, 0>(M, n, n - j, X + j, negate, to);
  }
}

// ---- the epilogue: Finish, for n <= W columns from (i, j) on ----

// Access to n columns: all lanes, or only the first n.
template <class T, bool WHOLE> struct Part {
  template <class E> static Vec<T> get(const E* p, int64_t n) {
    return WHOLE ? load(p) : load(p, n);
  }
  template <class E> static void put(E* p, Vec<T> v, int64_t n) {
    if (WHOLE)
      store(p, v);
    else
      store(p, v, n);
  }
};

// A NaN passes.
template <class V> inline V relu(V v) { return (v < V{}) ? V{} : v; }
#if VEC_BYTES == 64
template <> inline VecF relu(VecF v) { return (VecF)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v); }
#endif

template <class T, bool WHOLE>
inline void finish_row(const Finish<T>& f, int64_t i, int64_t j, int64_t n, Vec<T> v) {
  using P = Part<T, WHOLE>;
  const Vec<T> zero{}, base_scale = f.base_scale - zero;
  int64_t index = i * f.ld + j;
  v = multiply_add(v, f.scale - zero, f.shift ? P::get(f.shift + j, n) : zero);
  if (f.base) v = multiply_add(base_scale, P::get(f.base + index, n), v);
  if (f.wide_base) v = multiply_add(base_scale, P::get(f.wide_base + index, n), v);
  if (f.mask) v = (P::get(f.mask + index, n) <= zero) ? zero : v;
  if (f.relu) v = relu(v);
  if (f.wide_out)
    P::put(f.wide_out + index, v, n);
  else
    P::put(f.out + index, v, n);
}

// The same for a whole tile whose sums stay in acc: out = scale * sums + base_scale * base. Written
// apart because the products of attention are so short that asking all of the above costs a tenth.
template <class T, int R>
inline void finish_sums(const Finish<T>& f, int64_t index, const Vec<T> (&sums)[R][2]) {
  const Vec<T> zero{}, scale = f.scale - zero, base_scale = f.base_scale - zero;
  for (int r = 0; r < R; r++, index += f.ld)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      Vec<T> sum = scale * sums[r][v];
      int64_t at = index + v * W<T>;
      if (f.wide_base) sum = multiply_add(base_scale, load(f.wide_base + at), sum);
      store(f.wide_out + at, sum);
    }
}

// Rows i.. i + R and columns j.. j + n of C. The values that Finish needs are fetched while the
// sums are computed.
template <class T, int R>
void tile(int64_t K, const Left<T>& A, const Packed<T>* B, const Finish<T>& f, int64_t i, int64_t j,
          int64_t n) {
  constexpr int64_t LINE = 64 / int64_t(sizeof(T));
  const bool only_sums = f.wide_out && n == 2 * W<T> && !f.base && !f.shift && !f.mask && !f.relu;
  for (int64_t r = 0; r < R && !only_sums; r++)
    for (int64_t index = (i + r) * f.ld + j, end = index + n; index < end; index += LINE) {
      if (f.base) __builtin_prefetch(f.base + index);
      if (f.wide_base) __builtin_prefetch(f.wide_base + index);
      if (f.mask) __builtin_prefetch(f.mask + index);
      if (f.out) __builtin_prefetch(f.out + index, 1);
    }
  const T* a = A.data + i / ROWS * A.strip + i % ROWS * A.row;
  if (n > W<T>) {
    Vec<T> sums[R][2];
    accumulate<T, R, 2>(K, a, A.row, A.next, B, sums[0]);
    if (only_sums) return finish_sums<T, R>(f, i * f.ld + j, sums);
    for (int r = 0; r < R; r++) {
      finish_row<T, true>(f, i + r, j, n, sums[r][0]);
      if (n == 2 * W<T>)
        finish_row<T, true>(f, i + r, j + W<T>, n, sums[r][1]);
      else
        finish_row<T, false>(f, i + r, j + W<T>, n - W<T>, sums[r][1]);
    }
  } else {
    Vec<T> sums[R];
    accumulate<T, R, 1>(K, a, A.row, A.next, B, sums);
    for (int r = 0; r < R; r++) finish_row<T, false>(f, i + r, j, n, sums[r]);
  }
}

// Panels outside, rows inside: a panel of B stays in the first cache level while all rows of A meet
// it.
template <class T>
void product(int64_t M, int64_t N, int64_t K, const Left<T>& A, const void* B, const Finish<T>& f) {
  constexpr int64_t C = 2 * W<T>, G = GROUP<T>;
  if (!K) {  // no product, only its epilogue
    for (int64_t i = 0; i < M; i++)
      for (int64_t j = 0; j < N; j += W<T>) finish_row<T, false>(f, i, j, N - j, Vec<T>{});
    return;
  }
  auto* panel = static_cast<const Packed<T>*>(B);
  for (int64_t j = 0; j < N; j += C, panel += (K + G - 1) / G * G * C) {
    int64_t i = 0, n = N - j < C ? N - j : C;
    for (; i + ROWS <= M; i += ROWS) tile<T, ROWS>(K, A, panel, f, i, j, n);
    for (; i + ROWS * 2 / 3 <= M; i += ROWS * 2 / 3) tile<T, ROWS * 2 / 3>(K, A, panel, f, i, j, n);
    for (; i + 2 <= M; i += 2) tile<T, 2>(K, A, panel, f, i, j, n);
    if (i < M) tile<T, 1>(K, A, panel, f, i, j, n);
  }
}

}  // namespace ISA
}  // namespace crate_mini
