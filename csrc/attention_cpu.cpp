// Causal attention on the CPU, head by head. For queries i and keys j <= i, with P the head width:
//   s_ij = q_i . k_j / sqrt(P);  w_ij = e^(s_ij - m_i) / sum_l e^(s_il - m_i),  m_i = max_l s_il
//   y_i = sum_j w_ij v_j
// and backward from g, the gradient of y, where t_ij is the gradient of s_ij:
//   t_ij = w_ij (g_i . v_j - g_i . y_i);  gv_j = sum_i w_ij g_i
//   gq_i = sum_j t_ij k_j / sqrt(P);      gk_j = sum_i t_ij q_i / sqrt(P)
//
// No (T, T) matrix is kept: forward holds the scores of a few queries and stores m_i and one over
// the sum, from which backward computes the weights again, a block of keys by queries at a time, so
// that they stay in the second cache level. What lies above the diagonal is skipped in steps of a
// product's tile. A head is the work of one thread, so the number of threads changes no bit.
// Operations: 2 T^2 P forward, 5 T^2 P backward. Products: product_cpu.cpp; rows: softmax_cpu.h.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "product_cpu.h"

namespace crate_mini {
namespace {

constexpr int64_t TILE = 24;      // forward: queries whose scores are held, a multiple of 12
constexpr int64_t KEYS = 96;      // backward: a block of keys, a multiple of 12 and of 32,
constexpr int64_t QUERIES = 192;  // and of queries, a multiple of KEYS
constexpr int64_t PAD = 32;       // values between rows that would share a cache set

inline int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// One head of q, k, v, y or a gradient: T rows that far apart.
template <class T> struct Rows {
  T* data;
  int64_t row;
  T* operator+(int64_t i) const { return data + i * row; }
};
template <class T> Rows<T> head(const void* data, const Strides& s, int64_t b, int64_t k) {
  return {(T*)data + b * s[0] + k * s[2], s[1]};
}

// k null: it is q; v null: it is k.
inline void share(const void* q, const Strides& q_strides, const void*& k, Strides& k_strides) {
  if (k) return;
  k = q;
  k_strides = q_strides;
}

// A right side of K rows and N columns, packed once and used in parts.
template <class T> struct Right {
  const Isa<T>& m;
  int64_t K, N;
  char* data;
  Right(const Isa<T>& m, int64_t K, int64_t N, Slot slot)
      : m(m), K(K), N(N), data(scratch_bytes(slot, m.packed_bytes(K, N))) {}

  void pack(const T* src, int64_t row, int64_t col) {
    for (int64_t j = 0; j < N; j += m.cols)
      m.pack(K, std::min(m.cols, N - j), src + j * col, row, col, panel(j));
  }
  char* panel(int64_t j) const { return data + size_t(j / m.cols) * m.panel_bytes(K); }

  // A (M, K) times columns first.. last, both multiples of a panel.
  void columns(int64_t M, const Left<T>& A, int64_t first, int64_t last, const Finish<T>& f) const {
    m.product(M, last - first, K, A, panel(first), f);
  }
  // A (M, last - first) times rows first.. last; first is a multiple of m.group.
  void rows(int64_t M, const Left<T>& A, int64_t first, int64_t last, Finish<T> f) const {
    for (int64_t j = 0; j < N; j += m.cols) {
      m.product(M, m.cols, last - first, A, panel(j) + size_t(first * m.cols) * m.packed, f);
      f.wide_out += m.cols;
      if (f.wide_base) f.wide_base += m.cols;
    }
  }
};

// out = scale (.), in acc
template <class T> Finish<T> set(int64_t ld, double scale, Acc<T>* out) {
  Finish<T> f;
  f.ld = ld;
  f.scale = Acc<T>(scale);
  f.wide_out = out;
  return f;
}
// sums += scale (.)
template <class T> Finish<T> add(int64_t ld, double scale, Acc<T>* sums) {
  Finish<T> f = set<T>(ld, scale, sums);
  f.wide_base = sums;
  return f;
}

// y and the statistics (2, T) of one head: m_i, then one over the sum.
template <class T>
void forward(int64_t n, int64_t P, Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> y, Acc<T>* stats) {
  const Isa<T>& m = isa<T>();
  const double scale = 1 / std::sqrt(double(P));
  const int64_t ld = up_to(n, m.cols) + PAD, ld_sums = up_to(P, m.cols);
  Right<T> keys(m, P, n, KEY_COLUMNS), values(m, n, P, KEY_ROWS);
  keys.pack(k.data, 1, k.row);
  values.pack(v.data, v.row, 1);
  auto* scores = scratch<Acc<T>>(SCORES, TILE * ld);
  auto* weights = scratch<T>(WEIGHTS, TILE * ld);
  auto* sums = scratch<Acc<T>>(SUMS, TILE * ld_sums);
  for (int64_t i = 0; i < n; i += TILE) {
    int64_t M = std::min(TILE, n - i);
    Acc<T>*maximum = stats + i, *inverse = stats + n + i;
    keys.columns(M, m.plain(q + i, q.row), 0, up_to(i + M, m.cols), set<T>(ld, scale, scores));
    m.softmax(M, i + 1, ld, scores, weights, maximum, inverse);
    values.rows(M, m.plain(weights, ld), 0, i + M, set<T>(ld_sums, 1, sums));
    m.round_rows(M, P, sums, ld_sums, inverse, y + i, y.row);
  }
}

// The gradients of one head.
template <class T> struct Backward {
  const Isa<T>& m;
  int64_t n, P, ld_sums;  // T of the equations; rows of sums are ld_sums apart
  double scale;
  Rows<T> q, k, v, g;
  Right<T> q_columns, g_columns, q_rows, k_rows, g_rows;  // q^T, g^T, q, k, g
  Acc<T> *gq, *gk, *gv;           // sums (n, P); they may be the same memory
  Acc<T> *maximum, *inverse, *mean;  // of each query; mean: g_i . y_i
  Acc<T> *scores, *gweights;      // of a block, (KEYS, QUERIES)
  T *weights, *gscores, *strips;  // strips: gscores as a left side that sums over keys

  Backward(int64_t n, int64_t P, Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> g)
      : m(isa<T>()), n(n), P(P), ld_sums(up_to(P, m.cols)), scale(1 / std::sqrt(double(P))),
        q(q), k(k), v(v), g(g),
        q_columns(m, P, n, QUERY_COLUMNS), g_columns(m, P, n, GRADIENT_COLUMNS),
        q_rows(m, n, P, QUERY_ROWS), k_rows(m, n, P, k.data == q.data ? QUERY_ROWS : KEY_ROWS),
        g_rows(m, n, P, GRADIENT_ROWS),
        scores(scratch<Acc<T>>(SCORES, KEYS * QUERIES)),
        gweights(scratch<Acc<T>>(GWEIGHTS, KEYS * QUERIES)),
        weights(scratch<T>(WEIGHTS, KEYS * QUERIES)), gscores(scratch<T>(GSCORES, KEYS * QUERIES)),
        strips(scratch<T>(LEFT, KEYS * (QUERIES + m.rows))) {
    q_columns.pack(q.data, 1, q.row);
    g_columns.pack(g.data, 1, g.row);
    q_rows.pack(q.data, q.row, 1);
    if (k_rows.data != q_rows.data) k_rows.pack(k.data, k.row, 1);
    g_rows.pack(g.data, g.row, 1);
  }

  // Room for the sums of the three gradients, or of one where they are to be added.
  void clear(bool one_gq_gk, bool one_gk_gv) {
    auto* sums = scratch<Acc<T>>(SUMS, 3 * n * ld_sums);
    std::fill(sums, sums + 3 * n * ld_sums, Acc<T>(0));
    gq = sums;
    gk = one_gq_gk ? gq : gq + n * ld_sums;
    gv = one_gk_gv ? gk : gk + n * ld_sums;
  }

  void statistics(const Acc<T>* stats, Rows<T> y) {
    int64_t padded = up_to(n, m.cols);  // panels of queries are read to their end
    maximum = scratch<Acc<T>>(SHIFT, 3 * padded);
    inverse = maximum + padded;
    mean = inverse + padded;
    std::fill(maximum, maximum + 3 * padded, Acc<T>(0));
    std::copy(stats, stats + n, maximum);
    std::copy(stats + n, stats + 2 * n, inverse);
    m.row_dots(n, P, g.data, g.row, y.data, y.row, mean);
  }

  void run() {
    for (int64_t j = 0; j < n; j += KEYS)
      for (int64_t i = j; i < n; i += QUERIES)
        block(j, std::min(KEYS, n - j), i, std::min(QUERIES, n - i));
  }

  void write(Rows<T> out, const Acc<T>* sums) const {
    m.round_rows(n, P, sums, ld_sums, nullptr, out.data, out.row);
  }

  // The block of keys j.. j + M and queries i.. i + N, i a multiple of KEYS and at least j.
  void block(int64_t j, int64_t M, int64_t i, int64_t N) {
    int64_t ld = up_to(N, m.cols);
    for (int64_t c = 0; c < ld; c += m.cols) {  // a panel of queries, and the keys it can see
      int64_t seen = std::min(M, i + c + m.cols - j), first = i + c, last = first + m.cols;
      q_columns.columns(seen, m.plain(k + j, k.row), first, last, set<T>(ld, scale, scores + c));
      g_columns.columns(seen, m.plain(v + j, v.row), first, last, set<T>(ld, 1, gweights + c));
    }
    m.softmax_backward(M, ld, i - j, scores, gweights, maximum + i, inverse + i, mean + i, weights,
                       gscores);
    for (int64_t r = 0; r < M; r += m.rows) {  // keys, and the queries that see them
      int64_t rows = std::min(m.rows, M - r), first = std::max(i, j + r);
      int64_t from = r * ld + first - i, to = (j + r) * ld_sums;
      g_rows.rows(rows, m.plain(weights + from, ld), first, i + N, add<T>(ld_sums, 1, gv + to));
      q_rows.rows(rows, m.plain(gscores + from, ld), first, i + N, add<T>(ld_sums, scale, gk + to));
    }
    m.interleave(M, 0, M, ld, gscores, false, strips);
    for (int64_t r = 0; r < N; r += m.rows) {  // queries, and the keys that they see
      int64_t rows = std::min(m.rows, N - r), last = std::min(j + M, i + r + m.rows);
      Left<T> A = m.transposed(strips + r * m.round_up(M), M);
      k_rows.rows(rows, A, j, last, add<T>(ld_sums, scale, gq + (i + r) * ld_sums));
    }
  }
};

}  // namespace

void attention_forward_cpu(int dtype, int64_t B, int64_t n, int64_t K, int64_t P, Strides q_strides,
                           Strides k_strides, Strides v_strides, const void* q, const void* k,
                           const void* v, void* y, void* stats, int threads) {
  share(q, q_strides, k, k_strides);
  share(k, k_strides, v, v_strides);
  const Strides rows = {n * K * P, K * P, P};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t h = 0; h < B * K; h++) {
      int64_t b = h / K, i = h % K;
      forward<T>(n, P, head<T>(q, q_strides, b, i), head<T>(k, k_strides, b, i),
                 head<T>(v, v_strides, b, i), head<T>(y, rows, b, i), (Acc<T>*)stats + h * 2 * n);
    }
  });
}

void attention_backward_cpu(int dtype, int64_t B, int64_t n, int64_t K, int64_t P,
                            Strides q_strides, Strides k_strides, Strides v_strides,
                            Strides y_strides, Strides g_strides, const void* q, const void* k,
                            const void* v, const void* y, const void* gy, const void* stats,
                            void* gq, void* gk, void* gv, int threads) {
  share(q, q_strides, k, k_strides);
  share(k, k_strides, v, v_strides);
  const Strides rows = {n * K * P, K * P, P};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t h = 0; h < B * K; h++) {
      int64_t b = h / K, i = h % K;
      Backward<T> call(n, P, head<T>(q, q_strides, b, i), head<T>(k, k_strides, b, i),
                       head<T>(v, v_strides, b, i), head<T>(gy, g_strides, b, i));
      call.clear(!gk, !gv);
      call.statistics((const Acc<T>*)stats + h * 2 * n, head<T>(y, y_strides, b, i));
      call.run();
      call.write(head<T>(gq, rows, b, i), call.gq);
      if (gk) call.write(head<T>(gk, rows, b, i), call.gk);
      if (gv) call.write(head<T>(gv, rows, b, i), call.gv);
    }
  });
}

}  // namespace crate_mini
