// Look-up of 4-bit elements, 32 or 64 at once, where the processor has AVX2 and F16C.
//
// A block of elements has one scale, so it holds 16 different values at most. Their bytes fit registers, and a byte
// shuffle looks up 32 elements at once. fp16 and bf16 are multiplied and rounded 16 at a time, before the look-up. fp32
// is looked up unscaled and multiplied after, since its 64 bytes cost more to prepare for every block. Either way an
// element is the fp32 product of code and scale, rounded once.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#define FASTPEFT_AVX2 1
#else
#define FASTPEFT_AVX2 0
#endif

namespace {

#if FASTPEFT_AVX2

// 16 numbers of 16 bits as two tables of bytes, each in both lanes.
struct Table {
    __m256i low, high;

    Table() = default;
    explicit Table(__m256i numbers) {
        const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        const __m256i bytes = _mm256_shuffle_epi8(numbers, _mm256_broadcastsi128_si256(split));
        const __m256i first = _mm256_permute2x128_si256(bytes, bytes, 0x00);
        const __m256i second = _mm256_permute2x128_si256(bytes, bytes, 0x11);
        low = _mm256_unpacklo_epi64(first, second);
        high = _mm256_unpackhi_epi64(first, second);
    }
};

// The products of one block: 16 of them, in two registers, rounded into one.
template <typename T>
struct Products;

template <>
struct Products<Half> {
    __m256 first, second;

    explicit Products(const float* code) : first(_mm256_loadu_ps(code)), second(_mm256_loadu_ps(code + 8)) {}

    __m256i rounded(__m256 scale) const {
        const __m128i low = _mm256_cvtps_ph(_mm256_mul_ps(first, scale), _MM_FROUND_TO_NEAREST_INT);
        const __m128i high = _mm256_cvtps_ph(_mm256_mul_ps(second, scale), _MM_FROUND_TO_NEAREST_INT);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
};

template <>
struct Products<BFloat16> {
    __m256 even, odd;

    explicit Products(const float* code)
        : even(_mm256_i32gather_ps(code, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), 4)),
          odd(_mm256_i32gather_ps(code, _mm256_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15), 4)) {}

    static __m256i upper_half(__m256 value) {  // as round_to; 0x7FFF + 1 where the half is odd is 0x8000 - 1 where even
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i last = _mm256_and_si256(bits, _mm256_set1_epi32(0x10000));
        const __m256i is_even = _mm256_cmpeq_epi32(last, _mm256_setzero_si256());
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), is_even);
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7FC00000), is_nan);
    }

    __m256i rounded(__m256 scale) const {
        const __m256i evens = _mm256_srli_epi32(upper_half(_mm256_mul_ps(even, scale)), 16);
        return _mm256_blend_epi16(evens, upper_half(_mm256_mul_ps(odd, scale)), 0xAA);
    }
};

template <typename T>
struct Lookup {
    using Block = Table;

    Products<T> products;

    explicit Lookup(const float* code) : products(code) {}

    Block block(float scale) const { return Table(products.rounded(_mm256_set1_ps(scale))); }

    // Unpacking works lane by lane: elements 0 to 7 and 16 to 23 go to the lower lane, 8 to 15 and 24 to 31 to the upper.
    static __m256i ordered(__m256i bytes) {
        return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    }

    void put(const Block& table, __m256i index, T* out) const {
        const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
        __m256i* to = reinterpret_cast<__m256i*>(out);
        _mm256_storeu_si256(to, _mm256_unpacklo_epi8(low, high));
        _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi8(low, high));
    }
};

template <>
struct Lookup<float> {
    using Block = float;

    Table low, high;

    explicit Lookup(const float* code) {
        uint16_t halves[2][16];
        for (int nibble = 0; nibble < 16; ++nibble) {
            halves[0][nibble] = static_cast<uint16_t>(bits_of(code[nibble]));
            halves[1][nibble] = static_cast<uint16_t>(bits_of(code[nibble]) >> 16);
        }
        low = Table(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves[0])));
        high = Table(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves[1])));
    }

    Block block(float scale) const { return scale; }

    // Twice unpacked: elements 0 to 3, 8 to 11 and so on go to the lower lane, the others to the upper.
    static __m256i ordered(__m256i bytes) {
        const __m128i pairs = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(pairs)), 0xD8);
    }

    void put(Block block, __m256i index, float* out) const {
        const __m256 scale = _mm256_set1_ps(block);
        const __m256i b0 = _mm256_shuffle_epi8(low.low, index), b1 = _mm256_shuffle_epi8(low.high, index);
        const __m256i b2 = _mm256_shuffle_epi8(high.low, index), b3 = _mm256_shuffle_epi8(high.high, index);
        put_16(_mm256_unpacklo_epi8(b0, b1), _mm256_unpacklo_epi8(b2, b3), scale, out);
        put_16(_mm256_unpackhi_epi8(b0, b1), _mm256_unpackhi_epi8(b2, b3), scale, out + 16);
    }

    static void put_16(__m256i lower, __m256i upper, __m256 scale, float* out) {
        const __m256 first = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower, upper));
        const __m256 second = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower, upper));
        _mm256_storeu_ps(out, _mm256_mul_ps(first, scale));
        _mm256_storeu_ps(out + 8, _mm256_mul_ps(second, scale));
    }
};

// `count` elements, a multiple of 32, from `packed` on. Of the last 32 alone only 16 bytes are read, and what the upper
// lane then holds is not used.
template <typename T>
inline void decode_vectors(const Lookup<T>& lookup, const typename Lookup<T>::Block& block, const uint8_t* packed,
                           int64_t count, T* out) {
    const __m256i mask = _mm256_set1_epi8(15);
    const auto put = [&](__m256i bytes, T* to, bool both) {
        bytes = lookup.ordered(bytes);
        const __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), odd = _mm256_and_si256(bytes, mask);
        lookup.put(block, _mm256_unpacklo_epi8(even, odd), to);
        if (both) lookup.put(block, _mm256_unpackhi_epi8(even, odd), to + 32);
    };
    for (; count >= 64; count -= 64, packed += 32, out += 64) {
        put(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)), out, true);
    }
    if (count > 0) put(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed))), out, false);
}

#else

template <typename T>
struct Lookup {
    using Block = float;
    explicit Lookup(const float*) {}
    Block block(float scale) const { return scale; }
};

template <typename T>
void decode_vectors(const Lookup<T>&, float, const uint8_t*, int64_t, T*) {}

#endif

}  // namespace
