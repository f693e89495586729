// Hashed dropout, forward and backward alike (minift/ops/dropout.py). N tokens, C channels. A warp takes a row.
//
//     y[i, c] = x[i, c] / (1 - p)  if kept(row[i], col[c])  else 0

#include "common.cuh"
#include "dropout.h"

namespace {

template <class T>
__device__ void all_rows(const Dropout& a) {
    auto x = static_cast<const T*>(a.x);
    auto y = static_cast<T*>(a.y);
    const int64_t C = a.C;
    wide(C % 4 == 0 && aligned(x, y, a.drop.col), [&](auto width) {
        constexpr int W = decltype(width)::value;
        for (int64_t i = thread() / WARP; i < a.N; i += threads() / WARP) {
            const int32_t word = a.drop.row[i];
            for (int64_t c = lane() * W; c < C; c += WARP * W) {
                auto v = load<W>(x + i * C + c);
                const auto words = fetch<W>(a.drop.col + c);
                for (int k = 0; k < W; k++) v.at[k] *= kept(word, words.at[k], a.drop.threshold, a.drop.scale);
                store<W>(y + i * C + c, v);
            }
        }
    });
}

}  // namespace

// blocks: N / 8
extern "C" __global__ void dropout(Dropout a) {
    if (a.dtype == FLOAT32) all_rows<float>(a);
    else if (a.dtype == BFLOAT16) all_rows<bf16>(a);
    else all_rows<fp16>(a);
}

// y = mix(x ^ salt): the words of rows or, without x, of channels.
// blocks: n / 256
extern "C" __global__ void mix_words(Words a) {
    const uint32_t salt = uint32_t(a.salt), k = a.seed_word ? mix(uint32_t(*a.seed_word) + salt) : salt;
    for (int64_t i = thread(); i < a.n; i += threads())
        a.y[i] = int32_t(mix((a.x ? uint32_t(a.x[i]) : uint32_t(i) * GOLDEN) ^ k));
}
