// Hashed dropout, forward and backward alike (minift/ops/dropout.py). N tokens, C channels. A warp takes a row.
//
//     y[i, c] = x[i, c] / (1 - p)  if kept(row[i], col[c])  else 0

#include "common.cuh"

// x, y (N, C), row (N,), col (C,)
// blocks: N / 8
extern "C" __global__ void dropout(const void* x, void* y, const int32_t* row, const int32_t* col, int64_t threshold,
                                   float scale, int64_t N, int64_t C, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        auto from = static_cast<decltype(null)>(const_cast<void*>(x)), to = static_cast<decltype(null)>(y);
        wide(C % 4 == 0 && aligned(from, to, col), [&](auto width) {
            constexpr int W = decltype(width)::value;
            for (int64_t i = thread() / WARP; i < N; i += threads() / WARP) {
                const int32_t word = row[i];
                for (int64_t c = lane() * W; c < C; c += WARP * W) {
                    auto v = load<W>(from + i * C + c);
                    const auto words = fetch<W>(col + c);
                    for (int k = 0; k < W; k++) v.at[k] *= kept(word, words.at[k], int32_t(threshold), scale);
                    store<W>(to + i * C + c, v);
                }
            }
        });
    });
}

// y = mix(x ^ salt), both (n,): the words of rows, and, where x is null and i GOLDEN stands for it, of columns.
// base (1,): the step's word, of which mix(base + salt) is the salt; or null
// blocks: n / 256
extern "C" __global__ void mix_words(const int32_t* x, int32_t* y, const int32_t* base, int64_t salt, int64_t n) {
    const uint32_t k = base ? mix(uint32_t(*base) + uint32_t(salt)) : uint32_t(salt);
    for (int64_t i = thread(); i < n; i += threads())
        y[i] = int32_t(mix((x ? uint32_t(x[i]) : uint32_t(i) * GOLDEN) ^ k));
}
