// Every kernel of crate_mini as a plain function of pointers and sizes. No torch, no Python.
//
// Start with ista_naive.cpp, the whole ISTA block in two short functions. The other files compute
// the same faster.
//
// Letters: N rows (tokens); d width; h codes per row; S ISTA steps; a codes; r residuals; gx the
// gradient of x, and so on. Matrices are row-major without gaps. `dtype` is the type of every
// matrix unless a comment says otherwise; "acc" is the type that sums are kept in: double for F64,
// else float. Only pointers marked "or null" may be null. Any size may be zero, except S >= 1. The
// caller (fused.py) checks shapes, types and devices; nothing here can. Specification:
// reference.py.
#pragma once
#include <array>
#include <cstdint>
#include <string>

namespace crate_mini {

enum Dtype { F32 = 0, BF16 = 1, F64 = 2 };  // F64 on the CPU only

// ---- ISTA, naive: float32, one thread; see ista_naive.cpp ----

// codes (S, N, h) = a_1..a_S and residuals (S, N, d) = r_1..r_S are kept for backward; lam (h).
void ista_naive_forward(int64_t N, int64_t d, int64_t h, int64_t S, float eta, const float* x,
                        const float* D, const float* decoder, const float* lam, float* y,
                        float* codes, float* residuals);

// For a tied dictionary, decoder is D and gdecoder is gD.
void ista_naive_backward(int64_t N, int64_t d, int64_t h, int64_t S, float eta, const float* gy,
                         const float* ga, const float* D, const float* decoder, const float* codes,
                         const float* residuals, float* gx, float* gD, float* gdecoder,
                         float* glam);

// ---- ISTA on the CPU ----

// a: codes after S steps from zero on min_{a >= 0} lam |a|_1 + 1/2 |x - D a|^2; y = decoder a:
//   a_1 = ReLU(eta D^T x - eta lam)
//   r_t = x - D a_{t-1};  a_t = ReLU(a_{t-1} + eta D^T r_t - eta lam)
// x, y (N, d); D (d, h); decoder (d, h) or null: D; lams (h) acc, or null for the scalar lam;
// a (N, h). What backward needs, both or null: trail_a (S-1, N, h) = a_1..a_{S-1} and
// trail_r (S-1, N, d) = r_2..r_S.
void ista_forward_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                      const void* x, const void* D, const void* decoder, const void* lams, void* y,
                      void* a, void* trail_a, void* trail_r, int threads);

// Its gradients. gy (N, d) or null and ga (N, h) or null, null meaning zero; gx (N, d); gD (d, h);
// gdec (d, h), null where decoder is null: the decoder's share then goes into gD; glam (h) acc or
// null. With m_t = [a_t > 0] and G_t = eta times the gradient of the argument of step t's ReLU:
//   G_S = eta m_S (decoder^T gy + ga);  gr_t = D G_t;  G_{t-1} = m_{t-1} (G_t - eta D^T gr_t)
//   gx = sum_t gr_t;  gD = sum_t r_t G_t^T - sum_{t>1} gr_t a_{t-1}^T, with r_1 = x
//   gdec = gy a_S^T;  glam = -sum_t G_t;  all but gx summed over rows
void ista_backward_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta,
                       const void* gy, const void* ga, const void* x, const void* D,
                       const void* decoder, const void* a, const void* trail_a, const void* trail_r,
                       void* gx, void* gD, void* gdec, void* glam, int threads);

// ista_forward for a few rows, without what backward needs: products that read codes touch only
// the non-zero ones. Dt and dect (h, d) are D and decoder transposed, so that the atom of a code
// is one contiguous row.
void ista_decode_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                     const void* x, const void* D, const void* Dt, const void* dect,
                     const void* lams, void* y, void* a, int threads);

// ---- MSSA's projection on the CPU ----

// u = LayerNorm(z; weight, bias, eps) U. z (N, d) of type zdtype (dtype or F32); weight (d) acc;
// bias (d) acc or null; U (d, d); u (N, d). LayerNorm is computed in acc, its result rounded to
// dtype.
void mssa_project_forward_cpu(int zdtype, int dtype, int64_t N, int64_t d, double eps,
                              const void* z, const void* weight, const void* bias, const void* U,
                              void* u, int threads);

// Its gradients from gu (N, d): gz (N, d) zdtype; gweight (d) acc; gbias (d) acc, null where bias
// is; gU (d, d).
void mssa_project_backward_cpu(int zdtype, int dtype, int64_t N, int64_t d, double eps,
                               const void* gu, const void* z, const void* weight, const void* bias,
                               const void* U, void* gz, void* gweight, void* gbias, void* gU,
                               int threads);

// ---- causal attention on the CPU ----

using Strides = std::array<int64_t, 3>;  // elements from one batch, token and head to the next

// y_i = sum_{j <= i} w_ij v_j with w_i = softmax(q_i . k_j / sqrt(P)), for each of B K heads.
// q, k, v (B, T, K, P) with these strides, the P values of a head neighbours; k null: it is q; v
// null: it is k. y (B, T, K, P); stats (B, K, 2, T) acc, which backward needs: the largest score
// of each i, and 1 / sum_j e^(score - largest).
void attention_forward_cpu(int dtype, int64_t B, int64_t T, int64_t K, int64_t P, Strides q_strides,
                           Strides k_strides, Strides v_strides, const void* q, const void* k,
                           const void* v, void* y, void* stats, int threads);

// Its gradients from gy: gq, gk, gv (B, T, K, P). Where k is null, its share is added to gq, and gk
// is null; where v is null, its share is added to k's.
void attention_backward_cpu(int dtype, int64_t B, int64_t T, int64_t K, int64_t P,
                            Strides q_strides, Strides k_strides, Strides v_strides,
                            Strides y_strides, Strides gy_strides, const void* q, const void* k,
                            const void* v, const void* y, const void* gy, const void* stats,
                            void* gq, void* gk, void* gv, int threads);
// ---- the language-model head on the CPU; see head_cpu.cpp ----

// Mean cross-entropy of the logits x W^T over the rows whose target is not negative, and its
// gradients. x (N, d); W (V, d), V >= 1; targets (N) int64 below V; loss (1) acc, NaN if no row
// counts; gx (N, d) acc and gW (V, d) acc, both or null.
void head_cpu(int dtype, int64_t N, int64_t V, int64_t d, const void* x, const void* W,
              const void* targets, void* loss, void* gx, void* gW, int threads);

// ---- top-k on the CPU ----

// The k largest codes of each row of a (N, h) keep their value, the others become 0; 1 <= k <= h.
// Of equal codes the first stay; a NaN is larger than any number. values (N, h): what is kept
// instead, for the gradient, or null: a itself. out (N, h).
void top_k_cpu(int dtype, int64_t N, int64_t h, int64_t k, const void* a, const void* values,
               void* out, int threads);

// ---- instruction sets of the CPU kernels, slow to fast; see product_cpu.cpp ----

const char* isa_names();         // those this machine can run, separated by spaces, fastest last
const char* isa_name();          // the one in use: the fastest, unless use_isa chose another
bool use_isa(const char* name);  // for tests and benchmarks; false if this machine lacks it

// ---- the same on CUDA ----
//
// Pointers are to device memory. `version` is 0 (best) or 1..3, see product_cuda.cuh; `stream` a
// cudaStream_t. `workspace` holds at least the bytes that the function's own workspace function
// returns for its first four arguments on the same device, aligned to 256. dtype is F32 or BF16,
// and acc float. Work is queued on the stream without waiting. Returns a CUDA error code, 0 for
// none; cuda_problem puts it into words.

std::string cuda_problem(int error);

int64_t ista_forward_workspace_cuda(int dtype, int64_t N, int64_t d, int64_t h);
int ista_forward_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                      const void* x, const void* D, const void* decoder, const void* lams, void* y,
                      void* a, void* trail_a, void* trail_r, void* workspace, int version,
                      void* stream);
int64_t ista_backward_workspace_cuda(int dtype, int64_t N, int64_t d, int64_t h);
int ista_backward_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta,
                       const void* gy, const void* ga, const void* x, const void* D,
                       const void* decoder, const void* a, const void* trail_a, const void* trail_r,
                       void* gx, void* gD, void* gdec, void* glam, void* workspace, int version,
                       void* stream);
// N at most 65535. There is one version only.
int64_t ista_decode_workspace_cuda(int dtype, int64_t N, int64_t d, int64_t h);
int ista_decode_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                     const void* x, const void* D, const void* Dt, const void* dect,
                     const void* lams, void* y, void* a, void* workspace, int version,
                     void* stream);

int64_t mssa_project_forward_workspace_cuda(int zdtype, int dtype, int64_t N, int64_t d);
int mssa_project_forward_cuda(int zdtype, int dtype, int64_t N, int64_t d, double eps,
                              const void* z, const void* weight, const void* bias, const void* U,
                              void* u, void* workspace, int version, void* stream);
int64_t mssa_project_backward_workspace_cuda(int zdtype, int dtype, int64_t N, int64_t d);
int mssa_project_backward_cuda(int zdtype, int dtype, int64_t N, int64_t d, double eps,
                               const void* gu, const void* z, const void* weight, const void* bias,
                               const void* U, void* gz, void* gweight, void* gbias, void* gU,
                               void* workspace, int version, void* stream);

}  // namespace crate_mini
