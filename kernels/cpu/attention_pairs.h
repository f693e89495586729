// Attention in bf16 by AVX512-BF16 (products.h): attention.cpp's pieces, multiplied in bf16 and summed in float.
//
// Scores, statistics, dropout and all sums are float, as there. What goes into a product is bf16, two numbers in a word,
// which are neighbours along what is summed over:
//     rows      as it is: summed over its columns, from the left
//     pairs     two rows in one word: summed over its rows, from either side
//     across    two columns in one word, columns as rows: summed over its columns, from the right
// Scores lie with keys down and queries across. Numbers of rows are even where they are summed over, with a row of zeros.
#pragma once

namespace {

struct PairPiece : Scores<bf16> {
    typedef bf16 Element;

    static const bool SCALED = false;
    static int64_t even(int64_t n) { return (n + 1) / 2 * 2; }
    static int64_t keys(int64_t longest) { return even(longest); }
    static int64_t width(int64_t D) { return round_up(D); }

    // of the sequence: two forms where attention.cpp has one of floats
    const int64_t half = keys(c.a.longest) * c.width;  // numbers of bf16
    bf16* const k = reinterpret_cast<bf16*>(w.k);      // rows
    bf16* const v = reinterpret_cast<bf16*>(w.v);      // rows
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(v + half);  // V's in forward, K's in backward

    // of the queries at hand
    uint32_t* const q = reinterpret_cast<uint32_t*>(w.q);           // pairs, (QUERIES / 2, width)
    uint32_t* const q_across = reinterpret_cast<uint32_t*>(w.q_t);  // (width / 2, QUERIES)
    uint32_t* const dout = reinterpret_cast<uint32_t*>(w.dout);
    uint32_t* const dout_across = reinterpret_cast<uint32_t*>(w.dout_t);

    // of a tile of P or dS
    alignas(64) uint32_t rows[KEYS * QUERIES / 2];
    alignas(64) uint32_t rows_in_pairs[KEYS / 2 * QUERIES];

    void read_keys() {
        const int64_t n = sees(range.q1 - 1);
        read(k, c.k, range.k0, n, even(n), range.head, c.D, c.width);
        read(v, c.v, range.k0, n, even(n), range.head, c.D, c.width);
        name_keys(n);
        pair_rows(c.a.backward ? k : v, even(n), c.width, pairs);
    }

    // The queries' rows of x in both forms; acc is free meanwhile.
    void read_forms(Matrix<bf16> x, uint32_t* in_pairs, uint32_t* across) {
        bf16* const as_they_are = reinterpret_cast<bf16*>(w.acc);
        read(as_they_are, x, first, m, QUERIES, range.head, c.D, c.width);
        pair_rows(as_they_are, QUERIES, c.width, in_pairs);
        transpose(lanes, c.width / 2, w.acc, reinterpret_cast<float*>(across), QUERIES);
    }

    void read_queries(int64_t i) {
        name_queries(i);
        read_forms(c.q, q, q_across);
    }

    void read_gradient() { read_forms(c.dout, dout, dout_across); }

    // tile (n x lanes) = factor * x y^T, x the rows of keys from j on
    void times(int64_t j, int64_t n, const bf16* x, const uint32_t* y_across, float factor, float* tile) {
        const uint32_t* const words = reinterpret_cast<const uint32_t*>(x + j * c.width);
        product<false>(n, lanes, c.width / 2, words, c.width / 2, y_across, QUERIES, tile, QUERIES, false);
        for (int64_t i = 0; i < n; i++)
            for (int64_t l = 0; l < lanes; l += LANES) *at(tile + i * QUERIES + l) *= factor;
    }

    void scores(int64_t j, int64_t n, float* tile) {
        times(j, n, k, q_across, c.scale, tile);
        mask(j, n, tile);
    }

    void gradient_scores(int64_t j, int64_t n, float* tile) { times(j, n, v, dout_across, c.inverse, tile); }

    // acc (m x width) = or += the n rows of the tile, turned, times the keys j..j + n
    void sum_over_keys(int64_t j, int64_t n, const float* tile) {
        pair_floats(tile, n, even(n), QUERIES, rows_in_pairs);
        product<true>(m, c.width, even(n) / 2, rows_in_pairs, QUERIES, pairs + j / 2 * c.width, c.width, w.acc, c.width,
                      j > 0);
    }

    // to (keys x width), from key j on, += the n rows of the tile times y
    void sum_over_queries(int64_t j, int64_t n, const float* tile, const uint32_t* y_pairs, float* to) {
        round_floats(tile, n, n, QUERIES, reinterpret_cast<bf16*>(rows));
        product<false>(n, c.width, even(m) / 2, rows, QUERIES / 2, y_pairs, c.width, to + j * c.width, c.width, true);
    }
};

}  // namespace
