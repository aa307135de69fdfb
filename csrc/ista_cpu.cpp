// ISTA on the CPU, as matrix products that apply the threshold, mask or residual while the sums are
// still in registers. Equations: ista_naive.cpp. Products, from slow to fast: product_cpu.cpp.
//
// Rows of x are independent, so a tile of rows goes through all products of its steps while its
// codes stay in the second cache level. D is packed once per call for both directions, D^T r and
// D a. The gradient of D sums over rows: one thread sums a panel of its columns in a fixed order,
// so the number of threads changes no bit. Operations: 2 N d h per product; S steps take 2 S
// products forward and 4 S backward.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "product_cpu.h"

namespace crate_mini {
namespace {

constexpr int64_t TILE = 48;         // rows that go through the steps together; even, 4 x 12
constexpr int64_t PAD = 32;          // values between rows that would share a cache set
constexpr int64_t SLAB = 16 * TILE;  // rows whose share of gD is summed in registers

// D (d, h) packed for both directions.
template <class T> struct Dictionary {
  const Isa<T>& m;
  int64_t d, h;
  char* forth;  // for r -> D^T r, sums over d
  char* back;   // for a -> D a, sums over h
  T* padded;    // per thread: a tile of codes with padded rows, or null where that gains nothing

  Dictionary(const Isa<T>& m, int64_t d, int64_t h, int threads, Slot forth, Slot back)
      : m(m), d(d), h(h), forth(scratch_bytes(forth, m.packed_bytes(d, h))),
        back(scratch_bytes(back, m.packed_bytes(h, d))),
        padded(h * sizeof(T) % 4096 ? nullptr : scratch<T>(PADDED, threads * TILE * (h + PAD))) {}

  void pack_forth(const T* D) { pack_all(m, d, h, D, h, 1, forth); }
  void pack_back(const T* D) { pack_all(m, h, d, D, 1, h, back); }

  // D^T r for M rows r; absent: r is zero, and only what finishes the product is done.
  void correlate(int64_t M, const T* r, const Finish<T>& f, bool absent = false) const {
    m.product(M, h, absent ? 0 : d, m.plain(r, d), forth, f);
  }

  // D a for M rows a. Rows that lie a multiple of 4096 bytes apart share one set of the first cache
  // level, which holds 8 of the 12 rows that a product reads at once; padded, all 12 stay.
  void synthesize(int64_t M, const T* a, const Finish<T>& f) const {
    int64_t row = h;
    if (padded) {
      T* rows = padded + thread_number() * TILE * (h + PAD);
      for (int64_t i = 0; i < M; i++) std::copy(a + i * h, a + (i + 1) * h, rows + i * (h + PAD));
      a = rows;
      row = h + PAD;
    }
    m.product(M, d, h, m.plain(a, row), back, f);
  }
};

// out = ReLU(a + eta (.) - eta lam), (.) the product
template <class T>
Finish<T> threshold(int64_t h, double eta, const T* a, const Acc<T>* shift, T* out) {
  Finish<T> f;
  f.ld = h;
  f.scale = Acc<T>(eta);
  f.base = a;
  f.shift = shift;
  f.relu = true;
  f.out = out;
  return f;
}

// out = [mask > 0] (scale (.) + base_scale base)
template <class T>
Finish<T> combine(int64_t ld, double scale, double base_scale, const T* base, const T* mask,
                  T* out) {
  Finish<T> f;
  f.ld = ld;
  f.scale = Acc<T>(scale);
  f.base_scale = Acc<T>(base_scale);
  f.base = base;
  f.mask = mask;
  f.out = out;
  return f;
}

// -eta lam for every code
template <class T> const Acc<T>* make_shift(int64_t h, double eta, double lam, const void* lams) {
  auto* shift = scratch<Acc<T>>(SHIFT, h);
  for (int64_t j = 0; j < h; j++)
    shift[j] = -Acc<T>(eta) * (lams ? static_cast<const Acc<T>*>(lams)[j] : Acc<T>(lam));
  return shift;
}

template <class T>
void forward(int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam, const T* x,
             const T* D, const T* decoder, const void* lams, T* y, T* a, T* trail_a, T* trail_r,
             int threads) {
  const Isa<T>& m = isa<T>();
  Dictionary<T> dict(m, d, h, threads, FORTH, BACK);
  Dictionary<T> dec(m, d, h, threads, DECODER_FORTH, DECODER_BACK);
  const Acc<T>* shift = make_shift<T>(h, eta, lam, lams);
  bool tied = !decoder;
#pragma omp parallel num_threads(threads)
  {
    dict.pack_forth(D);
    if (S > 1 || tied) dict.pack_back(D);
    if (!tied) dec.pack_back(decoder);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N; i += TILE) {
      int64_t M = std::min(TILE, N - i);
      // Without a trail each step overwrites the codes of the step before.
      T* code = S > 1 && trail_a ? trail_a + i * h : a + i * h;
      dict.correlate(M, x + i * d, threshold<T>(h, eta, nullptr, shift, code));
      for (int64_t t = 2; t <= S; t++) {
        T* r = trail_r ? trail_r + ((t - 2) * N + i) * d : y + i * d;
        dict.synthesize(M, code, combine<T>(d, -1, 1, x + i * d, nullptr, r));
        T* next = t < S && trail_a ? trail_a + ((t - 1) * N + i) * h : a + i * h;
        dict.correlate(M, r, threshold<T>(h, eta, code, shift, next));
        code = next;
      }
      (tied ? dict : dec).synthesize(M, code, combine<T>(d, 1, 0, nullptr, nullptr, y + i * d));
    }
  }
}

// gD = the sum over rows of terms left^T right, left (rows, d) and right (rows, h), slab by slab:
// while a slab is in cache all its terms are summed in registers, and memory sees one partial sum
// per slab and element.
template <class T> struct DictionaryGradient {
  const Isa<T>& m;
  int64_t d, h, terms;
  T* out;
  T* left;          // interleaved, the rows of one term after another
  Acc<T>* partial;  // (d, h), sums of the slabs so far
  char* panels;     // per thread: one packed panel of each right side

  DictionaryGradient(const Isa<T>& m, int64_t d, int64_t h, int64_t terms, T* out, Slot left,
                     Slot partial, Slot panels, int threads)
      : m(m), d(d), h(h), terms(terms), out(out),
        left(scratch<T>(left, terms * SLAB * (d + m.rows))),
        partial(scratch<Acc<T>>(partial, d * h)),
        panels(scratch_bytes(panels, size_t(threads * terms) * m.panel_bytes(SLAB))) {}

  // Store rows i.. i + M of the slab (of `rows` rows) as the left side of term t.
  void put(int64_t t, int64_t rows, int64_t i, int64_t M, const T* X, bool negate = false) {
    m.interleave(terms * m.round_up(rows), t * m.round_up(rows) + i, M, d, X, negate, left);
  }

  // Add the slab, right[t] (rows, h). Every thread of a parallel region calls it; ends with a
  // barrier.
  void add(int64_t rows, const T* const* right, bool first, bool last) {
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < m.panels(h); p++) {
      int64_t j = p * m.cols, n = std::min(m.cols, h - j);
      char* panel = panels + size_t(thread_number() * terms) * m.panel_bytes(SLAB);
      for (int64_t t = 0; t < terms; t++)
        m.pack(rows, n, right[t] + j, h, 1, panel + size_t(t) * m.panel_bytes(rows));
      Finish<T> f;
      f.ld = h;
      f.out = out + j;
      f.wide_base = first ? nullptr : partial + j;
      f.wide_out = last ? nullptr : partial + j;
      int64_t K = terms * m.round_up(rows);
      m.product(d, n, K, m.transposed(left, K), panel, f);
    }
  }
};

// sums[j] -= column sums of G (rows, h). Each thread sums whole columns, so the order is fixed.
template <class T> void subtract_columns(int64_t rows, int64_t h, const T* G, Acc<T>* sums) {
  constexpr int64_t C = 64;
#pragma omp for schedule(static)
  for (int64_t p = 0; p < (h + C - 1) / C; p++) {
    double column[C] = {};
    int64_t n = std::min(C, h - p * C);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < n; j++) column[j] += lift(G[i * h + p * C + j]);
    for (int64_t j = 0; j < n; j++) sums[p * C + j] -= Acc<T>(column[j]);
  }
}

// The call's arguments, see ista_backward_cpu in kernels.h.
template <class T> struct Backward {
  int64_t N, d, h, S;
  double eta;
  const T *gy, *ga, *x, *D, *decoder, *a, *trail_a, *trail_r;
  T *gx, *gD, *gdec;
  Acc<T>* glam;
  T *G, *gr;  // of one slab: G_1.. G_S (SLAB, h) and gr_2.. gr_S (SLAB, d)

  const T* codes(int64_t t) const { return t == S ? a : trail_a + (t - 1) * N * h; }
  const T* residual(int64_t t) const { return t == 1 ? x : trail_r + (t - 2) * N * d; }
  T* step_grad(int64_t t, int64_t i) const { return G + ((t - 1) * SLAB + i) * h; }
  T* residual_grad(int64_t t, int64_t i) const { return gr + ((t - 2) * SLAB + i) * d; }

  // All products but those into gD, for rows n.. n + M, which are rows i.. i + M of their slab.
  void rows(const Dictionary<T>& dict, const Dictionary<T>& dec, int64_t n, int64_t i,
            int64_t M) const {
    const T* ga_n = ga ? ga + n * h : nullptr;
    dec.correlate(M, gy + n * d, combine(h, eta, eta, ga_n, a + n * h, step_grad(S, i)), !gy);
    for (int64_t t = S; t > 1; t--) {
      const T* before = codes(t - 1) + n * h;
      T *Gt = step_grad(t, i), *grt = residual_grad(t, i);
      dict.synthesize(M, Gt, combine<T>(d, 1, 0, nullptr, nullptr, grt));
      dict.correlate(M, grt, combine<T>(h, -eta, 1, Gt, before, step_grad(t - 1, i)));
    }
    const T* sum = S > 1 ? residual_grad(S, i) : nullptr;
    for (int64_t t = S - 1; t > 1; t--, sum = gx + n * d)
      for (int64_t k = 0; k < M * d; k++)
        lower(lift(sum[k]) + lift(residual_grad(t, i)[k]), gx[n * d + k]);
    dict.synthesize(M, step_grad(1, i), combine<T>(d, 1, 1, sum, nullptr, gx + n * d));
  }

  void run(int threads) {
    const Isa<T>& m = isa<T>();
    bool tied = !decoder;
    bool into_gdec = gy && gdec;
    bool into_gD = gy && !gdec;
    Dictionary<T> dict(m, d, h, threads, FORTH, BACK);
    Dictionary<T> dec(m, d, h, threads, DECODER_FORTH, DECODER_BACK);
    DictionaryGradient<T> sum(m, d, h, 2 * S - 1 + into_gD, gD, LEFT, PARTIAL, PANELS, threads);
    DictionaryGradient<T> sum_dec(m, d, h, 1, gdec, DECODER_LEFT, DECODER_PARTIAL, DECODER_PANELS,
                                  threads);
    G = scratch<T>(STEPS, S * SLAB * h);
    gr = scratch<T>(RESIDUALS, S * SLAB * d);
    if (gdec && (!gy || !N)) std::fill(gdec, gdec + d * h, T{});
    if (!N) std::fill(gD, gD + d * h, T{});
    if (glam) std::fill(glam, glam + h, Acc<T>(0));
#pragma omp parallel num_threads(threads)
    {
      dict.pack_forth(D);
      dict.pack_back(D);
      if (!tied) dec.pack_forth(decoder);
      for (int64_t s = 0; s < N; s += SLAB)
        slab(dict, tied ? dict : dec, sum, sum_dec, s, into_gD, into_gdec);
    }
  }

  void slab(const Dictionary<T>& dict, const Dictionary<T>& dec, DictionaryGradient<T>& sum,
            DictionaryGradient<T>& sum_dec, int64_t s, bool into_gD, bool into_gdec) {
    int64_t rows_here = std::min(SLAB, N - s);
    bool first = s == 0, last = s + SLAB >= N;
    // Right sides of gD: G_t of each step, a_{t-1} (with -gr_t on its left), then a_S (with gy).
    std::vector<const T*> right;
    for (int64_t t = 1; t <= S; t++) right.push_back(step_grad(t, 0));
    for (int64_t t = 2; t <= S; t++) right.push_back(codes(t - 1) + s * h);
    right.push_back(a + s * h);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < rows_here; i += TILE) {
      int64_t M = std::min(TILE, rows_here - i), n = s + i;
      rows(dict, dec, n, i, M);
      for (int64_t t = 1; t <= S; t++) sum.put(t - 1, rows_here, i, M, residual(t) + n * d);
      for (int64_t t = 2; t <= S; t++)
        sum.put(S + t - 2, rows_here, i, M, residual_grad(t, i), true);
      if (into_gD) sum.put(2 * S - 1, rows_here, i, M, gy + n * d);
      if (into_gdec) sum_dec.put(0, rows_here, i, M, gy + n * d);
    }
    sum.add(rows_here, right.data(), first, last);
    if (into_gdec) sum_dec.add(rows_here, &right.back(), first, last);
    for (int64_t t = 1; t <= S && glam; t++)
      subtract_columns<T>(rows_here, h, step_grad(t, 0), glam);
  }
};

}  // namespace

void ista_forward_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                      const void* x, const void* D, const void* decoder, const void* lams, void* y,
                      void* a, void* trail_a, void* trail_r, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    forward<T>(N, d, h, S, eta, lam, (const T*)x, (const T*)D, (const T*)decoder, lams, (T*)y,
               (T*)a, (T*)trail_a, (T*)trail_r, threads);
  });
}

void ista_backward_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta,
                       const void* gy, const void* ga, const void* x, const void* D,
                       const void* decoder, const void* a, const void* trail_a, const void* trail_r,
                       void* gx, void* gD, void* gdec, void* glam, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    Backward<T> call{N, d, h, S, eta, (const T*)gy, (const T*)ga, (const T*)x, (const T*)D,
                     (const T*)decoder, (const T*)a, (const T*)trail_a, (const T*)trail_r,
                     (T*)gx, (T*)gD, (T*)gdec, (Acc<T>*)glam, nullptr, nullptr};
    call.run(threads);
  });
}

}  // namespace crate_mini
