// Attention over packed sequences, a tile of scores at a time (minift/ops/attention.py; Dao et al., arXiv 2205.14135).
//
//     P = softmax(scale * Q K^T)        O = drop(P) V        (per head and sequence; causal: key position <= query's)
//     dV = drop(P)^T dO        dP = drop'(dO V^T)        dS = P * (dP - sum over keys of P * dP)
//     dQ = scale * dS K        dK = scale * dS^T Q
//
// N tokens, M query rows, S sequences, H heads, D head size. A tile of scores lies with keys down and queries across:
// what belongs to a query (maximum, sum, position, dropout word) is one lane of a vector, and nothing is summed across
// lanes. Inside all is float, in rows of `width` numbers: D rounded up to whole vectors, zeros at the end. On a CPU that
// multiplies bf16 itself, attention_tiles.h or attention_pairs.h has the products.
// What one piece of work writes no other does, and no sum's order depends on the number of threads.

#include "attention.h"

#include <atomic>
#include <cmath>  // INFINITY
#include <initializer_list>

#include "products.h"
#include "tiles.h"

namespace {

const int64_t QUERIES = 32, KEYS = 64;  // of a tile: 8 KB; longer sums are cut there, which keeps their rounding small
const int64_t CHUNK = 256;               // queries of one piece of forward, so that one long sequence feeds many cores
const int64_t FEW = 4;                   // queries that leave too many lanes idle

// ---- one call, and what one worker holds

inline int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

template <class T>
struct Matrix {  // (rows, H, D); strides in elements
    T* data;
    int64_t row, head;
    T* at(int64_t i, int64_t h) const { return data + i * row + h * head; }
};

template <class T>
Matrix<T> given(const Strided& x) {
    return {static_cast<T*>(const_cast<void*>(x.data)), x.row, x.head};
}

template <class T>
Matrix<T> written(void* x, int64_t H, int64_t D) {  // contiguous
    return {static_cast<T*>(x), H * D, D};
}

// One call: its arguments, its tensors as matrices of T, and what every piece of work asks.
template <class T>
struct Call {
    const Attention& a;
    const int64_t width;
    const Matrix<T> q = given<T>(a.q), k = given<T>(a.k), v = given<T>(a.v), dout = given<T>(a.dout);
    const Matrix<T> out = written<T>(a.out, a.H, a.D);
    const Matrix<T> dq = written<T>(a.dq, a.H, a.D), dk = written<T>(a.dk, a.H, a.D), dv = written<T>(a.dv, a.H, a.D);
    float* const top = a.stats;                  // (M, H): the largest score
    float* const sum = a.stats + a.M * a.H;      // (M, H): the sum of exp(score - largest)
    const int64_t *const offsets = a.offsets, *const rows = a.rows;
    const int32_t* const keys = a.keys;
    const int64_t H = a.H, D = a.D;
    const bool causal = a.causal != 0;
    const float scale = a.scale, inverse = a.inverse;
    const uint32_t salt_row = a.salt_row, salt_col = a.salt_col;
    const int32_t threshold = a.threshold;
};

struct Work {
    float *k, *v, *dk, *dv;          // (longest, width)
    float *q, *dout, *acc;           // (QUERIES, width); acc is O or dQ
    float *q_t, *dout_t;             // (width, QUERIES)
    float *tile, *dtile;             // (longest, QUERIES); forward needs one tile at a time
    float *top, *sum, *delta;        // (QUERIES,)
    int32_t *position, *row;         // (QUERIES,) in the sequence; word of dropout
    int32_t* col;                    // (longest,) words of dropout

    static int64_t size(int64_t longest, int64_t width) {
        return round_up(longest * (4 * width + 2 * QUERIES + 1) + 5 * QUERIES * width + 5 * QUERIES);
    }

    Work(float* from, int64_t longest, int64_t width) {
        auto take = [&](int64_t n) { return from += n, from - n; };
        for (auto p : {&k, &v, &dk, &dv}) *p = take(longest * width);
        for (auto p : {&q, &dout, &acc, &q_t, &dout_t}) *p = take(QUERIES * width);
        for (auto p : {&tile, &dtile}) *p = take(longest * QUERIES);
        for (auto p : {&top, &sum, &delta}) *p = take(QUERIES);
        for (auto p : {&position, &row}) *p = reinterpret_cast<int32_t*>(take(QUERIES));
        col = reinterpret_cast<int32_t*>(take(longest));
    }
};

struct Range {  // the queries q0..q1 and the keys k0..k1 of one sequence, in one head
    int64_t q0, q1, k0, k1, head;
};

// (n x width) = factor * x
template <class T>
void read(float* to, Matrix<T> x, int64_t first, int64_t n, int64_t head, int64_t D, int64_t width, float factor) {
    for (int64_t i = 0; i < n; i++, to += width) {
        const T* from = x.at(first + i, head);
        for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(from + 8 * x.row + d);
#pragma omp simd
        for (int64_t d = 0; d < D; d++) to[d] = load(from + d) * factor;
        for (int64_t d = D; d < width; d++) to[d] = 0;
    }
}

// The same as bf16, without a factor, and rows of zeros up to `all`.
inline void read(bf16* to, Matrix<bf16> x, int64_t first, int64_t n, int64_t all, int64_t head, int64_t D,
                 int64_t width) {
    for (int64_t i = 0; i < all; i++, to += width) {
        const int64_t there = i < n ? D : 0;
        if (there) __builtin_memcpy(to, x.at(first + i, head), there * sizeof(bf16));
        for (int64_t d = there; d < width; d++) to[d].bits = 0;
    }
}

template <class T>
void write(const float* from, Matrix<T> x, int64_t first, int64_t n, int64_t head, int64_t D, int64_t width,
           float factor) {
    for (int64_t i = 0; i < n; i++, from += width) {
        T* to = x.at(first + i, head);
#pragma omp simd
        for (int64_t d = 0; d < D; d++) store(to + d, from[d] * factor);
    }
}

// ---- the scores of one piece of work

template <class T>
struct Scores {
    const Call<T>& c;
    const Range range;
    Work w;
    int64_t first, m, lanes, seen;  // the queries at hand: the first, how many, rounded up; the keys that the last sees

    // Of query q: how many keys it sees.
    int64_t sees(int64_t q) const { return c.causal ? (c.rows ? c.rows[q] : q) + 1 - range.k0 : range.k1 - range.k0; }

    void name_keys(int64_t n) {
        for (int64_t j = 0; c.keys && j < n; j++)
            w.col[j] = int32_t(mix(uint32_t(j * c.H + range.head) * GOLDEN ^ c.salt_col));
    }

    void name_queries(int64_t i) {
        first = i, m = range.q1 - i < QUERIES ? range.q1 - i : QUERIES, lanes = round_up(m);
        for (int64_t l = 0; l < lanes; l++) {
            const int64_t q = first + (l < m ? l : m - 1);  // lanes past the last query repeat it, and are not used
            w.position[l] = int32_t((c.rows ? c.rows[q] : q) - range.k0);
            w.row[l] = c.keys ? int32_t(mix(uint32_t(c.keys[q]) ^ c.salt_row)) : 0;
        }
        seen = sees(first + m - 1);
    }

    // The scores of the keys j..j + n become -inf where a causal query must not look.
    void mask(int64_t j, int64_t n, float* tile) {
        if (!c.causal || j + n - 1 <= w.position[0]) return;
        for (int64_t i = 0; i < n; i++)
            for (int64_t l = 0; l < lanes; l += LANES) {
                Vec& s = *at(tile + i * QUERIES + l);
                s = *at(w.position + l) < int32_t(j + i) ? Vec{} - INFINITY : s;
            }
    }

    // 1 in the lanes that are not dropped at key j, else 0.
    template <bool DROP>
    Vec kept(Words row, int64_t j) const {
        if (!DROP) return Vec{} + 1.0f;
        Words x = row ^ uint32_t(w.col[j]);
        x = (x ^ x >> 16) * MUL1;
        x = (x ^ x >> 15) * MUL2;
        return where((Ints)x < c.threshold, Vec{} + 1.0f);
    }

    // The scores become dropped exponentials; turn: what those before are to be multiplied by, where the maximum rose.
    template <bool DROP>
    void softmax(int64_t j, int64_t n, float* turn) {
        for (int64_t l = 0; l < lanes; l += LANES) {
            const Vec old = *at(w.top + l);
            const Words row = (Words)*at(w.row + l);
            Vec top = old, sum{};
            for (int64_t i = 0; i < n; i++) {
                const Vec s = *at(w.tile + i * QUERIES + l);
                top = s > top ? s : top;
            }
            for (int64_t i = 0; i < n; i++) {
                Vec& s = *at(w.tile + i * QUERIES + l);
                const Vec p = exp_(s - top);
                sum += p;
                s = DROP ? p * kept<DROP>(row, j + i) : p;
            }
            *at(turn + l) = exp_(old - top);
            *at(w.sum + l) = *at(w.sum + l) * *at(turn + l) + sum;
            *at(w.top + l) = top;
        }
    }

    void softmax(int64_t j, int64_t n, float* turn) { c.keys ? softmax<true>(j, n, turn) : softmax<false>(j, n, turn); }

    void begin_statistics() {
        for (int64_t l = 0; l < lanes; l++) w.top[l] = -INFINITY, w.sum[l] = 0;
    }

    // acc lies (m x width), if a piece does not say otherwise.
    void scale_acc(const float* turn) {
        for (int64_t l = 0; l < m; l++)
            for (int64_t d = 0; turn[l] != 1 && d < c.width; d += LANES) *at(w.acc + l * c.width + d) *= turn[l];
    }

    const float* finished_acc() { return w.acc; }

    // o (m x width): drop(exponentials) V
    void write_output(const float* o) {
        for (int64_t l = 0; l < m; l++) {
            const int64_t i = (first + l) * c.H + range.head;
            c.top[i] = w.top[l], c.sum[i] = w.sum[l];
            write(o + l * c.width, c.out, first + l, 1, range.head, c.D, c.width, c.inverse / w.sum[l]);
        }
    }

    // Of lanes past the last query P is 0.
    void read_statistics() {
        for (int64_t l = 0; l < lanes; l++) {
            const int64_t i = (first + l) * c.H + range.head;
            w.top[l] = l < m ? c.top[i] : INFINITY, w.sum[l] = l < m ? c.sum[i] : 1, w.delta[l] = 0;
        }
    }

    // The scores of the keys j..j + n become P, negative where dropped; dtile becomes dP, and P * dP is added to delta.
    // The factor 1 / (1 - p) is in dP already.
    template <bool DROP>
    void probabilities(int64_t j, int64_t n) {
        for (int64_t l = 0; l < lanes; l += LANES) {
            const Vec top = *at(w.top + l), part = 1 / *at(w.sum + l);
            const Words row = (Words)*at(w.row + l);
            Vec sum{};
            for (int64_t i = j; i < j + n; i++) {
                Vec &s = *at(w.tile + i * QUERIES + l), &dp = *at(w.dtile + i * QUERIES + l);
                const Vec p = exp_(s - top) * part, stays = kept<DROP>(row, i);
                if (DROP) dp *= stays;
                s = DROP ? (stays == 0 ? -p : p) : p;
                sum += p * dp;
            }
            *at(w.delta + l) += sum;
        }
    }

    void probabilities(int64_t j, int64_t n) { c.keys ? probabilities<true>(j, n) : probabilities<false>(j, n); }

    // P of the keys j..j + n becomes drop(P), and dP becomes dS.
    void softmax_backward(int64_t j, int64_t n) {
        for (int64_t l = 0; l < lanes; l += LANES) {
            const Vec delta = *at(w.delta + l);
            for (int64_t i = j; i < j + n; i++) {
                Vec &s = *at(w.tile + i * QUERIES + l), &ds = *at(w.dtile + i * QUERIES + l);
                ds = (s < 0 ? -s : s) * (ds - delta);
                s = s < 0 ? Vec{} : s;
            }
        }
    }

};

// ---- one piece of work

// P has the products: Piece here by floats, TilePiece and PairPiece by the instructions for bf16.
template <class P>
void forward(P& p) {
    float turn[QUERIES];
    if (p.range.q0 >= p.range.q1) return;
    p.read_keys();
    for (int64_t i = p.range.q0; i < p.range.q1; i += QUERIES) {
        p.read_queries(i);
        p.begin_statistics();
        for (int64_t j = 0; j < p.seen; j += KEYS) {
            const int64_t n = p.seen - j < KEYS ? p.seen - j : KEYS;
            p.scores(j, n, p.w.tile);
            p.softmax(j, n, turn);
            if (j > 0) p.scale_acc(turn);
            p.sum_over_keys(j, n, p.w.tile);
        }
        p.write_output(p.finished_acc());
    }
}

template <class P>
void backward(P& p) {
    const Work& w = p.w;
    const int64_t all = p.range.k1 - p.range.k0, head = p.range.head, width = p.c.width, D = p.c.D;
    for (int64_t i = 0; i < P::keys(all) * width; i++) w.dk[i] = w.dv[i] = 0;
    if (p.range.q0 < p.range.q1) p.read_keys();
    for (int64_t i = p.range.q0; i < p.range.q1; i += QUERIES) {
        p.read_queries(i);
        p.read_statistics();
        p.read_gradient();
        for (int64_t j = 0; j < p.seen; j += KEYS) {
            const int64_t n = p.seen - j < KEYS ? p.seen - j : KEYS;
            p.scores(j, n, w.tile + j * QUERIES);
            p.gradient_scores(j, n, w.dtile + j * QUERIES);
            p.probabilities(j, n);
        }
        for (int64_t j = 0; j < p.seen; j += KEYS) {
            const int64_t n = p.seen - j < KEYS ? p.seen - j : KEYS;
            p.softmax_backward(j, n);
            p.sum_over_queries(j, n, w.tile + j * QUERIES, p.dout, w.dv);
            p.sum_over_queries(j, n, w.dtile + j * QUERIES, p.q, w.dk);
            p.sum_over_keys(j, n, w.dtile + j * QUERIES);
        }
        write(p.finished_acc(), p.c.dq, p.first, p.m, head, D, width, p.c.scale);
    }
    // what was read as it is has its factor yet to come
    write(w.dk, p.c.dk, p.range.k0, all, head, D, width, P::SCALED ? 1 : p.c.scale);
    write(w.dv, p.c.dv, p.range.k0, all, head, D, width, P::SCALED ? 1 : p.c.inverse);
}

template <class T>
struct Piece : Scores<T> {
    using Scores<T>::c, Scores<T>::range, Scores<T>::w, Scores<T>::first, Scores<T>::m, Scores<T>::lanes;
    typedef T Element;

    static const bool SCALED = true;  // queries and gradients are read with their factors
    static int64_t keys(int64_t longest) { return longest; }
    static int64_t width(int64_t D) { return round_up(D); }

    const float *const q = w.q, *const dout = w.dout;

    void read_keys() {
        const int64_t n = this->sees(range.q1 - 1);
        read(w.k, c.k, range.k0, n, range.head, c.D, c.width, 1);
        read(w.v, c.v, range.k0, n, range.head, c.D, c.width, 1);
        this->name_keys(n);
    }

    void read_queries(int64_t i) {
        this->name_queries(i);
        read(w.q, c.q, first, m, range.head, c.D, c.width, c.scale);
        if (m > FEW) transpose(m, c.width, w.q, w.q_t, QUERIES);
    }

    void read_gradient() {
        read(w.dout, c.dout, first, m, range.head, c.D, c.width, c.inverse);
        if (m > FEW) transpose(m, c.width, w.dout, w.dout_t, QUERIES);
    }

    // tile (n x lanes) = x y^T, x (n, D) of keys, y (m, D) of queries
    void times(int64_t n, const float* x, const float* y, const float* y_t, float* tile) {
        if (m <= FEW) dots(n, m, c.width, x, y, tile, QUERIES);
        else product<false>(n, lanes, c.D, x, c.width, y_t, QUERIES, tile, QUERIES, false);
    }

    // tile: the scores of the keys j..j + n, scale * K Q^T
    void scores(int64_t j, int64_t n, float* tile) {
        times(n, w.k + j * c.width, w.q, w.q_t, tile);
        this->mask(j, n, tile);
    }

    // tile: dP of the keys j..j + n, V dO^T
    void gradient_scores(int64_t j, int64_t n, float* tile) { times(n, w.v + j * c.width, w.dout, w.dout_t, tile); }

    // acc (m x width) = or += the n rows of the tile, turned, times the keys' rows: of V in forward, of K in backward
    void sum_over_keys(int64_t j, int64_t n, const float* tile) {
        const float* const rows = c.a.backward ? w.k : w.v;
        product<true>(m, c.width, n, tile, QUERIES, rows + j * c.width, c.width, w.acc, c.width, j > 0);
    }

    // to (keys x width), from key j on, += the n rows of the tile times y
    void sum_over_queries(int64_t j, int64_t n, const float* tile, const float* y, float* to) {
        product<false>(n, c.width, m, tile, QUERIES, y, c.width, to + j * c.width, c.width, true);
    }
};

}  // namespace

#ifdef HAS_TILES
#include "attention_tiles.h"
#endif
#ifdef HAS_PAIRS
#include "attention_pairs.h"
#endif

namespace {

// ---- all pieces

// The first query at or after this token.
int64_t query_at(const Attention& a, int64_t token) {
    if (!a.rows) return a.M ? token : 0;  // an empty tensor's address is null, too
    int64_t low = 0, high = a.M;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (a.rows[middle] < token) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Floats that a worker needs.
template <class P>
int64_t scratch_size(int64_t longest, int64_t D) {
    return Work::size(P::keys(longest), P::width(D));
}

// Calls f(piece) for every sequence, chunk of its queries and head. A worker takes the next piece when it is free.
template <class P, class F>
void pieces(const Attention& a, int64_t chunk, const F& f) {
    const Call<typename P::Element> call{a, P::width(a.D)};
    const int64_t chunks = (a.longest + chunk - 1) / chunk;
    std::atomic<int64_t> next{0};
    parallel(a.workers, 1, [&](int64_t worker, int64_t) {
        float* const scratch = a.scratch + worker * scratch_size<P>(a.longest, a.D);
        const Work work(scratch, P::keys(a.longest), call.width);
        for (int64_t i; (i = next++) < a.S * chunks * a.H;) {
            const int64_t s = i / a.H / chunks, k0 = a.offsets[s], k1 = a.offsets[s + 1];
            const int64_t q0 = query_at(a, k0) + i / a.H % chunks * chunk, end = query_at(a, k1);
            P piece{{call, {q0, q0 + chunk < end ? q0 + chunk : end, k0, k1, i % a.H}, work, 0, 0, 0, 0}};
            f(piece);
        }
    });
}

template <class P>
void run(const Attention& a) {
    if (a.backward) pieces<P>(a, at_least_1(a.longest), [](P& piece) { backward(piece); });
    else pieces<P>(a, CHUNK, [](P& piece) { forward(piece); });
}


}  // namespace

extern "C" void attention_scratch(const AttentionScratch* a) {
    int64_t longest = 0;
    for (int64_t s = 0; s < a->S; s++) {
        const int64_t length = a->offsets[s + 1] - a->offsets[s];
        if (length > longest) longest = length;
    }
    a->found[0] = longest;
    a->found[1] = scratch_size<Piece<float>>(longest, a->D);
#ifdef HAS_TILES
    const int64_t of_tiles = scratch_size<TilePiece>(longest, a->D);
    if (of_tiles > a->found[1]) a->found[1] = of_tiles;
#endif
#ifdef HAS_PAIRS
    const int64_t of_pairs = scratch_size<PairPiece>(longest, a->D);
    if (of_pairs > a->found[1]) a->found[1] = of_pairs;
#endif
}

extern "C" void attention(const Attention* a) {
    if (a->dtype == FLOAT32) return run<Piece<float>>(*a);
#ifdef HAS_TILES
    if (tiles_work()) return run<TilePiece>(*a);
#endif
#ifdef HAS_PAIRS
    return run<PairPiece>(*a);
#endif
    run<Piece<bf16>>(*a);
}
