// The k largest codes of each token; the work on a row is keep_largest in rows_cpu.h.
#include "kernels.h"
#include "product_cpu.h"

namespace crate_mini {

void top_k_cpu(int dtype, int64_t N, int64_t h, int64_t k, const void* a, const void* values,
               void* out, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Isa<T>& m = isa<T>();
    auto *codes = static_cast<const T*>(a), *kept = static_cast<const T*>(values ? values : a);
    auto* to = static_cast<T*>(out);
    int64_t* room = scratch<int64_t>(KEYS, threads * h);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < N; i++)
      m.keep_largest(h, k, codes + i * h, kept + i * h, to + i * h, room + thread_number() * h);
  });
}

}  // namespace crate_mini
