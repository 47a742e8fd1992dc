// The names of CUDA C++ that kernels may use as they are. What is missing here does not compile in emulation, and has a
// wrapper in csrc/cuda: global memory, atomics, fences, static shared memory.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emu/device.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::pylora::emu::thread_index())
#define blockIdx (::pylora::emu::block_index())
#define blockDim (::pylora::emu::block_size())
#define gridDim (::pylora::emu::grid_size())

using dim3 = pylora::emu::Dim3;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads(pylora::emu::Site site = pylora::emu::Site::here()) { pylora::emu::sync_threads(site); }
inline void __syncwarp(unsigned lanes = 0xffffffffu, pylora::emu::Site site = pylora::emu::Site::here()) {
  pylora::emu::sync_warp(lanes, site);
}

namespace pylora::emu {

template <class T>
T shuffle_value(uint32_t lanes, T value, int operand, ShuffleKind kind, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words)
    word = shuffle(lanes, word, operand, kind, width, site);
  std::memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace pylora::emu

template <class T>
T __shfl_sync(unsigned lanes, T value, int lane, int width = 32, pylora::emu::Site site = pylora::emu::Site::here()) {
  return pylora::emu::shuffle_value(lanes, value, lane, pylora::emu::ShuffleKind::index, width, site);
}
template <class T>
T __shfl_up_sync(unsigned lanes, T value, unsigned delta, int width = 32,
                 pylora::emu::Site site = pylora::emu::Site::here()) {
  return pylora::emu::shuffle_value(lanes, value, static_cast<int>(delta), pylora::emu::ShuffleKind::up, width, site);
}
template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned delta, int width = 32,
                   pylora::emu::Site site = pylora::emu::Site::here()) {
  return pylora::emu::shuffle_value(lanes, value, static_cast<int>(delta), pylora::emu::ShuffleKind::down, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, int width = 32,
                  pylora::emu::Site site = pylora::emu::Site::here()) {
  return pylora::emu::shuffle_value(lanes, value, mask, pylora::emu::ShuffleKind::exclusive_or, width, site);
}

inline unsigned __ballot_sync(unsigned lanes, int vote, pylora::emu::Site site = pylora::emu::Site::here()) {
  return pylora::emu::ballot(lanes, vote != 0, site);
}
inline int __any_sync(unsigned lanes, int vote, pylora::emu::Site site = pylora::emu::Site::here()) {
  return pylora::emu::ballot(lanes, vote != 0, site) != 0;
}
inline int __all_sync(unsigned lanes, int vote, pylora::emu::Site site = pylora::emu::Site::here()) {
  return pylora::emu::ballot(lanes, vote != 0, site) == lanes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float value) { return pylora::emu::bits_of(value); }
inline float __uint_as_float(unsigned bits) { return pylora::emu::float_of(bits); }
inline int __float_as_int(float value) { return static_cast<int>(pylora::emu::bits_of(value)); }
inline float __int_as_float(int bits) { return pylora::emu::float_of(static_cast<unsigned>(bits)); }

// The emulated library is compiled without contraction, so these are what they say.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
