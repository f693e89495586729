// Hashed dropout, forward and backward alike (minift/ops/dropout.py). N tokens, C channels.
//
//     y[i, c] = x[i, c] / (1 - p)  if kept(row[i], col[c])  else 0

#include "common.h"

namespace {

template <class T>
void dropout_row(const T* x, T* y, int32_t row, const int32_t* col, int64_t C, int32_t threshold, float scale) {
#pragma omp simd
    for (int64_t c = 0; c < C; c++) store(y + c, load(x + c) * kept(row, col[c], threshold, scale));
}

}  // namespace

// x, y (N, C), row (N,), col (C,)
extern "C" void dropout(const void* x, void* y, const int32_t* row, const int32_t* col, int64_t threshold, float scale,
                        int64_t N, int64_t C, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        auto from = static_cast<decltype(null)>(const_cast<void*>(x)), to = static_cast<decltype(null)>(y);
        parallel(N, at_least_1(GRAIN / at_least_1(C)), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++)
                dropout_row(from + i * C, to + i * C, row[i], col, C, int32_t(threshold), scale);
        });
    });
}

// y = mix(x ^ salt), both (n,): the words of rows, and, where x is null and i GOLDEN stands for it, of columns.
// base (1,): the step's word, of which mix(base + salt) is the salt; or null
extern "C" void mix_words(const int32_t* x, int32_t* y, const int32_t* base, int64_t salt, int64_t n) {
    const uint32_t k = base ? mix(uint32_t(*base) + uint32_t(salt)) : uint32_t(salt);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        y[i] = int32_t(mix((x ? uint32_t(x[i]) : uint32_t(i) * GOLDEN) ^ k));
}
