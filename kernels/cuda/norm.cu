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

namespace {

struct Drop {  // row is null where nothing is dropped
    const int32_t *row, *col;
    int32_t threshold;
    float scale;
};

// x times what dropout makes of it at channels c to c + W of row i.
template <int W>
__device__ Vector<float, W> dropped(Vector<float, W> x, Drop drop, int64_t i, int64_t c) {
    const int32_t word = drop.row[i];
    const auto words = fetch<W>(drop.col + c);
    for (int k = 0; k < W; k++) x.at[k] *= kept(word, words.at[k], drop.threshold, drop.scale);
    return x;
}

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

}  // namespace

// x, residual, h, y (N, C); row (N,), col (C,); weight, bias (C,) float; mean, rstd (N,) float.
// row null: nothing is dropped.
// blocks: N / 8
extern "C" __global__ void norm_forward(const void* x, const void* residual, const int32_t* row, const int32_t* col,
                                        int64_t threshold, float scale, const float* weight, const float* bias,
                                        float eps, void* h, void* y, float* mean, float* rstd, int64_t N, int64_t C,
                                        int64_t dtype) {
    typed(dtype, [&](auto* null) {
        typedef decltype(null) P;
        auto xs = static_cast<P>(const_cast<void*>(x)), residuals = static_cast<P>(const_cast<void*>(residual));
        auto hs = static_cast<P>(h), ys = static_cast<P>(y);
        const Drop drop = {row, col, int32_t(threshold), scale};
        wide(C % 4 == 0 && aligned(xs, residuals, hs, ys, weight, bias, col), [&](auto width) {
            constexpr int W = decltype(width)::value;
            for (int64_t i = thread() / WARP; i < N; i += threads() / WARP)
                norm_row<W>(xs, residuals, drop, weight, bias, eps, hs, ys, mean, rstd, i, C);
        });
    });
}

// y again, from h (N, C) and what norm_forward found
// blocks: N / 8
extern "C" __global__ void normalise(const void* h, const float* mean, const float* rstd, const float* weight,
                                     const float* bias, void* y, int64_t N, int64_t C, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        auto hs = static_cast<decltype(null)>(const_cast<void*>(h)), ys = static_cast<decltype(null)>(y);
        wide(C % 4 == 0 && aligned(hs, ys, weight, bias), [&](auto width) {
            constexpr int W = decltype(width)::value;
            for (int64_t i = thread() / WARP; i < N; i += threads() / WARP)
                normalise_row<W>(hs, mean[i], rstd[i], weight, bias, ys, i, C);
        });
    });
}

// dh, dy, h, dresidual, dx (N, C); dh null: zero; dx null: not asked for. sums (blocks, 2, C) float: for each block of
// `block` rows its part of dweight and dbias, and at the end all of it in the first; null: not asked for.
// blocks: N / block
extern "C" __global__ void norm_backward(const void* dh, const void* dy, const void* h, const float* mean,
                                         const float* rstd, const int32_t* row, const int32_t* col, int64_t threshold,
                                         float scale, const float* weight, void* dresidual, void* dx, float* sums,
                                         int64_t block, int64_t N, int64_t C, int64_t dtype) {
    typed(dtype, [&](auto* null) {
        typedef decltype(null) P;
        auto dhs = static_cast<P>(const_cast<void*>(dh)), dys = static_cast<P>(const_cast<void*>(dy));
        auto hs = static_cast<P>(const_cast<void*>(h)), dr = static_cast<P>(dresidual), dxs = static_cast<P>(dx);
        const Drop drop = {row, col, int32_t(threshold), scale};
        wide(C % 4 == 0 && aligned(dhs, dys, hs, dr, dxs, weight, col, sums), [&](auto width) {
            constexpr int W = decltype(width)::value;
            for (int64_t begin = blockIdx.x * block; begin < N; begin += gridDim.x * block) {
                const int64_t end = begin + block < N ? begin + block : N;
                for (int64_t i = begin + threadIdx.x / WARP; i < end; i += blockDim.x / WARP)
                    backward_row<W>(dhs, dys, hs, mean[i], rstd[i], drop, weight, dr, dxs, i, C);
                if (sums) sum_rows<W>(dys, hs, mean, rstd, sums + begin / block * 2 * C, begin, end, C);
            }
        });
    });
}

// Adds the parts of all blocks up into the first; a warp's lanes are channels, its warps every so many blocks.
// blocks: C / 16
extern "C" __global__ void norm_backward_2(const void* dh, const void* dy, const void* h, const float* mean,
                                           const float* rstd, const int32_t* row, const int32_t* col,
                                           int64_t threshold, float scale, const float* weight, void* dresidual,
                                           void* dx, float* sums, int64_t block, int64_t N, int64_t C, int64_t dtype) {
    __shared__ float part[THREADS];
    if (!sums) return;
    const int64_t blocks = (N + block - 1) / block;
    for (int64_t first = int64_t(blockIdx.x) * WARP; first < 2 * C; first += int64_t(gridDim.x) * WARP) {
        const int64_t c = first + lane();
        float sum = 0;
        if (c < 2 * C)
            for (int64_t b = threadIdx.x / WARP; b < blocks; b += blockDim.x / WARP) sum += sums[b * 2 * C + c];
        part[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x < WARP && c < 2 * C) {
            for (int t = threadIdx.x + WARP; t < blockDim.x; t += WARP) sum += part[t];
            sums[c] = sum;
        }
        __syncthreads();
    }
}
