// Cross-entropy of rows of logits and its gradient, in place (minift/ops/loss.py). M rows, V classes or vocabulary.
//
//     z = z + bias        lse = log(sum_v exp(z_v))        loss = lse - (1 - e) z_target - e mean(z)
//     dz = exp(z - lse) - (1 - e) onehot(target) - e / V
//
// A block takes a row and reads it twice: once for its largest element and the sum of exponentials together (Milakov &
// Gimelshein, https://arxiv.org/abs/1805.02867), once for the gradient. A target beyond gives NaN.

#include "common.cuh"
#include "loss.h"

namespace {

struct Seen {  // of the logits so far
    float high, sum, total;  // the largest; sum of exp(z - high); sum of z
    int32_t first;           // where the largest is, the first of equals
};

__device__ inline void see(Seen* s, float z, int32_t v) {
    if (z > s->high) {
        s->sum *= expf(s->high - z);
        s->high = z;
        s->first = v;
    }
    s->sum += expf(z - s->high);
    s->total += z;
}

__device__ inline Seen join(Seen a, Seen b) {
    const bool left = a.high > b.high || (a.high == b.high && a.first < b.first);
    const float high = left ? a.high : b.high;
    const float sum = a.sum * expf(a.high - high) + b.sum * expf(b.high - high);
    return {high, sum, a.total + b.total, left ? a.first : b.first};
}

// What the whole block saw, in all its threads.
__device__ inline Seen join_block(Seen s) {
    __shared__ Seen warps[THREADS / WARP];
    for (int m = WARP / 2; m; m /= 2)
        s = join(s, {__shfl_xor_sync(0xFFFFFFFF, s.high, m), __shfl_xor_sync(0xFFFFFFFF, s.sum, m),
                     __shfl_xor_sync(0xFFFFFFFF, s.total, m), __shfl_xor_sync(0xFFFFFFFF, s.first, m)});
    __syncthreads();  // the row before has been read
    if (lane() == 0) warps[threadIdx.x / WARP] = s;
    __syncthreads();
    s = warps[0];
    for (int w = 1; w < blockDim.x / WARP; w++) s = join(s, warps[w]);
    return s;
}

// f(Width<W>, v) on this thread's part of a row: a row may begin anywhere, so vectors begin where they can.
template <class T, class F>
__device__ void each(const T* z, int64_t V, const F& f) {
    const int64_t off = reinterpret_cast<uint64_t>(z) / sizeof(T) % 4, head = off && V > 4 - off ? 4 - off : 0;
    const int64_t whole = off && !head ? 0 : (V - head) / 4 * 4;
    if (threadIdx.x < head) f(Width<1>{}, threadIdx.x);
    for (int64_t v = head + 4 * threadIdx.x; v < head + whole; v += 4 * blockDim.x) f(Width<4>{}, v);
    for (int64_t v = head + whole + threadIdx.x; v < V; v += blockDim.x) f(Width<1>{}, v);
}

template <class T>
__device__ void row(T* z, const float* bias, int64_t target, float smoothing, float* loss, float* hit, bool grad,
                    int64_t V) {
    if (target == -1) {
        if (threadIdx.x == 0) *loss = *hit = 0;
        for (int64_t v = threadIdx.x; grad && v < V; v += blockDim.x) assign(z + v, 0);
        return;
    }
    Seen s = {-3.40282347e38f, 0, 0, 0x7FFFFFFF};  // finite, for -inf less -inf is NaN
    each(z, V, [&](auto width, int64_t v) {
        constexpr int W = decltype(width)::value;
        const auto x = load<W>(z + v);
        for (int k = 0; k < W; k++) see(&s, bias ? x.at[k] + bias[v + k] : x.at[k], int32_t(v + k));
    });
    s = join_block(s);
    const bool known = target >= 0 && target < V;
    const float lse = s.high + logf(s.sum), share = smoothing / float(V);
    if (threadIdx.x == 0) {
        const float at_target = known ? value(z[target]) + (bias ? bias[target] : 0) : from_bits(NAN_BITS);
        *loss = lse - (1 - smoothing) * at_target - (smoothing ? share * s.total : 0);
        *hit = s.first == target;
    }
    if (!grad) return;
    __syncthreads();  // the logit at the target has been read
    each(z, V, [&](auto width, int64_t v) {
        constexpr int W = decltype(width)::value;
        auto x = load<W>(z + v);
        for (int k = 0; k < W; k++) {
            const float p = expf((bias ? x.at[k] + bias[v + k] : x.at[k]) - lse);
            x.at[k] = p - share - (v + k == target ? 1 - smoothing : 0);
        }
        store<W>(z + v, x);
    });
}

template <class T>
__device__ void all_rows(const CrossEntropy& a) {
    auto z = static_cast<T*>(a.z);
    for (int64_t m = blockIdx.x; m < a.M; m += gridDim.x)
        row(z + m * a.stride, a.bias, a.targets[m], a.smoothing, a.loss + m, a.hits + m, a.grad != 0, a.V);
}

}  // namespace

// A target beyond V gives NaN.
// blocks: M
extern "C" __global__ void cross_entropy(CrossEntropy a) {
    if (a.dtype == FLOAT32) all_rows<float>(a);
    else if (a.dtype == BFLOAT16) all_rows<bf16>(a);
    else all_rows<fp16>(a);
}
