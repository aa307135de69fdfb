// The ISTA block, equation by equation, forward and backward, in plain loops. Read this file first;
// ista_cpu.cpp and ista_cuda.cu compute the same faster.
//
// A token x (d) becomes sparse codes a (h) on a dictionary D (d, h), and these become y (d). S
// steps from a_0 = 0 lower lam |a|_1 + 1/2 |x - D a|^2:
//   r_t = x - D a_{t-1}                            the residual: what the codes do not explain yet
//   a_t = ReLU(a_{t-1} + eta D^T r_t - eta lam)    a gradient step, then the threshold
//   y = decoder a_S                                in the paper the decoder is D
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace crate_mini {

// (M v)_i and (M^T v)_j of a row-major matrix M (d, h)
static float row(const float* M, int64_t i, int64_t h, const float* v) {
  float sum = 0;
  for (int64_t j = 0; j < h; j++) sum += M[i * h + j] * v[j];
  return sum;
}
static float column(const float* M, int64_t j, int64_t d, int64_t h, const float* v) {
  float sum = 0;
  for (int64_t i = 0; i < d; i++) sum += M[i * h + j] * v[i];
  return sum;
}

void ista_naive_forward(int64_t N, int64_t d, int64_t h, int64_t S, float eta, const float* x,
                        const float* D, const float* decoder, const float* lam, float* y,
                        float* codes, float* residuals) {
  for (int64_t n = 0; n < N; n++, x += d, y += d) {
    const float* before = nullptr;  // a_{t-1}
    for (int64_t t = 0; t < S; t++) {
      float* r = residuals + (t * N + n) * d;
      float* a = codes + (t * N + n) * h;
      for (int64_t i = 0; i < d; i++) r[i] = x[i] - (before ? row(D, i, h, before) : 0);
      for (int64_t j = 0; j < h; j++) {
        float v = (before ? before[j] : 0) + eta * column(D, j, d, h, r) - eta * lam[j];
        a[j] = v < 0 ? 0 : v;  // a NaN stays
      }
      before = a;
    }
    for (int64_t i = 0; i < d; i++) y[i] = row(decoder, i, h, before);
  }
}

// The chain rule, from the last step back to the first. gr is the gradient of r_t, and G is eta
// times the gradient of what step t's ReLU receives:
//   G_S = eta [a_S > 0] (decoder^T gy + ga);  G_{t-1} = [a_{t-1} > 0] (G_t - eta D^T gr_t)
//   gr_t = D G_t;  gx = sum_t gr_t;  gD = sum_t r_t G_t^T - gr_t a_{t-1}^T;  glam = -sum_t G_t
void ista_naive_backward(int64_t N, int64_t d, int64_t h, int64_t S, float eta, const float* gy,
                         const float* ga, const float* D, const float* decoder, const float* codes,
                         const float* residuals, float* gx, float* gD, float* gdecoder,
                         float* glam) {
  std::fill(gx, gx + N * d, 0.f);
  std::fill(gD, gD + d * h, 0.f);
  std::fill(gdecoder, gdecoder + d * h, 0.f);
  std::fill(glam, glam + h, 0.f);
  std::vector<float> G(h), gr(d), zeros(h);
  for (int64_t n = 0; n < N; n++, gy += d, ga += h, gx += d) {
    const float* a = codes + ((S - 1) * N + n) * h;
    for (int64_t j = 0; j < h; j++)
      G[j] = a[j] <= 0 ? 0 : eta * (column(decoder, j, d, h, gy) + ga[j]);
    for (int64_t i = 0; i < d; i++)
      for (int64_t j = 0; j < h; j++) gdecoder[i * h + j] += gy[i] * a[j];
    for (int64_t t = S - 1; t >= 0; t--) {
      const float* r = residuals + (t * N + n) * d;
      const float* before = t > 0 ? a - N * h : zeros.data();
      for (int64_t i = 0; i < d; i++) gx[i] += gr[i] = row(D, i, h, G.data());
      for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < h; j++) gD[i * h + j] += r[i] * G[j] - gr[i] * before[j];
      for (int64_t j = 0; j < h; j++) glam[j] -= G[j];
      for (int64_t j = 0; j < h; j++)
        G[j] = before[j] <= 0 ? 0 : G[j] - eta * column(D, j, d, h, gr.data());
      a = before;
    }
  }
}

}  // namespace crate_mini
