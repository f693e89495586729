// What the kernel of minift/ops/attention.py is called with. N tokens, M query rows, S sequences, H heads, D head size.
#pragma once

#include "shared.h"

struct Strided {  // (M or N, H, D); the distances of rows and of heads in elements, those of D are neighbours
    const void* data;
    int64_t row, head;
};

struct AttentionScratch {
    const int64_t* offsets;  // (S + 1,)
    int64_t S, D;
    int64_t* found;  // (2,), written: tokens of the longest sequence, floats of scratch memory that a worker needs
};

struct Attention {
    Strided q, k, v;         // (M, H, D), (N, H, D), (N, H, D)
    void* out;               // (M, H, D), written by forward
    float* stats;            // (2, M, H), written by forward: the largest score, and the sum of exp(score - largest)
    Strided dout;            // (M, H, D), read by backward
    void *dq, *dk, *dv;      // written by backward
    const int64_t* offsets;  // (S + 1,)
    const int64_t* rows;     // (M,) token numbers of the queries, ascending, or null: all
    int64_t M, S, H, D;
    int64_t longest, workers;  // tokens of the longest sequence; pieces of work at a time
    float* scratch;            // (workers, per_worker)
    float scale;
    int64_t causal;
    const int32_t* keys;          // (M,) the query tokens' names, or null: no dropout
    uint32_t salt_row, salt_col;  // of dropout's words
    int32_t threshold;
    float inverse;  // 1 / (1 - p)
    int64_t backward, dtype;
};
