// Matrices in memory as launchers take them.
#pragma once

#include <cstdint>

namespace pylora {

/// Strides in elements.
template <class Pointer>
struct Matrix {
  Pointer data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
};
using ConstMatrix = Matrix<const void*>;
using MutableMatrix = Matrix<void*>;

template <class T>
const T* row_of(ConstMatrix m, int64_t row) {
  return static_cast<const T*>(m.data) + row * m.row_stride;
}
template <class T>
T* row_of(MutableMatrix m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.row_stride;
}

}  // namespace pylora
