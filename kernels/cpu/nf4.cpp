// Four bits a weight, there and back (minift/ops/nf4.py), to the bit what the reference there gives. n weights.
//
//     a = max |w|        c = the level nearest to w / a        w ~ levels[c] * a             in blocks of 64
//     a ~ second[d] * b + m                                    double quantisation           in blocks of 256 of a
//
// A group is what shares one b: 16,384 weights. The tables come from Python, for there should be one of each. A byte
// holds two codes, so two levels are copied at once, by a table of 256 pairs: as fast as permutations of a vector that
// holds the 16 levels, and on any CPU.

#include "common.h"

namespace {

const int64_t BLOCK = 64, NESTED = 256, GROUP = BLOCK * NESTED;

// n <= 64 weights of one block. pairs (256, 2).
template <class T>
void expand(const uint8_t* codes, const float* pairs, float a, T* out, int64_t n) {
    if (n < BLOCK) {
        for (int64_t i = 0; i < n; i++) store(out + i, pairs[2 * codes[i / 2] + i % 2] * a);
        return;
    }
    float level[BLOCK];
    for (int64_t i = 0; i < BLOCK; i += 2) std::memcpy(level + i, pairs + 2 * codes[i / 2], 2 * sizeof(float));
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; i++) store(out + i, level[i] * a);
}

// The codes of n <= 64 weights; returns a. middles (15,): between the levels.
template <class T>
float pack(const T* w, const float* middles, uint8_t* codes, int64_t n) {
    uint8_t code[BLOCK];
    uint32_t most = 0;  // |w| as bits has the order of |w|, with NaN above all
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) {
        const uint32_t size = to_bits(load(w + i)) & 0x7FFFFFFF;
        most = size > most ? size : most;
    }
    const float a = from_bits(most), least = a < 1e-38f ? 1e-38f : a, inverse = 1 / least;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float x = n == BLOCK ? load(w + i) * inverse : load(w + i) / least;  // bitsandbytes divides in a last block
        int32_t c = 0;
        for (int64_t k = 0; k < 15; k++) c += !(x <= middles[k]);
        code[i] = uint8_t(c);
    }
    if (n % 2) code[n] = 7;  // level 7 is 0
    for (int64_t i = 0; i < n; i += 2) codes[i / 2] = uint8_t(code[i] << 4 | code[i + 1]);
    return n == BLOCK ? a : least;
}

}  // namespace

// codes (ceil(n / 2),), out (n,). The scales a: `absmax` (ceil(n / 64),) float, or, where that is null, from d
// (ceil(n / 64),), b (ceil(n / 16384),), m (1,) and second (256,).
extern "C" void dequantize(const void* codes, const float* pairs, const float* absmax, const void* d, const float* b,
                           const float* m, const float* second, void* out, int64_t n, int64_t dtype) {
    auto bytes = static_cast<const uint8_t*>(codes), ds = static_cast<const uint8_t*>(d);
    typed(dtype, [&](auto* null) {
        auto to = static_cast<decltype(null)>(out);
        parallel((n + GROUP - 1) / GROUP, 2, [&](int64_t begin, int64_t end) {
            for (int64_t g = begin; g < end; g++) {
                float product[NESTED];  // tabled, so that no compiler can make one rounding of product and sum
                for (int64_t i = 0; !absmax && i < NESTED; i++) product[i] = second[i] * b[g];
                for (int64_t i = g * GROUP; i < n && i < (g + 1) * GROUP; i += BLOCK) {
                    const float a = absmax ? absmax[i / BLOCK] : product[ds[i / BLOCK]] + *m;
                    expand(bytes + i / 2, pairs, a, to + i, n - i < BLOCK ? n - i : BLOCK);
                }
            }
        });
    });
}

// w (n,), codes (ceil(n / 2),), absmax (ceil(n / 64),), middles (15,)
extern "C" void quantize(const void* w, const float* middles, void* codes, float* absmax, int64_t n, int64_t dtype) {
    auto bytes = static_cast<uint8_t*>(codes);
    typed(dtype, [&](auto* null) {
        auto from = static_cast<decltype(null)>(const_cast<void*>(w));
        parallel((n + BLOCK - 1) / BLOCK, GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t at = i * BLOCK, size = n - at < BLOCK ? n - at : BLOCK;
                absmax[i] = pack(from + at, middles, bytes + at / 2, size);
            }
        });
    });
}
