// Choosing the instruction set: asked for by several threads while another switches it, every answer is one of the two.
#include <atomic>

#include "threads.h"

using namespace pylora;

int main() {
  Isa best;
  CHECK(current_isa(&best).is_ok(), "first use");
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0}, asked{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < 3; ++i)
    readers.emplace_back([&] {
      do {
        Isa isa;
        if (!current_isa(&isa).is_ok() || (isa != Isa::scalar && isa != best)) ++wrong;
        ++asked;
      } while (!stop);
    });
  for (int i = 0; i < 1000; ++i)
    CHECK(set_isa(i % 2 ? isa_name(best) : "scalar").is_ok(), "switch %d", i);
  stop = true;
  for (std::thread& reader : readers)
    reader.join();
  CHECK(wrong == 0 && asked >= 3, "%d of %d answers wrong", wrong.load(), asked.load());
  Isa last;
  CHECK(current_isa(&last).is_ok() && last == best, "the last switch holds");
  return test::failures() == 0 ? 0 : 1;
}
