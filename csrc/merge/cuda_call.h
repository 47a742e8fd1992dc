// One call of a merge op on a GPU. Never run on one yet.
#pragma once

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "binding/context.h"
#include "binding/status.h"
#include "merge/log_tensor.h"

namespace pylora::merge {

class CudaCall : public Arguments {
 public:
  CudaCall(const char* op, const Tensor& w)
      : Arguments(op, w, at::kCUDA), guard_(w.device()), context_(binding::device_context(w.device())) {
    args_.tensor_cores = merges_by_tensor_cores(weight_.dtype);
  }

  /// Checks the log, but not that W is what it was made for. Waits for its headers.
  void read_log(const char* name, const OptionalTensor& log) {
    if (!log) return;
    LogReader reader(op_, name, weight_);
    reader.check_tensor(*log, w_.device());
    const int64_t fixed = fixed_bytes(weight_, true);
    const Tensor head = log->narrow(0, 0, std::min(fixed, log->numel())).cpu();
    read_ = reader.read_header(head.const_data_ptr(), true, log->numel());
    TORCH_CHECK_NOT_IMPLEMENTED(read_.architecture == 0 || read_.architecture == tensor_core_architecture(), op_, ": ",
                                name, ": expected sums of this GPU's tensor cores, sm_", tensor_core_architecture(),
                                ", got the log of a merge by those of sm_", read_.architecture);
    Log on_host = read_;
    on_host.chunks = reinterpret_cast<ChunkHeader*>(static_cast<uint8_t*>(head.mutable_data_ptr()) + sizeof(LogHeader));
    reader.check_whole(on_host);
    const bool aligned = reinterpret_cast<uintptr_t>(log->const_data_ptr()) % kPayloadUnit == 0;
    read_storage_ = aligned ? *log : log->clone();
    uint8_t* const bytes = static_cast<uint8_t*>(const_cast<void*>(read_storage_.const_data_ptr()));
    read_.chunks = reinterpret_cast<ChunkHeader*>(bytes + sizeof(LogHeader));
    read_.data = bytes + fixed;
    args_.read = &read_;
    args_.tensor_cores = read_.architecture != 0;
  }

  void check_unchanged() {
    if (!args_.read) return;
    prepare();
    binding::throw_unless_ok(check_unchanged_cuda(context_, args_));
    throw_unless(answers().changed == 0);
  }

  bool is_finite() {
    prepare();
    binding::throw_unless_ok(is_finite_cuda(context_, args_));
    return answers().not_finite == 0;
  }

  /// Waits for the answer where a log is read.
  void run() {
    prepare();
    args_.check = args_.read && !put_in_.num_adapters;
    binding::throw_unless_ok(change_cuda(context_, args_));
    if (args_.check) throw_unless(answers().changed == 0);
    bump_version();
  }

  /// Changes W and returns the log; if memory runs out, W is as it was.
  Tensor run_with_log() {
    prepare();
    headers_ = at::full({num_tiles(weight_) * static_cast<int64_t>(sizeof(ChunkHeader))}, 0xff, on_gpu());
    // What is taken out without a log does not come back by putting it in again: all memory has to be there before.
    const bool reversible = !take_out_.num_adapters || args_.read;
    Tensor data = new_bytes(reversible ? first_log_capacity_cuda(weight_) : most_log_bytes(), w_.device());
    Log log;
    log.fused = true;
    log.tiles = true;
    log.architecture = args_.tensor_cores ? tensor_core_architecture() : 0;
    log.chunks = static_cast<ChunkHeader*>(headers_.mutable_data_ptr());
    point_to(data, &log);
    args_.write = &log;
    binding::throw_unless_ok(change_cuda(context_, args_));
    bump_version();
    try {
      DeviceAnswers said = answers();
      while (said.pending > 0) {
        data = grown(data, &said);
        point_to(data, &log);
        binding::throw_unless_ok(change_cuda(context_, args_));
        said = answers();
      }
      return finished(log, data, int64_t{said.used} * kPayloadUnit);
    } catch (...) {
      go_back(log);
      throw;
    }
  }

 private:
  at::TensorOptions on_gpu() const { return w_.options().dtype(at::kByte); }
  int64_t most_log_bytes() const { return num_tiles(weight_) * kChunk * dtype_bytes(weight_.dtype); }

  void prepare() {
    args_.weight = with_data(weight_);
    args_.take_out = take_out_;
    args_.put_in = put_in_;
    if (workspace_.defined()) return;
    workspace_ = new_bytes(workspace_bytes_cuda(args_), w_.device());
    answers_ = at::zeros({static_cast<int64_t>(sizeof(DeviceAnswers))}, on_gpu());
    args_.workspace = workspace_.mutable_data_ptr();
    args_.answers = static_cast<DeviceAnswers*>(answers_.mutable_data_ptr());
  }

  /// Waits.
  DeviceAnswers answers() const {
    const Tensor on_host = answers_.cpu();
    DeviceAnswers said;
    std::memcpy(&said, on_host.const_data_ptr(), sizeof said);
    return said;
  }

  void set_answers(const DeviceAnswers& say) const {
    const Tensor on_host = new_bytes(sizeof say);
    std::memcpy(on_host.mutable_data_ptr(), &say, sizeof say);
    answers_.copy_(on_host);
  }

  static void point_to(const Tensor& data, Log* log) {
    log->data = static_cast<uint8_t*>(data.mutable_data_ptr());
    log->capacity = data.numel();
  }

  /// What is there with room behind it for all that asked for some, and `said` as it then has to begin. Chunks that found
  /// none have counted their bytes, so that they all find it now.
  Tensor grown(const Tensor& data, DeviceAnswers* said) const {
    const int64_t wanted = int64_t{said->used} * kPayloadUnit;
    const Tensor larger = new_bytes(data.numel() + wanted, w_.device());
    larger.narrow(0, 0, data.numel()).copy_(data);
    *said = {};
    said->used = static_cast<int32_t>(data.numel() / kPayloadUnit);
    set_answers(*said);
    return larger;
  }

  /// Header, chunks and payloads one after another.
  Tensor finished(const Log& log, const Tensor& data, int64_t payload_bytes) const {
    const int64_t fixed = fixed_bytes(weight_, true);
    const Tensor result = new_bytes(fixed + payload_bytes, w_.device());
    const LogHeader header(weight_, log, payload_bytes);
    const Tensor head = new_bytes(sizeof header);
    std::memcpy(head.mutable_data_ptr(), &header, sizeof header);
    result.narrow(0, 0, head.numel()).copy_(head);
    result.narrow(0, head.numel(), headers_.numel()).copy_(headers_);
    result.narrow(0, fixed, payload_bytes).copy_(data.narrow(0, 0, payload_bytes));
    return result;
  }

  /// Undoes the chunks that are done. Memory is what has run out: everything here is there already.
  void go_back(const Log& log) {
    DeviceArgs back = args_;
    back.take_out = put_in_;
    back.put_in = take_out_;
    back.read = &log;
    back.write = nullptr;
    binding::throw_unless_ok(change_cuda(context_, back));
  }

  const c10::DeviceGuard guard_;
  const Context context_;
  Tensor workspace_, answers_, headers_, read_storage_;
  Log read_;
  DeviceArgs args_;
};

}  // namespace pylora::merge
