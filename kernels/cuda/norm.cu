// Dropout, residual and layer norm in one pass over each row (minift/ops/norm.py). N tokens, C width.
//
//     h = residual + drop(x)        y = (h - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps)
//
// backward, with n = (h - mean) * rstd, g = dy * weight, and means over a row:
//
//     dresidual = dh + rstd * (g - mean(g) - n * mean(g * n))        dx = drop(dresidual)
//     dweight = sum over rows of dy * n                              dbias = sum over rows of dy
//
// A warp takes a row; what it reads a second time is in the caches. dweight and dbias: each block sums its own `block`
// rows, a thread four channels, and a second kernel sums these, so the order never changes.

#include "common.cuh"
#include "norm.h"

namespace {

// y of row i.
template <int W, class T>
__device__ void normalise_row(const T* h, float mean, float rstd, const float* weight, const float* bias, T* y,
                              int64_t i, int64_t C) {
    for (int64_t c = lane() * W; c < C; c += WARP * W) {
        auto a = load<W>(h + i * C + c);
        const auto w = load<W>(weight + c), b = load<W>(bias + c);
        for (int k = 0; k < W; k++) a.at[k] = (a.at[k] - mean) * rstd * w.at[k] + b.at[k];
        store<W>(y + i * C + c, a);
    }
}

// Row i forward.
template <int W, class T>
__device__ void norm_row(const T* x, const T* residual, Drop drop, const float* weight, const float* bias, float eps,
                         T* h, T* y, float* mean, float* rstd, int64_t i, int64_t C) {
    float sum = 0, squares = 0;
    for (int64_t c = lane() * W; c < C; c += WARP * W) {
        auto a = load<W>(x + i * C + c);
        const auto r = load<W>(residual + i * C + c);
        if (drop.row) a = dropped<W>(a, drop, i, c);
        for (int k = 0; k < W; k++) a.at[k] += r.at[k];
        store<W>(h + i * C + c, a);
        a = load<W>(h + i * C + c);  // as rounded: backward will see no other
        for (int k = 0; k < W; k++) sum += a.at[k];
    }
    const float m = warp_sum(sum) / float(C);
    for (int64_t c = lane() * W; c < C; c += WARP * W) {
        const auto a = load<W>(h + i * C + c);
        for (int k = 0; k < W; k++) squares += (a.at[k] - m) * (a.at[k] - m);
    }
    const float s = 1 / sqrtf(warp_sum(squares) / float(C) + eps);
    normalise_row<W>(h, m, s, weight, bias, y, i, C);
    if (lane() == 0) mean[i] = m, rstd[i] = s;
}

// Row i backward, but for dweight and dbias; dh null: zero; dx null: not asked for.
template <int W, class T>
__device__ void backward_row(const T* dh, const T* dy, const T* h, float mean, float rstd, Drop drop,
                             const float* weight, T* dresidual, T* dx, int64_t i, int64_t C) {
    float sum = 0, dot = 0;
    for (int64_t c = lane() * W; c < C; c += WARP * W) {
        const auto d = load<W>(dy + i * C + c), a = load<W>(h + i * C + c), w = load<W>(weight + c);
        for (int k = 0; k < W; k++) {
            const float g = d.at[k] * w.at[k];
            sum += g;
            dot += g * ((a.at[k] - mean) * rstd);
        }
    }
    const float p = warp_sum(sum) / float(C), q = warp_sum(dot) / float(C);
    for (int64_t c = lane() * W; c < C; c += WARP * W) {
        const auto d = load<W>(dy + i * C + c), a = load<W>(h + i * C + c), w = load<W>(weight + c);
        Vector<float, W> r = {};
        if (dh) r = load<W>(dh + i * C + c);
        for (int k = 0; k < W; k++) r.at[k] += rstd * (d.at[k] * w.at[k] - p - (a.at[k] - mean) * rstd * q);
        store<W>(dresidual + i * C + c, r);
        if (dx) store<W>(dx + i * C + c, dropped<W>(load<W>(dresidual + i * C + c), drop, i, c));
    }
}

// The part of rows begin to end in dweight and dbias, into sums (2, C).
template <int W, class T>
__device__ void sum_rows(const T* dy, const T* h, const float* mean, const float* rstd, float* sums, int64_t begin,
                         int64_t end, int64_t C) {
    for (int64_t c = threadIdx.x * W; c < C; c += blockDim.x * W) {
        Vector<float, W> dweight = {}, dbias = {};
        for (int64_t i = begin; i < end; i++) {
            const auto d = load<W>(dy + i * C + c), a = load<W>(h + i * C + c);
            for (int k = 0; k < W; k++) {
                dweight.at[k] += d.at[k] * ((a.at[k] - mean[i]) * rstd[i]);
                dbias.at[k] += d.at[k];
            }
        }
        store<W>(sums + c, dweight);
        store<W>(sums + C + c, dbias);
    }
}

template <class T>
__device__ void forward(const NormForward& a) {
    auto x = static_cast<const T*>(a.x), residual = static_cast<const T*>(a.residual);
    auto h = static_cast<T*>(a.h), y = static_cast<T*>(a.y);
    wide(a.C % 4 == 0 && aligned(x, residual, h, y, a.weight, a.bias, a.drop.col), [&](auto width) {
        constexpr int W = decltype(width)::value;
        for (int64_t i = thread() / WARP; i < a.N; i += threads() / WARP)
            norm_row<W>(x, residual, a.drop, a.weight, a.bias, a.eps, h, y, a.mean, a.rstd, i, a.C);
    });
}

template <class T>
__device__ void forward_again(const Normalise& a) {
    auto h = static_cast<const T*>(a.h);
    auto y = static_cast<T*>(a.y);
    wide(a.C % 4 == 0 && aligned(h, y, a.weight, a.bias), [&](auto width) {
        constexpr int W = decltype(width)::value;
        for (int64_t i = thread() / WARP; i < a.N; i += threads() / WARP)
            normalise_row<W>(h, a.mean[i], a.rstd[i], a.weight, a.bias, y, i, a.C);
    });
}

template <class T>
__device__ void backward(const NormBackward& a) {
    auto dh = static_cast<const T*>(a.dh), dy = static_cast<const T*>(a.dy), h = static_cast<const T*>(a.h);
    auto dresidual = static_cast<T*>(a.dresidual), dx = static_cast<T*>(a.dx);
    const int64_t N = a.N, C = a.C, block = a.block;
    wide(C % 4 == 0 && aligned(dh, dy, h, dresidual, dx, a.weight, a.drop.col, a.sums), [&](auto width) {
        constexpr int W = decltype(width)::value;
        for (int64_t begin = blockIdx.x * block; begin < N; begin += gridDim.x * block) {
            const int64_t end = begin + block < N ? begin + block : N;
            for (int64_t i = begin + threadIdx.x / WARP; i < end; i += blockDim.x / WARP)
                backward_row<W>(dh, dy, h, a.mean[i], a.rstd[i], a.drop, a.weight, dresidual, dx, i, C);
            if (a.sums) sum_rows<W>(dy, h, a.mean, a.rstd, a.sums + begin / block * 2 * C, begin, end, C);
        }
    });
}

}  // namespace

// blocks: N / 8
extern "C" __global__ void norm_forward(NormForward a) {
    if (a.dtype == FLOAT32) forward<float>(a);
    else if (a.dtype == BFLOAT16) forward<bf16>(a);
    else forward<fp16>(a);
}

// blocks: N / 8
extern "C" __global__ void normalise(Normalise a) {
    if (a.dtype == FLOAT32) forward_again<float>(a);
    else if (a.dtype == BFLOAT16) forward_again<bf16>(a);
    else forward_again<fp16>(a);
}

// blocks: N / block
extern "C" __global__ void norm_backward(NormBackward a) {
    if (a.dtype == FLOAT32) backward<float>(a);
    else if (a.dtype == BFLOAT16) backward<bf16>(a);
    else backward<fp16>(a);
}

// blocks: C / 16
extern "C" __global__ void norm_backward_2(NormBackward a) {
    if (a.sums) add_parts(a.sums, (a.N + a.block - 1) / a.block, 2 * a.C);
}
