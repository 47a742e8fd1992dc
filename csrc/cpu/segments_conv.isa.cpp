// The kernels of segments_conv.h. Vectors run along the positions of an image, which are neighbours in memory, and
// factors are read one number at a time: tiles of 6 ranks (or output channels) x 2 vectors.
//
// Where the kernel moves in steps of one, a channel's rows are laid out with the padding between them; an element of
// the kernel then is a shift along that line, and nothing is copied for it. Positions that the padding adds are computed
// and dropped. Otherwise each element of the kernel has a line of its own.
#include "cpu/segments_conv_kernels.h"
#include "cpu/simd/stage.h"

namespace pylora::PYLORA_ISA {
namespace {

constexpr int kTile = 6;
constexpr int64_t kMaxLine = 2 * kConvPositions;  // positions with padding
constexpr int64_t kBuffer = 6144;                 // elements: 24 KB of f32
constexpr int64_t kMaxDepth = 256;                // of a block
constexpr int64_t kMaxRuns = kConvPositions;
constexpr int64_t kRankBlock = 32;
constexpr int64_t kMostRanks = 512;

template <class C>
constexpr int64_t kWide = 2 * kLanes<C>;

template <class C>
constexpr int64_t whole(int64_t count) {
  return (count + kWide<C> - 1) / kWide<C> * kWide<C>;
}

/// The first of equal parts that `count` is split into, each at most kTile.
constexpr int64_t tile_of(int64_t count) {
  const int64_t tiles = (count + kTile - 1) / kTile;
  return (count + tiles - 1) / tiles;
}

template <class F, class C>
void pack_as(ConstMatrix factor, int64_t rows, int64_t columns, C* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const F* row = row_of<F>(factor, i);
    for (int64_t j = 0; j < columns; ++j)
      out[j * rows + i] = static_cast<C>(widened(row + j * factor.column_stride));
  }
}

template <class C>
void pack(ConstMatrix factor, DType dtype, int64_t rows, int64_t columns, void* out) {
  constexpr void (*kForms[kNumDTypes])(ConstMatrix, int64_t, int64_t, C*) = {pack_as<float, C>, pack_as<bf16, C>,
                                                                             pack_as<f16, C>, pack_as<double, C>};
  kForms[static_cast<int>(dtype)](factor, rows, columns, static_cast<C*>(out));
}

/// count elements, `step` apart in x, as accumulators.
template <class T>
void copy_run(const T* x, int64_t step, int64_t count, Accumulator<T>* out) {
  using C = Accumulator<T>;
  int64_t i = 0;
  if (step == 1 && count >= kLanes<C>) {
    for (; i + kLanes<C> <= count; i += kLanes<C>)
      store(out + i, load(x + i));
    store(out + count - kLanes<C>, load(x + count - kLanes<C>));
    return;
  }
  for (; i < count; ++i)
    out[i] = widened(x + i * step);
}

// ---- positions ----

/// Neighbouring positions of one output row.
struct Run {
  int64_t first;  // counted from the block's begin
  int64_t count;
  int64_t at[kSpatialDims];  // output coordinates of the first
};

/// The positions [begin, end) row by row, at most kMaxRuns rows.
struct Runs {
  Run runs[kMaxRuns];
  int64_t count = 0;

  Runs(const ConvGeometry& g, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end;) {
      const int64_t row = p / g.out[2], x = p % g.out[2];
      const int64_t length = min_of(g.out[2] - x, end - p);
      runs[count++] = {p - begin, length, {row / g.out[1], row % g.out[1], x}};
      p += length;
    }
  }
  const Run& last() const { return runs[count - 1]; }
};

/// Channels laid out with the padding between their rows.
struct Line {
  int64_t height, width;  // of a padded plane
  int64_t first;          // where the block begins on the line
  int64_t positions;      // of the block, with padding between them
  int64_t longest_shift;

  Line(const ConvGeometry& g, const Runs& runs) {
    height = g.out[1] + (g.kernel[1] - 1) * g.dilation[1];
    width = g.out[2] + (g.kernel[2] - 1) * g.dilation[2];
    first = place(runs.runs[0]);
    positions = place(runs.last()) + runs.last().count - first;
    longest_shift = shift(g, g.taps() - 1);
  }
  int64_t place(const Run& run) const { return (run.at[0] * height + run.at[1]) * width + run.at[2]; }
  int64_t shift(const ConvGeometry& g, int64_t tap) const {
    const int64_t x = tap % g.kernel[2], y = tap / g.kernel[2] % g.kernel[1], z = tap / g.kernel[2] / g.kernel[1];
    return (z * g.dilation[0] * height + y * g.dilation[1]) * width + x * g.dilation[2];
  }
};

/// Blocks of x of one row as lines of accumulators: line k belongs to channel k / taps and element k % taps of the kernel.
template <class T>
class Lines {
  using C = Accumulator<T>;

 public:
  Lines(const SegmentConv& args, int64_t row, int64_t begin, int64_t end)
      : g_(args.geometry),
        x_(static_cast<const T*>(args.x) + row * args.in_channels * args.geometry.plane()),
        depth_(args.in_channels * args.geometry.taps()),
        runs_(args.geometry, begin, end),
        line_(args.geometry, runs_) {
    const bool is_dense = g_.stride[0] == 1 && g_.stride[1] == 1 && g_.stride[2] == 1;
    shifts_ = is_dense && line_.positions <= kMaxLine && g_.taps() <= kMaxDepth;
    positions_ = whole<C>(shifts_ ? line_.positions : end - begin);
    length_ = positions_ + (shifts_ ? line_.longest_shift : 0);
    shifts_ = shifts_ && find_rows();
    if (!shifts_) length_ = positions_ = whole<C>(end - begin);
    for (int64_t i = 0; i < kBuffer; ++i)
      buffer_[i] = 0;
  }

  /// Positions of a line, in whole vectors.
  int64_t positions() const { return positions_; }
  const Runs& runs() const { return runs_; }
  /// Where a run's positions are on a line.
  int64_t place(const Run& run) const { return shifts_ ? line_.place(run) - line_.first : run.first; }

  /// Lines from k on; answers how many.
  int64_t stage(int64_t k, const C** lines) {
    const int64_t taps = g_.taps(), in_buffer = kBuffer / length_;
    if (!shifts_) {
      const int64_t count = min_of(min_of(in_buffer, kMaxDepth), depth_ - k);
      for (int64_t i = 0; i < count; ++i) {
        stage_tap((k + i) / taps, (k + i) % taps, buffer_ + i * length_);
        lines[i] = buffer_ + i * length_;
      }
      return count;
    }
    const int64_t channels = min_of(min_of(in_buffer, kMaxDepth / taps), (depth_ - k) / taps);
    for (int64_t c = 0; c < channels; ++c) {
      C* out = buffer_ + c * length_;
      for (int64_t i = 0; i < num_rows_; ++i)
        copy_run(x_ + (k / taps + c) * g_.plane() + rows_[i].source, 1, rows_[i].count, out + rows_[i].target);
      for (int64_t t = 0; t < taps; ++t)
        lines[c * taps + t] = out + line_.shift(g_, t);
    }
    return channels * taps;
  }

 private:
  struct InputRow {
    int64_t source, target, count;
  };

  /// The rows of x that lie on the line; false: too many, or the line is too long.
  bool find_rows() {
    if (length_ * 4 > kBuffer) return false;
    const int64_t last = line_.first + length_;
    for (int64_t row = line_.first / line_.width; row * line_.width < last; ++row) {
      const int64_t z = row / line_.height - g_.padding[0], y = row % line_.height - g_.padding[1];
      if (z < 0 || z >= g_.in[0] || y < 0 || y >= g_.in[1]) continue;
      const int64_t start = row * line_.width + g_.padding[2] - line_.first;  // of the row's first element
      const int64_t skipped = start < 0 ? -start : 0;
      const int64_t in_row = line_.width - g_.padding[2];  // a row longer than the kernel's reach ends there
      const int64_t count = min_of(min_of(g_.in[2], in_row), length_ - start) - skipped;
      if (count <= 0) continue;
      if (num_rows_ == kMaxRuns) return false;
      rows_[num_rows_++] = {(z * g_.in[1] + y) * g_.in[2] + skipped, start + skipped, count};
    }
    return true;
  }

  /// One channel seen through one element of the kernel.
  void stage_tap(int64_t channel, int64_t tap, C* out) const {
    const int64_t element[kSpatialDims] = {tap / g_.kernel[2] / g_.kernel[1], tap / g_.kernel[2] % g_.kernel[1],
                                           tap % g_.kernel[2]};
    for (int64_t i = 0; i < runs_.count; ++i) {
      const Run& run = runs_.runs[i];
      int64_t at[kSpatialDims];
      for (int d = 0; d < kSpatialDims; ++d)
        at[d] = run.at[d] * g_.stride[d] - g_.padding[d] + element[d] * g_.dilation[d];
      const bool is_inside = at[0] >= 0 && at[0] < g_.in[0] && at[1] >= 0 && at[1] < g_.in[1];
      const int64_t step = g_.stride[2];
      // Positions [low, high) of the run are inside.
      int64_t low = at[2] < 0 ? (-at[2] + step - 1) / step : 0;
      int64_t high = at[2] < g_.in[2] ? (g_.in[2] - at[2] + step - 1) / step : 0;
      high = is_inside ? min_of(high, run.count) : 0;
      low = min_of(low, high);
      C* to = out + run.first;
      for (int64_t j = 0; j < low; ++j)
        to[j] = 0;
      if (low < high) {
        const int64_t row = channel * g_.plane() + (at[0] * g_.in[1] + at[1]) * g_.in[2];
        copy_run(x_ + row + at[2] + low * step, step, high - low, to + low);
      }
      for (int64_t j = high; j < run.count; ++j)
        to[j] = 0;
    }
  }

  const ConvGeometry& g_;
  const T* x_;
  int64_t depth_;
  Runs runs_;
  Line line_;
  bool shifts_ = false;
  int64_t positions_ = 0, length_ = 0;
  InputRow rows_[kMaxRuns];
  int64_t num_rows_ = 0;
  alignas(64) C buffer_[kBuffer];
};

// ---- products ----

/// sums[m, 0 to 2 vectors] (+)= sum over k of factor[k, m] lines[k][position ...].
template <class C, int M>
void add_lines(const C* const* lines, int64_t position, int64_t depth, const C* factor, int64_t factor_stride, C* sums,
               int64_t stride, bool accumulate) {
  constexpr int kL = kLanes<C>;
  Vec<C> sum[M][2];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    sum[m][0] = accumulate ? load(sums + m * stride) : Vec<C>{};
    sum[m][1] = accumulate ? load(sums + m * stride + kL) : Vec<C>{};
  }
  for (int64_t k = 0; k < depth; ++k, factor += factor_stride) {
    const C* p = lines[k] + position;
    const Vec<C> first = load(p), second = load(p + kL);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vec<C> value = splat(factor[m]);
      sum[m][0] += value * first;
      sum[m][1] += value * second;
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    store(sums + m * stride, sum[m][0]);
    store(sums + m * stride + kL, sum[m][1]);
  }
}

template <class C>
using AddLines = void (*)(const C* const*, int64_t, int64_t, const C*, int64_t, C*, int64_t, bool);
template <class C>
constexpr AddLines<C> kAddLines[kTile] = {add_lines<C, 1>, add_lines<C, 2>, add_lines<C, 3>,
                                          add_lines<C, 4>, add_lines<C, 5>, add_lines<C, 6>};

template <class T>
void shrink(const SegmentConv& args, int64_t row, int64_t rank, const void* packed_a, int64_t begin, int64_t end) {
  using C = Accumulator<T>;
  const int64_t depth = args.in_channels * args.geometry.taps(), out_positions = args.geometry.positions();
  Lines<T> lines(args, row, begin, end);
  alignas(64) C sums[kRankBlock * kMaxLine];
  const C* staged[kMaxDepth];
  const int64_t stride = lines.positions();
  for (int64_t r = 0; r < rank; r += kRankBlock) {
    const int64_t ranks = min_of(kRankBlock, rank - r), tile = tile_of(ranks);
    for (int64_t k = 0, count = 0; k < depth; k += count) {
      count = lines.stage(k, staged);
      const C* factor = static_cast<const C*>(packed_a) + k * rank + r;
      for (int64_t p = 0; p < stride; p += kWide<C>)
        for (int64_t m = 0; m < ranks; m += tile)
          kAddLines<C>[min_of(tile, ranks - m) - 1](staged, p, count, factor + m, rank, sums + m* stride + p, stride,
                                                    k > 0);
    }
    for (int64_t m = 0; m < ranks; ++m) {
      C* v = static_cast<C*>(args.v) + (row * args.v_stride + r + m) * out_positions + begin;
      for (int64_t i = 0; i < lines.runs().count; ++i) {
        const Run& run = lines.runs().runs[i];
        copy_run(sums + m * stride + lines.place(run), 1, run.count, v + run.first);
      }
    }
  }
}

/// y[m, ...] += scaling * sum over r of factor[r, m] v[r, ...]. partial: positions of a last incomplete vector.
template <class T, int M, int kVectors, bool kPartial>
void expand_tile(const Accumulator<T>* v, int64_t v_stride, int64_t ranks, const Accumulator<T>* factor,
                 int64_t factor_stride, Accumulator<T> scaling, T* y, int64_t y_stride, int64_t partial) {
  using C = Accumulator<T>;
  Vec<C> sum[M][kVectors];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n)
      sum[m][n] = Vec<C>{};
  for (int64_t r = 0; r < ranks; ++r, v += v_stride, factor += factor_stride) {
    Vec<C> line[kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n)
      line[n] = kPartial ? load_partial(v, partial) : load(v + n * kLanes<C>);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const Vec<C> value = splat(factor[m]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n)
        sum[m][n] += value * line[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kVectors; ++n) {
      T* p = y + m * y_stride + n * kLanes<C>;
      const Vec<C> delta = splat(scaling) * sum[m][n];
      if (kPartial) {
        store_partial(p, load_partial(p, partial) + delta, partial);
      } else {
        store(p, load(p) + delta);
      }
    }
  }
}

template <class T>
using ExpandTile = void (*)(const Accumulator<T>*, int64_t, int64_t, const Accumulator<T>*, int64_t, Accumulator<T>, T*,
                            int64_t, int64_t);
/// A tile's three widths: two vectors, one, part of one.
template <class T, int M>
constexpr ExpandTile<T> kExpandWidths[3] = {expand_tile<T, M, 2, false>, expand_tile<T, M, 1, false>,
                                            expand_tile<T, M, 1, true>};
template <class T>
constexpr const ExpandTile<T>* kExpandTiles[kTile] = {kExpandWidths<T, 1>, kExpandWidths<T, 2>, kExpandWidths<T, 3>,
                                                      kExpandWidths<T, 4>, kExpandWidths<T, 5>, kExpandWidths<T, 6>};

template <class T>
void expand(const SegmentConv& args, int64_t row, const SegmentSlot& slot, const void* packed_b, int64_t begin,
            int64_t end) {
  using C = Accumulator<T>;
  const int64_t positions = args.geometry.positions(), outs = args.out_channels / args.groups;
  const int64_t group_ranks = slot.rank / args.groups, tile = tile_of(outs);
  for (int64_t o = 0; o < args.out_channels;) {
    const int64_t group = o / outs, count = min_of(tile, (group + 1) * outs - o);
    T* y = static_cast<T*>(args.y) + (row * args.out_channels + o) * positions + begin;
    for (int64_t r = 0; r < group_ranks; r += kMostRanks) {
      const C* v = static_cast<const C*>(args.v) + (row * args.v_stride + group * group_ranks + r) * positions + begin;
      const C* factor = static_cast<const C*>(packed_b) + r * args.out_channels + o;
      for (int64_t p = 0; p < end - begin;) {
        const int64_t left = end - begin - p;
        const int form = left >= kWide<C> ? 0 : left >= kLanes<C> ? 1 : 2;
        kExpandTiles<T>[count - 1][form](v + p, positions, min_of(kMostRanks, group_ranks - r), factor,
                                         args.out_channels, static_cast<C>(slot.scaling), y + p, positions, left);
        p += form == 0 ? kWide<C> : kLanes<C>;
      }
    }
    o += count;
  }
}

}  // namespace

extern const SegmentConvKernels segment_conv_kernels;
const SegmentConvKernels segment_conv_kernels = {
    {pack<float>, pack<float>, pack<float>, pack<double>},
    {shrink<float>, shrink<bf16>, shrink<f16>, shrink<double>},
    {expand<float>, expand<bf16>, expand<f16>, expand<double>},
};

}  // namespace pylora::PYLORA_ISA
