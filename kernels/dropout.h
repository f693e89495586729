// What the kernels of minift/ops/dropout.py are called with. N tokens, C channels.
#pragma once

#include "shared.h"

struct Dropout {
    const void* x;  // (N, C)
    void* y;        // (N, C)
    Drop drop;
    int64_t N, C, dtype;
};

struct Words {
    const int32_t* x;          // (n,), or null: element i is i * GOLDEN, the words of channels
    int32_t* y;                // (n,)
    const int32_t* seed_word;  // (1,): the word of (seed, step), and the salt is mix(seed_word + salt); or null
    int64_t salt, n;
};
