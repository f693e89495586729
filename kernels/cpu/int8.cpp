// Around a product of int8 matrices (minift/ops/int8.py): rows of floats to int8, and int32 sums to floats. And the product
// itself, for CPUs without VNNI, where torch._int_mm is slow or not exact.
//
//     x = x f        a = max |x| over what is not kept apart        codes = round(127 x / a)
//     y = sums (a / 127) s + bias + sum over the channels k kept apart of x_k w_k
//
// Kept apart are elements more than KEEP times as large as the row's mean, the first `most` of them. A row is worked on
// by itself and channels come in their order, so threads and other rows change nothing.

#include "int8.h"

#include "common.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

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

// ---- the product: of int8 as pairs of int16 along the channels, for which AVX2 has an instruction

const int64_t ROWS = 4, OUTPUTS = 16;   // of a tile, whose sums the registers hold
const int64_t DEPTH = 256;              // pairs of a tile's rows and outputs, which the L1 cache holds
const int64_t HEIGHT = 96, WIDTH = 64;  // rows that the L2 cache holds, while they meet so many outputs

// Two neighbours, the first of them low.
inline int32_t pair(int8_t first, int8_t second) {
    return int32_t(uint32_t(uint16_t(int16_t(first))) | uint32_t(uint16_t(int16_t(second))) << 16);
}

// Pairs [begin, end) of `rows` rows of C channels, as (pairs, lanes); lanes without a row and the last of an odd C are 0.
template <int64_t lanes>
void pair_rows(const int8_t* x, int64_t rows, int64_t C, int64_t begin, int64_t end, int32_t* pairs) {
    for (int64_t r = 0; r < lanes; r++) {
        const int8_t* row = x + r * C;
        const int64_t whole = r < rows ? (C / 2 < end ? C / 2 : end) : begin;
        for (int64_t p = begin; p < whole; p++) pairs[(p - begin) * lanes + r] = pair(row[2 * p], row[2 * p + 1]);
        for (int64_t p = whole; p < end; p++) pairs[(p - begin) * lanes + r] = r < rows ? pair(row[2 * p], 0) : 0;
    }
}

// The same of a matrix (C, O), for its columns from `w` on, `outputs` of them.
void pair_columns(const int8_t* w, int64_t outputs, int64_t C, int64_t O, int64_t begin, int64_t end, int32_t* pairs) {
    const int8_t zeros[OUTPUTS] = {};
    for (int64_t p = begin; p < end; p++, pairs += OUTPUTS) {
        const int8_t *first = w + 2 * p * O, *second = 2 * p + 1 < C ? first + O : zeros;
        for (int64_t o = 0; o < outputs; o++) pairs[o] = pair(first[o], second[o]);
        for (int64_t o = outputs; o < OUTPUTS; o++) pairs[o] = 0;
    }
}

// sums (ROWS, OUTPUTS) of x (n, ROWS) and w (n, OUTPUTS), pairs. `stride`: from one row of sums to the next.
void tile(const int32_t* x, const int32_t* w, int64_t n, int32_t* sums, int64_t stride, bool add) {
#ifdef __AVX2__
    __m256i sum[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t p = 0; p < n; p++) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + p * OUTPUTS));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + p * OUTPUTS + 8));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const __m256i both = _mm256_set1_epi32(x[p * ROWS + r]);
            sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(both, low));
            sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(both, high));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            auto to = reinterpret_cast<__m256i*>(sums + r * stride + 8 * half);
            _mm256_storeu_si256(to, add ? _mm256_add_epi32(_mm256_loadu_si256(to), sum[r][half]) : sum[r][half]);
        }
#else
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t o = 0; o < OUTPUTS; o++) {
            int32_t sum = add ? sums[r * stride + o] : 0;
            for (int64_t p = 0; p < n; p++) {
                const int32_t a = x[p * ROWS + r], b = w[p * OUTPUTS + o];
                sum += int32_t(int16_t(a)) * int16_t(b) + (a >> 16) * (b >> 16);
            }
            sums[r * stride + o] = sum;
        }
#endif
}

// Outputs [o, o + WIDTH) of all rows.
void multiply_outputs(const Multiply& a, int64_t o) {
    const int64_t pairs = (a.C + 1) / 2, last = o + WIDTH < a.O ? o + WIDTH : a.O;
    alignas(64) int32_t right[WIDTH * DEPTH];
    for (int64_t p = 0; p < pairs; p += DEPTH) {
        const int64_t n = pairs - p < DEPTH ? pairs - p : DEPTH;
        for (int64_t t = o; t < last; t += OUTPUTS) {
            const int64_t outputs = last - t < OUTPUTS ? last - t : OUTPUTS;
            int32_t* to = right + (t - o) * n;
            if (a.by_outputs) pair_rows<OUTPUTS>(a.w + t * a.C, outputs, a.C, p, p + n, to);
            else pair_columns(a.w + t, outputs, a.C, a.O, p, p + n, to);
        }
        for (int64_t top = 0; top < a.N; top += HEIGHT) {
            const int64_t bottom = top + HEIGHT < a.N ? top + HEIGHT : a.N;
            for (int64_t t = o; t < last; t += OUTPUTS)
                for (int64_t row = top; row < bottom; row += ROWS) {
                    const int32_t *left = a.pairs + row * pairs + p * ROWS, *w = right + (t - o) * n;
                    int32_t* to = a.sums + row * a.O + t;
                    const int64_t rows = bottom - row, outputs = last - t;
                    if (rows >= ROWS && outputs >= OUTPUTS) {
                        tile(left, w, n, to, a.O, p > 0);
                        continue;
                    }
                    int32_t edge[ROWS * OUTPUTS];
                    tile(left, w, n, edge, OUTPUTS, false);
                    for (int64_t r = 0; r < ROWS && r < rows; r++)
                        for (int64_t i = 0; i < OUTPUTS && i < outputs; i++)
                            to[r * a.O + i] = edge[r * OUTPUTS + i] + (p > 0 ? to[r * a.O + i] : 0);
                }
        }
    }
}

}  // namespace

extern "C" void multiply(const Multiply* a) {
    const int64_t pairs = (a->C + 1) / 2;
    parallel((a->N + ROWS - 1) / ROWS, at_least_1(GRAIN / at_least_1(a->C * ROWS)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * ROWS; row < end * ROWS; row += ROWS)
            pair_rows<ROWS>(a->x + row * a->C, a->N - row, a->C, 0, pairs, a->pairs + row * pairs);
    });
    parallel((a->O + WIDTH - 1) / WIDTH, at_least_1(GRAIN / at_least_1(a->C * a->N)), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++) multiply_outputs(*a, block * WIDTH);
    });
}

extern "C" void quantize_rows(const QuantizeRows* a) {
    if (a->dtype == FLOAT32) quantize_all<float>(*a);
    else quantize_all<bf16>(*a);
}

extern "C" void from_sums(const FromSums* a) {
    if (a->dtype == FLOAT32) from_sums_all<float>(*a);
    else from_sums_all<bf16>(*a);
}
