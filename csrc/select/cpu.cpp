// Selection on the CPU: integers alone, which the compiler vectorises where that pays, so there is one body for all
// instruction sets.
#include <cstring>

#include "select/select.h"

namespace pylora::select {
namespace {

constexpr int kDigitBits = 16;
constexpr int64_t kBins = int64_t{1} << kDigitBits;
// Neighbouring elements often fall into one bin: counting them in tables of their own avoids waiting for a store.
constexpr int kTables = 4;
// Waking a thread costs about 5 us, in which one reads 20,000 numbers.
constexpr int64_t kGrain = 20000;

/// A dtype's bits. The leading digit holds the exponent and what fits of the mantissa, below the sign, which is 0.
template <class Bits>
struct Layout {
  static constexpr int kBits = 8 * static_cast<int>(sizeof(Bits));
  static constexpr Bits kMagnitude = static_cast<Bits>(~(Bits{1} << (kBits - 1)));
};

/// The bin of the count-th largest; `above`: those in higher
/// bins.
int64_t find_bin(const uint32_t* tables, int64_t count, int64_t* above) {
  *above = 0;
  for (int64_t bin = kBins - 1; bin > 0; --bin) {
    int64_t here = 0;
    for (int table = 0; table < kTables; ++table)
      here += tables[table * kBins + bin];
    if (*above + here >= count) return bin;
    *above += here;
  }
  return 0;
}

/// Counts the digits at `shift` of the magnitudes.
template <class Bits>
void count_digits(const Bits* values, int64_t size, int shift, uint32_t* tables) {
  std::memset(tables, 0, kTables * kBins * sizeof(uint32_t));
  int64_t i = 0;
  for (; i + kTables <= size; i += kTables)
    for (int table = 0; table < kTables; ++table)
      ++tables[table * kBins +
               static_cast<int64_t>(((values[i + table] & Layout<Bits>::kMagnitude) >> shift) & (kBins - 1))];
  for (; i < size; ++i)
    ++tables[static_cast<int64_t>(((values[i] & Layout<Bits>::kMagnitude) >> shift) & (kBins - 1))];
}

/// Copies the magnitudes whose digit at `shift` is `bin` to `out`, which may be `values`; returns their number.
template <class Bits>
int64_t collect(const Bits* values, int64_t size, int shift, int64_t bin, Bits* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    const Bits magnitude = values[i] & Layout<Bits>::kMagnitude;
    out[found] = magnitude;  // without a branch: the next one overwrites what does not belong
    found += static_cast<int64_t>((magnitude >> shift) & (kBins - 1)) == bin;
  }
  return found;
}

template <class Bits>
Threshold threshold_of(const ThresholdArgs& args) {
  uint32_t* tables = static_cast<uint32_t*>(args.workspace);
  Bits* candidates = reinterpret_cast<Bits*>(tables + kTables * kBins);
  const Bits* values = static_cast<const Bits*>(args.x);
  Threshold result;
  int64_t size = args.size;
  // The first digit starts below the sign, and the last one may hold bits again in which all candidates agree.
  for (int at = Layout<Bits>::kBits - 1 - kDigitBits;; at -= kDigitBits) {
    const int shift = at < 0 ? 0 : at;
    count_digits(values, size, shift, tables);
    int64_t above;
    const int64_t bin = find_bin(tables, args.count - result.larger, &above);
    result.larger += above;
    size = collect(values, size, shift, bin, candidates);
    values = candidates;
    if (shift == 0) break;
  }
  result.bits = candidates[0];
  result.equal = size;
  return result;
}

template <class Bits>
void keep(const Context& context, int64_t size, const Bits* x, Bits threshold, Bits* out) {
  parallel_for(context, size, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      out[i] = (x[i] & Layout<Bits>::kMagnitude) >= threshold ? x[i] : Bits{0};
  });
}

}  // namespace

int64_t threshold_workspace_bytes(int64_t size, DType dtype) {
  return kTables * kBins * static_cast<int64_t>(sizeof(uint32_t)) + (size + 1) * dtype_bytes(dtype);
}

Status magnitude_threshold_cpu(const Context&, const ThresholdArgs& args, Threshold* found) {
  if (args.count < 1 || args.count > args.size) return invalid_argument("select: count: expected 1 to the size");
  if (args.size >= int64_t{1} << 32) return unsupported("select: more than 2^32 - 1 elements");
  switch (args.dtype) {
    case DType::f64:
      *found = threshold_of<uint64_t>(args);
      break;
    case DType::f32:
      *found = threshold_of<uint32_t>(args);
      break;
    default:
      *found = threshold_of<uint16_t>(args);
  }
  return {};
}

Status keep_from_cpu(const Context& context, int64_t size, DType dtype, const void* x, uint64_t threshold, void* out) {
  switch (dtype) {
    case DType::f64:
      keep(context, size, static_cast<const uint64_t*>(x), threshold, static_cast<uint64_t*>(out));
      break;
    case DType::f32:
      keep(context, size, static_cast<const uint32_t*>(x), static_cast<uint32_t>(threshold),
           static_cast<uint32_t*>(out));
      break;
    default:
      keep(context, size, static_cast<const uint16_t*>(x), static_cast<uint16_t>(threshold),
           static_cast<uint16_t*>(out));
  }
  return {};
}

}  // namespace pylora::select
