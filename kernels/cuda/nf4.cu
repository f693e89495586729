// Four bits a weight, there and back (minift/ops/nf4.py), to the bit what the reference there gives. n weights.
//
//     a = max |w|        c = the level nearest to w / a        w ~ levels[c] * a             in blocks of 64
//     a ~ second[d] * b + m                                    double quantisation           in blocks of 256 of a
//
// The tables come from Python, for there should be one of each.

#include "common.cuh"
#include "nf4.h"

namespace {

const int64_t BLOCK = 64, GROUP = BLOCK * 256;

// The scale of a block, in two roundings.
__device__ inline float scale(const Dequantize& a, int64_t block) {
    if (a.absmax) return a.absmax[block];
    return __fadd_rn(__fmul_rn(a.second[a.d[block]], a.b[block * BLOCK / GROUP]), *a.m);
}

// A thread takes eight weights. level (16,)
template <class T>
__device__ void expand(const Dequantize& a, const float* level) {
    const uint8_t* codes = a.codes;
    auto out = static_cast<T*>(a.out);
    const int64_t n = a.n;
    const bool four = aligned(codes, out);
    for (int64_t i = 8 * thread(); i < n; i += 8 * threads()) {
        const float s = scale(a, i / BLOCK);
        if (four && i + 8 <= n) {
            const auto found = fetch<4>(codes + i / 2);
            for (int k = 0; k < 8; k += 4) {
                const int first = found.at[k / 2], next = found.at[k / 2 + 1];
                store<4>(out + i + k,
                         {{level[first >> 4] * s, level[first & 15] * s, level[next >> 4] * s, level[next & 15] * s}});
            }
        } else {
            for (int64_t j = i; j < n && j < i + 8; j++)
                assign(out + j, level[j % 2 ? codes[j / 2] & 15 : codes[j / 2] >> 4] * s);
        }
    }
}

// A warp takes a block, a lane two weights, which share a byte.
template <class T>
__device__ void pack(const Quantize& a) {
    float middle[15];
    for (int k = 0; k < 15; k++) middle[k] = a.middles[k];
    auto w = static_cast<const T*>(a.w);
    const int64_t n = a.n;
    for (int64_t i = thread() / WARP; i * BLOCK < n; i += threads() / WARP) {
        const int64_t at = i * BLOCK + 2 * lane();
        const bool whole = (i + 1) * BLOCK <= n;
        const float x[2] = {at < n ? value(w[at]) : 0, at + 1 < n ? value(w[at + 1]) : 0};
        uint32_t most = 0;  // |w| as bits has the order of |w|, with NaN above all
        for (int k = 0; k < 2; k++) {
            const uint32_t size = to_bits(x[k]) & 0x7FFFFFFF;
            most = size > most ? size : most;
        }
        for (int s = WARP / 2; s; s /= 2) {
            const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, most, s);
            most = other > most ? other : most;
        }
        const float absmax = from_bits(most), least = absmax < 1e-38f ? 1e-38f : absmax, inverse = 1 / least;
        int code[2];
        for (int k = 0; k < 2; k++) {
            const float scaled = whole ? x[k] * inverse : x[k] / least;  // bitsandbytes divides in a last block
            code[k] = 0;
            for (int j = 0; j < 15; j++) code[k] += !(scaled <= middle[j]);
        }
        if (at + 1 == n) code[1] = 7;  // level 7 is 0
        if (at < n) a.codes[at / 2] = uint8_t(code[0] << 4 | code[1]);
        if (lane() == 0) a.absmax[i] = whole ? absmax : least;
    }
}

}  // namespace

// blocks: n / 2048
extern "C" __global__ void dequantize(Dequantize a) {
    __shared__ float level[16];
    for (int c = threadIdx.x; c < 16; c += blockDim.x) level[c] = a.pairs[2 * c + 1];  // of a byte whose low half is c
    __syncthreads();
    if (a.dtype == FLOAT32) expand<float>(a, level);
    else if (a.dtype == BFLOAT16) expand<bf16>(a, level);
    else expand<fp16>(a, level);
}

// blocks: n / 512
extern "C" __global__ void quantize(Quantize a) {
    if (a.dtype == FLOAT32) pack<float>(a);
    else if (a.dtype == BFLOAT16) pack<bf16>(a);
    else pack<fp16>(a);
}
