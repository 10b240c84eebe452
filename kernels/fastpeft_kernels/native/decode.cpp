// 4-bit weights to dense ones on CPU: scales, nested or not, look-up, product and rounding in one pass.
#include "decode_lookup.h"

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t PIECE = 1 << 16;  // elements a thread takes at a time; also what a second thread is worth waking for
constexpr int64_t SCALES = 256;      // computed ahead of what waits for them

struct Weight {
    const uint8_t* packed;
    const void* absmax;  // float, or uint8_t when nested
    const float* code;
    const float* nested_absmax;  // null when not nested
    const float* nested_code;
    const float* nested_offset;
    int shift, nested_shift;  // log2 of the block sizes

    void scales(int64_t block, int64_t count, float* out) const {
        if (nested_absmax == nullptr) {
            std::copy_n(static_cast<const float*>(absmax) + block, count, out);
            return;
        }
        const uint8_t* index = static_cast<const uint8_t*>(absmax);
        for (const int64_t end = block + count; block < end;) {
            const int64_t group = block >> nested_shift, stop = std::min(end, (group + 1) << nested_shift);
            const float largest = nested_absmax[group], offset = *nested_offset;
            for (; block < stop; ++block) *out++ = nested_code[index[block]] * largest + offset;
        }
    }
};

// To nearest even; NaN stays NaN.
inline void round_to(float value, float& out) { out = value; }
inline void round_to(float value, BFloat16& out) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
inline void round_to(float value, Half& out) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u;
    } else if (magnitude >= 0x47800000u) {  // 65536 and more
        half = 0x7C00u;
    } else if (magnitude >= 0x38800000u) {  // normal in fp16 too; may carry up to infinity
        half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    } else if (magnitude >= 0x33000000u) {  // counts of 2^-24, from half of one on
        const uint32_t shift = 126u - (magnitude >> 23), mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
        half = (mantissa + (1u << (shift - 1)) - 1u + ((mantissa >> shift) & 1u)) >> shift;
    } else {
        half = 0u;
    }
    out.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | half);
}

// Elements begin <= e < end of one block.
template <typename T>
void decode_plain(const Weight& weight, float scale, int64_t begin, int64_t end, T* out) {
    T values[16];
    for (int nibble = 0; nibble < 16; ++nibble) round_to(weight.code[nibble] * scale, values[nibble]);
    if (begin < end && begin % 2) *out++ = values[weight.packed[begin++ / 2] & 15];
    for (; begin + 2 <= end; begin += 2, out += 2) {
        const uint8_t byte = weight.packed[begin / 2];
        out[0] = values[byte >> 4];
        out[1] = values[byte & 15];
    }
    if (begin < end) *out = values[weight.packed[begin / 2] >> 4];
}

// Elements begin <= e < end of one block.
template <typename T>
void decode_part(const Weight& weight, const Lookup<T>& lookup, float scale, int64_t begin, int64_t end, T* out, bool plain) {
    if (!plain) {
        const int64_t odd = begin & 1, count = (end - begin - odd) & ~INT64_C(31);
        if (odd) decode_plain(weight, scale, begin, begin + 1, out);
        begin += odd, out += odd;
        decode_vectors(lookup, lookup.block(scale), weight.packed + (begin >> 1), count, out);
        begin += count, out += count;
    }
    if (begin < end) decode_plain(weight, scale, begin, end, out);
}

// Elements begin <= e < end of the flat weight.
template <typename T>
void decode_range(const Weight weight, int64_t begin, int64_t end, T* out, bool plain) {
    const Lookup<T> lookup(weight.code);
    const int64_t size = INT64_C(1) << weight.shift;
    float scales[SCALES];
    while (begin < end) {
        const int64_t block = begin >> weight.shift, last = ((end - 1) >> weight.shift) + 1;
        const int64_t stop = std::min(end, std::min(last, block + SCALES) << weight.shift);
        weight.scales(block, std::min(last - block, SCALES), scales);
        for (const float* scale = scales; begin < stop;) {
            if (!plain && stop - begin >= 2 * size && (begin & (size - 1)) == 0) {
                // Two whole blocks together: the steps to one table wait for each other, not for those to the second.
                const auto first = lookup.block(scale[0]), second = lookup.block(scale[1]);
                decode_vectors(lookup, first, weight.packed + (begin >> 1), size, out);
                decode_vectors(lookup, second, weight.packed + ((begin + size) >> 1), size, out + size);
                begin += 2 * size, out += 2 * size, scale += 2;
            } else {
                const int64_t count = std::min(stop - begin, size - (begin & (size - 1)));
                decode_part(weight, lookup, *scale++, begin, begin + count, out, plain);
                begin += count, out += count;
            }
        }
    }
}

template <typename T>
void decode(const Weight& weight, int64_t first, T* out, int64_t rows, int64_t columns, int64_t stride, int threads,
            bool plain) {
    if (stride == columns) columns *= rows, rows = 1;
    const int64_t total = rows * columns, pieces = (total + PIECE - 1) / PIECE;
    const auto decode_piece = [&](int64_t piece) {
        const int64_t end = std::min(total, (piece + 1) * PIECE);
        for (int64_t begin = piece * PIECE; begin < end;) {
            const int64_t row = begin / columns, column = begin % columns;
            const int64_t count = std::min(end - begin, columns - column);
            decode_range(weight, first + begin, first + begin + count, out + row * stride + column, plain);
            begin += count;
        }
    };
    if (threads <= 1 || pieces <= 1) {  // no OpenMP at all: its threads do not survive a fork
        for (int64_t piece = 0; piece < pieces; ++piece) decode_piece(piece);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; ++piece) decode_piece(piece);
}

}  // namespace

#define FASTPEFT_DECODE(NAME, T)                                                                                       \
    extern "C" void NAME(const uint8_t* packed, const void* absmax, const float* code, const float* nested_absmax,     \
                         const float* nested_code, const float* nested_offset, int64_t blocksize,                      \
                         int64_t nested_blocksize, int64_t first, T* out, int64_t rows, int64_t columns,               \
                         int64_t stride, int32_t threads, int32_t plain) {                                             \
        const Weight weight{packed, absmax, code, nested_absmax, nested_code, nested_offset,                           \
                            __builtin_ctzll(blocksize), __builtin_ctzll(nested_blocksize)};                            \
        decode(weight, first, out, rows, columns, stride, threads, plain || !FASTPEFT_AVX2);                           \
    }

FASTPEFT_DECODE(fastpeft_decode_4bit_float32, float)
FASTPEFT_DECODE(fastpeft_decode_4bit_bfloat16, BFloat16)
FASTPEFT_DECODE(fastpeft_decode_4bit_float16, Half)
