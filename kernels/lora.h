// What the kernels of minift/ops/lora.py are called with. N tokens, C width of x, R rank: on CUDA at most 16, and there
// something is always dropped.
//
// A is float, R rows, padded with zeros to an even number of them, of lda >= C numbers, a multiple of 64.
#pragma once

#include "shared.h"

struct LoraForward {
    const void* x;  // (N, C)
    const float* A;
    void* h;  // (N, R)
    Drop drop;
    int64_t N, C, R, lda, dtype;
};

struct LoraBackward {
    const void* x;   // (N, C), or null where sums is
    const float* g;  // (N, R)
    const float* A;
    float* sums;  // (blocks, R, lda), of which the first becomes dA, or null; on the CPU there is one, which is added to
    int64_t block;           // rows that share one of the sums on CUDA
    const int64_t* offsets;  // (examples + 1,) where each example begins, and the end; or null: they are one. On the CPU
    int64_t examples;
    void* dx;       // (N, C), added to; or null
    Drop drop;
    int64_t N, C, R, lda, dtype;
};
