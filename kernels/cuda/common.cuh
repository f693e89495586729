// What all CUDA kernels share: element types, vectors of four, sums over a warp. No header of CUDA's is needed.
//
// A kernel is one .cu file that includes this one and offers `extern "C" __global__ void f(Arguments a)` with the name, the
// arguments (kernels/NAME.h) and the meaning of the function in kernels/cpu/NAME.cpp. The line above it says how many blocks
// are worth starting, `// blocks: N / 8`, by fields of the arguments; any other number, of blocks or of threads, gives the
// same result (threads: whole warps, THREADS at most). A kernel f_2 runs after f, with the same arguments.
// minift/ops/cuda.py reads all this.
#pragma once

#include "shared.h"

namespace {

const int THREADS = 256, WARP = 32;

const uint32_t NAN_BITS = 0x7FC00000;

// ---- element types: float, bf16 and fp16, computed in float

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

__device__ inline float value(float x) { return x; }

__device__ inline float value(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }

__device__ inline float value(fp16 x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    return from_half(x.bits);  // tests/ops/emulate.h
#endif
}

__device__ inline void assign(float* p, float x) { *p = x; }

// Rounds to nearest, ties to even; a NaN stays one.
__device__ inline void assign(bf16* p, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
    const uint32_t u = to_bits(x), rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    p->bits = uint16_t(x != x ? 0x7FC0 : rounded);
#endif
}

__device__ inline void assign(fp16* p, float x) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
#else
    p->bits = to_half(x);
#endif
}

// ---- W elements at once: 4 where they lie as vectors do, else 1

template <class T, int W>
struct alignas(W * sizeof(T)) Vector {
    T at[W];
};

template <int W>
struct Width {
    static constexpr int value = W;
};

template <int W, class T>
__device__ Vector<T, W> fetch(const T* p) {
    return *reinterpret_cast<const Vector<T, W>*>(p);
}

template <int W, class T>
__device__ Vector<float, W> load(const T* p) {
    const Vector<T, W> found = fetch<W>(p);
    Vector<float, W> x;
    for (int k = 0; k < W; k++) x.at[k] = value(found.at[k]);
    return x;
}

template <int W, class T>
__device__ void store(T* p, const Vector<float, W>& x) {
    Vector<T, W> made;
    for (int k = 0; k < W; k++) assign(made.at + k, x.at[k]);
    *reinterpret_cast<Vector<T, W>*>(p) = made;
}

// Whether vectors of four can be taken from each of these.
template <class T, class... More>
__device__ bool aligned(const T* p, More... more) {
    const bool fits = reinterpret_cast<uint64_t>(p) % (4 * sizeof(T)) == 0;
    if constexpr (sizeof...(more) == 0) return fits;
    else return fits && aligned(more...);
}

// Calls f(Width<4>) or f(Width<1>).
template <class F>
__device__ void wide(bool four, const F& f) {
    if (four) f(Width<4>{});
    else f(Width<1>{});
}

// What dropout multiplies channels c to c + W of row i by.
template <int W>
__device__ Vector<float, W> factors(Drop drop, int64_t i, int64_t c) {
    const int32_t word = drop.row[i];
    const auto words = fetch<W>(drop.col + c);
    Vector<float, W> made;
    for (int k = 0; k < W; k++) made.at[k] = kept(word, words.at[k], drop.threshold, drop.scale);
    return made;
}

// x times what dropout makes of it there.
template <int W>
__device__ Vector<float, W> dropped(Vector<float, W> x, Drop drop, int64_t i, int64_t c) {
    const auto factor = factors<W>(drop, i, c);
    for (int k = 0; k < W; k++) x.at[k] *= factor.at[k];
    return x;
}

// ---- who this thread is

__device__ inline int lane() { return threadIdx.x % WARP; }

__device__ inline int64_t thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ inline int64_t threads() { return int64_t(gridDim.x) * blockDim.x; }

// The sum over the lanes of a warp, in all of them, always in the same order.
__device__ inline float warp_sum(float x) {
    for (int m = WARP / 2; m; m /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, m);
    return x;
}

// A kernel's second half: adds the parts (blocks, size) up into the first. A warp's lanes are columns, its warps every so
// many parts.
__device__ inline void add_parts(float* parts, int64_t blocks, int64_t size) {
    __shared__ float part[THREADS];
    for (int64_t first = int64_t(blockIdx.x) * WARP; first < size; first += int64_t(gridDim.x) * WARP) {
        const int64_t c = first + lane();
        float sum = 0;
        if (c < size)
            for (int64_t b = threadIdx.x / WARP; b < blocks; b += blockDim.x / WARP) sum += parts[b * size + c];
        part[threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.x < WARP && c < size) {
            for (int t = threadIdx.x + WARP; t < blockDim.x; t += WARP) sum += part[t];
            parts[c] = sum;
        }
        __syncthreads();
    }
}

}  // namespace
