// Vectors, and products of small matrices with float sums: what attention.cpp is made of.
//
// A vector is what one register of the CPU holds, written with the vector types that GCC and Clang share.
// Matrices lie row by row; lda, ldb, ldc are the distances between their rows. Their numbers are float or, where the CPU
// has AVX512-BF16, pairs of bf16 in a word: HAS_PAIRS is defined then, and with -DPAIRS_BY_LOOPS, for tests.
#pragma once

#include "common.h"

#if defined(PAIRS_BY_LOOPS) || defined(__AVX512BF16__)
#define HAS_PAIRS
#endif

#if defined(__AVX512BF16__) && !defined(PAIRS_BY_LOOPS)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
const int LANES = 16, ROWS = 8;  // floats in a vector; rows of the block of a product that the registers hold
#elif defined(__AVX__)
const int LANES = 8, ROWS = 6;
#else
const int LANES = 4, ROWS = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// The vector that begins here. No template: GCC drops `aligned(4)` from a template's argument. No reference: Clang takes
// it to be aligned as a whole vector where a function returns one.
inline Vec* at(float* x) { return reinterpret_cast<Vec*>(x); }
inline const Vec* at(const float* x) { return reinterpret_cast<const Vec*>(x); }
inline const Ints* at(const int32_t* x) { return reinterpret_cast<const Ints*>(x); }
inline Words* at(uint32_t* x) { return reinterpret_cast<Words*>(x); }
inline const Words* at(const uint32_t* x) { return reinterpret_cast<const Words*>(x); }

// x where the mask is set, else 0.
inline Vec where(Ints mask, Vec x) { return (Vec)(mask & (Ints)x); }

// common.h's exp_ of every lane.
inline Vec exp_(Vec x) {
    const float MAGIC = 12582912.0f + 191.0f;
    x = -104.0f > x ? Vec{} - 104.0f : x;
    const Vec shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
    const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = r * 1.9875691e-4f + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 5.0000000e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Vec)((Ints)shifted << 23) * 5.42101086e-20f;
}

// ---- bf16 in words

// x rounded to bf16, to nearest, ties to even, in the low half of each word.
inline Words rounded(Vec x) {
    const Words u = (Words)x;
    return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}

// pairs (n / 2 x m) of the float rows x (n x m), m in whole vectors; n rows are read, and zeros stand for those up to `all`.
inline void pair_floats(const float* x, int64_t n, int64_t all, int64_t m, uint32_t* pairs) {
    for (int64_t i = 0; i < all; i += 2, pairs += m)
        for (int64_t j = 0; j < m; j += LANES) {
            const Words low = i < n ? rounded(*at(x + i * m + j)) : Words{};
            const Words high = i + 1 < n ? rounded(*at(x + (i + 1) * m + j)) : Words{};
            *at(pairs + j) = low | high << 16;
        }
}

// The float rows x (n x m) in bf16, and zeros up to the row `all`.
inline void round_floats(const float* x, int64_t n, int64_t all, int64_t m, bf16* y) {
#pragma omp simd
    for (int64_t i = 0; i < n * m; i++) store(y + i, x[i]);
    for (int64_t i = n * m; i < all * m; i++) y[i].bits = 0;
}

// pairs (n / 2 x m) of the rows x (n x m).
inline void pair_rows(const bf16* x, int64_t n, int64_t m, uint32_t* pairs) {
    for (int64_t i = 0; i < n; i += 2, pairs += m)
#pragma omp simd
        for (int64_t j = 0; j < m; j++) pairs[j] = x[i * m + j].bits | uint32_t(x[(i + 1) * m + j].bits) << 16;
}

// ---- products

// The vector of such numbers.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef Vec type;
};
template <>
struct VectorOf<uint32_t> {
    typedef Words type;
};

inline Vec multiply_add(Vec sum, float left, Vec right) { return sum + left * right; }

#ifdef HAS_PAIRS
// Both numbers of a word with both of another.
inline Vec multiply_add(Vec sum, uint32_t left, Words right) {
#ifdef PAIRS_BY_LOOPS
    const Vec low = (Vec)(right << 16), high = (Vec)(right & 0xFFFF0000u);
    return sum + from_bits(left & 0xFFFF0000u) * high + from_bits(left << 16) * low;
#else
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Words{} + left), (__m512bh)right);
#endif
}
#endif

// C (R x W vectors) = or += A (R x n) B (n x W vectors), in registers. TURNED: A lies n x R. T: float, or words of pairs.
template <int R, int W, bool TURNED, class T>
inline void block(int64_t n, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    Vec sum[R][W];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) sum[r][w] = Vec{};
    for (int64_t i = 0; i < n; i++) {
        typename VectorOf<T>::type right[W];
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) right[w] = *at(b + i * ldb + w * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            T left;
            __builtin_memcpy(&left, TURNED ? a + i * lda + r : a + r * lda + i, sizeof left);  // a word of two bf16, maybe
#pragma GCC unroll 2
            for (int w = 0; w < W; w++) sum[r][w] = multiply_add(sum[r][w], left, right[w]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) {
            Vec& to = *at(c + r * ldc + w * LANES);
            to = add ? to + sum[r][w] : sum[r][w];
        }
}

// The last m <= R rows.
template <int R, int W, bool TURNED, class... Rest>
inline void remainder(int64_t m, Rest... rest) {
    if (m == R) return block<R, W, TURNED>(rest...);
    if constexpr (R > 1) remainder<R - 1, W, TURNED>(m, rest...);
}

// m rows of W vectors.
template <int W, bool TURNED, class T>
void panel(int64_t m, int64_t n, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    const int64_t step = TURNED ? 1 : lda;
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS) block<ROWS, W, TURNED>(n, a + i * step, lda, b, ldb, c + i * ldc, ldc, add);
    remainder<ROWS - 1, W, TURNED>(m - i, n, a + i * step, lda, b, ldb, c + i * ldc, ldc, add);
}

// C (m x columns) = or += A (m x n) B (n x columns); columns are rounded up to vectors.
template <bool TURNED, class T>
void product(int64_t m, int64_t columns, int64_t n, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
    int64_t j = 0;
    for (; j + LANES < columns; j += 2 * LANES) panel<2, TURNED>(m, n, a, lda, b + j, ldb, c + j, ldc, add);
    if (j < columns) panel<1, TURNED>(m, n, a, lda, b + j, ldb, c + j, ldc, add);
}

// The named lanes of a and, counted on, b.
inline Vec pick(Vec a, Vec b, Ints lanes) {
#ifdef __clang__
    Vec x;
    for (int l = 0; l < LANES; l++) x[l] = lanes[l] < LANES ? a[lanes[l]] : b[lanes[l] - LANES];
    return x;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
}

// The square's rows become its columns: at each step a row and the one `bit` below it swap half their lanes.
inline void turn(Vec* t) {
#pragma GCC unroll 4
    for (int bit = 1; bit < LANES; bit *= 2) {
        Ints low{}, high{};
        for (int l = 0; l < LANES; l++) low[l] = l & bit ? LANES + l - bit : l, high[l] = low[l] + bit;
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++)
            if (!(r & bit)) {
                const Vec a = t[r], b = t[r + bit];
                t[r] = pick(a, b, low), t[r + bit] = pick(a, b, high);
            }
    }
}

// y (n x ldy) = x^T, x (m x n); n in whole vectors, m is rounded up to them.
inline void transpose(int64_t m, int64_t n, const float* x, float* y, int64_t ldy) {
    for (int64_t i = 0; i < m; i += LANES)
        for (int64_t j = 0; j < n; j += LANES) {
            Vec t[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) t[r] = i + r < m ? *at(x + (i + r) * n + j) : Vec{};
            turn(t);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) *at(y + (j + r) * ldy + i) = t[r];
        }
}

// C (m x columns) = A B^T, A (m x n), B (columns x n), n in whole vectors: so few columns that `product` would idle.
inline void dots(int64_t m, int64_t columns, int64_t n, const float* a, const float* b, float* c, int64_t ldc) {
    for (int64_t i = 0; i < m; i += LANES)
        for (int64_t j = 0; j < columns; j++) {
            Vec t[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                t[r] = Vec{};
                for (int64_t d = 0; i + r < m && d < n; d += LANES)
                    t[r] += *at(a + (i + r) * n + d) * *at(b + j * n + d);
            }
            turn(t);
            for (int r = 1; r < LANES; r++) t[0] += t[r];
            for (int r = 0; r < LANES && i + r < m; r++) c[(i + r) * ldc + j] = t[0][r];
        }
}

}  // namespace
