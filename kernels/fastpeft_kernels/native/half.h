// The bits of 16- and 32-bit floating numbers.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

}  // namespace
