// A block's tile of W: from memory into shared memory, changed there, and back, with the log of its chunks.
#pragma once

#include "merge/codec.cuh"
#include "merge/sums.cuh"

namespace pylora::merge {

enum class Mode : int8_t {
  change,
  put_back,         // what has been taken out, if answers->changed says that it should not have been
  check_unchanged,  // alone
  is_finite,
};

/// What a launch works on.
struct Work {
  Weight weight;
  Mode mode = Mode::change;
  bool takes_out = false, puts_in = false;
  bool check = false;
  bool aligned = false;  // every row of W begins at a multiple of 16 bytes
  PackedFactors out, in;
  Log read, write;  // without chunks: none
  DeviceAnswers* answers = nullptr;
  int32_t* done = nullptr;  // for each tile of a block, whether it has been taken out; null: not asked for
};

/// Neighbouring elements in shared memory.
template <class Bits, int N>
struct alignas(N * sizeof(Bits) > 16 ? 16 : N * sizeof(Bits)) Run {
  Bits element[N];
};

template <class Sums>
class TileChange {
 public:
  using T = typename Sums::T;
  using C = typename Sums::C;
  using Bits = BitsOf<T>;
  static constexpr int kRows = Sums::kRows, kRun = Sums::kRun, kChunks = kRows / static_cast<int>(kTileRows);
  static constexpr int kSize = static_cast<int>(sizeof(Bits)), kOnce = 16 / kSize;
  static constexpr int kWidth = static_cast<int>(kTileColumns), kLine = kWidth + kOnce, kCodeLine = kWidth + 16;
  static constexpr int kHeader = 128, kTileBytes = kRows * kLine * kSize, kCodeBytes = kRows * kCodeLine;
  /// Factors first, then, in their place, the tile as it will be and its codes.
  static constexpr int kAfterBytes = kTileBytes + kCodeBytes;
  static constexpr int kSharedBytes =
      kHeader + kTileBytes + (kAfterBytes > Sums::kFactorBytes ? kAfterBytes : Sums::kFactorBytes);
  using RunOf = Run<Bits, kRun>;

  static PYLORA_HOST_DEVICE constexpr int64_t num_pieces(const Weight& w) {
    return w.count * ((w.rows + kRows - 1) / kRows) * tiles_across(w);
  }

  PYLORA_DEVICE explicit TileChange(const Work& work)
      : work_(work),
        box_(cuda::shared_memory<int>()),
        tile_(cuda::shared_memory<Bits>(kHeader)),
        after_(cuda::shared_memory<Bits>(kHeader + kTileBytes)),
        codes_(cuda::shared_memory<int8_t>(kHeader + 2 * kTileBytes)) {}

  PYLORA_DEVICE void change(int64_t piece) {
    const bool is_done = begin(piece) && change_chunks();
    if (work_.done && work_.mode == Mode::change && threadIdx.x == 0)
      cuda::store_global(work_.done + piece, static_cast<int32_t>(is_done));
  }

 private:
  /// Which tile it is, and which of its chunks are worked on; false: none.
  PYLORA_DEVICE bool begin(int64_t piece) {
    const Weight& w = work_.weight;
    const int64_t down = (w.rows + kRows - 1) / kRows, across = tiles_across(w);
    matrix_ = piece / (down * across);
    row_ = piece / across % down * kRows;
    column_ = piece % across * kWidth;
    rows_ = min_of(kRows, cuda::left_of(w.rows, row_));
    columns_ = min_of(kWidth, cuda::left_of(w.columns, column_));
    first_chunk_ = (matrix_ * tiles_down(w) + row_ / kTileRows) * across + piece % across;
    __syncthreads();  // the tile before and its flags have been read
    if (threadIdx.x == 0) box_[kWarps] = active_chunks(piece);
    __syncthreads();
    active_ = box_[kWarps];
    return active_ != 0;
  }

  /// false: the tile is not what the log was written for, and stays as it is.
  PYLORA_DEVICE bool change_chunks() {
    load();
    if (work_.check && !is_unchanged()) return false;
    if (work_.mode == Mode::check_unchanged) return true;
    if (work_.takes_out) take_out();
    if (work_.puts_in) put_in();
    if (work_.mode == Mode::is_finite) return true;
#pragma unroll 1
    for (int h = 0; h < kChunks; ++h)
      if (is_active(h) && (!work_.write.chunks || write_log(h))) store(h);
    return true;
  }

  PYLORA_DEVICE int active_chunks(int64_t piece) const {
    if (work_.mode == Mode::put_back && cuda::load_global<int32_t>(work_.done + piece) == 0) return 0;
    int active = 0;
    for (int h = 0; h < kChunks && h * static_cast<int>(kTileRows) < rows_; ++h) {
      const int64_t chunk = chunk_at(h);
      if (work_.read.chunks && cuda::load_readonly<ChunkHeader>(work_.read.chunks + chunk).is(ChunkKind::pending))
        continue;
      if (work_.write.chunks && !cuda::load_global<ChunkHeader>(work_.write.chunks + chunk).is(ChunkKind::pending))
        continue;
      active |= 1 << h;
    }
    return active;
  }

  PYLORA_DEVICE bool is_active(int h) const { return active_ >> h & 1; }
  PYLORA_DEVICE int64_t chunk_at(int h) const { return first_chunk_ + h * tiles_across(work_.weight); }
  PYLORA_DEVICE ChunkShape shape_of(int h) const {
    return {min_of(static_cast<int>(kTileRows), rows_ - h * static_cast<int>(kTileRows)), columns_};
  }
  static PYLORA_DEVICE Bits* lines_of(Bits* tile, int h) { return tile + h * static_cast<int>(kTileRows) * kLine; }

  PYLORA_DEVICE Bits* row_in_memory(int row) const {
    const Weight& w = work_.weight;
    return static_cast<Bits*>(w.data) + matrix_ * w.matrix_stride + (row_ + row) * w.row_stride + column_;
  }

  /// Starts to bring the tile, zeros beyond W's edges: it is there with the first factors.
  PYLORA_DEVICE void load() {
    constexpr int kGroups = kWidth / kOnce;
    for (int i = threadIdx.x; i < kRows * kGroups; i += kThreads) {
      const int row = i / kGroups, column = i % kGroups * kOnce;
      const int valid = row < rows_ ? columns_ - column : 0;
      const Bits* const from = row_in_memory(row) + column;
      Bits* const to = tile_ + row * kLine + column;
      if (work_.aligned) {
        const int bytes = valid <= 0 ? 0 : valid >= kOnce ? 16 : valid * kSize;
        cuda::cp_async<16, true>(to, bytes > 0 ? from : work_.weight.data, bytes);
      } else {
#pragma unroll
        for (int e = 0; e < kOnce; ++e)
          to[e] = e < valid ? cuda::load_global<Bits>(from + e) : Bits{0};
      }
    }
    cuda::cp_async_commit();
  }

  /// A chunk into W.
  PYLORA_DEVICE void store(int h) {
    using Group = Run<Bits, kOnce>;
    constexpr int kGroups = kWidth / kOnce, kChunkRows = static_cast<int>(kTileRows);
    const Bits* const lines = lines_of(work_.puts_in ? after_ : tile_, h);
#pragma unroll 4
    for (int i = threadIdx.x; i < kChunkRows * kGroups; i += kThreads) {
      const int row = i / kGroups, column = i % kGroups * kOnce;
      const int valid = h * kChunkRows + row < rows_ ? columns_ - column : 0;
      Bits* const to = row_in_memory(h * kChunkRows + row) + column;
      const Group group = *reinterpret_cast<const Group*>(lines + row * kLine + column);
      if (work_.aligned && valid >= kOnce) {
        cuda::store_global(to, group);
      } else {
#pragma unroll
        for (int e = 0; e < kOnce; ++e)
          if (e < valid) cuda::store_global(to + e, group.element[e]);
      }
    }
  }

  /// Counts the chunks that are not what the log was written for; false if there is one.
  PYLORA_DEVICE bool is_unchanged() {
    cuda::cp_async_wait<0>();
    __syncthreads();
    bool unchanged = true;
    for (int h = 0; h < kChunks; ++h) {
      if (!is_active(h)) continue;
      const uint32_t sum = checksum(lines_of(tile_, h), kLine, shape_of(h), box_);
      if (cuda::load_uniform<ChunkHeader>(work_.read.chunks + chunk_at(h)).checksum == sum) continue;
      if (threadIdx.x == 0) cuda::atomic_add(&work_.answers->changed, 1);
      unchanged = false;
    }
    return unchanged;
  }

  /// What row scales multiply and divide by, from `row` and `column` of the tile on.
  PYLORA_DEVICE C scale_at(const void* scales, int row, int column) const {
    const int64_t place = work_.weight.transposed ? column_ + column : row_ + row;
    return cuda::load_readonly<C>(static_cast<const C*>(scales) + place);
  }
  PYLORA_DEVICE C put_in_value(C w, C sum, int row, int column) const {
    if (!work_.in.scale) return one_nan(add_rn(w, sum));
    return one_nan(multiply_add_rn(w, scale_at(work_.in.scale, row, column), sum));
  }
  PYLORA_DEVICE C take_out_value(const PackedFactors& f, C w, C sum, int row, int column) const {
    const C rest = subtract_rn(w, sum);
    return one_nan(f.scale ? multiply_rn(rest, scale_at(f.inverse, row, column)) : rest);
  }

  PYLORA_DEVICE void take_out() {
    sums_.add_up(work_.out, matrix_, row_, column_, after_);
    sums_.for_each([&](int row, int column, const C(&sums)[kRun]) {
      RunOf& run = *reinterpret_cast<RunOf*>(tile_ + row * kLine + column);
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        run.element[i] =
            round_back<T>(take_out_value(work_.out, value_of<T>(run.element[i]), sums[i], row, column + i));
    });
    __syncthreads();
    if (!work_.read.chunks) return;
    for (int h = 0; h < kChunks; ++h) {
      if (!is_active(h)) continue;
      const ChunkHeader header = cuda::load_uniform<ChunkHeader>(work_.read.chunks + chunk_at(h));
      const Corrector<Bits> corrector(lines_of(tile_, h), kLine, shape_of(h), work_.read.data + header.offset,
                                      work_.read.data + work_.read.capacity);
      corrector.correct(header, box_);
    }
    __syncthreads();
  }

  PYLORA_DEVICE void put_in() {
    sums_.add_up(work_.in, matrix_, row_, column_, after_);
    __syncthreads();  // the factors have been read: `after` takes their place
    if (work_.mode == Mode::is_finite) return count_not_finite();
    sums_.for_each([&](int row, int column, const C(&sums)[kRun]) {
      const RunOf before = *reinterpret_cast<const RunOf*>(tile_ + row * kLine + column);
      RunOf after;
      Run<int8_t, kRun> codes;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const C value = put_in_value(value_of<T>(before.element[i]), sums[i], row, column + i);
        after.element[i] = round_to<T>(value);
        const C back = take_out_value(work_.in, value_of<T>(after.element[i]), sums[i], row, column + i);
        codes.element[i] = code_of(before.element[i], round_back<T>(back));
      }
      *reinterpret_cast<RunOf*>(after_ + row * kLine + column) = after;
      *reinterpret_cast<Run<int8_t, kRun>*>(codes_ + row * kCodeLine + column) = codes;
    });
    __syncthreads();
  }

  PYLORA_DEVICE void count_not_finite() {
    bool finite = true;
    sums_.for_each([&](int row, int column, const C(&sums)[kRun]) {  // beyond W's edges all is zeros
      const RunOf before = *reinterpret_cast<const RunOf*>(tile_ + row * kLine + column);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const C rounded =
            value_of<T>(round_to<T>(put_in_value(value_of<T>(before.element[i]), sums[i], row, column + i)));
        finite = finite && rounded - rounded == C(0);
      }
    });
    if (__any_sync(cuda::kAllLanes, !finite) && lane_id() == 0) cuda::atomic_add(&work_.answers->not_finite, 1);
  }

  /// false: there is no room for the chunk's payload.
  PYLORA_DEVICE bool write_log(int h) {
    const ChunkShape shape = shape_of(h);
    const uint32_t sum = checksum(lines_of(after_, h), kLine, shape, box_);
    const Encoder<Bits> encoder(codes_ + h * static_cast<int>(kTileRows) * kCodeLine, kCodeLine, shape, box_);
    if (threadIdx.x == 0) box_[kWarps] = reserve(encoder.bytes());
    __syncthreads();
    const int unit = box_[kWarps];
    if (unit < 0) return false;
    const int64_t offset = static_cast<int64_t>(unit) * kPayloadUnit;
    if (threadIdx.x == 0) cuda::store_global(work_.write.chunks + chunk_at(h), encoder.header(offset, sum));
    encoder.write(lines_of(tile_, h), kLine, work_.write.data + offset);
    return true;
  }

  /// The first unit, -1 if there is no room.
  PYLORA_DEVICE int reserve(int bytes) const {
    if (bytes == 0) return 0;
    const int units = (bytes + static_cast<int>(kPayloadUnit) - 1) / static_cast<int>(kPayloadUnit);
    const int first = cuda::atomic_add(&work_.answers->used, units);
    if ((static_cast<int64_t>(first) + units) * kPayloadUnit <= work_.write.capacity) return first;
    cuda::atomic_add(&work_.answers->pending, 1);
    return -1;
  }

  const Work& work_;
  int* box_;
  Bits *tile_, *after_;
  int8_t* codes_;
  Sums sums_;
  int64_t matrix_, row_, column_, first_chunk_;
  int rows_, columns_, active_;
};

}  // namespace pylora::merge
