// Memory of a thread, kept for its next call.

#pragma once

#include <stdlib.h>

namespace {

struct Room {
    float* at = nullptr;
    size_t size = 0;
    float* of(size_t floats) {
        if (floats > size) {
            free(at);
            size = floats;
            at = (float*)aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        }
        return at;
    }
};

}  // namespace
