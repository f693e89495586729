// GELU and its gradient, both from x; the equations stand in gelu.h.

#include "gelu.h"

#include "common.h"

namespace {

const int64_t BLOCK = 1 << 10;  // elements of one piece of work: where pieces end does not depend on the threads

struct Math {
    static float exp(float x) { return exp_(x); }
    static float quotient(float x, float y) { return x / y; }
    static float scaled_quotient(float s, float x, float y) { return s * x / y; }
};

template <class Form>
void values(const float* x, float* y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = Form::value(x[i]);
}

template <class Form>
void gradients(const float* x, const float* dy, float* dx, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dx[i] = dy[i] * Form::slope(x[i]);
}

// In bfloat16 there are 65,536 numbers, and what is computed for each of them stands in a table. Looking it up takes about
// half as long as computing it: what a layer sees has few exponents, so that part of the table stays in the cache.
template <class Form>
struct Table {
    bf16 values[1 << 16];
    float slopes[1 << 16];

    Table() {
        for (uint32_t bits = 0; bits < 1 << 16; bits++) {
            const float x = from_bits(bits << 16);
            store(values + bits, Form::value(x));
            slopes[bits] = Form::slope(x);
        }
    }
};

template <class Form>
const Table<Form>& table() {
    static const Table<Form>* made = new Table<Form>;  // by the first thread that comes; never destroyed
    return *made;
}

template <class Form>
void values(const bf16* x, bf16* y, int64_t n) {
    const bf16* known = table<Form>().values;
    for (int64_t i = 0; i < n; i++) y[i] = known[x[i].bits];
}

// n: at most BLOCK.
template <class Form>
void gradients(const bf16* x, const bf16* dy, bf16* dx, int64_t n) {
    const float* slopes = table<Form>().slopes;
    float found[BLOCK];
    for (int64_t i = 0; i < n; i++) found[i] = slopes[x[i].bits];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(dx + i, load(dy + i) * found[i]);
}

// f(start, length) on every block of n elements.
template <class F>
void blocks(int64_t n, const F& f) {
    parallel((n + BLOCK - 1) / BLOCK, GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * BLOCK; i < n && i < end * BLOCK; i += BLOCK) f(i, n - i < BLOCK ? n - i : BLOCK);
    });
}

template <class T>
void forward(const GeluForward& a) {
    auto x = static_cast<const T*>(a.x);
    auto y = static_cast<T*>(a.y);
    blocks(a.n, [&](int64_t i, int64_t size) {
        if (a.tanh) values<Tanh<Math>>(x + i, y + i, size);
        else values<Erf<Math>>(x + i, y + i, size);
    });
}

template <class T>
void backward(const GeluBackward& a) {
    auto x = static_cast<const T*>(a.x), dy = static_cast<const T*>(a.dy);
    auto dx = static_cast<T*>(a.dx);
    blocks(a.n, [&](int64_t i, int64_t size) {
        if (a.tanh) gradients<Tanh<Math>>(x + i, dy + i, dx + i, size);
        else gradients<Erf<Math>>(x + i, dy + i, dx + i, size);
    });
}

}  // namespace

extern "C" void gelu_forward(const GeluForward* a) {
    if (a->dtype == FLOAT32) forward<float>(*a);
    else forward<bf16>(*a);
}

extern "C" void gelu_backward(const GeluBackward* a) {
    if (a->dtype == FLOAT32) backward<float>(*a);
    else backward<bf16>(*a);
}
