// The matrix product that every CPU kernel is made of: C = finish(A B), with `finish` applied while
// the sums are still in registers. Everything that differs between instruction sets is in one table
// of functions, Isa.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "kernels.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace crate_mini {

// The upper half of a float: 8 bits of precision.
struct bf16 {
  uint16_t bits;
};

inline float lift(bf16 v) {
  uint32_t wide = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}
inline float lift(float v) { return v; }
inline double lift(double v) { return v; }

// Round to nearest, ties to even; a NaN stays a NaN.
inline void lower(float v, bf16& out) {
  uint32_t wide;
  memcpy(&wide, &v, 4);
  uint32_t rounded = wide + 0x7fff + ((wide >> 16) & 1);
  out.bits = uint16_t((v != v ? (wide | 0x400000) : rounded) >> 16);
}
inline void lower(float v, float& out) { out = v; }
inline void lower(double v, double& out) { out = v; }

inline bf16 minus(bf16 v) { return {uint16_t(v.bits ^ 0x8000)}; }
template <class T> T minus(T v) { return -v; }

// The type that sums are kept in.
template <class T> struct AccOf {
  using type = float;
};
template <> struct AccOf<double> {
  using type = double;
};
template <class T> using Acc = typename AccOf<T>::type;

// What happens to element (i, j) of a product before it is stored; every matrix here has row stride
// ld.
//   v = scale * product + base_scale * base + shift[j];  ReLU or mask;  out = v
template <class T> struct Finish {
  int64_t ld = 0;
  Acc<T> scale = 1, base_scale = 1;
  const T* base = nullptr;
  const Acc<T>* wide_base = nullptr;  // a base in acc: partial sums of a long product
  const Acc<T>* shift = nullptr;      // one value per column
  const T* mask = nullptr;            // v = 0 where mask <= 0 (a NaN in mask lets v pass)
  bool relu = false;                  // v = 0 where v < 0 (a NaN passes)
  T* out = nullptr;
  Acc<T>* wide_out = nullptr;  // store here, in acc, instead
};

// The left side A of a product. With rows and group of the Isa that multiplies, element (i, k) is
// data[i / rows * strip + i % rows * row + k / group * next + k % group]. A plain matrix has
// strip = rows * row and next = group; a transposed one is copied so that the values one inner loop
// reads are neighbours.
template <class T> struct Left {
  const T* data;
  int64_t row, next, strip;
};

// The functions of one instruction set for type T. B is packed in panels of `cols` columns; inside
// a panel, `group` neighbours along k lie together because one instruction multiplies that many (2
// for AVX512-BF16).
template <class T> struct Isa {
  int64_t rows;  // rows of A whose sums are held at once
  int64_t cols, group;
  size_t packed;  // bytes of a packed element
  // One panel of K rows and n <= cols columns, B[k][j] = src[k * row + j * col], where row or col
  // is 1; zeros beyond.
  void (*pack)(int64_t K, int64_t n, const T* src, int64_t row, int64_t col, void* panel);
  void (*product)(int64_t M, int64_t N, int64_t K, const Left<T>& A, const void* B,
                  const Finish<T>& finish);
  // Store X (M, n) as rows k.. k + M of X^T, a left side that sums over K rows; k is a multiple of
  // group. Laid out as `transposed` describes: strips of `rows` columns of X, in each strip one row
  // (or pair of rows) after another, the last filled up with zeros. strips has room for n + rows
  // columns, K rounded up.
  void (*interleave)(int64_t K, int64_t k, int64_t M, int64_t n, const T* X, bool negate,
                     T* strips);
  // LayerNorm of M rows, z of type T or acc: x = normalised(z) * weight + bias.
  void (*norm)(int64_t M, int64_t d, const void* z, bool z_is_acc, double eps, const Acc<T>* weight,
               const Acc<T>* bias, T* x);
  // Its gradient: gz from gx; adds to gweight and gbias (d); writes x as norm does.
  void (*norm_backward)(int64_t M, int64_t d, const void* z, bool z_is_acc, double eps,
                        const Acc<T>* weight, const Acc<T>* bias, const Acc<T>* gx, void* gz,
                        Acc<T>* gweight, Acc<T>* gbias, T* x);
  // One row A (K) times a matrix (K, n) of rows `stride` apart, skipping the rows where A is zero.
  void (*combine)(int64_t K, const Acc<T>* A, const T* rows, int64_t stride, int64_t n,
                  Acc<T>* sums);
  // What attention does between its products, see softmax_cpu.h.
  void (*softmax)(int64_t M, int64_t seen, int64_t ld, const Acc<T>* scores, T* weights,
                  Acc<T>* maximum, Acc<T>* inverse);
  void (*softmax_backward)(int64_t M, int64_t N, int64_t ahead, const Acc<T>* scores,
                           const Acc<T>* gweights, const Acc<T>* maximum, const Acc<T>* inverse,
                           const Acc<T>* mean, T* weights, T* gscores);
  void (*row_dots)(int64_t M, int64_t n, const T* A, int64_t row_a, const T* B, int64_t row_b,
                   Acc<T>* dots);
  void (*round_rows)(int64_t M, int64_t n, const Acc<T>* sums, int64_t ld, const Acc<T>* scale,
                     T* out, int64_t row);

  // One block of softmax for M rows S (M, n), n a multiple of cols: top becomes the maximum of top
  // and the row; E (M, n) = exp(S - top), or is null; factor = exp(old top - top); and sum becomes
  // factor sum + the row of E summed.
  void (*exponentials)(int64_t M, int64_t n, const Acc<T>* S, Acc<T>* top, Acc<T>* sum,
                       Acc<T>* factor, T* E);

  // out[j] = values[j] where a[j] is one of the k largest of n, the first ones of equals, else 0;
  // room for n numbers.
  void (*keep_largest)(int64_t n, int64_t k, const T* a, const T* values, T* out, int64_t* room);

  Left<T> plain(const T* A, int64_t columns) const { return {A, columns, group, rows * columns}; }
  Left<T> transposed(const T* strips, int64_t K) const {
    return {strips, group, rows * group, rows * round_up(K)};
  }
  int64_t round_up(int64_t K) const { return (K + group - 1) / group * group; }
  int64_t panels(int64_t N) const { return (N + cols - 1) / cols; }
  size_t panel_bytes(int64_t K) const { return size_t(round_up(K) * cols) * packed; }
  size_t packed_bytes(int64_t K, int64_t N) const { return panel_bytes(K) * size_t(panels(N)); }
};

template <class T> const Isa<T>& isa();  // the table in use, see use_isa in kernels.h

// ---- shared by the files that compose products ----

// Working memory of the calling thread, kept from call to call and grown when needed: touching
// fresh pages costs more than the arithmetic that fills them. Each use within one call has its own
// slot.
enum Slot {
  FORTH, BACK, DECODER_FORTH, DECODER_BACK, SHIFT, STEPS, RESIDUALS, LEFT, PARTIAL, PANELS,
  DECODER_LEFT, DECODER_PARTIAL, DECODER_PANELS, ROWS_OUT, SUMS, PADDED, QUERY_COLUMNS, KEY_COLUMNS,
  GRADIENT_COLUMNS, QUERY_ROWS, KEY_ROWS, GRADIENT_ROWS, SCORES, WEIGHTS, GSCORES, GWEIGHTS, KEYS,
  SLOTS
};

inline char* scratch_bytes(Slot slot, size_t size) {
  struct Block {
    char* data = nullptr;
    size_t size = 0;
    void release() {
      ::operator delete(data, std::align_val_t(64));
      data = nullptr;
      size = 0;
    }
    ~Block() { release(); }
  };
  static thread_local Block blocks[SLOTS];
  Block& block = blocks[slot];
  if (block.size < size) {
    block.release();
    block.data = static_cast<char*>(::operator new(size, std::align_val_t(64)));
    block.size = size;
  }
  return block.data;
}
template <class E> E* scratch(Slot slot, int64_t count) {
  return reinterpret_cast<E*>(scratch_bytes(slot, size_t(count) * sizeof(E)));
}

inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Pack all of B (K, N). Every thread of a parallel region calls it; they share the panels, and a
// barrier ends it.
template <class T>
void pack_all(const Isa<T>& m, int64_t K, int64_t N, const T* src, int64_t row, int64_t col,
              char* packed) {
#pragma omp for schedule(static)
  for (int64_t p = 0; p < m.panels(N); p++) {
    int64_t j = p * m.cols;
    m.pack(K, N - j < m.cols ? N - j : m.cols, src + j * col, row, col,
           packed + p * m.panel_bytes(K));
  }
}

// Call `body` with a value of the type that a dtype code names.
template <class Body> inline void with_type(int dtype, Body body) {
  if (dtype == F32)
    body(float{});
  else if (dtype == BF16)
    body(bf16{});
  else
    body(double{});
}

}  // namespace crate_mini
