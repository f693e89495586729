// What the kernels of minift/ops/norm.py are called with. N tokens, C width.
#pragma once

#include "shared.h"

struct NormForward {
    const void *x, *residual;  // (N, C)
    Drop drop;
    const float *weight, *bias;  // (C,)
    float eps;
    void *h, *y;         // (N, C)
    float *mean, *rstd;  // (N,)
    int64_t N, C, dtype;
};

struct Normalise {  // y once more, from h and what norm_forward found
    const void* h;              // (N, C)
    const float *mean, *rstd;   // (N,)
    const float *weight, *bias;  // (C,)
    void* y;                    // (N, C)
    int64_t N, C, dtype;
};

struct NormBackward {
    const void* dh;            // (N, C), or null: zero
    const void *dy, *h;        // (N, C)
    const float *mean, *rstd;  // (N,)
    Drop drop;
    const float* weight;  // (C,)
    void* dresidual;      // (N, C)
    void* dx;             // (N, C), or null: not asked for
    float* sums;          // (blocks, 2, C), all zero, or null: for each block of `block` rows its part of dweight and
    int64_t block;        // dbias, and at the end all of it in the first
    int64_t N, C, dtype;
};
