// The ISTA block forward, faster: every loop walks along rows of D, and sums that the compiler may
// not reorder are split into eight.
#include <cstdint>
#include <vector>

// (M v)_i of a row-major matrix M (d, h)
static float row(const float* M, int64_t i, int64_t h, const float* v) {
  const float* m = M + i * h;
  float part[8] = {};
  int64_t j = 0;
  for (; j + 8 <= h; j += 8)
    for (int k = 0; k < 8; k++) part[k] += m[j + k] * v[j + k];
  float sum = 0;
  for (int k = 0; k < 8; k++) sum += part[k];
  for (; j < h; j++) sum += m[j] * v[j];
  return sum;
}

// sums (h) = M^T v, row by row
static void columns(const float* M, int64_t d, int64_t h, const float* v, float* sums) {
  for (int64_t j = 0; j < h; j++) sums[j] = 0;
  for (int64_t i = 0; i < d; i++) {
    const float* m = M + i * h;
    const float scale = v[i];
    for (int64_t j = 0; j < h; j++) sums[j] += scale * m[j];
  }
}

extern "C" void ista_forward(int64_t N, int64_t d, int64_t h, int64_t S, float eta, const float* x,
                             const float* D, const float* decoder, const float* lam, float* y,
                             float* codes, float* residuals) {
  std::vector<float> products(h);
  for (int64_t n = 0; n < N; n++, x += d, y += d) {
    const float* before = nullptr;  // a_{t-1}
    for (int64_t t = 0; t < S; t++) {
      float* r = residuals + (t * N + n) * d;
      float* a = codes + (t * N + n) * h;
      for (int64_t i = 0; i < d; i++) r[i] = x[i] - (before ? row(D, i, h, before) : 0);
      columns(D, d, h, r, products.data());
      for (int64_t j = 0; j < h; j++) {
        float v = (before ? before[j] : 0) + eta * products[j] - eta * lam[j];
        a[j] = v < 0 ? 0 : v;  // a NaN stays
      }
      before = a;
    }
    for (int64_t i = 0; i < d; i++) y[i] = row(decoder, i, h, before);
  }
}
