// What the kernel of minift/ops/loss.py is called with. M rows, V classes or vocabulary.
#pragma once

#include "shared.h"

struct CrossEntropy {
    void* z;                 // (M, V), with `grad` overwritten by dz; rows begin `stride` elements apart
    const float* bias;       // (V,), or null
    const int64_t* targets;  // (M,) in [0, V), or -1: not asked about, so that loss, hit and dz are 0
    float smoothing;
    float *loss, *hits;  // (M,)
    int64_t grad, M, V, stride, dtype;
};
