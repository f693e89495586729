// What the kernels of minift/ops/int8.py are called with. N tokens, C channels before a product, O after it.
#pragma once

#include "shared.h"

struct QuantizeRows {
    const void* x;         // (N, C)
    const float* factors;  // (C,) that x is multiplied by first, or null
    int8_t* codes;         // (N, C), written: round(127 x / absmax), 0 where x is kept apart
    float* absmax;         // (N,), written: the largest |x| of the row that is not kept apart
    int32_t* columns;      // (N, most), written: where x is kept apart, ascending
    float* values;         // (N, most), written: x there
    int32_t* counts;       // (N,), written: how many are kept apart in the row
    int64_t N, C, most, dtype;
};

struct Multiply {
    const int8_t* x;  // (N, C)
    const int8_t* w;  // (C, O), or by_outputs: (O, C)
    int32_t* pairs;   // (N rounded up to 4, C / 2 rounded up), working memory
    int32_t* sums;    // (N, O), written: x w
    int64_t N, C, O, by_outputs;
};

struct FromSums {
    const int32_t* sums;     // (N, O), products of codes
    const float* absmax;     // (N,)
    const float* scales;     // (O,), or null: all 1
    const float* bias;       // (O,), or null
    const int32_t* columns;  // (N, most)
    const float* values;     // (N, most)
    const int32_t* counts;   // (N,), or null: nothing is kept apart
    const int32_t* places;   // (C,): the row in `weights` of each channel that is kept apart anywhere
    const float* weights;    // (number of these, O)
    void* y;                 // (N, O), written; float32 may stand where the sums did
    int64_t N, O, most, dtype;
};
