// Element types of tensors as the kernels see them.
#pragma once

#include <cstdint>

namespace pylora {

enum class DType : uint8_t { f32, bf16, f16, f64 };
constexpr int kNumDTypes = 4;

/// Storage of the 16-bit types. Arithmetic is always done in the accumulator's type.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

/// The type that products of T are summed in: f64 for f64, f32 for all others.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

constexpr int64_t dtype_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
constexpr DType accumulator_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace pylora
