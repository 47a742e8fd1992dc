// What csrc/cuda/*.cuh call: the emulated counterparts of instructions. Accesses to a kernel's own memory are inline
// here, so that a sanitizer sees them in the kernel; the bookkeeping is in the emulator's .cpp files, which are built
// without TSan.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/status.h"
#include "emu/numbers.h"
#include "emu/site.h"

namespace pylora::emu {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_size();
const Dim3& grid_size();

/// The running block's dynamic shared memory.
unsigned char* shared_memory();
int num_multiprocessors();
size_t max_shared_bytes();

/// Ends the launch with an error that names kernel, block, thread and site.
[[noreturn]] void trap(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Launching.

Status launch(const char* signature, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);

template <class Body>
Status launch(const char* signature, Dim3 grid, Dim3 block, size_t shared_bytes, Body&& body) {
  return launch(
      signature, grid, block, shared_bytes,
      [](void* erased) { (*static_cast<std::remove_reference_t<Body>*>(erased))(); }, static_cast<void*>(&body));
}

// Global memory.

enum class LoadKind : uint8_t { readonly, uniform, own, coherent, acquire };

void check_load(const void* p, size_t bytes, LoadKind kind, Site site);
void check_store(const void* p, size_t bytes, Site site);
void check_atomic(const void* p, size_t bytes, Site site);

/// A word as a sanitizer sees one: of an integer type that may alias any other, at its natural alignment.
template <size_t Bytes>
struct AliasOf;
template <>
struct AliasOf<1> {
  typedef uint8_t __attribute__((may_alias)) type;
};
template <>
struct AliasOf<2> {
  typedef uint16_t __attribute__((may_alias)) type;
};
template <>
struct AliasOf<4> {
  typedef uint32_t __attribute__((may_alias)) type;
};
template <>
struct AliasOf<8> {
  typedef uint64_t __attribute__((may_alias)) type;
};

/// memcpy of `Bytes` bytes in words of up to eight: inlined copies of the library's are invisible to TSan.
template <size_t Bytes>
void copy_words(void* to, const void* from) {
  using Alias = typename AliasOf<(Bytes < 8 ? Bytes : 8)>::type;
  for (size_t i = 0; i < Bytes / sizeof(Alias); ++i)
    static_cast<Alias*>(to)[i] = static_cast<const Alias*>(from)[i];
}

template <class V>
V load(const void* p, LoadKind kind, Site site) {
  check_load(p, sizeof(V), kind, site);
  V value;
  copy_words<sizeof(V)>(&value, p);
  return value;
}

template <class V>
void store(void* p, V value, Site site) {
  check_store(p, sizeof(V), site);
  copy_words<sizeof(V)>(p, &value);
}

// cp.async: the destination holds NaN until the wait, when the data is copied.

struct Copy {
  void* to;
  const void* from;
  int bytes, valid_bytes, group;
};

/// Checks, counts and queues.
void begin_copy(const Copy& copy, LoadKind kind, Site site);
/// Takes a copy that waiting for all but `pending` groups completes from the thread's queue; false if there is none.
bool take_copy(int pending, Copy* copy);
void cp_async_commit();

inline void cp_async(void* to, const void* from, int bytes, int valid_bytes, LoadKind kind, Site site) {
  begin_copy({to, from, bytes, valid_bytes, 0}, kind, site);
  using Word = AliasOf<4>::type;
  for (int i = 0; i < bytes / 4; ++i)
    static_cast<Word*>(to)[i] = 0xffffffffu;
}

inline void cp_async_wait(int pending) {
  using Byte = AliasOf<1>::type;
  for (Copy copy; take_copy(pending, &copy);) {
    for (int i = 0; i < copy.bytes; ++i) {
      static_cast<Byte*>(copy.to)[i] = i < copy.valid_bytes ? static_cast<const Byte*>(copy.from)[i] : 0;
    }
  }
}

// Between blocks.

/// What this thread and, as a barrier came before, its block have written is for those who acquire the counter. Kept
/// for blocks; TSan takes the order of threads from the atomic access itself.
void release_to(const int* counter);
void acquire_from(const int* counter);
/// Lets other blocks run before this one goes on.
void give_way(Site site);
/// The same, and says that the thread found nothing to do.
void spin_wait(Site site);

template <class T>
T atomic_add(T* p, T value, Site site) {
  check_atomic(p, sizeof(T), site);
  T before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  do {
    after = before + value;
  } while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

inline void atomic_add_pair(void* p, uint32_t pair, bool is_bf16, Site site) {
  check_atomic(p, sizeof(uint32_t), site);
  auto* const word = static_cast<AliasOf<4>::type*>(p);
  uint32_t before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  do {
    after = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const auto a = static_cast<uint16_t>(before >> shift), b = static_cast<uint16_t>(pair >> shift);
      const uint16_t sum =
          is_bf16 ? f32_to_bf16(bf16_to_f32(a) + bf16_to_f32(b)) : f32_to_f16(f16_to_f32(a) + f16_to_f32(b));
      after |= static_cast<uint32_t>(sum) << shift;
    }
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

inline int atomic_cas(int* p, int expected, int desired, Site site) {
  check_atomic(p, sizeof(int), site);
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

inline int arrive(int* counter, int amount, Site site) {
  check_atomic(counter, sizeof(int), site);
  release_to(counter);
  const int before = __atomic_fetch_add(counter, amount, __ATOMIC_ACQ_REL);
  acquire_from(counter);
  give_way(site);
  return before;
}

inline int load_acquire(const int* p, Site site) {
  check_load(p, sizeof(int), LoadKind::acquire, site);
  const int value = __atomic_load_n(p, __ATOMIC_ACQUIRE);
  acquire_from(p);
  return value;
}

// Within a block and a warp.

void sync_threads(Site site);
void sync_warp(uint32_t lanes, Site site);
/// Barrier `id` of `threads` threads; without `wait` it only arrives.
void barrier(int id, int threads, bool wait, Site site);

enum class ShuffleKind : uint8_t { index, up, down, exclusive_or };
uint32_t shuffle(uint32_t lanes, uint32_t bits, int operand, ShuffleKind kind, int width, Site site);
uint32_t ballot(uint32_t lanes, bool vote, Site site);

enum class MmaKind : uint8_t { bf16, f16, tf32 };
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MmaKind kind, Site site);

/// Checks this lane's row address for a load of `count` matrices; false if the lane's address is not read.
bool check_matrix_row(const void* row, int count, Site site);
/// Distributes the lanes' rows of eight 16-bit elements.
void exchange_matrices(uint32_t* r, const uint16_t (&row)[8], int count, bool transposed, Site site);

template <int N>
void ldmatrix(uint32_t (&r)[N], const void* row, int count, bool transposed, Site site) {
  uint16_t elements[8] = {};
  if (check_matrix_row(row, count, site)) copy_words<16>(elements, row);
  exchange_matrices(r, elements, count, transposed, site);
}

}  // namespace pylora::emu
