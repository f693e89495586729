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

#include "norm.h"

#include <cmath>

#include "common.h"

namespace {

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

template <class T>
void forward(const NormForward& a) {
    auto x = static_cast<const T*>(a.x), residual = static_cast<const T*>(a.residual);
    auto h = static_cast<T*>(a.h), y = static_cast<T*>(a.y);
    const int64_t C = a.C;
    parallel(a.N, at_least_1(GRAIN / at_least_1(C)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            add_row(x + i * C, residual + i * C, h + i * C, i, a.drop, C);
            norm_row(h + i * C, a.weight, a.bias, a.eps, y + i * C, a.mean + i, a.rstd + i, C);
        }
    });
}

template <class T>
void forward_again(const Normalise& a) {
    auto h = static_cast<const T*>(a.h);
    auto y = static_cast<T*>(a.y);
    const int64_t C = a.C;
    parallel(a.N, at_least_1(GRAIN / at_least_1(C)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            normalise_row(h + i * C, a.mean[i], a.rstd[i], a.weight, a.bias, y + i * C, C);
    });
}

// All but the sums over blocks.
template <class T>
void backward(const NormBackward& a) {
    auto dh = static_cast<const T*>(a.dh), dy = static_cast<const T*>(a.dy), h = static_cast<const T*>(a.h);
    auto dresidual = static_cast<T*>(a.dresidual), dx = static_cast<T*>(a.dx);
    const int64_t N = a.N, C = a.C, block = a.block, blocks = (N + block - 1) / block;
    parallel(blocks, at_least_1(GRAIN / at_least_1(block * C)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * block; i < N && i < end * block; i++) {
            float* sums = a.sums ? a.sums + i / block * 2 * C : nullptr;
            backward_row(dh ? dh + i * C : nullptr, dy + i * C, h + i * C, a.mean[i], a.rstd[i], a.weight,
                         dresidual + i * C, sums, C);
            if (dx) drop_row(dresidual + i * C, dx + i * C, i, a.drop, C);
        }
    });
}

}  // namespace

extern "C" void norm_forward(const NormForward* a) {
    if (a->dtype == FLOAT32) forward<float>(*a);
    else forward<bf16>(*a);
}

extern "C" void normalise(const Normalise* a) {
    if (a->dtype == FLOAT32) forward_again<float>(*a);
    else forward_again<bf16>(*a);
}

extern "C" void norm_backward(const NormBackward* a) {
    if (a->dtype == FLOAT32) backward<float>(*a);
    else backward<bf16>(*a);
    if (!a->sums) return;
    const int64_t blocks = (a->N + a->block - 1) / a->block, size = 2 * a->C;
    for (int64_t step = 1; step < blocks; step *= 2)
        for (int64_t b = 0; b + step < blocks; b += 2 * step) add(a->sums + (b + step) * size, a->sums + b * size, size);
}
