// One call of a merge op on the CPU.
#pragma once

#include <ATen/Parallel.h>

#include "binding/context.h"
#include "binding/status.h"
#include "merge/log_tensor.h"

namespace pylora::merge {

class CpuCall : public Arguments {
 public:
  CpuCall(const char* op, const Tensor& w) : Arguments(op, w, at::kCPU) {}

  /// Checks the log, but not that W is what it was made for.
  void read_log(const char* name, const OptionalTensor& log) {
    if (!log) return;
    LogReader reader(op_, name, weight_);
    reader.check_tensor(*log, at::kCPU);
    // A view may begin anywhere; headers are read where they lie.
    const bool aligned = reinterpret_cast<uintptr_t>(log->const_data_ptr()) % alignof(ChunkHeader) == 0;
    read_storage_ = aligned ? *log : log->clone();
    uint8_t* const bytes = static_cast<uint8_t*>(const_cast<void*>(read_storage_.const_data_ptr()));
    read_ = reader.read_header(bytes, false, log->numel());
    read_.chunks = reinterpret_cast<ChunkHeader*>(bytes + sizeof(LogHeader));
    read_.data = bytes + fixed_bytes(weight_, false);
    reader.check_whole(read_);
    args_.read = &read_;
  }

  void check_unchanged() {
    if (!args_.read) return;
    bool unchanged = false;
    binding::throw_unless_ok(check_unchanged_cpu(context_, with_data(weight_), read_, &unchanged));
    throw_unless(unchanged);
  }

  bool is_finite() {
    prepare();
    bool finite = false;
    binding::throw_unless_ok(is_finite_cpu(context_, args_, &finite));
    return finite;
  }

  void run() {
    prepare();
    bool unchanged = true;
    if (args_.read && !put_in_.num_adapters) args_.unchanged = &unchanged;
    binding::throw_unless_ok(change_cpu(context_, args_));
    args_.unchanged = nullptr;
    throw_unless(unchanged);
    bump_version();
  }

  /// Changes W and returns the log; if memory runs out, W is as it was.
  Tensor run_with_log() {
    prepare();
    // What is taken out without a log does not come back by putting it in again: all memory has to be there before.
    return take_out_.num_adapters && !args_.read ? run_in_counted_room() : run_in_growing_room();
  }

 private:
  Tensor run_in_counted_room() {
    int64_t bytes = 0;
    binding::throw_unless_ok(count_log_bytes_cpu(context_, args_, &bytes));
    Log log = new_log();
    const Tensor data = new_bytes(bytes + 1), result = new_log_tensor(bytes);  // a full log is not worked on
    point_to(data, &log);
    args_.write = &log;
    binding::throw_unless_ok(change_cpu(context_, args_));
    TORCH_INTERNAL_ASSERT(num_pending(log) == 0 && log.used == bytes);
    bump_version();
    fill(result, log);
    return result;
  }

  Tensor run_in_growing_room() {
    const Weight& w = weight_;
    Log log = new_log();
    Tensor data = new_bytes(first_log_capacity(w));
    point_to(data, &log);
    args_.write = &log;
    binding::throw_unless_ok(change_cpu(context_, args_));
    bump_version();
    try {
      while (const int64_t pending = num_pending(log)) {
        data = grown(data, log, pending);
        point_to(data, &log);
        binding::throw_unless_ok(change_cpu(context_, args_));
      }
      const Tensor result = new_log_tensor(payload_bytes(log));
      fill(result, log);
      return result;
    } catch (...) {
      go_back(log);
      throw;
    }
  }

  void prepare() {
    args_.weight = with_data(weight_);
    args_.take_out = take_out_;
    args_.put_in = put_in_;
    args_.num_slots = at::get_num_threads();
    workspace_ = new_bytes(workspace_bytes(args_));
    args_.workspace = workspace_.mutable_data_ptr();
  }

  static void point_to(const Tensor& data, Log* log) {
    log->data = static_cast<uint8_t*>(data.mutable_data_ptr());
    log->capacity = data.numel();
  }

  int64_t num_pending(const Log& log) const {
    int64_t pending = 0;
    for (int64_t i = 0; i < num_chunks(weight_); ++i)
      pending += log.chunks[i].is(ChunkKind::pending);
    return pending;
  }

  /// Room for the pending chunks if they need what the others did and a quarter more, and for one panel at least.
  Tensor grown(const Tensor& data, const Log& log, int64_t pending) const {
    const Weight& w = weight_;
    const int64_t chunks = num_chunks(w), done = chunks - pending;
    const int64_t most = pending * kChunk * dtype_bytes(w.dtype);
    const int64_t likely = done > 0 ? log.used / done * pending / 4 * 5 : most;
    const int64_t more = (likely < most ? likely : most) + panel_log_bytes(w);
    const Tensor larger = new_bytes(log.used + more);
    std::memcpy(larger.mutable_data_ptr(), data.const_data_ptr(), static_cast<size_t>(log.used));
    return larger;
  }

  /// A log without payloads; its chunks are in `headers_`.
  Log new_log() {
    const int64_t chunks = num_chunks(weight_);
    headers_ = new_bytes((chunks + 1) * static_cast<int64_t>(sizeof(ChunkHeader)));
    Log log;
    log.chunks = static_cast<ChunkHeader*>(headers_.mutable_data_ptr());
    for (int64_t i = 0; i < chunks; ++i)
      log.chunks[i].set(ChunkKind::pending);
    return log;
  }

  int64_t payload_bytes(const Log& log) const {
    int64_t bytes = 0;
    for (int64_t i = 0; i < num_chunks(weight_); ++i)
      bytes += log.chunks[i].bytes;
    return bytes;
  }

  Tensor new_log_tensor(int64_t payload) const { return new_bytes(fixed_bytes(weight_, false) + payload); }

  /// The finished log, in the order of its chunks.
  void fill(const Tensor& result, const Log& log) const {
    const int64_t fixed = fixed_bytes(weight_, false);
    const LogHeader header(weight_, log, result.numel() - fixed);
    uint8_t* to = static_cast<uint8_t*>(result.mutable_data_ptr());
    std::memcpy(to, &header, sizeof header);
    Log copy;
    copy.chunks = reinterpret_cast<ChunkHeader*>(to + sizeof header);
    copy.data = to + fixed;
    copy_log(weight_, log, &copy);
  }

  /// Undoes the chunks that are done. Memory is what has run out: everything here is there already.
  void go_back(const Log& log) {
    ChangeArgs back = args_;
    back.take_out = args_.put_in;
    back.put_in = args_.take_out;
    back.read = &log;
    back.write = nullptr;
    binding::throw_unless_ok(change_cpu(context_, back));
  }

  const Context context_ = binding::cpu_context();
  Tensor workspace_, headers_, read_storage_;
  Log read_;
  ChangeArgs args_;
};

}  // namespace pylora::merge
