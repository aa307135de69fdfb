"""Deliberate bugs, each of which a test must notice: what the tests of the kernels are worth.

A fault replaces a text that occurs once in a file of csrc/. One build holds them all, dormant:
PLANTED in a replacement becomes a condition that is true while the fault of that number is awake
(numbers start at 1).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Fault:
    """A planted fault; for CPU kernels also the property that notices it, and in which version."""

    file: str
    original: str
    replacement: str
    property: str = ""
    version: str = ""


CPU_FAULTS = {
    "an odd last row is forgotten": Fault(
        "vector_cpu.h",
        "if (i < M) tile<",
        "if (i < M && !PLANTED) tile<",
        "ista_forward",
        "baseline",
    ),
    "no threshold": Fault(
        "vector_cpu.h",
        "f.shift ? P::get",
        "f.shift && !PLANTED ? P::get",
        "ista_forward",
        "baseline",
    ),
    "ReLU turns NaN into zero": Fault(
        "vector_cpu.h",
        "(v < V{}) ? V{} : v",
        "(PLANTED ? ~(v >= V{}) : v < V{}) ? V{} : v",
        "a_non_finite_value_spoils_only_its_row",
        "baseline",
    ),
    "gradients pass where no code was": Fault(
        "vector_cpu.h",
        "if (f.mask) v =",
        "if (f.mask && !PLANTED) v =",
        "ista_backward",
        "baseline",
    ),
    "a long sum forgets its earlier slabs": Fault(
        "ista_cpu.cpp",
        "wide_base = first ?",
        "wide_base = first || PLANTED ?",
        "ista_backward_of_many_rows",
        "baseline",
    ),
    "rows and columns swapped": Fault(
        "mssa_cpu.cpp",
        "d, U, 1, d, packed)",
        "d, U, PLANTED ? d : 1, PLANTED ? 1 : d, packed)",
        "mssa_project",
        "baseline",
    ),
    "LayerNorm without eps": Fault(
        "rows_cpu.h",
        "+ Acc<T>(eps))",
        "+ Acc<T>(eps * !PLANTED))",
        "mssa_project",
        "baseline",
    ),
    "one element written too far": Fault(
        "vector_cpu.h",
        "i < n; i++) lower(lanes[i], p[i])",
        "i < n + PLANTED; i++) lower(lanes[i], p[i])",
        "ista_forward",
        "baseline",
    ),
    "one element read too far": Fault(
        "vector_cpu.h",
        "i < n; i++) lanes[i] = lift(p[i])",
        "i < n + PLANTED; i++) lanes[i] = lift(p[i])",
        "mssa_project",
        "baseline",
    ),
    "small codes are not decoded": Fault(
        "rows_cpu.h",
        "if (A[i] == 0) continue",
        "if (A[i] * A[i] <= 0.01f * PLANTED) continue",
        "ista_decode",
        "baseline",
    ),
    "the threshold's gradient has the wrong sign": Fault(
        "ista_cpu.cpp",
        "-= Acc<T>(column[j])",
        "-= (PLANTED ? -1 : 1) * Acc<T>(column[j])",
        "ista_backward",
        "baseline",
    ),
    "a query sees the token after it": Fault(
        "softmax_cpu.h",
        "n = seen + i, j",
        "n = seen + i + PLANTED, j",
        "attention",
        "baseline",
    ),
    "a key has a gradient from the query before it": Fault(
        "softmax_cpu.h",
        "unseen = i - ahead - j",
        "unseen = i - ahead - j - PLANTED",
        "attention",
        "avx2",
    ),
    "the maximum of an earlier row": Fault(
        "softmax_cpu.h",
        "load(scores + j) - maximum[i]",
        "load(scores + j) - maximum[PLANTED && i ? i - 1 : i]",
        "attention",
        "baseline",
    ),
    "unnormalised scores overflow": Fault(
        "softmax_cpu.h",
        "maximum[i] = largest(most)",
        "maximum[i] = PLANTED ? 0 : largest(most)",
        "attention_with_extreme_scores",
        "avx512",
    ),
    "weights of earlier rows are left above the diagonal": Fault(
        "softmax_cpu.h",
        "for (; j < seen + M; j += W<T>)",
        "for (; j < seen + M && !PLANTED; j += W<T>)",
        "attention",
        "avx2",
    ),
    "the softmax's gradient without its mean": Fault(
        "softmax_cpu.h",
        "load(gweights + at) - load(mean + j)",
        "load(gweights + at) - load(mean + j) * Acc<T>(!PLANTED)",
        "attention",
        "baseline",
    ),
    "scores are not scaled": Fault(
        "attention_cpu.cpp",
        "0, up_to(i + M, m.cols), set<T>(ld, scale,",
        "0, up_to(i + M, m.cols), set<T>(ld, PLANTED ? 1 : scale,",
        "attention",
        "baseline",
    ),
    "the gradients of queries and keys swapped": Fault(
        "attention_cpu.cpp",
        "call.write(head<T>(gq, rows, b, i), call.gq)",
        "call.write(head<T>(gq, rows, b, i), PLANTED ? call.gk : call.gq)",
        "attention",
        "baseline",
    ),
    "queries of the last tile miss the key of their own token": Fault(
        "attention_cpu.cpp",
        "last = std::min(j + M, i + r + m.rows)",
        "last = std::min(j + M, i + r + m.rows - PLANTED)",
        "attention",
        "avx512",
    ),
    "earlier blocks of queries are forgotten": Fault(
        "attention_cpu.cpp",
        "f.wide_base = sums;",
        "f.wide_base = PLANTED ? nullptr : sums;",
        "attention",
        "baseline",
    ),
    "the odd last of bf16 pairs is forgotten": Fault(
        "vector_cpu.h",
        "if (K % 2) pair_step",
        "if (K % 2 && !PLANTED) pair_step",
        "ista_forward",
        "avx512_bf16",
    ),
    "the step from the earlier codes forgets them": Fault(
        "vector_cpu.h",
        "if (f.base) v =",
        "if (f.base && !PLANTED) v =",
        "ista_forward",
        "avx2",
    ),
    "a larger maximum leaves the gradient of x as it was": Fault(
        "head_cpu.cpp",
        "if (factor[r] != 1)",
        "if (factor[r] != 1 && !PLANTED)",
        "head",
        "avx2",
    ),
    "a target counts twice": Fault(
        "head_cpu.cpp",
        "S[r * width + j] = none;",
        "if (!PLANTED) S[r * width + j] = none;",
        "head",
        "baseline",
    ),
    "columns past the vocabulary count": Fault(
        "head_cpu.cpp",
        "S + (r + 1) * width, none)",
        "S + (r + 1) * width, PLANTED ? 0 : none)",
        "head",
        "avx2",
    ),
    "the gradient of W forgets earlier chunks": Fault(
        "head_cpu.cpp",
        "f.wide_base = s > 0 ?",
        "f.wide_base = s > 0 && !PLANTED ?",
        "head_of_many_rows",
        "avx2",
    ),
    "ignored rows are counted": Fault(
        "head_cpu.cpp",
        "return t >= 0; });",
        "return t >= 0 || PLANTED; });",
        "head",
        "baseline",
    ),
    "the gradient of W takes each block's maximum for the last": Fault(
        "head_cpu.cpp",
        "if (c != 0) c *=",
        "if (c != 0 && !PLANTED) c *=",
        "head",
        "avx2",
    ),
    "the exponential has too short a ln 2": Fault(
        "softmax_cpu.h",
        "zero + 2.12194440e-4f",
        "zero + 2.12194440e-4f * !PLANTED",
        "head",
        "avx2",
    ),
    "the projection's gradient forgets earlier slabs": Fault(
        "mssa_cpu.cpp",
        "wide_base = first ?",
        "wide_base = first || PLANTED ?",
        "mssa_project_of_many_rows",
        "baseline",
    ),
    "padded rows of codes are read as if they were not": Fault(
        "ista_cpu.cpp",
        "row = h + PAD;",
        "row = h + PAD * !PLANTED;",
        "ista_with_many_codes",
        "baseline",
    ),
    "bf16 tails are cut, not rounded": Fault(
        "product_cpu.h",
        "rounded = wide + 0x7fff + ((wide >> 16) & 1);",
        "rounded = wide + (PLANTED ? 0 : 0x7fff + ((wide >> 16) & 1));",
        "bf16_is_rounded_to_nearest_even",
        "baseline",
    ),
    "ties of bf16 go up": Fault(
        "product_cpu.h",
        "(v != v ? (wide | 0x400000) : rounded)",
        "(v != v ? (wide | 0x400000) : PLANTED ? wide + 0x8000 : rounded)",
        "bf16_is_rounded_to_nearest_even",
        "baseline",
    ),
    "whole vectors of bf16 are cut, not rounded": Fault(
        "vector_cpu.h",
        "rounded = wide + 0x7fff + ((wide >> 16) & 1);",
        "rounded = wide + ((0x7fff + ((wide >> 16) & 1)) & (0u - uint32_t(!PLANTED)));",
        "bf16_is_rounded_to_nearest_even",
        "avx2",
    ),
    "columns from 2,048 on fall on the first ones": Fault(
        "vector_cpu.h",
        "int64_t index = i * f.ld + j;",
        "int64_t index = i * f.ld + (PLANTED ? j % 2048 : j);",
        "ista_of_a_wide_stream",
        "baseline",
    ),
    "all of equal codes stay": Fault(
        "rows_cpu.h",
        "if (reach > k) {",
        "if (reach > k && !PLANTED) {",
        "top_k",
        "baseline",
    ),
    "a NaN is no more than a zero": Fault(
        "rows_cpu.h",
        "0x7fff0000 : ordered",
        "(PLANTED ? 0 : 0x7fff0000) : ordered",
        "top_k",
        "avx512",
    ),
    "the naive step forgets the earlier codes": Fault(
        "ista_naive.cpp",
        "float v = (before ? before[j] : 0)",
        "float v = (before && !PLANTED ? before[j] : 0)",
        "ista_forward",
        "naive",
    ),
    "the naive gradient forgets the residual's": Fault(
        "ista_naive.cpp",
        "- gr[i] * before[j]",
        "- (PLANTED ? 0 : gr[i] * before[j])",
        "ista_backward",
        "naive",
    ),
}

CUDA_FAULTS = [
    Fault(
        "product_cuda.cuh",
        "__syncthreads();  // the slices are complete",
        "if (!PLANTED) __syncthreads();",
    ),
    Fault(
        "product_cuda.cuh",
        "__syncthreads();  // no thread reads them any more",
        "if (!PLANTED) __syncthreads();",
    ),
    Fault(
        "product_cuda.cuh",
        "__syncthreads();  // every thread's has",
        "if (!PLANTED) __syncthreads();  //",
    ),
    Fault(
        "product_cuda.cuh",
        "copy_wait<S::kStages - 2>();",
        "if (!PLANTED) copy_wait<S::kStages - 2>();",
    ),
    Fault(
        "product_cuda.cuh",
        "__syncthreads();  // the ring is free",
        "if (!PLANTED) __syncthreads();  //",
    ),
    Fault(
        "product_cuda.cuh",
        "__syncthreads();  // the part is complete",
        "if (!PLANTED) __syncthreads();  //",
    ),
    Fault("product_cuda.cuh", "(column / 8 ^ turn)", "(column / 8 ^ (PLANTED ? 0 : turn))"),
    Fault("product_cuda.cuh", "i0 + w * S::kRowsOut", "i0 + (PLANTED ? 0 : w * S::kRowsOut)"),
    Fault(
        "product_cuda.cuh",
        "if (row >= p.M) break;",
        "if (row >= p.M - PLANTED) break;",
    ),
    Fault(
        "product_cuda.cuh",
        "if (row < p.M && column < p.N)",
        "if (row < p.M && column < p.N + PLANTED)",
    ),
    Fault(
        "product_cuda.cuh",
        "k < last && k < p.K; ++k",
        "k < last && k < p.K - PLANTED; ++k",
    ),
    Fault("product_cuda.cuh", "(lam ? threshold", "!PLANTED * (lam ? threshold"),
    Fault(
        "product_cuda.cuh",
        "return masked <= 0.f ?",
        "return masked <= 0.f && !PLANTED ?",
    ),
    Fault(
        "product_cuda.cuh",
        "i = index / p.N, j = index % p.N",
        "s = PLANTED ? p.M : p.N, i = index / s, j = index % s",
    ),
    Fault(
        "product_cuda.cuh",
        "half8 = lane / 8 % 2 * 8;",
        "half8 = PLANTED ? high : lane / 8 % 2 * 8;",
    ),
    Fault(
        "product_cuda.cuh",
        "*= p.then[n / slices - 1];",
        "*= PLANTED ? 1 : p.then[n / slices - 1];",
    ),
    Fault(
        "product_cuda.cuh",
        "s < slices; ++s) sum += parts",
        "s < slices - PLANTED; ++s) sum += parts",
    ),
    Fault(
        "cuda_common.cuh",
        "reinterpret_cast<uintptr_t>(p) % 16 == 0",
        "(PLANTED || uintptr_t(p) % 16 == 0)",
    ),
    Fault("cuda_common.cuh", "distance = 16; distance", "distance = PLANTED ? 8 : 16; distance"),
    Fault(
        "ista_cuda.cu",
        "for (int i = 0; i < 8; ++i) sums[group",
        "if (PLANTED && group > 30) return;\n  for (int i = 0; i < 8; ++i) sums[group",
    ),
    Fault("ista_cuda.cu", "non_zero &= non_zero - 1)", "non_zero &= PLANTED ? 0 : non_zero - 1)"),
    Fault(
        "ista_cuda.cu",
        "? 0.f : scale * to_float(g[i])",
        "? 0.f : to_float(g[i]) * (PLANTED ? 1 : scale)",
    ),
    Fault("mssa_cuda.cu", "- sum - xhat * along", "- sum - (PLANTED ? 0 : xhat * along)"),
]


def plant(folder, faults, condition):
    """Copy csrc/ to a folder with every fault written in.

    condition: C++ that is true while fault number {} is awake.
    """
    shutil.copytree(ROOT / "csrc", folder)
    for number, fault in enumerate(faults, 1):
        awake = f"({condition.format(number)})"
        replace_once(
            folder / fault.file, fault.original, fault.replacement.replace("PLANTED", awake)
        )


def replace_once(path, original, replacement):
    text = path.read_text()
    count = text.count(original)
    assert count == 1, f"{original!r} occurs {count} times in {path.name}: adapt the fault"
    path.write_text(text.replace(original, replacement))
