// Included by product_cpu.cpp after vector_cpu.h, once per instruction set: work on rows other than
// the product (LayerNorm forward and backward, decoding, top-k), and the table of all functions.
#include "softmax_cpu.h"

namespace crate_mini {
namespace ISA {

// ---- LayerNorm, a row at a time ----
inline float root(float v) { return __builtin_sqrtf(v); }
inline double root(double v) { return __builtin_sqrt(v); }

template <class T, class Z>
inline void moments(int64_t d, const Z* z, double eps, Acc<T>& mean, Acc<T>& rstd) {
  Vec<T> sum{}, square{};
  for (int64_t j = 0; j < d; j += W<T>) sum += load(z + j, d - j);
  mean = total(sum) / Acc<T>(d);
  int64_t j = 0;
  for (; j + W<T> <= d; j += W<T>) {  // a second pass: nothing cancels if |mean| >> deviation
    Vec<T> centred = load(z + j) - mean;
    square = multiply_add(centred, centred, square);
  }
  Acc<T> rest = 0;
  for (; j < d; j++) rest += (lift(z[j]) - mean) * (lift(z[j]) - mean);
  rstd = 1 / root((total(square) + rest) / Acc<T>(d) + Acc<T>(eps));
}

template <class T, class Z>
void norm_rows(int64_t M, int64_t d, const Z* z, double eps, const Acc<T>* weight,
               const Acc<T>* bias, T* x) {
  for (int64_t i = 0; i < M; i++, z += d, x += d) {
    Acc<T> mean, rstd;
    moments<T>(d, z, eps, mean, rstd);
    for (int64_t j = 0; j < d; j += W<T>) {
      int64_t n = d - j;
      Vec<T> v = (load(z + j, n) - mean) * rstd * load(weight + j, n);
      store(x + j, bias ? v + load(bias + j, n) : v, n);
    }
  }
}

template <class T>
void norm(int64_t M, int64_t d, const void* z, bool z_is_acc, double eps, const Acc<T>* weight,
          const Acc<T>* bias, T* x) {
  if (z_is_acc)
    norm_rows<T>(M, d, static_cast<const Acc<T>*>(z), eps, weight, bias, x);
  else
    norm_rows<T>(M, d, static_cast<const T*>(z), eps, weight, bias, x);
}

// With unit = (z - mean) rstd and g = gx weight: gz = rstd (g - mean(g) - unit mean(g unit)). Also
// writes x, the normalised rows.
template <class T, class Z>
void norm_backward_rows(int64_t M, int64_t d, const Z* z, double eps, const Acc<T>* weight,
                        const Acc<T>* bias, const Acc<T>* gx, Z* gz, Acc<T>* gweight, Acc<T>* gbias,
                        T* x) {
  for (int64_t i = 0; i < M; i++, z += d, gx += d, gz += d, x += d) {
    Acc<T> mean, rstd;
    moments<T>(d, z, eps, mean, rstd);
    Vec<T> sum_g{}, sum_gn{};
    for (int64_t j = 0; j < d; j += W<T>) {  // past the end gx is loaded as 0, and every term is 0
      int64_t n = d - j;
      Vec<T> up = load(gx + j, n), w = load(weight + j, n);
      Vec<T> unit = (load(z + j, n) - mean) * rstd, g = up * w;
      sum_g += g;
      sum_gn = multiply_add(g, unit, sum_gn);
      store(gweight + j, multiply_add(up, unit, load(gweight + j, n)), n);
      store(gbias + j, load(gbias + j, n) + up, n);
      store(x + j, bias ? unit * w + load(bias + j, n) : unit * w, n);
    }
    Acc<T> mean_g = total(sum_g) / Acc<T>(d), mean_gn = total(sum_gn) / Acc<T>(d);
    for (int64_t j = 0; j < d; j += W<T>) {
      int64_t n = d - j;
      Vec<T> unit = (load(z + j, n) - mean) * rstd;
      store(gz + j, rstd * (load(gx + j, n) * load(weight + j, n) - mean_g - unit * mean_gn), n);
    }
  }
}

template <class T>
void norm_backward(int64_t M, int64_t d, const void* z, bool z_is_acc, double eps,
                   const Acc<T>* weight, const Acc<T>* bias, const Acc<T>* gx, void* gz,
                   Acc<T>* gweight, Acc<T>* gbias, T* x) {
  if (z_is_acc)
    norm_backward_rows<T>(M, d, static_cast<const Acc<T>*>(z), eps, weight, bias, gx,
                          static_cast<Acc<T>*>(gz), gweight, gbias, x);
  else
    norm_backward_rows<T>(M, d, static_cast<const T*>(z), eps, weight, bias, gx,
                          static_cast<T*>(gz), gweight, gbias, x);
}

// ---- decoding: sums[j] = sum_i A[i] rows[i][j], zeros of A skipped, sums in 8 registers ----
template <class T>
void combine(int64_t K, const Acc<T>* A, const T* rows, int64_t stride, int64_t n, Acc<T>* sums) {
  int64_t j = 0;
  for (; j + 8 * W<T> <= n; j += 8 * W<T>) {
    Vec<T> c[8] = {};
    for (int64_t i = 0; i < K; i++) {
      if (A[i] == 0) continue;
      Vec<T> a = A[i] - Vec<T>{};
#pragma GCC unroll 8
      for (int v = 0; v < 8; v++)
        c[v] = multiply_add(a, load(rows + i * stride + j + v * W<T>), c[v]);
    }
    for (int v = 0; v < 8; v++) store(sums + j + v * W<T>, c[v]);
  }
  for (int64_t l = j; l < n; l++) sums[l] = 0;
  for (int64_t i = 0; i < K && j < n; i++)
    for (int64_t l = j; l < n && A[i] != 0; l++) sums[l] += A[i] * lift(rows[i * stride + l]);
}

// ---- the k largest of a row ----

// An integer for every float, in the same order: -0 is 0, and a NaN exceeds all others.
inline int32_t key(float v) {
  int32_t bits;
  v += 0.f;
  memcpy(&bits, &v, 4);
  int32_t ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
  return v != v ? 0x7fff0000 : ordered;
}
inline int64_t key(double v) {
  int64_t bits;
  v += 0.;
  memcpy(&bits, &v, 8);
  int64_t ordered = bits < 0 ? bits ^ 0x7fffffffffffffff : bits;
  return v != v ? 0x7fff000000000000 : ordered;
}
inline int32_t key(bf16 v) { return key(lift(v)) >> 16; }

template <class T> inline void keep_if(bool kept, T value, T& out) { out = kept ? value : 0; }
inline void keep_if(bool kept, bf16 value, bf16& out) { out.bits = kept ? value.bits : 0; }

template <class K> inline K how_many_reach(K edge, int64_t n, const K* keys) {
  K count = 0;
  for (int64_t j = 0; j < n; j++) count += keys[j] >= edge;
  return count;
}

// See Isa. `edge` grows bit by bit to the largest number that at least k keys reach.
template <class T>
void keep_largest(int64_t n, int64_t k, const T* a, const T* values, T* out, int64_t* room) {
  using K = decltype(key(T{}));
  K* keys = reinterpret_cast<K*>(room);
  for (int64_t j = 0; j < n; j++) keys[j] = key(a[j]);
  K bit = K(1) << (8 * sizeof(T) - 2), edge = 0, reach = how_many_reach(edge, n, keys);
  if (reach < k) edge = -2 * bit, reach = K(n);
  for (; bit && reach != k; bit >>= 1) {
    K count = how_many_reach(K(edge + bit), n, keys);
    if (count >= k) edge += bit, reach = count;
  }
  int64_t end = n;  // before it codes equal to the edge are kept
  if (reach > k) {
    int64_t fit = k - how_many_reach(K(edge + 1), n, keys);
    for (end = 0; fit > 0; end++) fit -= keys[end] == edge;
  }
  for (int64_t j = 0; j < end; j++) keep_if(keys[j] >= edge, values[j], out[j]);
  for (int64_t j = end; j < n; j++) keep_if(keys[j] > edge, values[j], out[j]);
}

template <class T> constexpr Isa<T> table() {
  return {ROWS, 2 * W<T>, GROUP<T>, sizeof(Packed<T>), pack<T>, product<T>, interleave<T>,
          norm<T>, norm_backward<T>, combine<T>, softmax<T>, softmax_backward<T>, row_dots<T>,
          round_rows<T>, exponentials<T>, keep_largest<T>};
}

}  // namespace ISA
}  // namespace crate_mini
