// Included by product_cpu.cpp after vector_cpu.h, once per instruction set: work on rows other than
// the product (LayerNorm forward and backward, decoding), and the table of all functions.
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

template <class T> constexpr Isa<T> table() {
  return {ROWS, 2 * W<T>, GROUP<T>, sizeof(Packed<T>), pack<T>, product<T>, interleave<T>,
          norm<T>, norm_backward<T>, combine<T>, softmax<T>, softmax_backward<T>, row_dots<T>,
          round_rows<T>, exponentials<T>};
}

}  // namespace ISA
}  // namespace crate_mini
