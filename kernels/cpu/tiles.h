// Products of bf16 matrices with float sums, by AMX's tiles of 16 x 32 by 32 x 16.
//
//     C (m x columns) = or += A (m x n) B (n x columns)          m and columns in whole blocks, n in whole depths
//
// A lies row by row. B lies in pairs, as the instruction wants it: word (i, j) of (n / 2 x columns) is B's bf16 at (2i, j),
// and above it that at (2i + 1, j). HAS_TILES is defined where the CPU has AMX, and with -DTILES_BY_LOOPS, for tests: then
// loops stand in for the instructions.
#pragma once

#include "products.h"

#if defined(TILES_BY_LOOPS) || defined(__AMX_BF16__)
#define HAS_TILES
#endif

#ifdef HAS_TILES

#ifndef TILES_BY_LOOPS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

const int64_t BLOCK = 32;  // rows and columns of a block: two tiles each way
const int64_t DEPTH = 32;  // of A's columns at once: a tile's row is 64 bytes

inline int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The words x (n x m), turned: y (m x n). n and m in whole vectors.
inline void turn_words(int64_t n, int64_t m, const void* x, void* y) {
    transpose(n, m, static_cast<const float*>(x), static_cast<float*>(y), n);
}

// ---- the instructions

struct TileShapes {  // as LDTILECFG reads them: eight tiles of 16 rows of 64 bytes
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#ifdef TILES_BY_LOOPS

thread_local uint32_t tile[8][16][16];

inline bool may_use_tiles() { return true; }
inline void open_tiles(const TileShapes*) {}
inline void close_tiles() {}

inline void load_tile(int t, const void* from, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(tile[t][r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store_tile(int t, void* to, int64_t stride) {
    for (int r = 0; r < 16; r++) __builtin_memcpy(static_cast<char*>(to) + r * stride, tile[t][r], 64);
}

inline void zero_tile(int t) { __builtin_memset(tile[t], 0, sizeof tile[t]); }

inline void multiply_tiles(int c, int a, int b) {
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) {
                const uint32_t x = tile[a][r][i], y = tile[b][i][j];
                float sum = from_bits(tile[c][r][j]);
                sum += from_bits(x << 16) * from_bits(y << 16);
                sum += from_bits(x & 0xFFFF0000u) * from_bits(y & 0xFFFF0000u);
                tile[c][r][j] = to_bits(sum);
            }
}

#else

// Whether the kernel lets this process use tiles: it has to be asked once, and remembers.
inline bool may_use_tiles() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return allowed;
}

// macros, for the numbers of tiles stand in the instructions
#define open_tiles _tile_loadconfig
#define close_tiles _tile_release
#define load_tile _tile_loadd
#define store_tile _tile_stored
#define zero_tile _tile_zero
#define multiply_tiles _tile_dpbf16ps

#endif

// What was written there is in memory: GCC's tile loads do not tell its optimiser that they read.
inline void in_memory(const void* x) { __asm__ volatile("" : : "r"(x) : "memory"); }

// ---- products

// BLOCK x BLOCK of C.
inline void block(int64_t n, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                  bool add) {
    const int64_t a_step = lda * 2, b_step = ldb * 4, c_step = ldc * 4;  // bytes
    float *c0 = c, *c1 = c + 16 * ldc;
    in_memory(a);
    in_memory(b);
    in_memory(c);
    if (add) {
        load_tile(0, c0, c_step);
        load_tile(1, c0 + 16, c_step);
        load_tile(2, c1, c_step);
        load_tile(3, c1 + 16, c_step);
    } else {
        zero_tile(0);
        zero_tile(1);
        zero_tile(2);
        zero_tile(3);
    }
    for (int64_t i = 0; i < n; i += DEPTH) {
        const uint32_t* right = b + i / 2 * ldb;
        load_tile(4, a + i, a_step);
        load_tile(5, a + 16 * lda + i, a_step);
        load_tile(6, right, b_step);
        load_tile(7, right + 16, b_step);
        multiply_tiles(0, 4, 6);
        multiply_tiles(1, 4, 7);
        multiply_tiles(2, 5, 6);
        multiply_tiles(3, 5, 7);
    }
    store_tile(0, c0, c_step);
    store_tile(1, c0 + 16, c_step);
    store_tile(2, c1, c_step);
    store_tile(3, c1 + 16, c_step);
}

// The tiles of the thread at hand, while one of these lives.
struct Tiles {
    Tiles() {
        const TileShapes shapes;
        in_memory(&shapes);
        open_tiles(&shapes);
    }
    ~Tiles() { close_tiles(); }
    Tiles(const Tiles&) = delete;

    void product(int64_t m, int64_t columns, int64_t n, const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb,
                 float* c, int64_t ldc, bool add) const {
        for (int64_t i = 0; i < m; i += BLOCK)
            for (int64_t j = 0; j < columns; j += BLOCK)
                block(n, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, add);
    }
};

// Whether tiles are to be had, and multiply a block of small whole numbers as loops do. No machine with AMX was at hand when
// this was written: on one where it errs, attention goes on without them.
inline bool tiles_work() {
    static const bool work = [] {
        if (!may_use_tiles()) return false;
        bf16 a[BLOCK * DEPTH], b[DEPTH * BLOCK];
        for (int64_t i = 0; i < BLOCK * DEPTH; i++) store(a + i, float(i % 7 - 3)), store(b + i, float(i % 11 - 5));
        uint32_t pairs[DEPTH / 2 * BLOCK];
        pair_rows(b, DEPTH, BLOCK, pairs);
        float c[BLOCK * BLOCK];
        Tiles().product(BLOCK, BLOCK, DEPTH, a, DEPTH, pairs, BLOCK, c, BLOCK, false);
        bool right = true;
        for (int64_t i = 0; i < BLOCK; i++)
            for (int64_t j = 0; j < BLOCK; j++) {
                float sum = 0;
                for (int64_t d = 0; d < DEPTH; d++) sum += load(a + i * DEPTH + d) * load(b + d * BLOCK + j);
                right = right && c[i * BLOCK + j] == sum;
            }
        return right;
    }();
    return work;
}

}  // namespace

#endif
