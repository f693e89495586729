// The low-rank products beside a frozen layer, with dropout on their way (minift/ops/lora.py). drop(x) is never a matrix.
//
//     h = drop(x) A^T        dA = g^T drop(x)        dx += drop'(g A)
//
// N tokens, C width of x, R rank. A tile of drop(x) is made in the cache, used, and forgotten. Inside
// all is float. A piece of work is a block of rows forward, a strip of columns backward, where the rows follow in their
// order: nothing depends on the number of threads.

#include "lora.h"

#include "products.h"

namespace {

const int64_t TOKENS = 8, PAIR = 2, COLS = 256;    // forward: rows and ranks of a block in registers; columns of a tile
const int64_t STRIP_TOKENS = 32, STRIP_COLS = 64;  // backward: of a tile
const int64_t MOST = 16;                         // ranks

// n elements of drop(x), then zeros up to `size`.
template <class T>
void drop_row(const T* x, float* to, int64_t i, int64_t c, int64_t n, int64_t size, Drop drop) {
    const int32_t row = drop.row[i], *col = drop.col + c;
#pragma omp simd
    for (int64_t k = 0; k < n; k++) to[k] = load(x + k) * kept(row, col[k], drop.threshold, drop.scale);
    for (int64_t k = n; k < size; k++) to[k] = 0;
}

// h (TOKENS x PAIR) += x a^T over n columns, whole vectors. Lanes are summed where all sums lie as rows of squares.
void dots(int64_t n, const float* x, const float* a, int64_t lda, float* h) {
    Vec sum[PAIR * TOKENS];
#pragma GCC unroll 16
    for (int s = 0; s < PAIR * TOKENS; s++) sum[s] = Vec{};
    for (int64_t k = 0; k < n; k += LANES) {
        Vec left[PAIR];
#pragma GCC unroll 2
        for (int r = 0; r < PAIR; r++) left[r] = *at(a + r * lda + k);
#pragma GCC unroll 8
        for (int i = 0; i < TOKENS; i++) {
            const Vec right = *at(x + i * COLS + k);
#pragma GCC unroll 2
            for (int r = 0; r < PAIR; r++) sum[r * TOKENS + i] += left[r] * right;
        }
    }
#pragma GCC unroll 4
    for (int s = 0; s < PAIR * TOKENS; s += LANES) {
        turn(sum + s);
#pragma GCC unroll 16
        for (int l = 1; l < LANES; l++) sum[s] += sum[s + l];
        *at(h + s) += sum[s];
    }
}

// h of at most TOKENS rows from row i on. A (R, lda), padded.
template <class T>
void rows(const T* x, const float* A, T* h, int64_t i, int64_t n, Drop drop, int64_t C, int64_t R, int64_t lda) {
    float tile[TOKENS * COLS], found[MOST * TOKENS] = {};
    for (int64_t c = 0; c < C; c += COLS) {
        const int64_t some = C - c < COLS ? C - c : COLS, whole = (some + LANES - 1) / LANES * LANES;
        for (int64_t r = 0; r < TOKENS; r++)
            if (r < n) drop_row(x + (i + r) * C + c, tile + r * COLS, i + r, c, some, whole, drop);
            else std::memset(tile + r * COLS, 0, whole * sizeof(float));
        for (int64_t r = 0; r < R; r += PAIR) dots(whole, tile, A + r * lda + c, lda, found + r * TOKENS);
    }
    for (int64_t k = 0; k < n; k++)
        for (int64_t r = 0; r < R; r++) store(h + (i + k) * R + r, found[r * TOKENS + k]);
}

// One strip of dA and dx, columns c..c + n.
template <class T>
void strip(const T* x, const float* g, const float* A, float* dA, T* dx, int64_t c, int64_t n, Drop drop, int64_t N,
           int64_t C, int64_t R, int64_t lda) {
    float tile[STRIP_TOKENS * STRIP_COLS];
    for (int64_t i = 0; i < N; i += STRIP_TOKENS) {
        const int64_t m = N - i < STRIP_TOKENS ? N - i : STRIP_TOKENS;
        if (dA) {
            for (int64_t k = 0; k < m; k++)
                drop_row(x + (i + k) * C + c, tile + k * STRIP_COLS, i + k, c, n, STRIP_COLS, drop);
            product<true>(R, STRIP_COLS, m, g + i * R, R, tile, STRIP_COLS, dA + c, lda, i > 0);
        }
        if (!dx) continue;
        product<false>(m, STRIP_COLS, R, g + i * R, R, A + c, lda, tile, STRIP_COLS, false);
        for (int64_t k = 0; k < m; k++) {
            const float* from = tile + k * STRIP_COLS;
            T* to = dx + (i + k) * C + c;
            const int32_t row = drop.row[i + k], *col = drop.col + c;
#pragma omp simd
            for (int64_t l = 0; l < n; l++)
                store(to + l, load(to + l) + from[l] * kept(row, col[l], drop.threshold, drop.scale));
        }
    }
}

template <class T>
void forward(const LoraForward& a) {
    auto x = static_cast<const T*>(a.x);
    auto h = static_cast<T*>(a.h);
    const int64_t N = a.N, C = a.C;
    parallel((N + TOKENS - 1) / TOKENS, at_least_1(GRAIN / at_least_1(TOKENS * C)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * TOKENS; i < N && i < end * TOKENS; i += TOKENS)
            rows(x, a.A, h, i, N - i < TOKENS ? N - i : TOKENS, a.drop, C, a.R, a.lda);
    });
}

template <class T>
void backward(const LoraBackward& a) {
    auto x = static_cast<const T*>(a.x);
    auto dx = static_cast<T*>(a.dx);
    const int64_t N = a.N, C = a.C, strips = (C + STRIP_COLS - 1) / STRIP_COLS;
    parallel(strips, at_least_1(GRAIN / at_least_1(N * STRIP_COLS)), [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; s++) {
            const int64_t c = s * STRIP_COLS, n = C - c < STRIP_COLS ? C - c : STRIP_COLS;
            strip(x, a.g, a.A, a.sums, dx, c, n, a.drop, N, C, a.R, a.lda);
        }
    });
}

}  // namespace

extern "C" void lora_forward(const LoraForward* a) {
    if (a->dtype == FLOAT32) forward<float>(*a);
    else forward<bf16>(*a);
}

extern "C" void lora_backward(const LoraBackward* a) {
    if (a->dtype == FLOAT32) backward<float>(*a);
    else backward<bf16>(*a);
}
