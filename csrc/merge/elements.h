// Elements of W in storage order as bytes in memory, whether its rows follow one another or not.
#pragma once

#include <cstring>

#include "merge/merge.h"

namespace pylora::merge {

/// Elements of one matrix in storage order, as bytes.
class Elements {
 public:
  Elements(const Weight& w, int64_t matrix)
      : base_(static_cast<char*>(w.data) + matrix * w.matrix_stride * dtype_bytes(w.dtype)),
        size_(dtype_bytes(w.dtype)),
        columns_(w.columns),
        row_stride_(w.rows == 1 ? w.columns : w.row_stride) {}

  char* base() const { return base_; }

  /// Where elements from `first` on lie as one run; null if rows are apart in memory.
  char* run(int64_t first) const { return row_stride_ == columns_ ? base_ + first * size_ : nullptr; }

  void read(int64_t first, int64_t count, void* to) const {
    for_rows(first, count, [to](int64_t done, char* place, size_t bytes) {
      std::memcpy(static_cast<char*>(to) + done, place, bytes);
    });
  }

  void write(int64_t first, int64_t count, const void* from) const {
    for_rows(first, count, [from](int64_t done, char* place, size_t bytes) {
      std::memcpy(place, static_cast<const char*>(from) + done, bytes);
    });
  }

 private:
  template <class Body>
  void for_rows(int64_t first, int64_t count, const Body& body) const {
    if (char* all = run(first)) return body(0, all, static_cast<size_t>(count * size_));
    for (int64_t done = 0; done < count;) {
      const int64_t row = (first + done) / columns_, column = (first + done) % columns_;
      const int64_t part = count - done < columns_ - column ? count - done : columns_ - column;
      body(done * size_, base_ + (row * row_stride_ + column) * size_, static_cast<size_t>(part * size_));
      done += part;
    }
  }

  char* base_;
  int64_t size_, columns_, row_stride_;
};

/// Calls work(elements as one run) for a chunk, by way of `buffer` if need be; writes back what it did if `changes`.
template <class Work>
void with_run(const Elements& elements, int64_t first, int64_t count, void* buffer, bool changes, const Work& work) {
  if (char* run = elements.run(first)) return work(run);
  elements.read(first, count, buffer);
  work(buffer);
  if (changes) elements.write(first, count, buffer);
}

struct alignas(64) ChunkBuffer {
  char bytes[kChunk * sizeof(double)];
};

}  // namespace pylora::merge
