// The language-model head on the CPU: mean cross-entropy over the vocabulary and its gradients in
// one pass, never holding all logits at once. For row i of x, with target t, logits s_j = x_i . W_j
// and n rows that count:
//
//   Z = sum_{j != t} exp(s_j - m),  m = max_{j != t} s_j;   z = exp(s_t - m)
//   loss = mean_i log((Z + z) / exp(s_t - m));   1 - p_t = Z / (Z + z)
//   gx_i = (sum_{j != t} p_j W_j - (1 - p_t) W_t) / n;   gW_j likewise, from the rows x_i
//
// The target has a term of its own because 1 - p_t, as a difference, would lose its digits.
//
// Columns go by in blocks that stay in the second cache level. There the maximum so far is taken
// off and the exponentials, E, are stored, which are all that remains of the logits: p = c E, where
// the factor c of a row follows from its last maximum and its sum. It multiplies the small
// matrices instead: rows of gx, and the rows of x in gW = E^T (c x). As elsewhere, one thread sums
// an element in a fixed order, so the number of threads changes no bit. Operations: 6 N V d.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "product_cpu.h"

namespace crate_mini {
namespace {

constexpr int64_t COLUMNS = 512;        // of the vocabulary, in a block
constexpr int64_t TILE = 96;            // rows that go through all blocks together; even, 8 x 12
constexpr int64_t CHUNK = 8 * TILE;     // rows whose share of gW is summed in registers, at most
constexpr int64_t EXPONENTIALS = 80e6;  // bytes of E: fewer rows where the vocabulary is large
constexpr int64_t FEW = 8;  // rows of a block of E that fit the first cache level; divides TILE

// What pass one knows of a row when it has seen all columns.
template <class T> struct Row {
  Acc<T> top, sum;     // m, and Z relative to it
  Acc<T> logit;        // of the target
  Acc<T> scale, pull;  // c, and -(1 - p_t) / n
};

template <class T> struct Head {
  int64_t N, V, d;
  const T *x, *W;
  const int64_t* targets;  // negative: the row does not count
  Acc<T>*gx, *gW;          // null: the loss alone

  const Isa<T>& m = isa<T>();
  // Blocks are equally wide, and the last is filled up with columns that have no weight.
  int64_t width = std::min(COLUMNS, m.panels(V) * m.cols);
  int64_t blocks = (V + width - 1) / width;
  int64_t fit = EXPONENTIALS / (V * int64_t(sizeof(T)));  // rows whose exponentials fit
  int64_t chunk = std::max(TILE, std::min(CHUNK, fit / TILE * TILE));
  int64_t counted = 0;
  char *forth, *back;  // W packed, for x -> x W^T and block by block for E -> E W
  T* E;                // exponentials of a chunk: [tile][block][row][column]
  Acc<T>* tops;        // the maximum they are relative to: [block][row of the chunk]
  Row<T>* rows;        // of the chunk

  int64_t columns(int64_t b) const { return std::min(width, V - b * width); }
  T* exponentials(int64_t i, int64_t b) const {  // i: first row of a tile within its chunk
    return gW ? E + (i / TILE * blocks + b) * TILE * width : nullptr;
  }

  Acc<T> run(int threads) {
    counted = std::count_if(targets, targets + N, [](int64_t t) { return t >= 0; });
    chunk = std::min(chunk, (N + TILE - 1) / TILE * TILE);
    forth = scratch_bytes(FORTH, m.packed_bytes(d, V));
    tops = scratch<Acc<T>>(SHIFT, blocks * chunk);
    rows = scratch<Row<T>>(SUMS, chunk);
    auto* logits = scratch<Acc<T>>(ROWS_OUT, threads * TILE * width);
    T *scaled = nullptr, *left = nullptr;
    char* panels = nullptr;
    if (gW) {
      back = scratch_bytes(BACK, size_t(blocks) * m.packed_bytes(width, d));
      E = scratch<T>(STEPS, chunk * blocks * width);
      scaled = scratch<T>(RESIDUALS, threads * chunk * d);
      left = scratch<T>(LEFT, threads * chunk * (width + m.rows));
      panels = scratch_bytes(PANELS, size_t(threads) * m.packed_bytes(chunk, d));
      if (!N) std::fill(gW, gW + V * d, Acc<T>(0));
    }
    long double loss = 0;  // the sum of many like terms drifts
#pragma omp parallel num_threads(threads)
    {
      pack();
      int me = thread_number();
      for (int64_t s = 0; s < N; s += chunk) {
        int64_t R = std::min(chunk, N - s);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < R; i += TILE)
          tile(s, i, std::min(TILE, R - i), logits + me * TILE * width);
        if (gW) {
#pragma omp for schedule(dynamic)
          for (int64_t b = 0; b < blocks; b++)
            weight_gradient(s, R, b, scaled + me * chunk * d, left + me * chunk * (width + m.rows),
                            panels + size_t(me) * m.packed_bytes(chunk, d));
        }
#pragma omp single
        loss += targets_of_chunk(s, R);
      }
    }
    return Acc<T>(loss / counted);
  }

  void pack() {
    pack_all(m, d, V, W, 1, d, forth);
    if (!gW) return;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++)
      for (int64_t p = 0; p < m.panels(d); p++)
        m.pack(columns(b), std::min(m.cols, d - p * m.cols), W + b * width * d + p * m.cols, d, 1,
               back + size_t(b) * m.packed_bytes(width, d) + size_t(p) * m.panel_bytes(columns(b)));
  }

  // ---- pass one: rows s + i.. s + i + M through all columns ----
  void tile(int64_t s, int64_t i, int64_t M, Acc<T>* S) {
    Row<T>* row = rows + i;
    Acc<T> top[TILE], sum[TILE], factor[TILE];
    std::fill(top, top + M, -std::numeric_limits<Acc<T>>::infinity());
    std::fill(sum, sum + M, Acc<T>(0));
    for (int64_t b = 0; b < blocks; b++) {
      T* Eb = exponentials(i, b);
      logits(s + i, M, b, S, row);
      m.exponentials(M, width, S, top, sum, factor, Eb);
      if (!gW) continue;
      std::copy(top, top + M, tops + b * chunk + i);
      add_to_gx(s + i, M, b, factor, Eb);
    }
    for (int64_t r = 0; r < M; r++) {
      row[r].top = top[r];
      row[r].sum = sum[r];
      finish(s + i + r, row[r]);
    }
  }

  // S = x W^T in block b. The target's logit moves to its row; it and columns past the end are -inf
  // now.
  void logits(int64_t i, int64_t M, int64_t b, Acc<T>* S, Row<T>* row) const {
    constexpr auto none = -std::numeric_limits<Acc<T>>::infinity();
    int64_t n = columns(b), begin = b * width;
    Finish<T> f;
    f.ld = width;
    f.wide_out = S;
    m.product(M, n, d, m.plain(x + i * d, d), forth + size_t(begin / m.cols) * m.panel_bytes(d), f);
    for (int64_t r = 0; r < M; r++) {
      std::fill(S + r * width + n, S + (r + 1) * width, none);
      int64_t j = targets[i + r] - begin;
      if (j < 0 || j >= n) continue;
      row[r].logit = S[r * width + j];
      S[r * width + j] = none;
    }
  }

  // gx += E W in block b. What earlier blocks added was relative to an earlier maximum.
  void add_to_gx(int64_t i, int64_t M, int64_t b, const Acc<T>* factor, const T* Eb) const {
    for (int64_t r = 0; r < M && b > 0; r++)
      if (factor[r] != 1)
        for (int64_t k = 0; k < d; k++) gx[(i + r) * d + k] *= factor[r];
    Finish<T> f;
    f.ld = d;
    f.wide_out = gx + i * d;
    f.wide_base = b > 0 ? f.wide_out : nullptr;
    m.product(M, d, columns(b), m.plain(Eb, width),
              back + size_t(b) * m.packed_bytes(width, d), f);
  }

  // A row's factors, and its gx.
  void finish(int64_t i, Row<T>& row) const {
    int64_t t = targets[i];
    row.scale = row.pull = 0;
    if (t >= 0) {  // in double, because it is done once a row
      double largest = std::max(double(row.top), double(row.logit));
      double others = row.sum == 0 ? 0 : row.sum * std::exp(row.top - largest);
      double all = others + std::exp(row.logit - largest);
      row.scale = Acc<T>(std::exp(row.top - largest) / all / double(counted));
      row.pull = Acc<T>(-others / all / double(counted));
    }
    if (!gW) return;
    for (int64_t k = 0; k < d; k++) {
      Acc<T> pulled = t >= 0 ? row.pull * lift(W[t * d + k]) : 0;
      gx[i * d + k] = row.scale * gx[i * d + k] + pulled;
    }
  }

  // ---- pass two: the chunk's E^T (c x) in block b, added to gW ----
  void weight_gradient(int64_t s, int64_t R, int64_t b, T* scaled, T* left, char* panels) const {
    for (int64_t r = 0; r < R; r++) {
      Acc<T> c = rows[r].scale;
      if (c != 0) c *= std::exp(tops[b * chunk + r] - rows[r].top);
      for (int64_t k = 0; k < d; k++) lower(c * lift(x[(s + r) * d + k]), scaled[r * d + k]);
    }
    for (int64_t p = 0; p < m.panels(d); p++)
      m.pack(R, std::min(m.cols, d - p * m.cols), scaled + p * m.cols, d, 1,
             panels + size_t(p) * m.panel_bytes(R));
    for (int64_t i = 0; i < R; i += FEW)
      m.interleave(R, i, std::min(FEW, R - i), width,
                   exponentials(i / TILE * TILE, b) + i % TILE * width, false, left);
    Finish<T> f;
    f.ld = d;
    f.wide_out = gW + b * width * d;
    f.wide_base = s > 0 ? f.wide_out : nullptr;
    m.product(columns(b), d, m.round_up(R), m.transposed(left, R), panels, f);
  }

  // The sum of a chunk's losses; adds the targets' terms to gW.
  long double targets_of_chunk(int64_t s, int64_t R) const {
    long double loss = 0;
    for (int64_t r = 0; r < R; r++) {
      int64_t t = targets[s + r];
      if (t < 0) continue;
      double above = rows[r].top - rows[r].logit;  // no digit is lost where the target is likely
      loss += above <= 0 ? std::log1p(rows[r].sum * std::exp(above))
                         : above + std::log(rows[r].sum + std::exp(-above));
      for (int64_t k = 0; k < d && gW; k++)
        gW[t * d + k] += rows[r].pull * lift(x[(s + r) * d + k]);
    }
    return loss;
  }
};

}  // namespace

void head_cpu(int dtype, int64_t N, int64_t V, int64_t d, const void* x, const void* W,
              const void* targets, void* loss, void* gx, void* gW, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    Head<T> call{N, V, d, (const T*)x, (const T*)W, (const int64_t*)targets, (Acc<T>*)gx,
                 (Acc<T>*)gW};
    *(Acc<T>*)loss = call.run(threads);
  });
}

}  // namespace crate_mini
