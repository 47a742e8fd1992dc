// Barriers, and what the lanes of a warp do together: shuffles, ballots, mma, ldmatrix.
#include <cstring>

#include "emu/block.h"

namespace pylora::emu {

namespace {

constexpr uint32_t kPoison = 0x7fffdeadu;  // a NaN, as what a lane gets from one that takes no part
constexpr const char* kWarpOpNames[] = {"__syncwarp", "a shuffle", "a ballot", "mma", "ldmatrix"};

const char* name_of(WarpOp op) { return kWarpOpNames[static_cast<int>(op)]; }

/// Wakes the threads that wait at the barrier and makes it ready for its next round.
void open(Block& block, Barrier& barrier) {
  for (Thread& thread : block.threads) {
    if (thread.state == State::waits_barrier && thread.barrier == &barrier) thread.state = State::ready;
  }
  barrier.arrived = barrier.expected = 0;
  ++barrier.round;
}

void arrive_at(Barrier& barrier, int threads, bool wait, const char* name, Site site) {
  Thread& thread = running_thread();
  thread.site = site;
  thread.doing = name;
  void* const tag = &barrier.tags[barrier.round & 1];
  order_release(tag);
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.site = site;
  }
  // The hardware would let these meet, but no compiler promises that they are one barrier.
  const bool divergent = &barrier == &thread.block->barriers[0] && barrier.site.line != site.line;
  if (divergent) trap(site, "%s, while other threads wait in the one at line %d", name, barrier.site.line);
  if (barrier.expected != threads) {
    trap(site, "%s: %d threads expected here, %d at line %d", name, threads, barrier.expected, barrier.site.line);
  }
  ++barrier.arrived;
  thread.barrier = &barrier;
  thread.state = wait ? State::waits_barrier : State::ready;
  if (barrier.arrived == barrier.expected) open(*thread.block, barrier);
  if (!wait) return;
  yield(thread.state);
  order_acquire(tag);
}

/// Where the lanes of `lanes` gather for `op`; traps if one of them is elsewhere.
Gathering& gathering_of(WarpOp op, uint32_t lanes, Site site) {
  Warp& warp = running_warp();
  const int lane = running_lane();
  if ((lanes >> lane & 1) == 0) trap(site, "%s: lane %d is not in its own mask %08x", name_of(op), lane, lanes);
  Gathering* place = nullptr;
  for (Gathering& other : warp.gatherings) {
    if (other.arrived == 0) {
      if (place == nullptr) place = &other;
      continue;
    }
    if ((other.lanes & lanes) == 0) continue;
    if (other.lanes == lanes && other.op == op && other.site.line == site.line) return other;
    trap(site, "%s with lanes %08x, while lanes %08x are in %s with lanes %08x at line %d", name_of(op), lanes,
         other.arrived, name_of(other.op), other.lanes, other.site.line);
  }
  *place = {lanes, 0, op, site};
  return *place;
}

/// Waits until all of `lanes` are here; the last to come calls finish(warp) for all.
template <class Finish>
void gather(WarpOp op, uint32_t lanes, Site site, const Finish& finish) {
  Thread& thread = running_thread();
  thread.site = site;
  thread.doing = name_of(op);
  Gathering& gathering = gathering_of(op, lanes, site);
  gathering.arrived |= 1u << running_lane();
  if (gathering.arrived != lanes) {
    yield(State::waits_warp);
    return;
  }
  finish(running_warp());
  gathering.arrived = 0;
  Thread* const first = &thread.block->threads[static_cast<size_t>(thread.linear / kLanes * kLanes)];
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) != 0) first[lane].state = State::ready;
  }
}

/// The lane that `lane` reads from, as the PTX ISA has it for shfl.sync; itself where that would be out of range.
int source_lane(int lane, int operand, ShuffleKind kind, int width) {
  const int first = lane & ~(width - 1), end = first + width;
  switch (kind) {
    case ShuffleKind::index:
      return first + (operand & (width - 1));
    case ShuffleKind::up:
      return lane - operand < first ? lane : lane - operand;
    case ShuffleKind::down:
      return lane + operand >= end ? lane : lane + operand;
    case ShuffleKind::exclusive_or:
      return (lane ^ operand) >= end ? lane : lane ^ operand;
  }
  return lane;
}

float operand_value(uint32_t word, int half, MmaKind kind) {
  if (kind == MmaKind::tf32) return float_of(word & kTf32Bits);
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  return kind == MmaKind::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

constexpr int kRows = 16, kColumns = 8, kMostDepth = 16;

/// One mma of the warp: words 0-3 of a lane's input are its part of a, 4-5 of b, 6-9 of d.
void multiply(Warp& warp, MmaKind kind) {
  const int per_word = kind == MmaKind::tf32 ? 1 : 2, depth = 8 * per_word;
  float a[kRows][kMostDepth], b[kMostDepth][kColumns], d[kRows][kColumns];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, member = lane % 4;
    const uint32_t* const in = warp.in[lane];
    for (int word = 0; word < 4; ++word) {
      for (int half = 0; half < per_word; ++half) {
        const int k = member * per_word + half + word / 2 * (depth / 2);
        a[group + word % 2 * 8][k] = operand_value(in[word], half, kind);
        if (word < 2) b[member * per_word + half + word * (depth / 2)][group] = operand_value(in[4 + word], half, kind);
      }
      d[group + word / 2 * 8][member * 2 + word % 2] = float_of(in[6 + word]);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < kColumns; ++column)
        d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i)
      warp.out[lane][i] = bits_of(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

}  // namespace

void sync_threads(Site site) {
  ++current_launch->record.barriers;
  arrive_at(running_thread().block->barriers[0], current_launch->record.threads, true, "__syncthreads", site);
}

void barrier(int id, int threads, bool wait, Site site) {
  const char* const name = wait ? "barrier_sync" : "barrier_arrive";
  if (id < 1 || id >= kBarriers) trap(site, "%s: id: expected 1 to %d, got %d", name, kBarriers - 1, id);
  if (threads < kLanes || threads % kLanes != 0 || threads > current_launch->record.threads) {
    trap(site, "%s: threads: expected a multiple of 32 up to the block's %d, got %d", name,
         current_launch->record.threads, threads);
  }
  ++current_launch->record.barriers;
  arrive_at(running_thread().block->barriers[id], threads, wait, name, site);
}

void sync_warp(uint32_t lanes, Site site) {
  Warp& warp = running_warp();
  order_release(&warp);
  gather(WarpOp::sync, lanes, site, [](Warp&) {});
  order_acquire(&warp);
}

uint32_t shuffle(uint32_t lanes, uint32_t bits, int operand, ShuffleKind kind, int width, Site site) {
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0) {
    trap(site, "a shuffle: width: expected a power of two up to 32, got %d", width);
  }
  const int lane = running_lane();
  uint32_t* const in = running_warp().in[lane];
  in[0] = bits;
  in[1] = static_cast<uint32_t>(source_lane(lane, operand, kind, width));
  gather(WarpOp::shuffle, lanes, site, [lanes](Warp& warp) {
    for (int i = 0; i < kLanes; ++i) {
      if ((lanes >> i & 1) == 0) continue;
      const uint32_t source = warp.in[i][1];
      warp.out[i][0] = (lanes >> source & 1) != 0 ? warp.in[source][0] : kPoison;
    }
  });
  return running_warp().out[lane][0];
}

uint32_t ballot(uint32_t lanes, bool vote, Site site) {
  const int lane = running_lane();
  running_warp().in[lane][0] = vote;
  gather(WarpOp::ballot, lanes, site, [lanes](Warp& warp) {
    uint32_t votes = 0;
    for (int i = 0; i < kLanes; ++i) {
      if ((lanes >> i & 1) != 0) votes |= warp.in[i][0] << i;
    }
    for (int i = 0; i < kLanes; ++i) {
      if ((lanes >> i & 1) != 0) warp.out[i][0] = votes;
    }
  });
  return running_warp().out[lane][0];
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MmaKind kind, Site site) {
  const int lane = running_lane();
  uint32_t* const in = running_warp().in[lane];
  for (int i = 0; i < 4; ++i)
    in[i] = a[i];
  for (int i = 0; i < 2; ++i)
    in[4 + i] = b[i];
  for (int i = 0; i < 4; ++i)
    in[6 + i] = bits_of(d[i]);
  gather(WarpOp::mma, ~0u, site, [kind](Warp& warp) {
    ++current_launch->record.mma;
    multiply(warp, kind);
  });
  for (int i = 0; i < 4; ++i)
    d[i] = float_of(running_warp().out[lane][i]);
}

bool check_matrix_row(const void* row, int count, Site site) {
  if (running_lane() >= 8 * count) return false;
  const auto address = reinterpret_cast<uintptr_t>(row), begin = reinterpret_cast<uintptr_t>(shared_memory());
  if (address % 16 != 0) trap(site, "ldmatrix: row address: expected a multiple of 16");
  if (address < begin || address + 16 > begin + current_launch->shared_bytes) {
    trap(site, "ldmatrix: row address: expected shared memory, got its byte %ld of %zu",
         static_cast<long>(address - begin), current_launch->shared_bytes);
  }
  return true;
}

void exchange_matrices(uint32_t* r, const uint16_t (&row)[8], int count, bool transposed, Site site) {
  const int lane = running_lane();
  uint32_t* const in = running_warp().in[lane];
  for (int i = 0; i < 4; ++i)
    in[i] = row[2 * i] | static_cast<uint32_t>(row[2 * i + 1]) << 16;
  gather(WarpOp::ldmatrix, ~0u, site, [count, transposed](Warp& warp) {
    ++current_launch->record.ldmatrix;
    const auto element = [&warp](int matrix, int i, int j) {
      return warp.in[8 * matrix + i][j / 2] >> (j % 2 * 16) & 0xffffu;
    };
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      for (int m = 0; m < count; ++m) {
        warp.out[lane][m] =
            transposed ? element(m, j, i) | element(m, j + 1, i) << 16 : element(m, i, j) | element(m, i, j + 1) << 16;
      }
    }
  });
  for (int m = 0; m < count; ++m)
    r[m] = running_warp().out[lane][m];
}

}  // namespace pylora::emu
