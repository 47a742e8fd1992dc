// The smallest test harness: CHECK counts and prints failures, and a test program fails if failures() is not 0.
#pragma once

#include <cstdio>

namespace pylora::test {

inline int& failures() {
  static int count = 0;
  return count;
}

}  // namespace pylora::test

#define CHECK(condition, ...)                                            \
  do {                                                                   \
    if (!(condition)) {                                                  \
      ++pylora::test::failures();                                        \
      std::printf("%s:%d: CHECK(%s): ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                          \
      std::printf("\n");                                                 \
    }                                                                    \
  } while (0)
