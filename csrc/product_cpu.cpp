// The arithmetic under ista_cpu.cpp, mssa_cpu.cpp and head_cpu.cpp, compiled once per instruction
// set: the matrix product C = finish(A B), LayerNorm and softmax. From slow to fast:
//
//   naive        not here but in ista_naive.cpp: plain loops, one element at a time
//   baseline     v2: B packed so that it is read in order, sums in registers, vectors that every
//                machine has (SSE2, NEON)
//   avx2         v3: the same code, registers twice as wide, multiply-add in one instruction
//   avx512       v4: registers four times as wide, 24 sums in flight instead of 12
//   avx512_bf16  v5: one instruction multiplies pairs of bf16 and adds in float, no conversion
// Check and time them all: python -m crate_mini.studies bench --op ista --versions
#include "kernels.h"
#include "product_cpu.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CRATE_X86 1
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns about its own immintrin.h (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

#define ISA baseline
#define VEC_BYTES 16
#define ROWS 6
#define NATIVE_BF16 0
#define FMA32(a, b, c) ((a) * (b) + (c))
#define FMA64(a, b, c) ((a) * (b) + (c))
#include "vector_cpu.h"
#include "rows_cpu.h"
#undef ISA
#undef VEC_BYTES
#undef ROWS
#undef NATIVE_BF16
#undef FMA32
#undef FMA64

#if CRATE_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define VEC_BYTES 32
#define ROWS 6
#define NATIVE_BF16 0
#define FMA32(a, b, c) ((VecF)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FMA64(a, b, c) ((VecD)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#include "vector_cpu.h"
#include "rows_cpu.h"
#undef ISA
#undef VEC_BYTES
#undef ROWS
#undef FMA32
#undef FMA64
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define VEC_BYTES 64
#define ROWS 12
#define FMA32(a, b, c) ((VecF)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FMA64(a, b, c) ((VecD)_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#endif
#define ISA avx512
#include "vector_cpu.h"
#include "rows_cpu.h"
#undef ISA
#undef NATIVE_BF16
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(                                                     \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16")
#endif
#define ISA avx512_bf16
#define NATIVE_BF16 1
#include "vector_cpu.h"
#include "rows_cpu.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // CRATE_X86

namespace crate_mini {

struct Version {  // one rung of the ladder
  const char* name;
  bool (*runs)();  // on this machine
  Isa<float> f32;
  Isa<bf16> b16;
  Isa<double> f64;  // for tests only, so always the baseline
};

static bool always() { return true; }
#if CRATE_X86
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// constexpr, because code that runs at start-up could hold an instruction this machine lacks.
static constexpr Version versions[] = {
#define RUNG(isa, runs) \
  {#isa, runs, isa::table<float>(), isa::table<bf16>(), baseline::table<double>()}
    RUNG(baseline, always),
#if CRATE_X86
    RUNG(avx2, has_avx2),
    RUNG(avx512, has_avx512),
    RUNG(avx512_bf16, has_avx512_bf16),
#endif
};

static const Version* fastest() {
  const Version* best = versions;
  for (const Version& v : versions) best = v.runs() ? &v : best;
  return best;
}
static const Version* current = fastest();

template <> const Isa<float>& isa() { return current->f32; }
template <> const Isa<bf16>& isa() { return current->b16; }
template <> const Isa<double>& isa() { return current->f64; }

const char* isa_name() { return current->name; }

const char* isa_names() {
  static char names[128] = "";
  if (!names[0])
    for (const Version& v : versions)
      if (v.runs()) strcat(strcat(names, names[0] ? " " : ""), v.name);
  return names;
}

bool use_isa(const char* name) {
  for (const Version& v : versions)
    if (!strcmp(v.name, name) && v.runs()) return current = &v, true;
  return false;
}

}  // namespace crate_mini
