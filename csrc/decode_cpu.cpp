// ISTA for one or a few rows without gradient, as in generation and steering.
//
// With so few rows the time goes into reading D, and after the threshold most codes are zero. So
// products that read codes (D a) read only the atoms of non-zero codes, which are rows of the
// transposed dictionary: a step reads D once plus a share as large as the codes' density, instead
// of twice. Codes and residuals stay in acc.
#include <algorithm>

#include "kernels.h"
#include "product_cpu.h"

namespace crate_mini {
namespace {

constexpr int64_t BLOCK = 128;  // columns that a thread sums at once, in registers

// out[r][j] = base[r][j] + scale * sum_i A[r][i] rows[i][j], skipping the rows where A is zero.
template <class T>
void combine_rows(int64_t N, int64_t K, int64_t n, const Acc<T>* A, const T* rows, Acc<T> scale,
                  const Acc<T>* base, Acc<T>* out) {
  const Isa<T>& m = isa<T>();
#pragma omp for schedule(static)
  for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; b++) {
    int64_t j = b * BLOCK, width = std::min(BLOCK, n - j);
    for (int64_t r = 0; r < N; r++) {
      Acc<T> sums[BLOCK];
      m.combine(K, A + r * K, rows + j, n, width, sums);
      for (int64_t l = 0; l < width; l++)
        out[r * n + j + l] = (base ? base[r * n + j + l] : 0) + scale * sums[l];
    }
  }
}

template <class T>
void decode(int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam, const T* x,
            const T* D, const T* Dt, const T* dect, const void* lams, T* y, T* a, int threads) {
  using A = Acc<T>;
  A* in = scratch<A>(ROWS_OUT, N * d);
  A* r = scratch<A>(RESIDUALS, N * d);
  A* code = scratch<A>(STEPS, N * h);
  for (int64_t i = 0; i < N * d; i++) in[i] = lift(x[i]);
  auto* lam_of_code = static_cast<const A*>(lams);
#pragma omp parallel num_threads(threads)
  {
    for (int64_t t = 1; t <= S; t++) {
      if (t > 1) combine_rows<T>(N, h, d, code, Dt, -1, in, r);
      combine_rows<T>(N, d, h, t > 1 ? r : in, D, A(eta), t > 1 ? code : nullptr, code);
#pragma omp for schedule(static)
      for (int64_t j = 0; j < N * h; j++) {
        A v = code[j] - A(eta) * (lam_of_code ? lam_of_code[j % h] : A(lam));
        code[j] = v < 0 ? 0 : v;
      }
    }
    combine_rows<T>(N, h, d, code, dect, 1, nullptr, r);
  }
  for (int64_t j = 0; j < N * h; j++) lower(code[j], a[j]);
  for (int64_t i = 0; i < N * d; i++) lower(r[i], y[i]);
}

}  // namespace

void ista_decode_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                     const void* x, const void* D, const void* Dt, const void* dect,
                     const void* lams, void* y, void* a, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    decode<T>(N, d, h, S, eta, lam, (const T*)x, (const T*)D, (const T*)Dt, (const T*)dect, lams,
              (T*)y, (T*)a, threads);
  });
}

}  // namespace crate_mini
