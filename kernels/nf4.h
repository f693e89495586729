// What the kernels of minift/ops/nf4.py are called with. n weights, in blocks of 64.
#pragma once

#include "shared.h"

struct Dequantize {
    const uint8_t* codes;  // (ceil(n / 2),)
    const float* pairs;    // (256, 2): the two levels of each byte
    const float* absmax;   // (ceil(n / 64),), or null where the scales are in four parts:
    const uint8_t* d;      // (ceil(n / 64),)
    const float *b, *m;    // (ceil(n / 16384),), (1,)
    const float* second;   // (256,): the levels of d
    void* out;             // (n,)
    int64_t n, dtype;
};

struct Quantize {
    const void* w;         // (n,)
    const float* middles;  // (15,): what lies halfway between levels
    uint8_t* codes;        // (ceil(n / 2),)
    float* absmax;         // (ceil(n / 64),)
    int64_t n, dtype;
};
