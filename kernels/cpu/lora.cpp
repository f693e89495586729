// The low-rank products beside a frozen layer, with dropout on their way (minift/ops/lora.py). drop(x) is never a matrix.
//
//     h = drop(x) A^T        dA = g^T drop(x)        dx += drop'(g A)
//
// N tokens, C width of x, R rank. A tile of drop(x) is made in the cache, used, and forgotten. Inside
// all is float. A piece of work is a block of rows forward, a strip of columns backward, where the rows follow in their
// order: nothing depends on the number of threads. A row of h or dx does not depend on what other rows there are; where
// the beginnings of examples are given, nor does dA on how many of them come in one call.

#include "lora.h"

#include "products.h"

#include <vector>

namespace {

const int64_t TOKENS = 8, PAIR = 2, COLS = 256;    // forward: rows and ranks of a block in registers; columns of a tile
const int64_t STRIP_TOKENS = 32, STRIP_COLS = 64;  // backward: of a tile
const int64_t MOST = 16;                         // ranks in registers

// n elements of drop(x), then zeros up to `size`.
template <class T>
void drop_row(const T* x, float* to, int64_t i, int64_t c, int64_t n, int64_t size, Drop drop) {
    if (!drop.row) {
#pragma omp simd
        for (int64_t k = 0; k < n; k++) to[k] = load(x + k);
    } else {
        const int32_t row = drop.row[i], *col = drop.col + c;
#pragma omp simd
        for (int64_t k = 0; k < n; k++) to[k] = load(x + k) * kept(row, col[k], drop.threshold, drop.scale);
    }
    for (int64_t k = n; k < size; k++) to[k] = 0;
}

// y += drop'(x), n elements of each.
template <class T>
void add_dropped(const float* x, T* y, int64_t i, int64_t c, int64_t n, Drop drop) {
    if (!drop.row) {
#pragma omp simd
        for (int64_t k = 0; k < n; k++) store(y + k, load(y + k) + x[k]);
        return;
    }
    const int32_t row = drop.row[i], *col = drop.col + c;
#pragma omp simd
    for (int64_t k = 0; k < n; k++)
        store(y + k, load(y + k) + x[k] * kept(row, col[k], drop.threshold, drop.scale));
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

// R <= MOST columns of h, which has ldh, in at most TOKENS rows from row i on. A (R, lda), padded.
template <class T>
void rows(const T* x, const float* A, T* h, int64_t i, int64_t n, Drop drop, int64_t C, int64_t R, int64_t lda,
          int64_t ldh) {
    float tile[TOKENS * COLS], found[MOST * TOKENS] = {};
    for (int64_t c = 0; c < C; c += COLS) {
        const int64_t some = C - c < COLS ? C - c : COLS, whole = (some + LANES - 1) / LANES * LANES;
        for (int64_t r = 0; r < TOKENS; r++)
            if (r < n) drop_row(x + (i + r) * C + c, tile + r * COLS, i + r, c, some, whole, drop);
            else std::memset(tile + r * COLS, 0, whole * sizeof(float));
        for (int64_t r = 0; r < R; r += PAIR) dots(whole, tile, A + r * lda + c, lda, found + r * TOKENS);
    }
    for (int64_t k = 0; k < n; k++)
        for (int64_t r = 0; r < R; r++) store(h + (i + k) * ldh + r, found[r * TOKENS + k]);
}

// Columns c..c + n of dA, added to what is there: each example's sum by itself, one after the other. So a call for some
// examples and one for the rest add up to the same bits as a call for all.
template <class T>
void add_gradient(const LoraBackward& a, int64_t c, int64_t n) {
    auto x = static_cast<const T*>(a.x);
    const int64_t all[] = {0, a.N}, *offsets = a.offsets ? a.offsets : all, examples = a.offsets ? a.examples : 1;
    float tile[STRIP_TOKENS * STRIP_COLS];
    std::vector<float> sum(a.R * STRIP_COLS);
    for (int64_t e = 0; e < examples; e++) {
        for (int64_t i = offsets[e]; i < offsets[e + 1]; i += STRIP_TOKENS) {
            const int64_t rest = offsets[e + 1] - i, m = rest < STRIP_TOKENS ? rest : STRIP_TOKENS;
            for (int64_t k = 0; k < m; k++)
                drop_row(x + (i + k) * a.C + c, tile + k * STRIP_COLS, i + k, c, n, STRIP_COLS, a.drop);
            const bool add = i > offsets[e];
            product<true>(a.R, STRIP_COLS, m, a.g + i * a.R, a.R, tile, STRIP_COLS, sum.data(), STRIP_COLS, add);
        }
        for (int64_t r = 0; r < a.R && offsets[e] < offsets[e + 1]; r++) {
            float* to = a.sums + r * a.lda + c;
#pragma omp simd
            for (int64_t k = 0; k < STRIP_COLS; k++) to[k] += sum[r * STRIP_COLS + k];
        }
    }
}

// Columns c..c + n of dx.
template <class T>
void add_update(const LoraBackward& a, int64_t c, int64_t n) {
    auto dx = static_cast<T*>(a.dx);
    float tile[STRIP_TOKENS * STRIP_COLS];
    for (int64_t i = 0; i < a.N; i += STRIP_TOKENS) {
        const int64_t m = a.N - i < STRIP_TOKENS ? a.N - i : STRIP_TOKENS;
        product<false>(m, STRIP_COLS, a.R, a.g + i * a.R, a.R, a.A + c, a.lda, tile, STRIP_COLS, false);
        for (int64_t k = 0; k < m; k++)
            add_dropped(tile + k * STRIP_COLS, dx + (i + k) * a.C + c, i + k, c, n, a.drop);
    }
}

template <class T>
void forward(const LoraForward& a) {
    auto x = static_cast<const T*>(a.x);
    auto h = static_cast<T*>(a.h);
    const int64_t N = a.N, C = a.C;
    parallel((N + TOKENS - 1) / TOKENS, at_least_1(GRAIN / at_least_1(TOKENS * C)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * TOKENS; i < N && i < end * TOKENS; i += TOKENS)
            for (int64_t r = 0; r < a.R; r += MOST) {
                const int64_t n = N - i < TOKENS ? N - i : TOKENS, some = a.R - r < MOST ? a.R - r : MOST;
                rows(x, a.A + r * a.lda, h + r, i, n, a.drop, C, some, a.lda, a.R);
            }
    });
}

template <class T>
void backward(const LoraBackward& a) {
    const int64_t strips = (a.C + STRIP_COLS - 1) / STRIP_COLS;
    parallel(strips, at_least_1(GRAIN / at_least_1(a.N * STRIP_COLS)), [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; s++) {
            const int64_t c = s * STRIP_COLS, n = a.C - c < STRIP_COLS ? a.C - c : STRIP_COLS;
            if (a.sums) add_gradient<T>(a, c, n);
            if (a.dx) add_update<T>(a, c, n);
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
