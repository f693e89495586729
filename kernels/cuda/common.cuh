// What all CUDA kernels share: element types, vectors of four, sums over a warp, the dropout hash. No header is needed.
//
// A kernel is one .cu file that includes this one and offers `extern "C" __global__ void f(...)` with the name, the
// arguments and the meaning of the function in kernels/cpu/NAME.cpp. The line above it says how many blocks are worth
// starting, `// blocks: N / 8`; any other number, of blocks or of threads, gives the same result (threads: whole warps,
// THREADS at most). A kernel f_2 runs after f, with the same arguments. minift/ops/cuda.py reads all this.
#pragma once

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

namespace {

const int THREADS = 256, WARP = 32;

// ---- bits

__device__ inline uint32_t to_bits(float x) { return __float_as_uint(x); }

__device__ inline float from_bits(uint32_t u) { return __uint_as_float(u); }

const uint32_t NAN_BITS = 0x7FC00000;

// ---- element types: float (dtype code 0), bf16 (1) and fp16 (2), computed in float

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

// Calls f with a null pointer of the element type of that code: typed(dtype, [&](auto* null) { ... decltype(null) ... }).
template <class F>
__device__ void typed(int64_t dtype, const F& f) {
    if (dtype == 0) f(static_cast<float*>(nullptr));
    else if (dtype == 1) f(static_cast<bf16*>(nullptr));
    else f(static_cast<fp16*>(nullptr));
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

// ---- who this thread is

__device__ inline int lane() { return threadIdx.x % WARP; }

__device__ inline int64_t thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ inline int64_t threads() { return int64_t(gridDim.x) * blockDim.x; }

// The sum over the lanes of a warp, in all of them, always in the same order.
__device__ inline float warp_sum(float x) {
    for (int m = WARP / 2; m; m /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, m);
    return x;
}

// ---- dropout's hash, bit for bit as minift/ops/dropout.py specifies it

const uint32_t GOLDEN = 0x9E3779B1, MUL1 = 0x7FEB352D, MUL2 = 0x846CA68B;

// lowbias32 without its last step.
__device__ inline uint32_t hash(uint32_t x) {
    x = (x ^ x >> 16) * MUL1;
    return (x ^ x >> 15) * MUL2;
}

// lowbias32.
__device__ inline uint32_t mix(uint32_t x) {
    x = hash(x);
    return x ^ x >> 16;
}

// What the element at these words is multiplied by: `scale`, which is 1 / (1 - p), or 0. A product, not a choice, so that
// an inf or NaN that is dropped shows. threshold is round((1 - p) 2^32) - 2^31.
__device__ inline float kept(int32_t row, int32_t col, int32_t threshold, float scale) {
    return int32_t(hash(uint32_t(row) ^ uint32_t(col))) < threshold ? scale : 0.0f;
}

}  // namespace
