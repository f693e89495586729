// The low-rank products beside a frozen layer, with dropout on their way (minift/ops/lora.py). drop(x) is never a matrix.
//
//     h = drop(x) A^T        dA = g^T drop(x)        dx += drop'(g A)
//
// N tokens, C width of x, R rank. A warp works on two rows at a time, so that what it reads of A serves both, and more of
// x is on its way at once. Forward, a lane sums its columns for all ranks, then the lanes are summed. Backward, a thread
// block takes a strip of columns of `block` rows and sums its part of dA in registers, then over its warps; a second
// kernel sums the parts, so the order never changes.
//
// Registers are for MOST = 8 or 16 ranks. Nothing branches on R: what is computed past it is not stored.

#include "common.cuh"
#include "lora.h"

namespace {

const int ROWS = 2, ROOM = 32;  // rows of a warp at a time; numbers of dA that a thread has registers for

// The sums of n <= 32 numbers, a power of two, over the lanes of a warp: lane l gets number l % n. Where two lanes differ
// in a bit, one goes on with the numbers that have it, the other with those that do not: n - 1 shuffles, not 5 n.
template <int n>
__device__ float warp_sums(float (&x)[n]) {
#pragma unroll
    for (int bit = 1; bit < n; bit *= 2) {
        const bool has = lane() & bit;
#pragma unroll
        for (int k = 0; k < n; k += 2 * bit) {
            const float other = __shfl_xor_sync(0xFFFFFFFF, has ? x[k] : x[k + bit], bit);
            x[k] = (has ? x[k + bit] : x[k]) + other;
        }
    }
    for (int bit = n; bit < WARP; bit *= 2) x[0] += __shfl_xor_sync(0xFFFFFFFF, x[0], bit);
    return x[0];
}

// h of rows i to i + ROWS; past the end is the last row once more, which is not stored.
template <int W, int MOST, class T>
__device__ void rows(const T* x, const float* A, T* h, Drop drop, int64_t i, int64_t N, int C, int R, int lda) {
    float sum[ROWS * MOST] = {};
    for (int c = lane() * W; c < C; c += WARP * W) {
        Vector<float, W> v[ROWS];
        for (int n = 0; n < ROWS; n++) {
            const int64_t row = i + n < N ? i + n : N - 1;
            v[n] = load<W>(x + row * C + c);
            const auto factor = factors<W>(drop, row, c);
            for (int k = 0; k < W; k++) v[n].at[k] *= factor.at[k];
        }
#pragma unroll
        for (int r = 0; r < MOST; r++) {
            const auto a = load<W>(A + (r < R ? r : R - 1) * lda + c);
            for (int n = 0; n < ROWS; n++)
                for (int k = 0; k < W; k++) sum[n * MOST + r] += v[n].at[k] * a.at[k];
        }
    }
    const float found = warp_sums(sum);
    const int n = lane() / MOST, r = lane() % MOST;
    if (n < ROWS && i + n < N && r < R) assign(h + (i + n) * R + r, found);
}

// A strip of A, (MOST, WARP * W) with zeros past its n columns and R rows, where all the block's threads can read it.
template <int W, int MOST>
__device__ void share(const float* A, float* shared, int n, int R, int lda) {
    __syncthreads();  // the strip before is done with
    for (int i = threadIdx.x; i < MOST * WARP * W; i += blockDim.x) {
        const int r = i / (WARP * W), c = i % (WARP * W);
        shared[i] = r < R && c < n ? A[r * lda + c] : 0;
    }
    __syncthreads();
}

// dx at W columns of a block's every `warps`th row, and what these rows add to dA there. All pointers are to the block's
// first row and to the first of these columns.
template <int W, int MOST, class T>
__device__ void strip_rows(const T* x, const float* g, const float* A, Vector<float, W> (&dA)[MOST], T* dx, Drop drop,
                           int rows, int C, int R) {
    const int warps = blockDim.x / WARP;
    for (int i = threadIdx.x / WARP; i < rows; i += ROWS * warps) {
        Vector<float, W> factor[ROWS] = {}, v[ROWS] = {}, d[ROWS] = {}, spread[ROWS] = {};
        for (int n = 0; n < ROWS; n++) {
            const int row = i + n * warps;
            if (row >= rows) break;
            if (x) v[n] = load<W>(x + int64_t(row) * C);
            if (dx) d[n] = load<W>(dx + int64_t(row) * C);
            factor[n] = factors<W>(drop, row, 0);
            for (int k = 0; k < W; k++) v[n].at[k] *= factor[n].at[k];
        }
#pragma unroll
        for (int r = 0; r < MOST; r++) {
            const auto a = load<W>(A + r * WARP * W);
            for (int n = 0; n < ROWS; n++) {
                const int row = i + n * warps;
                const float gr = row < rows && r < R ? g[row * R + r] : 0;
                for (int k = 0; k < W; k++) {
                    dA[r].at[k] += gr * v[n].at[k];
                    spread[n].at[k] += gr * a.at[k];
                }
            }
        }
        for (int n = 0; n < ROWS; n++) {
            const int row = i + n * warps;
            if (!dx || row >= rows) break;
            for (int k = 0; k < W; k++) d[n].at[k] += spread[n].at[k] * factor[n].at[k];
            store<W>(dx + int64_t(row) * C, d[n]);
        }
    }
}

// The block's sum of dA into `to` (R, lda), which begins at the first of the strip's n columns.
template <int W, int MOST>
__device__ void sum_warps(const Vector<float, W> (&dA)[MOST], float* shared, float* to, int n, int R, int lda) {
    __syncthreads();  // A has been read
#pragma unroll
    for (int r = 0; r < MOST; r++) store<W>(shared + (r * blockDim.x + threadIdx.x) * W, dA[r]);
    __syncthreads();
    for (int i = threadIdx.x; i < R * WARP * W; i += blockDim.x) {
        const int r = i / (WARP * W), c = i % (WARP * W);
        float sum = 0;
        for (int w = 0; w < blockDim.x / WARP; w++) sum += shared[(r * blockDim.x + w * WARP) * W + c];
        if (c < n) to[r * lda + c] = sum;
    }
}

// A thread block's share of the strips: first all of the first `block` rows, then all of the next.
template <int W, int MOST, class T>
__device__ void strips(const T* x, const float* g, const float* A, float* sums, T* dx, Drop drop, float* shared,
                       int64_t block, int64_t N, int C, int R, int lda) {
    static_assert(W * MOST <= ROOM, "");
    const int width = WARP * W, across = (C + width - 1) / width, all = (N + block - 1) / block * across;
    for (int strip = blockIdx.x; strip < all; strip += gridDim.x) {
        const int first = strip % across * width, n = C - first, c = lane() * W;
        const int64_t part = strip / across, i = part * block, rows = i + block < N ? block : N - i;
        const int64_t at = i * C + first + c;
        const Drop here = {drop.row + i, drop.col + first + c, drop.threshold, drop.scale};
        Vector<float, W> dA[MOST] = {};
        share<W, MOST>(A + first, shared, n, R, lda);
        if (c < n) strip_rows(x ? x + at : x, g + i * R, shared + c, dA, dx ? dx + at : dx, here, rows, C, R);
        if (sums) sum_warps(dA, shared, sums + part * R * lda + first, n, R, lda);
    }
}

// Calls f(Width<W>, Width<MOST>), W and MOST such that dA stays in its registers.
template <class F>
__device__ void shaped(bool four, int64_t R, const F& f) {
    if (!four) f(Width<1>{}, Width<16>{});
    else if (R <= 8) f(Width<4>{}, Width<8>{});
    else f(Width<2>{}, Width<16>{});
}

template <class T>
__device__ void forward(const LoraForward& a) {
    auto x = static_cast<const T*>(a.x);
    auto h = static_cast<T*>(a.h);
    shaped(a.C % 4 == 0 && a.lda % 4 == 0 && aligned(x, a.A, a.drop.col), a.R, [&](auto width, auto most) {
        constexpr int W = decltype(width)::value, MOST = decltype(most)::value;
        for (int64_t i = thread() / WARP * ROWS; i < a.N; i += threads() / WARP * ROWS)
            rows<W, MOST>(x, a.A, h, a.drop, i, a.N, a.C, a.R, a.lda);
    });
}

template <class T>
__device__ void backward(const LoraBackward& a, float* shared) {
    auto x = static_cast<const T*>(a.x);
    auto dx = static_cast<T*>(a.dx);
    shaped(a.C % 4 == 0 && aligned(x, dx, a.drop.col), a.R, [&](auto width, auto most) {
        constexpr int W = decltype(width)::value, MOST = decltype(most)::value;
        strips<W, MOST>(x, a.g, a.A, a.sums, dx, a.drop, shared, a.block, a.N, a.C, a.R, a.lda);
    });
}

}  // namespace

// blocks: N / 16
extern "C" __global__ void lora_forward(LoraForward a) {
    if (a.dtype == FLOAT32) forward<float>(a);
    else if (a.dtype == BFLOAT16) forward<bf16>(a);
    else forward<fp16>(a);
}

// A strip is 128 columns or fewer, `block` is 64: up to 1,024 columns, N / 8 thread blocks have one each at most.
// blocks: N / 8
extern "C" __global__ void lora_backward(LoraBackward a) {
    alignas(16) __shared__ float shared[ROOM * THREADS];
    if (a.dtype == FLOAT32) backward<float>(a, shared);
    else if (a.dtype == BFLOAT16) backward<bf16>(a, shared);
    else backward<fp16>(a, shared);
}

// blocks: lda / 4
extern "C" __global__ void lora_backward_2(LoraBackward a) {
    if (a.sums) add_parts(a.sums, (a.N + a.block - 1) / a.block, a.R * a.lda);
}
