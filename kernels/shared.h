// What C++ and CUDA share: integer types, bits of floats, dtype codes, and dropout's hash.
#pragma once

#ifdef __CUDACC_RTC__  // NVRTC brings no standard headers
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#include <cstring>
#endif

#ifdef __CUDACC__
#define INLINE __device__ inline
#else
#define INLINE inline
#endif

namespace {

// ---- dtype codes, as minift/ops/native.py gives them

const int64_t FLOAT32 = 0, BFLOAT16 = 1;  // any other: float16, on CUDA alone

// ---- bits

INLINE uint32_t to_bits(float x) {
#ifdef __CUDACC__
    return __float_as_uint(x);
#else
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
#endif
}

INLINE float from_bits(uint32_t u) {
#ifdef __CUDACC__
    return __uint_as_float(u);
#else
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
#endif
}

// ---- dropout's hash, bit for bit as minift/ops/dropout.py specifies it

const uint32_t GOLDEN = 0x9E3779B1, MUL1 = 0x7FEB352D, MUL2 = 0x846CA68B;

// lowbias32 without its last step.
INLINE uint32_t hash(uint32_t x) {
    x = (x ^ x >> 16) * MUL1;
    return (x ^ x >> 15) * MUL2;
}

// lowbias32.
INLINE uint32_t mix(uint32_t x) {
    x = hash(x);
    return x ^ x >> 16;
}

// What the element at these words is multiplied by: `scale`, which is 1 / (1 - p), or 0. A product, not a choice, so that
// an inf or NaN that is dropped still shows. threshold is round((1 - p) 2^32) - 2^31.
INLINE float kept(int32_t row, int32_t col, int32_t threshold, float scale) {
    return int32_t(hash(uint32_t(row) ^ uint32_t(col))) < threshold ? scale : 0.0f;
}

}  // namespace

// One dropout place: the words of its N rows and C channels. `row` is null where nothing is dropped.
struct Drop {
    const int32_t *row, *col;  // (N,), (C,)
    int32_t threshold;
    float scale;
};
