// Around a product of int8 matrices (minift/ops/int8.py): rows of floats to int8, and int32 sums to floats.
//
//     x = x f        a = max |x| over what is not kept apart        codes = round(127 x / a)
//     y = sums (a / 127) s + bias + sum over the channels k kept apart of x_k w_k
//
// Kept apart are elements more than KEEP times as large as the row's mean, the first `most` of them. A row is worked on
// by itself and channels come in their order, so threads and other rows change nothing.

#include "int8.h"

#include "common.h"

namespace {

const float KEEP = 16;
const int64_t BLOCK = 256;

// To the nearest integer, ties to even. Not by adding 1.5 * 2^23, which a compiler may fuse with the product before.
inline int32_t rounded(float x) { return int32_t(__builtin_rintf(x)); }

// An element as it is quantised.
template <bool scaled, class T>
inline float element(const T* x, const float* factors, int64_t c) {
    return scaled ? load(x + c) * factors[c] : load(x + c);
}

inline float size_of(float x) { return x < 0 ? -x : x; }

template <bool scaled, class T>
void quantize_row(const T* x, const QuantizeRows& a, int64_t n) {
    const float* factors = a.factors;
    const int64_t C = a.C;
    int8_t* codes = a.codes + n * C;
    float total = 0, high = 0;
#pragma omp simd reduction(+ : total) reduction(max : high)
    for (int64_t c = 0; c < C; c++) {
        const float size = size_of(element<scaled>(x, factors, c));
        total += size;
        high = size > high ? size : high;
    }

    // channels far above the rest would leave no digits to the others
    const float limit = KEEP * total / float(C);
    int64_t count = 0;
    if (high > limit) {
        high = 0;
        for (int64_t c = 0; c < C; c++) {
            const float value = element<scaled>(x, factors, c), size = size_of(value);
            if (size > limit && count < a.most) {
                a.columns[n * a.most + count] = int32_t(c);
                a.values[n * a.most + count] = value;
                count++;
            } else {
                high = size > high ? size : high;
            }
        }
    }
    a.counts[n] = int32_t(count);
    a.absmax[n] = high + (total - total);  // NaN where the row has an inf or NaN, which codes cannot hold
    if (total - total != 0) {
        std::memset(codes, 0, C);
        return;
    }
    const float inverse = high > 0 ? 127 / high : 0;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) codes[c] = int8_t(rounded(element<scaled>(x, factors, c) * inverse));
    for (int64_t k = 0; k < count; k++) codes[a.columns[n * a.most + k]] = 0;
}

template <class T>
void quantize_all(const QuantizeRows& a) {
    auto x = static_cast<const T*>(a.x);
    parallel(a.N, at_least_1(GRAIN / at_least_1(a.C)), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) {
            if (a.factors) quantize_row<true>(x + n * a.C, a, n);
            else quantize_row<false>(x + n * a.C, a, n);
        }
    });
}

// m <= BLOCK outputs of row n, from o on.
template <class T>
void from_sums_block(const FromSums& a, int64_t n, int64_t o, int64_t m, T* y) {
    const int32_t* sums = a.sums + n * a.O + o;
    const float scale = a.absmax[n] / 127;
    float out[BLOCK];
    if (a.scales) {
#pragma omp simd
        for (int64_t i = 0; i < m; i++) out[i] = float(sums[i]) * (scale * a.scales[o + i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < m; i++) out[i] = float(sums[i]) * scale;
    }
    const int64_t count = a.counts ? a.counts[n] : 0;
    for (int64_t k = n * a.most; k < n * a.most + count; k++) {
        const float value = a.values[k];
        const float* weights = a.weights + a.places[a.columns[k]] * a.O + o;
#pragma omp simd
        for (int64_t i = 0; i < m; i++) out[i] += value * weights[i];
    }
    if (a.bias) {
#pragma omp simd
        for (int64_t i = 0; i < m; i++) out[i] += a.bias[o + i];
    }
#pragma omp simd
    for (int64_t i = 0; i < m; i++) store(y + n * a.O + o + i, out[i]);
}

template <class T>
void from_sums_all(const FromSums& a) {
    auto y = static_cast<T*>(a.y);
    parallel(a.N, at_least_1(GRAIN / at_least_1(a.O)), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++)
            for (int64_t o = 0; o < a.O; o += BLOCK) from_sums_block(a, n, o, a.O - o < BLOCK ? a.O - o : BLOCK, y);
    });
}

}  // namespace

extern "C" void quantize_rows(const QuantizeRows* a) {
    if (a->dtype == FLOAT32) quantize_all<float>(*a);
    else quantize_all<bf16>(*a);
}

extern "C" void from_sums(const FromSums* a) {
    if (a->dtype == FLOAT32) from_sums_all<float>(*a);
    else from_sums_all<bf16>(*a);
}
