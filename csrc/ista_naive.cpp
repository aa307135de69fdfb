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

// sum_k u_k v_k. Row i of D is (D + i * h, stride 1), column j is (D + j, stride h).
static float dot(int64_t n, const float* u, int64_t stride, const float* v) {
  float sum = 0;
  for (int64_t k = 0; k < n; k++) sum += u[k * stride] * v[k];
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
      // r_t = x - D a_{t-1}
      for (int64_t i = 0; i < d; i++) r[i] = x[i] - (before ? dot(h, D + i * h, 1, before) : 0);
      // a_t = ReLU(a_{t-1} + eta D^T r_t - eta lam)
      for (int64_t j = 0; j < h; j++) {
        float v = (before ? before[j] : 0) + eta * dot(d, D + j, h, r) - eta * lam[j];
        a[j] = v < 0 ? 0 : v;  // a NaN stays
      }
      before = a;
    }
    // y = decoder a_S
    for (int64_t i = 0; i < d; i++) y[i] = dot(h, decoder + i * h, 1, before);
  }
}

// The chain rule, from the last step back to the first. gr_t is the gradient of r_t; G_t is eta
// times the gradient of what step t's ReLU receives, and [a_t > 0] is the gradient of that ReLU.
void ista_naive_backward(int64_t N, int64_t d, int64_t h, int64_t S, float eta, const float* gy,
                         const float* ga, const float* D, const float* decoder, const float* codes,
                         const float* residuals, float* gx, float* gD, float* gdecoder,
                         float* glam) {
  std::fill(gx, gx + N * d, 0.f);
  std::fill(gD, gD + d * h, 0.f);
  std::fill(gdecoder, gdecoder + d * h, 0.f);
  std::fill(glam, glam + h, 0.f);
  std::vector<float> G(h), gr(d);
  for (int64_t n = 0; n < N; n++, gy += d, ga += h, gx += d) {
    const float* a = codes + ((S - 1) * N + n) * h;
    // G_S = eta [a_S > 0] (decoder^T gy + ga)
    for (int64_t j = 0; j < h; j++)
      G[j] = a[j] <= 0 ? 0 : eta * (dot(d, decoder + j, h, gy) + ga[j]);
    // gdecoder += gy a_S^T
    for (int64_t i = 0; i < d; i++)
      for (int64_t j = 0; j < h; j++) gdecoder[i * h + j] += gy[i] * a[j];
    for (int64_t t = S - 1; t >= 0; t--) {
      const float* r = residuals + (t * N + n) * d;
      // gr_t = D G_t;  gx += gr_t
      for (int64_t i = 0; i < d; i++) gr[i] = dot(h, D + i * h, 1, G.data());
      for (int64_t i = 0; i < d; i++) gx[i] += gr[i];
      // gD += r_t G_t^T;  glam -= G_t
      for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < h; j++) gD[i * h + j] += r[i] * G[j];
      for (int64_t j = 0; j < h; j++) glam[j] -= G[j];
      if (t == 0) break;
      a -= N * h;  // from here on a_{t-1}
      // gD -= gr_t a_{t-1}^T;  G_{t-1} = [a_{t-1} > 0] (G_t - eta D^T gr_t)
      for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < h; j++) gD[i * h + j] -= gr[i] * a[j];
      for (int64_t j = 0; j < h; j++)
        G[j] = a[j] <= 0 ? 0 : G[j] - eta * dot(d, D + j, h, gr.data());
    }
  }
}

}  // namespace crate_mini
