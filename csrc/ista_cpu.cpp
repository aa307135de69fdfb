// ISTA on the CPU: sparse codes on a dictionary, as products with the threshold, mask and residual done while
// the sums are in registers. The versions, naive to fast, are those of the product: see product_cpu.cpp.
//
// Rows of x are independent, so a tile of rows goes through all the products of its steps while its codes are
// in the second cache level; D is packed once per call for both directions (D^T r and D a). The gradient of D
// sums over rows: it is done panel by panel of D's columns, whoever the thread, so that one thread and many
// give the same bits. Operations: 2 N d h per product; S steps take 2S forward and 4S backward.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "product_cpu.h"

namespace crate_mini {
namespace {

constexpr int64_t TILE = 48;                         // rows that go through the steps together; even, 4 x 12
constexpr int64_t PAD = 32;                          // values between rows that would share a cache set
constexpr int64_t SLAB = 16 * TILE;                  // rows whose products into gD are summed in registers

template <class T> struct Dictionary {               // D (d, h) packed for both directions
  const Isa<T>& m;
  int64_t d, h;
  char *forth, *back;                                // r -> D^T r, sums over d; a -> D a, sums over h
  T* aside;  // per thread: a tile of codes at a kinder distance, or null

  Dictionary(const Isa<T>& m, int64_t d, int64_t h, int threads, Slot forth, Slot back)
      : m(m), d(d), h(h), forth(scratch_bytes(forth, m.packed_bytes(d, h))),
        back(scratch_bytes(back, m.packed_bytes(h, d))),
        aside(h * sizeof(T) % 4096 ? nullptr : scratch<T>(ASIDE, threads * TILE * (h + PAD))) {}
  void pack_forth(const T* D) { pack_all(m, d, h, D, h, 1, forth); }
  void pack_back(const T* D) { pack_all(m, h, d, D, 1, h, back); }
  void correlate(int64_t M, const T* r, const Finish<T>& f, bool absent = false) const {
    m.product(M, h, absent ? 0 : d, m.plain(r, d), forth, f);
  }
  // Rows a multiple of 4096 bytes apart fall into one set of the first cache level, which holds 8 of the 12
  // that a product reads side by side; copied to another distance, all stay.
  void synthesize(int64_t M, const T* a, const Finish<T>& f) const {
    int64_t row = h;
    if (aside) {
      T* rows = aside + thread_number() * TILE * (h + PAD);
      for (int64_t i = 0; i < M; i++) std::copy(a + i * h, a + (i + 1) * h, rows + i * (h + PAD));
      a = rows, row = h + PAD;
    }
    m.product(M, d, h, m.plain(a, row), back, f);
  }
};

template <class T> Finish<T> threshold(int64_t h, double eta, const T* a, const Acc<T>* shift, T* out) {
  Finish<T> f;                                       // out = ReLU(a + eta (.) - eta lam)
  f.ld = h, f.scale = Acc<T>(eta), f.base = a, f.shift = shift, f.relu = true, f.out = out;
  return f;
}

template <class T>
Finish<T> combine(int64_t ld, double scale, double base_scale, const T* base, const T* mask, T* out) {
  Finish<T> f;                                       // out = [mask > 0] (scale (.) + base_scale base)
  f.ld = ld, f.scale = Acc<T>(scale), f.base_scale = Acc<T>(base_scale), f.base = base, f.mask = mask,
  f.out = out;
  return f;
}

template <class T> const Acc<T>* make_shift(int64_t h, double eta, double lam, const void* lams) {
  auto* shift = scratch<Acc<T>>(SHIFT, h);
  for (int64_t j = 0; j < h; j++)
    shift[j] = -Acc<T>(eta) * (lams ? static_cast<const Acc<T>*>(lams)[j] : Acc<T>(lam));
  return shift;
}

template <class T>
void forward(int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam, const T* x, const T* D,
             const T* decoder, const void* lams, T* y, T* a, T* trail_a, T* trail_r, int threads) {
  const Isa<T>& m = isa<T>();
  Dictionary<T> dict(m, d, h, threads, FORTH, BACK), dec(m, d, h, threads, DECODER_FORTH, DECODER_BACK);
  const Acc<T>* shift = make_shift<T>(h, eta, lam, lams);
  bool tied = decoder == D;
#pragma omp parallel num_threads(threads)
  {
    dict.pack_forth(D);
    if (S > 1 || tied) dict.pack_back(D);
    if (!tied) dec.pack_back(decoder);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N; i += TILE) {
      int64_t M = std::min(TILE, N - i);
      T* code = S > 1 && trail_a ? trail_a + i * h : a + i * h;  // without a trail a step overwrites the last
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

template <class T>
void step_forward(int64_t N, int64_t d, int64_t h, double eta, double lam, const T* a, const T* r, const T* D,
                  const void* lams, T* out, int threads) {
  const Isa<T>& m = isa<T>();
  Dictionary<T> dict(m, d, h, threads, FORTH, BACK);
  const Acc<T>* shift = make_shift<T>(h, eta, lam, lams);
#pragma omp parallel num_threads(threads)
  {
    dict.pack_forth(D);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N; i += TILE)
      dict.correlate(std::min(TILE, N - i), r + i * d,
                     threshold<T>(h, eta, a ? a + i * h : nullptr, shift, out + i * h));
  }
}

// gD = sum of terms left^T right over rows, left (rows, d), right (rows, h), slab by slab: while a slab is in
// cache all its terms are summed in registers, and one partial sum per slab and element travels to memory.
template <class T> struct DictionaryGradient {
  const Isa<T>& m;
  int64_t d, h, terms;
  T *out, *left;                                     // left: interleaved, the rows of term after term
  Acc<T>* partial;                                   // (d, h), sums of the slabs so far
  char* panels;                                      // per thread: one packed panel of the right sides

  DictionaryGradient(const Isa<T>& m, int64_t d, int64_t h, int64_t terms, T* out, Slot left, Slot partial,
                     Slot panels, int threads)
      : m(m), d(d), h(h), terms(terms), out(out), left(scratch<T>(left, terms * SLAB * (d + m.rows))),
        partial(scratch<Acc<T>>(partial, d * h)),
        panels(scratch_bytes(panels, size_t(threads * terms) * m.panel_bytes(SLAB))) {}

  // Rows i.. i + M of the slab (of `rows` rows) of term t's left side.
  void put(int64_t t, int64_t rows, int64_t i, int64_t M, const T* X, bool negate = false) {
    m.interleave(terms * m.round_up(rows), t * m.round_up(rows) + i, M, d, X, negate, left);
  }
  // Add the slab: right[t] (rows, h). Called by every thread of a parallel region; ends with a barrier.
  void add(int64_t rows, const T* const* right, bool first, bool last) {
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < m.panels(h); p++) {
      int64_t j = p * m.cols, n = std::min(m.cols, h - j);
      char* panel = panels + size_t(thread_number() * terms) * m.panel_bytes(SLAB);
      for (int64_t t = 0; t < terms; t++)
        m.pack(rows, n, right[t] + j, h, 1, panel + size_t(t) * m.panel_bytes(rows));
      Finish<T> f;
      f.ld = h, f.out = out + j, f.wide_base = first ? nullptr : partial + j,
      f.wide_out = last ? nullptr : partial + j;
      int64_t K = terms * m.round_up(rows);
      m.product(d, n, K, m.transposed(left, K), panel, f);
    }
  }
};

// sums[j] -= column sums of G (rows, h). Threads share the columns, so the order within a sum is fixed.
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

template <class T> struct Backward {  // the call's arguments, see ista_backward_cpu in kernels.h
  int64_t N, d, h, S;
  double eta;
  const T *gy, *ga, *x, *D, *decoder, *a, *trail_a, *trail_r;
  T *gx, *gD, *gdec;
  Acc<T>* glam;
  T *G, *gr;  // of one slab: G_1.. G_S (SLAB, h), gr_2.. gr_S (SLAB, d)

  const T* codes(int64_t t) const { return t == S ? a : trail_a + (t - 1) * N * h; }
  const T* residual(int64_t t) const { return t == 1 ? x : trail_r + (t - 2) * N * d; }
  T* step_grad(int64_t t, int64_t i) const { return G + ((t - 1) * SLAB + i) * h; }
  T* residual_grad(int64_t t, int64_t i) const { return gr + ((t - 2) * SLAB + i) * d; }

  // Rows at.. at + M, the i-th of their slab: all products but those into gD.
  void rows(const Dictionary<T>& dict, const Dictionary<T>& dec, int64_t at, int64_t i, int64_t M) const {
    dec.correlate(M, gy + at * d,
                  combine(h, eta, eta, ga ? ga + at * h : nullptr, a + at * h, step_grad(S, i)), !gy);
    for (int64_t t = S; t > 1; t--) {
      dict.synthesize(M, step_grad(t, i), combine<T>(d, 1, 0, nullptr, nullptr, residual_grad(t, i)));
      dict.correlate(M, residual_grad(t, i), combine<T>(h, -eta, 1, step_grad(t, i), codes(t - 1) + at * h,
                                                        step_grad(t - 1, i)));
    }
    const T* sum = S > 1 ? residual_grad(S, i) : nullptr;
    for (int64_t t = S - 1; t > 1; t--, sum = gx + at * d)
      for (int64_t k = 0; k < M * d; k++) lower(lift(sum[k]) + lift(residual_grad(t, i)[k]), gx[at * d + k]);
    dict.synthesize(M, step_grad(1, i), combine<T>(d, 1, 1, sum, nullptr, gx + at * d));
  }

  void run(int threads) {
    const Isa<T>& m = isa<T>();
    bool tied = decoder == D, into_gdec = gy && gdec, into_gD = gy && !gdec;
    Dictionary<T> dict(m, d, h, threads, FORTH, BACK), dec(m, d, h, threads, DECODER_FORTH, DECODER_BACK);
    DictionaryGradient<T> sum(m, d, h, 2 * S - 1 + into_gD, gD, LEFT, PARTIAL, PANELS, threads);
    DictionaryGradient<T> sum_dec(m, d, h, 1, gdec, DECODER_LEFT, DECODER_PARTIAL, DECODER_PANELS, threads);
    G = scratch<T>(STEPS, S * SLAB * h), gr = scratch<T>(RESIDUALS, S * SLAB * d);
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
    int64_t n = std::min(SLAB, N - s);
    bool first = s == 0, last = s + SLAB >= N;
    std::vector<const T*> right;  // of gD: per step r_t^T G_t and -gr_t^T a_{t-1}, then gy^T a_S
    for (int64_t t = 1; t <= S; t++) right.push_back(step_grad(t, 0));
    for (int64_t t = 2; t <= S; t++) right.push_back(codes(t - 1) + s * h);
    right.push_back(a + s * h);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < n; i += TILE) {
      int64_t M = std::min(TILE, n - i), at = s + i;
      rows(dict, dec, at, i, M);
      for (int64_t t = 1; t <= S; t++) sum.put(t - 1, n, i, M, residual(t) + at * d);
      for (int64_t t = 2; t <= S; t++) sum.put(S + t - 2, n, i, M, residual_grad(t, i), true);
      if (into_gD) sum.put(2 * S - 1, n, i, M, gy + at * d);
      if (into_gdec) sum_dec.put(0, n, i, M, gy + at * d);
    }
    sum.add(n, right.data(), first, last);
    if (into_gdec) sum_dec.add(n, &right.back(), first, last);
    for (int64_t t = 1; t <= S && glam; t++) subtract_columns<T>(n, h, step_grad(t, 0), glam);
  }
};

template <class T> void step_backward(int64_t N, int64_t d, int64_t h, double eta, const T* g, const T* out,
                                      const T* r, const T* D, T* ga, T* gr, T* gD, Acc<T>* glam,
                                      int threads) {
  const Isa<T>& m = isa<T>();
  Dictionary<T> dict(m, d, h, threads, FORTH, BACK);
  DictionaryGradient<T> sum(m, d, h, 1, gD, LEFT, PARTIAL, PANELS, threads);
  T* G = scratch<T>(STEPS, SLAB * h);
  if (!N) std::fill(gD, gD + d * h, T{});
  if (glam) std::fill(glam, glam + h, Acc<T>(0));
#pragma omp parallel num_threads(threads)
  {
    dict.pack_back(D);
    for (int64_t s = 0; s < N; s += SLAB) {
      int64_t n = std::min(SLAB, N - s);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < n; i += TILE) {
        int64_t M = std::min(TILE, n - i), at = s + i;
        m.product(M, h, 0, m.plain(r, d), dict.back,
                  combine<T>(h, 0, eta, g + at * h, out + at * h, G + i * h));
        if (ga)
          m.product(M, h, 0, m.plain(r, d), dict.back,
                    combine<T>(h, 0, 1, g + at * h, out + at * h, ga + at * h));
        dict.synthesize(M, G + i * h, combine<T>(d, 1, 0, nullptr, nullptr, gr + at * d));
        sum.put(0, n, i, M, r + at * d);
      }
      sum.add(n, &G, s == 0, s + SLAB >= N);
      if (glam) subtract_columns<T>(n, h, G, glam);
    }
  }
}

}  // namespace

void ista_forward_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                      const void* x, const void* D, const void* decoder, const void* lams, void* y, void* a,
                      void* trail_a, void* trail_r, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    forward<T>(N, d, h, S, eta, lam, (const T*)x, (const T*)D, (const T*)decoder, lams, (T*)y, (T*)a,
               (T*)trail_a, (T*)trail_r, threads);
  });
}

void ista_backward_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, const void* gy,
                       const void* ga, const void* x, const void* D, const void* decoder, const void* a,
                       const void* trail_a, const void* trail_r, void* gx, void* gD, void* gdec, void* glam,
                       int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    Backward<T>{N, d, h, S, eta, (const T*)gy, (const T*)ga, (const T*)x, (const T*)D, (const T*)decoder,
                (const T*)a, (const T*)trail_a, (const T*)trail_r, (T*)gx, (T*)gD, (T*)gdec, (Acc<T>*)glam,
                nullptr, nullptr}
        .run(threads);
  });
}

void ista_step_forward_cpu(int dtype, int64_t N, int64_t d, int64_t h, double eta, double lam, const void* a,
                           const void* r, const void* D, const void* lams, void* out, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    step_forward<T>(N, d, h, eta, lam, (const T*)a, (const T*)r, (const T*)D, lams, (T*)out, threads);
  });
}

void ista_step_backward_cpu(int dtype, int64_t N, int64_t d, int64_t h, double eta, const void* g,
                            const void* out, const void* r, const void* D, void* ga, void* gr, void* gD,
                            void* glam, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    step_backward<T>(N, d, h, eta, (const T*)g, (const T*)out, (const T*)r, (const T*)D, (T*)ga, (T*)gr,
                     (T*)gD, (Acc<T>*)glam, threads);
  });
}

}  // namespace crate_mini
