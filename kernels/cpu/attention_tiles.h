// Attention in bf16 by AMX (tiles.h): attention.cpp's pieces, multiplied in bf16 and summed in float.
//
// Scores, statistics, dropout and all sums are float, as there. What goes into a product is bf16, in one of four forms:
//     rows      as it is, for A
//     pairs     two rows in one word, for B
//     turned    columns as rows, for A: pairs, turned
//     across    columns as rows, for B, two columns in one word: rows, turned
// Scores lie with keys down and queries across, so P and dS are A or B of their products as they lie; what is summed over
// keys, O and dQ, lies (width x QUERIES), and is turned at its end. Keys are read in whole tiles, with zeros past the last.
#pragma once

namespace {

struct TilePiece : Scores<bf16> {
    typedef bf16 Element;

    static const bool SCALED = false;
    static int64_t keys(int64_t longest) { return whole(longest, KEYS); }
    static int64_t width(int64_t D) { return whole(D, BLOCK); }

    const Tiles tiles{};
    int64_t all = 0;  // keys that were read, in whole tiles

    // of the sequence: two forms where attention.cpp has one of floats
    const int64_t half = keys(c.a.longest) * c.width;  // numbers of bf16
    bf16* const k = reinterpret_cast<bf16*>(w.k);      // rows
    bf16* const turned = k + half;                     // (width, all): V in forward, K in backward
    bf16* const v = reinterpret_cast<bf16*>(w.v);      // rows
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(v + half);

    // of the queries at hand
    uint32_t* const q = reinterpret_cast<uint32_t*>(w.q);           // pairs, (QUERIES / 2, width)
    uint32_t* const q_across = reinterpret_cast<uint32_t*>(w.q_t);  // (width / 2, QUERIES)
    uint32_t* const dout = reinterpret_cast<uint32_t*>(w.dout);
    uint32_t* const dout_across = reinterpret_cast<uint32_t*>(w.dout_t);

    // of a tile of P or dS
    alignas(64) bf16 left[KEYS * QUERIES] = {};             // rows
    alignas(64) uint32_t right[KEYS / 2 * QUERIES] = {};    // pairs

    void read_keys() {
        const int64_t n = sees(range.q1 - 1);
        all = whole(n, KEYS);
        read(k, c.k, range.k0, n, all, range.head, c.D, c.width);
        read(v, c.v, range.k0, n, all, range.head, c.D, c.width);
        pair_rows(c.a.backward ? k : v, all, c.width, pairs);
        turn_words(all / 2, c.width, pairs, turned);
        name_keys(n);
    }

    // The queries' rows of x in both forms; acc is free meanwhile.
    void read_forms(Matrix<bf16> x, uint32_t* pairs, uint32_t* across) {
        bf16* const rows = reinterpret_cast<bf16*>(w.acc);
        read(rows, x, first, m, QUERIES, range.head, c.D, c.width);
        pair_rows(rows, QUERIES, c.width, pairs);
        turn_words(QUERIES, c.width / 2, rows, across);
    }

    void read_queries(int64_t i) {
        name_queries(i);
        read_forms(c.q, q, q_across);
    }

    void read_gradient() { read_forms(c.dout, dout, dout_across); }

    // tile (KEYS x QUERIES) = factor * x y^T, x the rows of keys from j on
    void times(int64_t j, const bf16* x, const uint32_t* y_across, float factor, float* tile) {
        tiles.product(KEYS, QUERIES, c.width, x + j * c.width, c.width, y_across, QUERIES, tile, QUERIES, false);
        for (int64_t i = 0; i < KEYS * QUERIES; i += LANES) *at(tile + i) *= factor;
    }

    void scores(int64_t j, int64_t n, float* tile) {
        times(j, k, q_across, c.scale, tile);
        mask(j, n, tile);
    }

    void gradient_scores(int64_t j, int64_t, float* tile) { times(j, v, dout_across, c.inverse, tile); }

    // acc (width x QUERIES) = or += turned, of the keys j..j + n, times the n rows of the tile
    void sum_over_keys(int64_t j, int64_t n, const float* tile) {
        pair_floats(tile, n, KEYS, QUERIES, right);
        tiles.product(c.width, QUERIES, whole(n, DEPTH), turned + j, all, right, QUERIES, w.acc, QUERIES, j > 0);
    }

    // to (keys x width), from key j on, += the n rows of the tile times y
    void sum_over_queries(int64_t j, int64_t n, const float* tile, const uint32_t* y_pairs, float* to) {
        round_floats(tile, n, KEYS, QUERIES, left);
        tiles.product(KEYS, c.width, QUERIES, left, QUERIES, y_pairs, c.width, to + j * c.width, c.width, true);
    }

    // acc lies (width x QUERIES) here
    void scale_acc(const float* turn) {
        for (int64_t d = 0; d < c.width; d++)
            for (int64_t l = 0; l < lanes; l += LANES) *at(w.acc + d * QUERIES + l) *= *at(turn + l);
    }

    // acc, turned: (QUERIES x width)
    const float* finished_acc() {
        transpose(c.width, QUERIES, w.acc, w.q, c.width);
        return w.q;
    }
};

}  // namespace
