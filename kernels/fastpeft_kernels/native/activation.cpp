// Gated activations on CPU: h = act(gate) * up and its gradients, each in one pass.
//
// All arithmetic is fp32. 16-bit tensors go through buffers that stay in the first-level cache, so that each activation
// is compiled once for all dtypes. Loops have no branches; "omp simd" promises the compiler that elements do not depend on
// each other, which holds for a result that is the very tensor of an input too, so that those are vectorised as well.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // nobody reads the flags of floating-point exceptions, and selects need no branch
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 512;   // elements in a buffer: seven of them fit a first-level cache
constexpr int64_t PIECE = 4096;  // elements of a row that a thread takes at a time

// sigmoid(x) and 1 - sigmoid(x), both without cancellation or overflow.
struct Sigmoid {
    float value, rest;
    explicit Sigmoid(float x) {
        const float e = exponential(-std::fabs(x)), larger = 1.0f / (1.0f + e), smaller = e * larger;
        value = x < 0.0f ? smaller : larger;
        rest = x < 0.0f ? larger : smaller;
    }
};

// The normal distribution's cdf and density; the coefficients are those of activation/triton_math.py, where they are derived.
struct Normal {
    float cdf, density;
    explicit Normal(float x) {
        const float scaled = 0.34f * std::min(std::fabs(x), 32.0f), t = 1.0f / (1.0f + scaled), s = scaled * t;
        float p = multiply_add(-0.0259407163f, s, 0.0689012557f);
        p = multiply_add(p, s, -0.0273074098f);
        p = multiply_add(p, s, -0.0305669717f);
        p = multiply_add(p, s, -0.0766097009f);
        p = multiply_add(p, s, 0.0845903382f);
        p = multiply_add(p, s, 0.315915078f);
        p = multiply_add(p, s, -0.673360407f);
        p = multiply_add(p, s, 0.5f);
        const float e = exponential(-0.5f * x * x), tail = e * (p * t);
        cdf = x < 0.0f ? tail : 1.0f - tail;
        density = e * 0.398942280f;
    }
};

// Each activation: its value, and from the gradient of that the gradient of x.
struct Silu {
    static float value(float x) { return x * Sigmoid(x).value; }
    static float gradient(float grad, float x, float& value) {
        const Sigmoid sigmoid(x);
        value = x * sigmoid.value;
        return grad * (sigmoid.value * multiply_add(x, sigmoid.rest, 1.0f));
    }
};
struct Gelu {
    static float value(float x) { return x * Normal(x).cdf; }
    static float gradient(float grad, float x, float& value) {
        const Normal normal(x);
        value = x * normal.cdf;
        return grad * multiply_add(x, normal.density, normal.cdf);
    }
};
struct GeluTanh {  // 1/2 (1 + tanh(z)) is sigmoid(2 z)
    static constexpr float SCALE = 1.59576912f, CUBE = 0.044715f;
    // The sigmoid has long been 0 or 1 where x * x is cut off, so that it cannot overflow.
    static float square(float x) { return std::min(x * x, 1e4f); }
    static float twice_z(float x) { return SCALE * x * multiply_add(CUBE, square(x), 1.0f); }
    static float value(float x) { return x * Sigmoid(twice_z(x)).value; }
    static float gradient(float grad, float x, float& value) {
        const Sigmoid sigmoid(twice_z(x));
        value = x * sigmoid.value;
        const float inner = SCALE * multiply_add(3.0f * CUBE, square(x), 1.0f);
        return grad * multiply_add(x * (sigmoid.value * sigmoid.rest), inner, sigmoid.value);
    }
};
struct Relu {
    static float value(float x) { return x < 0.0f ? 0.0f : x; }
    static float gradient(float grad, float x, float& value) {
        value = Relu::value(x);
        return x <= 0.0f ? 0.0f : grad;
    }
};
struct QuickGelu {
    static constexpr float SCALE = 1.702f;
    static float value(float x) { return x * Sigmoid(SCALE * x).value; }
    static float gradient(float grad, float x, float& value) {
        const Sigmoid sigmoid(SCALE * x);
        value = x * sigmoid.value;
        return grad * multiply_add(x, SCALE * (sigmoid.value * sigmoid.rest), sigmoid.value);
    }
};
struct Relu2 {
    static float value(float x) { return Relu::value(x) * Relu::value(x); }
    static float gradient(float grad, float x, float& value) {
        value = Relu2::value(x);
        return x <= 0.0f ? 0.0f : grad * (2.0f * x);
    }
};

template <typename Activation>
void forward_block(const float* gate, const float* up, float* h, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) h[i] = Activation::value(gate[i]) * up[i];
}

template <typename Activation>
void backward_block(const float* dh, const float* gate, const float* up, float* dgate, float* dup, float* h, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const float grad = dh[i], x = gate[i], factor = up[i];
        float value;
        dgate[i] = Activation::gradient(grad * factor, x, value);
        dup[i] = grad * value;
        h[i] = value * factor;
    }
}

using Forward = void (*)(const float*, const float*, float*, int64_t);
using Backward = void (*)(const float*, const float*, const float*, float*, float*, float*, int64_t);
// In the order of KINDS in activation/api.py.
constexpr Forward FORWARD[] = {forward_block<Silu>, forward_block<Gelu>,      forward_block<GeluTanh>,
                               forward_block<Relu>, forward_block<QuickGelu>, forward_block<Relu2>};
constexpr Backward BACKWARD[] = {backward_block<Silu>, backward_block<Gelu>,      backward_block<GeluTanh>,
                                 backward_block<Relu>, backward_block<QuickGelu>, backward_block<Relu2>};

// In the place of a factor that is not there.
inline const float* ones(int64_t count, float* buffer) {
    std::fill_n(buffer, count, 1.0f);
    return buffer;
}

template <typename T>
struct Matrix {
    T* data;
    int64_t stride;
    T* at(int64_t row, int64_t column) const { return data == nullptr ? nullptr : data + row * stride + column; }
};

// Calls block(row, column, count) for all of the matrix, in blocks; equal arguments always get equal blocks.
template <typename Block>
void for_each_block(int64_t rows, int64_t columns, int threads, const Block& block) {
    const int64_t pieces = (columns + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < rows * pieces; ++piece) {
        const int64_t row = piece / pieces, first = piece % pieces * PIECE, last = std::min(first + PIECE, columns);
        for (int64_t column = first; column < last; column += BLOCK) block(row, column, std::min(BLOCK, last - column));
    }
}

template <typename T>
void forward(int kind, Matrix<const T> gate, Matrix<const T> up, Matrix<T> h, int64_t rows, int64_t columns, int threads) {
    for_each_block(rows, columns, threads, [=](int64_t row, int64_t column, int64_t count) {
        alignas(64) float buffers[3][BLOCK];
        const float* factor = read(up.at(row, column), count, buffers[1]);
        const float* x = factor;
        if (gate.data == nullptr) {
            factor = ones(count, buffers[0]);
        } else {
            x = read(gate.at(row, column), count, buffers[0]);
        }
        float* result = target(h.at(row, column), buffers[2]);
        FORWARD[kind](x, factor, result, count);
        write(result, h.at(row, column), count);
    });
}

template <typename T>
void backward(int kind, Matrix<const T> dh, Matrix<const T> gate, Matrix<const T> up, Matrix<T> dgate, Matrix<T> dup,
              Matrix<T> h, int64_t rows, int64_t columns, int threads) {
    const bool gated = gate.data != nullptr;
    for_each_block(rows, columns, threads, [=](int64_t row, int64_t column, int64_t count) {
        alignas(64) float buffers[6][BLOCK];
        const float* grad = read(dh.at(row, column), count, buffers[0]);
        const float* factor = read(up.at(row, column), count, buffers[1]);
        const float* x = factor;
        if (gated) {
            x = read(gate.at(row, column), count, buffers[2]);
        } else {
            factor = ones(count, buffers[2]);
        }
        T* to_x = gated ? dgate.at(row, column) : dup.at(row, column);
        T* to_factor = gated ? dup.at(row, column) : nullptr;
        T* to_h = h.at(row, column);
        float* results[] = {target(to_x, buffers[3]), target(to_factor, buffers[4]), target(to_h, buffers[5])};
        BACKWARD[kind](grad, x, factor, results[0], results[1], results[2], count);
        write(results[0], to_x, count);
        write(results[1], to_factor, count);
        write(results[2], to_h, count);
    });
}

}  // namespace

// Pointers to (rows, columns) with a row stride in elements; `gate`, `dgate` and the backward's `h` may be null.
#define FASTPEFT_ACTIVATION(T, NAME)                                                                                   \
    void fastpeft_gated_activation_##NAME(int kind, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, \
                                          T* h, int64_t h_stride, int64_t rows, int64_t columns, int threads) {        \
        forward<T>(kind, {gate, gate_stride}, {up, up_stride}, {h, h_stride}, rows, columns, threads);                 \
    }                                                                                                                  \
    void fastpeft_gated_activation_backward_##NAME(                                                                    \
        int kind, const T* dh, int64_t dh_stride, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,  \
        T* dgate, int64_t dgate_stride, T* dup, int64_t dup_stride, T* h, int64_t h_stride, int64_t rows,              \
        int64_t columns, int threads) {                                                                                \
        backward<T>(kind, {dh, dh_stride}, {gate, gate_stride}, {up, up_stride}, {dgate, dgate_stride},                \
                    {dup, dup_stride}, {h, h_stride}, rows, columns, threads);                                         \
    }

extern "C" {
FASTPEFT_ACTIVATION(float, float32)
FASTPEFT_ACTIVATION(BFloat16, bfloat16)
FASTPEFT_ACTIVATION(Half, float16)
}
