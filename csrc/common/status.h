// What a launcher answers. Messages are string literals or live as long as the process.
#pragma once

namespace pylora {

struct Status {
  enum class Code { ok, invalid_argument, unsupported, cuda_error };

  Code code = Code::ok;
  const char* message = "";

  constexpr bool is_ok() const { return code == Code::ok; }
};

constexpr Status invalid_argument(const char* message) { return {Status::Code::invalid_argument, message}; }
constexpr Status unsupported(const char* message) { return {Status::Code::unsupported, message}; }

}  // namespace pylora
