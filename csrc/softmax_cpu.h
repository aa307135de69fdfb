// Included by rows_cpu.h, once per instruction set: what attention and the head do between their
// products.
//
// Scores and weights are tiles with rows ld apart, ld a multiple of the vector width W, so whole
// vectors can be read and written to the end of every row.

namespace crate_mini {
namespace ISA {

// e^x for x <= 0, at most 2 roundings off; 0 below e^-87, where floats lose their last bits.
// x = n ln 2 + f with an integer n; e^f is a polynomial, and n is added to its exponent.
inline VecF exponential(VecF x) {
  const VecF zero{}, rounder = zero + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  VecF n_up = multiply_add(x, zero + 1.44269504f, rounder), n = n_up - rounder;
  VecF f = multiply_add(n, zero - 0.693359375f, x);  // ln 2 in two parts, the first one exact
  f = multiply_add(n, zero + 2.12194440e-4f, f);
  VecF y = zero + 1.9875691500e-4f;  // the minimax coefficients of Cephes' expf
  y = multiply_add(y, f, zero + 1.3981999507e-3f);
  y = multiply_add(y, f, zero + 8.3334519073e-3f);
  y = multiply_add(y, f, zero + 4.1665795894e-2f);
  y = multiply_add(y, f, zero + 1.6666665459e-1f);
  y = multiply_add(y, f, zero + 5.0000001201e-1f);
  y = multiply_add(y * f, f, f + 1.f);
  y = (VecF)((Words)y + ((Words)n_up << 23));
  VecF tiny_or_nan = (x < -87.f) ? zero : x;
  return (x >= -87.f) ? y : tiny_or_nan;
}
inline VecD exponential(VecD x) {
  for (int64_t i = 0; i < W<double>; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

#if VEC_BYTES == 64
inline float total(VecF v) { return _mm512_reduce_add_ps((__m512)v); }
inline double total(VecD v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
template <class V> inline auto total(V v) {
  auto sum = v[0];
  for (unsigned i = 1; i < sizeof v / sizeof sum; i++) sum += v[i];
  return sum;
}
#endif

template <class V> inline V larger(V a, V b) { return (a > b) ? a : b; }
#if VEC_BYTES == 64
inline float largest(VecF v) { return _mm512_reduce_max_ps((__m512)v); }
inline double largest(VecD v) { return _mm512_reduce_max_pd((__m512d)v); }
#else
template <class V> inline auto largest(V v) {
  auto most = v[0];
  for (unsigned i = 1; i < sizeof v / sizeof most; i++) most = v[i] > most ? v[i] : most;
  return most;
}
#endif

// 0, 1, 2, ..: the number of each lane
template <class T> inline Vec<T> lanes() {
  Vec<T> numbers;
  for (int64_t i = 0; i < W<T>; i++) numbers[i] = Acc<T>(i);
  return numbers;
}
// The first n lanes of v, then `rest`.
template <class T> inline Vec<T> only_first(int64_t n, Vec<T> v, Acc<T> rest) {
  return n >= W<T> ? v : (lanes<T>() < Acc<T>(n)) ? v : rest - Vec<T>{};
}

// Row i of M sees the first `seen` + i scores: weights = e^(score - maximum), 0 up to what the last
// row sees. They still lack the factor `inverse`, one over their sum.
template <class T>
void softmax(int64_t M, int64_t seen, int64_t ld, const Acc<T>* scores, T* weights,
             Acc<T>* maximum, Acc<T>* inverse) {
  for (int64_t i = 0; i < M; i++, scores += ld, weights += ld) {
    int64_t n = seen + i, j = 0;
    const Acc<T> lowest = -Acc<T>(__builtin_inf());
    Vec<T> most = lowest - Vec<T>{}, sum{};
    for (j = 0; j < n; j += W<T>)
      most = larger(most, only_first<T>(n - j, load(scores + j), lowest));
    maximum[i] = largest(most);
    for (j = 0; j < n; j += W<T>) {
      Vec<T> weight = only_first<T>(n - j, exponential(load(scores + j) - maximum[i]), 0);
      sum += weight;
      store(weights + j, weight);
    }
    inverse[i] = 1 / total(sum);
    for (; j < seen + M; j += W<T>) store(weights + j, Vec<T>{});
  }
}

// Its gradient, transposed: rows are keys, columns are queries, N of them, and ld = N. Row 0 is
// seen from column -`ahead` on, row i from column i - `ahead` on. With the statistics of the
// columns,
//   weights = e^(scores - maximum) inverse;  gscores = weights (gweights - mean)
template <class T>
void softmax_backward(int64_t M, int64_t N, int64_t ahead, const Acc<T>* scores,
                      const Acc<T>* gweights, const Acc<T>* maximum, const Acc<T>* inverse,
                      const Acc<T>* mean, T* weights, T* gscores) {
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < N; j += W<T>) {
      int64_t unseen = i - ahead - j, at = i * N + j;
      Vec<T> weight{}, gscore{};
      if (unseen < W<T>) {  // else the scores were not even computed
        weight = exponential(load(scores + at) - load(maximum + j)) * load(inverse + j);
        gscore = weight * (load(gweights + at) - load(mean + j));
      }
      if (unseen > 0) {
        weight = (lanes<T>() < Acc<T>(unseen)) ? Vec<T>{} : weight;
        gscore = (lanes<T>() < Acc<T>(unseen)) ? Vec<T>{} : gscore;
      }
      store(weights + at, weight);
      store(gscores + at, gscore);
    }
}

// dots[i] = sum_j A[i][j] B[i][j], (M, n) with rows that far apart
template <class T>
void row_dots(int64_t M, int64_t n, const T* A, int64_t row_a, const T* B, int64_t row_b,
              Acc<T>* dots) {
  for (int64_t i = 0; i < M; i++, A += row_a, B += row_b) {
    Vec<T> sum{};
    for (int64_t j = 0; j < n; j += W<T>)
      sum = multiply_add(load(A + j, n - j), load(B + j, n - j), sum);
    dots[i] = total(sum);
  }
}

// out[i] = scale[i] sums[i], (M, n) with rows that far apart; scale null: 1
template <class T>
void round_rows(int64_t M, int64_t n, const Acc<T>* sums, int64_t ld, const Acc<T>* scale, T* out,
                int64_t row) {
  for (int64_t i = 0; i < M; i++, sums += ld, out += row)
    for (int64_t j = 0; j < n; j += W<T>)
      store(out + j, load(sums + j) * (scale ? scale[i] : Acc<T>(1)), n - j);
}

// ---- softmax over columns that come block by block ----

// See Isa. A NaN in S is lost in the maximum and found again in the sum.
template <class T>
void exponentials(int64_t M, int64_t n, const Acc<T>* S, Acc<T>* top, Acc<T>* sum, Acc<T>* factor,
                  T* E) {
  for (int64_t i = 0; i < M; i++, S += n, E += E ? n : 0) {
    Vec<T> largest = top[i] - Vec<T>{}, added{};
    for (int64_t j = 0; j < n; j += W<T>) {
      Vec<T> v = load(S + j);
      largest = (v > largest) ? v : largest;
    }
    Acc<T> before = top[i];
    for (int64_t l = 0; l < W<T>; l++) top[i] = largest[l] > top[i] ? largest[l] : top[i];
    // Where every value so far is -inf, exp(-inf - 0) = 0.
    Acc<T> shift = top[i] == -__builtin_huge_val() ? 0 : top[i];
    for (int64_t j = 0; j < n; j += W<T>) {
      Vec<T> e = exponential(load(S + j) - shift);
      added += e;
      if (E) store(E + j, e);
    }
    factor[i] = exponential(before - shift - Vec<T>{})[0];
    sum[i] = sum[i] * factor[i] + total(added);
  }
}

}  // namespace ISA
}  // namespace crate_mini
