// Dropout, residual and layer norm in one pass over each row (minift/ops/norm.py). N tokens, C width.
//
//     h = residual + drop(x)        y = (h - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps)
//
// backward, with n = (h - mean) * rstd, g = dy * weight, and means over a row:
//
//     dresidual = dh + rstd * (g - mean(g) - n * mean(g * n))        dx = drop(dresidual)
//     dweight = sum over rows of dy * n                              dbias = sum over rows of dy
//
// Statistics are float. The sums over rows are made block by block, and the blocks added two by two: the same
// whatever the number of threads, and with small rounding errors.

#include <cmath>

#include "common.h"

namespace {

struct Drop {  // row is null where nothing is dropped
    const int32_t *row, *col;
    int32_t threshold;
    float scale;
};

template <class T>
void drop_row(const T* x, T* y, int64_t i, Drop drop, int64_t C) {
    const int32_t row = drop.row[i], *col = drop.col;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) store(y + c, load(x + c) * kept(row, col[c], drop.threshold, drop.scale));
}

template <class T>
void add_row(const T* x, const T* residual, T* h, int64_t i, Drop drop, int64_t C) {
    if (!drop.row) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) store(h + c, load(residual + c) + load(x + c));
        return;
    }
    const int32_t row = drop.row[i], *col = drop.col;
#pragma omp simd
    for (int64_t c = 0; c < C; c++)
        store(h + c, load(residual + c) + load(x + c) * kept(row, col[c], drop.threshold, drop.scale));
}

template <class T>
void normalise_row(const T* h, float mean, float rstd, const float* weight, const float* bias, T* y, int64_t C) {
#pragma omp simd
    for (int64_t c = 0; c < C; c++) store(y + c, (load(h + c) - mean) * rstd * weight[c] + bias[c]);
}

template <class T>
void norm_row(const T* h, const float* weight, const float* bias, float eps, T* y, float* mean, float* rstd, int64_t C) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; c++) sum += load(h + c);
    const float m = sum / float(C);
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++) squares += (load(h + c) - m) * (load(h + c) - m);
    const float r = 1 / std::sqrt(squares / float(C) + eps);
    normalise_row(h, m, r, weight, bias, y, C);
    *mean = m, *rstd = r;
}

// sums (2, C): where this row's part of dweight and dbias is added; null where they are not asked for.
template <class T>
void backward_row(const T* dh, const T* dy, const T* h, float mean, float rstd, const float* weight, T* dresidual,
                  float* sums, int64_t C) {
    float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t c = 0; c < C; c++) {
        const float g = load(dy + c) * weight[c];
        sum += g;
        dot += g * ((load(h + c) - mean) * rstd);
    }
    if (sums) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            sums[c] += load(dy + c) * ((load(h + c) - mean) * rstd);
            sums[C + c] += load(dy + c);
        }
    }
    const float a = sum / float(C), b = dot / float(C);
    if (!dh) {
#pragma omp simd
        for (int64_t c = 0; c < C; c++)
            store(dresidual + c, rstd * (load(dy + c) * weight[c] - a - (load(h + c) - mean) * rstd * b));
        return;
    }
#pragma omp simd
    for (int64_t c = 0; c < C; c++)
        store(dresidual + c,
              load(dh + c) + rstd * (load(dy + c) * weight[c] - a - (load(h + c) - mean) * rstd * b));
}

void add(const float* x, float* y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

}  // namespace

// x, residual, h, y (N, C); row (N,), col (C,); weight, bias (C,) float; mean, rstd (N,) float.
// row null: nothing is dropped.
extern "C" void norm_forward(const void* x, const void* residual, const int32_t* row, const int32_t* col,
                             int64_t threshold, float scale, const float* weight, const float* bias, float eps, void* h,
                             void* y, float* mean, float* rstd, int64_t N, int64_t C, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        typedef decltype(null) P;
        auto xs = static_cast<P>(const_cast<void*>(x)), residuals = static_cast<P>(const_cast<void*>(residual));
        auto hs = static_cast<P>(h), ys = static_cast<P>(y);
        const Drop drop = {row, col, int32_t(threshold), scale};
        parallel(N, at_least_1(GRAIN / at_least_1(C)), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                add_row(xs + i * C, residuals + i * C, hs + i * C, i, drop, C);
                norm_row(hs + i * C, weight, bias, eps, ys + i * C, mean + i, rstd + i, C);
            }
        });
    });
}

// y again, from h (N, C) and what norm_forward found
extern "C" void normalise(const void* h, const float* mean, const float* rstd, const float* weight, const float* bias,
                          void* y, int64_t N, int64_t C, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        auto hs = static_cast<decltype(null)>(const_cast<void*>(h)), ys = static_cast<decltype(null)>(y);
        parallel(N, at_least_1(GRAIN / at_least_1(C)), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++)
                normalise_row(hs + i * C, mean[i], rstd[i], weight, bias, ys + i * C, C);
        });
    });
}

// dh, dy, h, dresidual, dx (N, C); dh null: zero; dx null: not asked for. sums (blocks, 2, C) float, all zero: for each
// block of `block` rows its part of dweight and dbias, and at the end all of it in the first; null: not asked for.
extern "C" void norm_backward(const void* dh, const void* dy, const void* h, const float* mean, const float* rstd,
                              const int32_t* row, const int32_t* col, int64_t threshold, float scale,
                              const float* weight, void* dresidual, void* dx, float* sums, int64_t block, int64_t N,
                              int64_t C, int64_t dtype) {
    const int64_t blocks = (N + block - 1) / block;
    typed(dtype, [&](auto* null) {
        typedef decltype(null) P;
        auto dhs = static_cast<P>(const_cast<void*>(dh)), dys = static_cast<P>(const_cast<void*>(dy));
        auto hs = static_cast<P>(const_cast<void*>(h)), dr = static_cast<P>(dresidual), dxs = static_cast<P>(dx);
        const Drop drop = {row, col, int32_t(threshold), scale};
        parallel(blocks, at_least_1(GRAIN / at_least_1(block * C)), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * block; i < N && i < end * block; i++) {
                backward_row(dh ? dhs + i * C : nullptr, dys + i * C, hs + i * C, mean[i], rstd[i], weight, dr + i * C,
                             sums ? sums + i / block * 2 * C : nullptr, C);
                if (dx) drop_row(dr + i * C, dxs + i * C, i, drop, C);
            }
        });
    });
    for (int64_t step = 1; sums && step < blocks; step *= 2)
        for (int64_t b = 0; b + step < blocks; b += 2 * step) add(sums + (b + step) * 2 * C, sums + b * 2 * C, 2 * C);
}
