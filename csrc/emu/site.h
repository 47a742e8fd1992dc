// A place in a kernel's source, for reports.
#pragma once

namespace pylora::emu {

struct Site {
  const char* file = "";
  int line = 0;

  /// As a default argument: where the function that has it was called.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace pylora::emu
