// MSSA's projection on the CPU: u = LayerNorm(z) U, a tile of rows at a time, so that the
// normalised rows are multiplied while they are in the first cache levels and never stored. Head k
// of K is the columns from k p on (p = d / K), so u (N, d) read as (B, T, K, p) is what attention
// takes. Backward normalises again, which costs less than reading the rows back from memory. The
// products, from slow to fast: product_cpu.cpp.
#include <algorithm>

#include "kernels.h"
#include "product_cpu.h"

namespace crate_mini {
namespace {

constexpr int64_t TILE = 96;         // rows per tile, even
constexpr int64_t SLAB = 16 * TILE;  // rows whose share of gU is summed in registers

// The call's arguments, see kernels.h.
template <class T> struct Project {
  bool z_is_acc;
  int64_t N, d;
  double eps;
  const char* z;
  const Acc<T>* weight;
  const Acc<T>* bias;
  const T* U;

  const char* row(int64_t i) const {
    return z + size_t(i * d) * (z_is_acc ? sizeof(Acc<T>) : sizeof(T));
  }

  void forward(T* u, int threads) const {
    const Isa<T>& m = isa<T>();
    char* packed = scratch_bytes(FORTH, m.packed_bytes(d, d));
    T* tiles = scratch<T>(STEPS, threads * TILE * d);
#pragma omp parallel num_threads(threads)
    {
      pack_all(m, d, d, U, d, 1, packed);
      T* x = tiles + thread_number() * TILE * d;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < N; i += TILE) {
        int64_t M = std::min(TILE, N - i);
        Finish<T> f;
        f.ld = d;
        f.out = u + i * d;
        m.norm(M, d, row(i), z_is_acc, eps, weight, bias, x);
        m.product(M, d, d, m.plain(x, d), packed, f);
      }
    }
  }

  // gx = gu U^T, then back through LayerNorm; gU = x^T gu, summed as in ista_cpu.cpp. gweight and
  // gbias are summed per tile first, so that their order does not depend on the threads.
  void backward(const T* gu, char* gz, Acc<T>* gweight, Acc<T>* gbias, T* gU, int threads) const {
    const Isa<T>& m = isa<T>();
    int64_t tiles = (N + TILE - 1) / TILE;
    char* packed = scratch_bytes(BACK, m.packed_bytes(d, d));
    char* panels = scratch_bytes(PANELS, size_t(threads) * m.panel_bytes(SLAB));
    T* x = scratch<T>(STEPS, threads * TILE * d);
    T* left = scratch<T>(LEFT, SLAB * (d + m.rows));
    Acc<T>* gx = scratch<Acc<T>>(ROWS_OUT, threads * TILE * d);
    Acc<T>* partial = scratch<Acc<T>>(PARTIAL, d * d);
    Acc<T>* sums = scratch<Acc<T>>(SUMS, tiles * 2 * d);
    std::fill(sums, sums + tiles * 2 * d, Acc<T>(0));
    if (!N) std::fill(gU, gU + d * d, T{});
#pragma omp parallel num_threads(threads)
    {
      pack_all(m, d, d, U, 1, d, packed);
      for (int64_t s = 0; s < N; s += SLAB) {
        int64_t n = std::min(SLAB, N - s);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n; i += TILE) {
          int64_t first_value = thread_number() * TILE * d;  // of this thread's share of x and gx
          tile(m, packed, gu, gz, sums + (s + i) / TILE * 2 * d, s + i, std::min(TILE, n - i),
               x + first_value, gx + first_value, n, left);
        }
        add_slab(m, n, left, gu + s * d, panels, partial, gU, s == 0, s + SLAB >= N);
      }
    }
    for (int64_t j = 0; j < d; j++) {
      double weight_sum = 0, bias_sum = 0;
      for (int64_t t = 0; t < tiles; t++) {
        weight_sum += sums[t * 2 * d + j];
        bias_sum += sums[t * 2 * d + d + j];
      }
      gweight[j] = Acc<T>(weight_sum);
      if (gbias) gbias[j] = Acc<T>(bias_sum);
    }
  }

  // Rows i.. i + M, of a slab of `rows` rows: gz, and their share of sums and left.
  void tile(const Isa<T>& m, const char* packed, const T* gu, char* gz, Acc<T>* sums, int64_t i,
            int64_t M, T* x, Acc<T>* gx, int64_t rows, T* left) const {
    Finish<T> f;
    f.ld = d;
    f.wide_out = gx;
    m.product(M, d, d, m.plain(gu + i * d, d), packed, f);
    m.norm_backward(M, d, row(i), z_is_acc, eps, weight, bias, gx, gz + (row(i) - z), sums,
                    sums + d, x);
    m.interleave(rows, i % SLAB, M, d, x, false, left);
  }

  // Add a slab's x^T gu to gU, via `partial` until the last slab.
  void add_slab(const Isa<T>& m, int64_t rows, const T* left, const T* gu, char* panels,
                Acc<T>* partial, T* gU, bool first, bool last) const {
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < m.panels(d); p++) {
      int64_t j = p * m.cols, n = std::min(m.cols, d - j);
      char* panel = panels + size_t(thread_number()) * m.panel_bytes(SLAB);
      m.pack(rows, n, gu + j, d, 1, panel);
      Finish<T> f;
      f.ld = d;
      f.out = gU + j;
      f.wide_base = first ? nullptr : partial + j;
      f.wide_out = last ? nullptr : partial + j;
      m.product(d, n, m.round_up(rows), m.transposed(left, rows), panel, f);
    }
  }
};

}  // namespace

void mssa_project_forward_cpu(int zdtype, int dtype, int64_t N, int64_t d, double eps,
                              const void* z, const void* weight, const void* bias, const void* U,
                              void* u, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    Project<T> call{zdtype != BF16, N, d, eps, (const char*)z,
                    (const Acc<T>*)weight, (const Acc<T>*)bias, (const T*)U};
    call.forward((T*)u, threads);
  });
}

void mssa_project_backward_cpu(int zdtype, int dtype, int64_t N, int64_t d, double eps,
                               const void* gu, const void* z, const void* weight, const void* bias,
                               const void* U, void* gz, void* gweight, void* gbias, void* gU,
                               int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    Project<T> call{zdtype != BF16, N, d, eps, (const char*)z,
                    (const Acc<T>*)weight, (const Acc<T>*)bias, (const T*)U};
    call.backward((const T*)gu, (char*)gz, (Acc<T>*)gweight, (Acc<T>*)gbias, (T*)gU, threads);
  });
}

}  // namespace crate_mini
