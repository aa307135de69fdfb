// Every kernel of crate_mini as a plain function: pointers, sizes, and how to run. No torch, no Python.
//
// Letters: N rows (tokens); d width; h codes per row; S ISTA steps; a codes; r residuals; gx: gradient of x.
// Matrices are row-major and dense. `dtype` is the type of every matrix unless a comment says otherwise;
// "acc" is the type sums are kept in: float, or double when dtype is F64. Pointers marked "or null" may be
// absent. The caller (fused.py) checks shapes, types and devices; nothing here can. Spec: reference.py.
#pragma once
#include <cstdint>

namespace crate_mini {

enum Dtype { F32 = 0, BF16 = 1, F64 = 2 };   // F64 on the CPU only

// a = codes after S steps from zero on min_{a >= 0} lam |a|_1 + 1/2 |x - D a|^2, y = decoder a:
//   a_1 = ReLU(eta D^T x - eta lam);  r_t = x - D a_{t-1};  a_t = ReLU(a_{t-1} + eta D^T r_t - eta lam)
// x, y (N, d); D, decoder (d, h), decoder may be D; lams (h) acc or null for the scalar lam; a (N, h).
// trail_a (S-1, N, h) = a_1..a_{S-1} and trail_r (S-1, N, d) = r_2..r_S, which backward wants; both or null.
void ista_forward_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                      const void* x, const void* D, const void* decoder, const void* lams,
                      void* y, void* a, void* trail_a, void* trail_r, int threads);

// Gradients of the above. gy (N, d) or null, ga (N, h) or null: absent means zero. gx (N, d); gD (d, h);
// gdec (d, h) or null: null adds the decoder's share to gD (a tied dictionary); glam (h) acc or null.
// With m_t = [a_t > 0] and G_t = eta * gradient of step t's argument:
//   G_S = eta m_S (gy Dec + ga);  gr_t = D G_t;  G_{t-1} = m_{t-1} (G_t - eta D^T gr_t)
//   gx = sum_t gr_t + D G_1;  gD = sum_t (r_t^T G_t - gr_t^T a_{t-1}) + x^T G_1 (+ gy^T a_S)
//   glam = -(sum over rows and t of G_t)
void ista_backward_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta,
                       const void* gy, const void* ga, const void* x, const void* D, const void* decoder,
                       const void* a, const void* trail_a, const void* trail_r,
                       void* gx, void* gD, void* gdec, void* glam, int threads);

// One step: out = ReLU(a + eta r D - eta lam); a (N, h) or null for the zero start; r (N, d); lams as above.
void ista_step_forward_cpu(int dtype, int64_t N, int64_t d, int64_t h, double eta, double lam, const void* a,
                           const void* r, const void* D, const void* lams, void* out, int threads);

// Its gradients from g (N, h), that of out: ga (N, h) or null; gr (N, d); gD (d, h); glam (h) acc or null.
void ista_step_backward_cpu(int dtype, int64_t N, int64_t d, int64_t h, double eta,
                            const void* g, const void* out, const void* r, const void* D,
                            void* ga, void* gr, void* gD, void* glam, int threads);

// ista without gradient for a few rows: products that read codes touch the non-zero ones only. Dt, dect
// (h, d) are D and decoder transposed, so that one code's atom is one contiguous row.
void ista_decode_cpu(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                     const void* x, const void* D, const void* Dt, const void* dect, const void* lams,
                     void* y, void* a, int threads);

// u = LayerNorm(z; weight, bias, eps) U. z (N, d) of type zdtype (dtype or F32); weight, bias (d) acc, bias
// or null; U (d, d) and u (N, d) of type dtype. LayerNorm is computed in acc, its result rounded to dtype.
void mssa_project_forward_cpu(int zdtype, int dtype, int64_t N, int64_t d, double eps, const void* z,
                              const void* weight, const void* bias, const void* U, void* u, int threads);

// Gradients of the above from gu (N, d): gz (N, d) zdtype; gweight, gbias (d) acc, gbias or null; gU (d, d).
void mssa_project_backward_cpu(int zdtype, int dtype, int64_t N, int64_t d, double eps, const void* gu,
                               const void* z, const void* weight, const void* bias, const void* U,
                               void* gz, void* gweight, void* gbias, void* gU, int threads);

// Versions of the CPU kernels, naive to fast; use_isa returns false where this machine lacks one.
const char* isa_names();          // those this machine can run, separated by spaces, fastest last
const char* isa_name();           // the one in use
bool use_isa(const char* name);   // choose another, for tests and for reading the ladder in bench.py

// The same on CUDA: pointers to device memory, `version` 0 (best) or 1..3 (product_cuda.cuh), `stream` a
// cudaStream_t, `workspace` at least the bytes that the matching *_workspace_cuda tells, aligned to 256.
// dtype F32 or BF16; "acc" is float. Everything is queued on the stream and nothing is waited for. Returns a
// CUDA error code, 0 if none.
int64_t ista_workspace_cuda(int dtype, int64_t N, int64_t d, int64_t h);  // for all four ISTA functions below
int ista_forward_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                      const void* x, const void* D, const void* decoder, const void* lams, void* y, void* a,
                      void* trail_a, void* trail_r, void* workspace, int version, void* stream);
int ista_backward_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, const void* gy,
                       const void* ga, const void* x, const void* D, const void* decoder, const void* a,
                       const void* trail_a, const void* trail_r, void* gx, void* gD, void* gdec, void* glam,
                       void* workspace, int version, void* stream);
int ista_step_forward_cuda(int dtype, int64_t N, int64_t d, int64_t h, double eta, double lam, const void* a,
                           const void* r, const void* D, const void* lams, void* out, int version,
                           void* stream);
int ista_step_backward_cuda(int dtype, int64_t N, int64_t d, int64_t h, double eta, const void* g,
                            const void* out, const void* r, const void* D, void* ga, void* gr, void* gD,
                            void* glam, void* workspace, int version, void* stream);
// N at most 65535
int ista_decode_cuda(int dtype, int64_t N, int64_t d, int64_t h, int64_t S, double eta, double lam,
                     const void* x, const void* D, const void* Dt, const void* dect, const void* lams,
                     void* y, void* a, void* workspace, void* stream);
int64_t mssa_workspace_cuda(int64_t N, int64_t d);                          // for both MSSA functions
int mssa_project_forward_cuda(int zdtype, int dtype, int64_t N, int64_t d, double eps, const void* z,
                              const void* weight, const void* bias, const void* U, void* u,
                              void* workspace, int version, void* stream);
int mssa_project_backward_cuda(int zdtype, int dtype, int64_t N, int64_t d, double eps, const void* gu,
                               const void* z, const void* weight, const void* bias, const void* U,
                               void* gz, void* gweight, void* gbias, void* gU,
                               void* workspace, int version, void* stream);

}  // namespace crate_mini
