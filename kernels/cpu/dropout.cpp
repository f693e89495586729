// Hashed dropout, forward and backward alike (minift/ops/dropout.py). N tokens, C channels.
//
//     y[i, c] = x[i, c] / (1 - p)  if kept(row[i], col[c])  else 0

#include "dropout.h"

#include "common.h"

namespace {

template <class T>
void all_rows(const Dropout& a) {
    auto x = static_cast<const T*>(a.x);
    auto y = static_cast<T*>(a.y);
    const int64_t C = a.C;
    parallel(a.N, at_least_1(GRAIN / at_least_1(C)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) drop_row(x + i * C, y + i * C, i, a.drop, C);
    });
}

}  // namespace

extern "C" void dropout(const Dropout* a) {
    if (a->dtype == FLOAT32) all_rows<float>(*a);
    else all_rows<bf16>(*a);
}

// y = mix(x ^ salt): the words of rows or, without x, of channels.
extern "C" void mix_words(const Words* a) {
    const int32_t* x = a->x;
    int32_t* y = a->y;
    const uint32_t salt = uint32_t(a->salt), k = a->seed_word ? mix(uint32_t(*a->seed_word) + salt) : salt;
    const int64_t n = a->n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        y[i] = int32_t(mix((x ? uint32_t(x[i]) : uint32_t(i) * GOLDEN) ^ k));
}
