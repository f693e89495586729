// Four bits a weight, there and back (minift/ops/nf4.py), to the bit what the reference there gives. n weights.
//
//     a = max |w|        c = the level nearest to w / a        w ~ levels[c] * a             in blocks of 64
//     a ~ second[d] * b + m                                    double quantisation           in blocks of 256 of a
//
// A group is what shares one b: 16,384 weights. The tables come from Python, for there should be one of each. A byte
// holds two codes, so two levels are copied at once, by a table of 256 pairs: as fast as permutations of a vector that
// holds the 16 levels, and on any CPU.

#include "nf4.h"

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

template <class T>
void expand_all(const Dequantize& a) {
    auto out = static_cast<T*>(a.out);
    const int64_t n = a.n;
    parallel((n + GROUP - 1) / GROUP, 2, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; g++) {
            float product[NESTED];  // tabled, so that no compiler can make one rounding of product and sum
            for (int64_t i = 0; !a.absmax && i < NESTED; i++) product[i] = a.second[i] * a.b[g];
            for (int64_t i = g * GROUP; i < n && i < (g + 1) * GROUP; i += BLOCK) {
                const float scale = a.absmax ? a.absmax[i / BLOCK] : product[a.d[i / BLOCK]] + *a.m;
                expand(a.codes + i / 2, a.pairs, scale, out + i, n - i < BLOCK ? n - i : BLOCK);
            }
        }
    });
}

template <class T>
void pack_all(const Quantize& a) {
    auto w = static_cast<const T*>(a.w);
    const float* middles = a.middles;
    uint8_t* codes = a.codes;
    float* absmax = a.absmax;
    const int64_t n = a.n;
    parallel((n + BLOCK - 1) / BLOCK, GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t at = i * BLOCK, size = n - at < BLOCK ? n - at : BLOCK;
            absmax[i] = pack(w + at, middles, codes + at / 2, size);
        }
    });
}

}  // namespace

extern "C" void dequantize(const Dequantize* a) {
    if (a->dtype == FLOAT32) expand_all<float>(*a);
    else expand_all<bf16>(*a);
}

extern "C" void quantize(const Quantize* a) {
    if (a->dtype == FLOAT32) pack_all<float>(*a);
    else pack_all<bf16>(*a);
}
