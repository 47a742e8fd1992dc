// Inputs, buffers and 16-bit conversions that the test programs share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "common/dtype.h"

namespace pylora::test {

/// `bytes` aligned to 64 and filled with 0xff, a NaN in every float type: a kernel that reads before it writes shows.
/// Its end is the end of the allocation (to the next multiple of 64), so that ASan sees what goes beyond.
struct AlignedBuffer {
  std::unique_ptr<void, decltype(&std::free)> data;
  explicit AlignedBuffer(int64_t bytes)
      : data(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)), &std::free) {
    std::memset(data.get(), 0xff, static_cast<size_t>(bytes));
  }
};

inline std::vector<float> normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values)
    value = distribution(generator);
  return values;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

using Bytes = std::vector<unsigned char>;

/// `count` elements of `dtype` as they lie in memory: normal ones, for f16 of magnitude 1/8 to 4 with any mantissa.
inline Bytes random_elements(DType dtype, int64_t count, unsigned seed) {
  Bytes bytes(static_cast<size_t>(count * dtype_bytes(dtype)));
  const std::vector<float> values = normal(count, seed);
  std::mt19937 generator(seed);
  for (int64_t i = 0; i < count; ++i) {
    unsigned char* place = bytes.data() + i * dtype_bytes(dtype);
    if (dtype == DType::f32) {
      std::memcpy(place, &values[i], 4);
    } else if (dtype == DType::f64) {
      const double value = values[i];
      std::memcpy(place, &value, 8);
    } else if (dtype == DType::bf16) {
      const uint16_t value = to_bf16(values[i]);
      std::memcpy(place, &value, 2);
    } else {
      const unsigned random = static_cast<unsigned>(generator());
      const uint16_t value = static_cast<uint16_t>((random & 0x83ffu) | (12 + (random >> 16) % 5) << 10);
      std::memcpy(place, &value, 2);
    }
  }
  return bytes;
}

}  // namespace pylora::test
