// What kernels do with global memory: bounds, alignment, bytes and sectors, and whether reads may see what was written.
// Nothing is freed while threads run: under TSan a free would be an access that no order covers.
#include <cstring>
#include <utility>

#include "emu/block.h"

namespace pylora::emu {
namespace {

constexpr uintptr_t kPageBytes = uintptr_t{1} << 17, kSectorBytes = 32, kUnitBytes = 2;

/// Shadow of what pages of memory were touched, by address.
template <class Page>
class Shadow {
 public:
  /// The page that holds `address`, or null if nothing there was touched.
  Page* find(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    if (latest_ != nullptr && latest_->number == number) return &latest_->page;
    for (Node* node = buckets_[number % kBuckets]; node != nullptr; node = node->next) {
      if (node->number == number) {
        latest_ = node;
        return &node->page;
      }
    }
    return nullptr;
  }

  Page& at(uintptr_t address) {
    if (Page* const page = find(address)) return *page;
    const uintptr_t number = address / kPageBytes;
    latest_ = buckets_[number % kBuckets] = new Node{number, buckets_[number % kBuckets], {}};
    return latest_->page;
  }

  template <class Visit>
  void each(const Visit& visit) {
    for (Node* first : buckets_) {
      for (Node* node = first; node != nullptr; node = node->next)
        visit(node->page);
    }
  }

  void clear() {
    for (Node*& first : buckets_) {
      while (first != nullptr)
        delete std::exchange(first, first->next);
    }
    latest_ = nullptr;
  }

 private:
  struct Node {
    uintptr_t number;
    Node* next;
    Page page;
  };
  static constexpr size_t kBuckets = 4096;
  Node* buckets_[kBuckets] = {};
  Node* latest_ = nullptr;
};

/// A bit a sector.
struct SectorPage {
  uint64_t touched[kPageBytes / kSectorBytes / 64] = {};

  void touch(uintptr_t address) {
    const uintptr_t sector = address % kPageBytes / kSectorBytes;
    touched[sector / 64] |= uint64_t{1} << sector % 64;
  }
};

/// For each unit of two bytes who wrote it last (the block's number + 1; 0: nobody), how often that block had released
/// by then, and whether the unit was read as read-only.
struct Unit {
  uint32_t writer : 31;
  uint32_t readonly : 1;
  uint32_t releases;
};

struct UnitPage {
  Unit unit[kPageBytes / kUnitBytes] = {};
};

Shadow<SectorPage> loaded, stored;
Shadow<UnitPage> units;

void touch(Shadow<SectorPage>& shadow, uintptr_t address, size_t bytes) {
  shadow.at(address).touch(address);
  const uintptr_t last = address + bytes - 1;
  if (last / kSectorBytes != address / kSectorBytes) shadow.at(last).touch(last);
}

void check_address(uintptr_t address, size_t bytes, bool write, const char* what, Site site) {
  running_thread().site = site;
  const std::vector<Region>& regions = machine().regions;
  if (regions.empty() || !machine().config.check_regions) return;
  static size_t latest = 0;
  bool only_read = false;  // a tensor may stand for two arguments, one of which is written
  for (size_t tries = 0; tries < regions.size(); ++tries) {
    const Region& region = regions[latest < regions.size() ? latest : latest = 0];
    if (address >= region.begin && address + bytes <= region.end) {
      if (region.writable || !write) return;
      only_read = true;
    }
    ++latest;
  }
  if (only_read) trap(site, "%s: %zu bytes of an argument that is only read", what, bytes);
  const Region* nearest = &regions[0];
  const auto distance = [address](const Region& region) {
    return address < region.begin ? region.begin - address : address - region.end;
  };
  for (const Region& region : regions) {
    if (distance(region) < distance(*nearest)) nearest = &region;
  }
  trap(site, "%s: %zu bytes outside every argument, %zu bytes %s one of %zu bytes", what, bytes,
       static_cast<size_t>(distance(*nearest)), address < nearest->begin ? "before" : "after the end of",
       static_cast<size_t>(nearest->end - nearest->begin));
}

void check_alignment(uintptr_t address, size_t bytes, const char* what, Site site) {
  if (address % bytes != 0) {
    trap(site, "%s: address: expected a multiple of %zu, got %zu more", what, bytes,
         static_cast<size_t>(address % bytes));
  }
}

/// Whether this block may read or overwrite what the unit's writer left.
bool may_follow(const Unit& unit, int64_t block) {
  const int64_t writer = static_cast<int64_t>(unit.writer) - 1;
  return unit.writer == 0 || writer == block || is_released(writer, unit.releases, block);
}

void check_unit_read(const Unit& unit, LoadKind kind, Site site) {
  const uint32_t writer = unit.writer - 1;
  const int64_t block = running_thread().block->linear;
  switch (kind) {
    case LoadKind::readonly:
    case LoadKind::uniform:
      trap(site, "a read-only load of what block %u of this launch has written", writer);
    case LoadKind::own:
      if (writer != block) {
        trap(site, "load_global of what block %u of this launch has written: expected load_coherent", writer);
      }
      return;
    case LoadKind::coherent:
      if (!may_follow(unit, block)) {
        trap(site, "load_coherent of what block %u has written, with no arrive() and acquire between", writer);
      }
      return;
    case LoadKind::acquire:
      return;
  }
}

void note_read(uintptr_t address, size_t bytes, LoadKind kind, Site site) {
  const bool readonly = kind == LoadKind::readonly || kind == LoadKind::uniform;
  for (uintptr_t at = address; at < address + bytes; at += kUnitBytes) {
    UnitPage* const page = readonly ? &units.at(at) : units.find(at);
    if (page == nullptr) return;
    Unit& unit = page->unit[at % kPageBytes / kUnitBytes];
    if (unit.writer != 0) check_unit_read(unit, kind, site);
    if (readonly) unit.readonly = 1;
  }
}

void note_write(uintptr_t address, size_t bytes, bool atomic, Site site) {
  const int64_t block = running_thread().block->linear;
  const uint32_t releases = num_releases(block);
  for (uintptr_t at = address; at < address + bytes; at += kUnitBytes) {
    Unit& unit = units.at(at).unit[at % kPageBytes / kUnitBytes];
    if (unit.readonly != 0) trap(site, "a store to what this launch has read with a read-only load");
    if (!atomic && !may_follow(unit, block)) {
      trap(site, "a store to what block %u has written, with no arrive() and acquire between",
           static_cast<uint32_t>(unit.writer) - 1);
    }
    unit.writer = static_cast<uint32_t>(block + 1);
    unit.releases = releases;
  }
}

/// Whether this is the first lane of its warp to come here for the n-th time.
bool counts_for_warp(const void* p, Site site) {
  Warp& warp = running_warp();
  UniformLoad* place = warp.uniform;
  UniformLoad* const end = warp.uniform + warp.num_uniform;
  while (place != end && (place->site.line != site.line || place->site.file != site.file))
    ++place;
  if (place == end) {
    if (warp.num_uniform == kMostUniformLoads) trap(site, "more than %d uniform loads in a kernel", kMostUniformLoads);
    ++warp.num_uniform;
    *place = {};
    place->site = site;
  }
  const int count = ++place->count[running_lane()];
  if (count > place->most) {
    place->most = count;
    place->address = p;
    return true;
  }
  if (count == place->most && place->address != p) trap(site, "load_uniform: lanes of a warp read different addresses");
  return false;
}

int64_t count_touched(Shadow<SectorPage>& shadow) {
  int64_t count = 0;
  shadow.each([&count](const SectorPage& page) {
    for (const uint64_t bits : page.touched)
      count += __builtin_popcountll(bits);
  });
  return count;
}

}  // namespace

void clear_shadows() {
  loaded.clear();
  stored.clear();
  units.clear();
}

void count_sectors(LaunchRecord& record) {
  record.load_sectors = count_touched(loaded);
  record.store_sectors = count_touched(stored);
}

void check_load(const void* p, size_t bytes, LoadKind kind, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  check_alignment(address, bytes, "load", site);
  check_address(address, bytes, false, "load", site);
  note_read(address, bytes, kind, site);
  if (kind == LoadKind::uniform && !counts_for_warp(p, site)) return;
  current_launch->record.load_bytes += static_cast<int64_t>(bytes);
  touch(loaded, address, bytes);
}

void check_store(const void* p, size_t bytes, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  check_alignment(address, bytes, "store", site);
  check_address(address, bytes, true, "store", site);
  note_write(address, bytes, false, site);
  current_launch->record.store_bytes += static_cast<int64_t>(bytes);
  touch(stored, address, bytes);
}

void check_atomic(const void* p, size_t bytes, Site site) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  check_alignment(address, bytes, "atomic", site);
  check_address(address, bytes, true, "atomic", site);
  note_write(address, bytes, true, site);
  ++current_launch->record.atomics;
  touch(loaded, address, bytes);
  touch(stored, address, bytes);
}

void begin_copy(const Copy& copy, LoadKind kind, Site site) {
  Thread& thread = running_thread();
  const auto from = reinterpret_cast<uintptr_t>(copy.from), to = reinterpret_cast<uintptr_t>(copy.to);
  const auto bytes = static_cast<size_t>(copy.bytes), valid_bytes = static_cast<size_t>(copy.valid_bytes);
  check_alignment(from, bytes, "cp_async from global memory", site);
  check_alignment(to, bytes, "cp_async to shared memory", site);
  if (copy.valid_bytes < 0 || copy.valid_bytes > copy.bytes) {
    trap(site, "cp_async: valid bytes: expected 0 to %d, got %d", copy.bytes, copy.valid_bytes);
  }
  const auto begin = reinterpret_cast<uintptr_t>(thread.block->shared);
  if (to < begin || to + bytes > begin + current_launch->shared_bytes) {
    trap(site, "cp_async: destination: expected shared memory, got its byte %ld of %zu", static_cast<long>(to - begin),
         current_launch->shared_bytes);
  }
  if (thread.num_copies == kMostCopies) trap(site, "more than %d cp.async copies of a thread under way", kMostCopies);
  check_address(from, valid_bytes, false, "cp_async", site);
  if (valid_bytes != 0) {
    note_read(from, valid_bytes, kind, site);
    touch(loaded, from, valid_bytes);
  }
  current_launch->record.load_bytes += copy.valid_bytes;
  ++current_launch->record.cp_async;
  Copy& queued = thread.copies[thread.num_copies++];
  queued = copy;
  queued.group = thread.copy_group;
}

void cp_async_commit() { ++running_thread().copy_group; }

bool take_copy(int pending, Copy* copy) {
  Thread& thread = running_thread();
  if (thread.num_copies == 0 || thread.copies[0].group >= thread.copy_group - pending) return false;
  *copy = thread.copies[0];
  --thread.num_copies;
  for (int i = 0; i < thread.num_copies; ++i)
    thread.copies[i] = thread.copies[i + 1];
  return true;
}

}  // namespace pylora::emu
