// pylora::merge_, unmerge_, swap_ and merge_is_finite: schemas, checks, the log as a tensor, registration.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <string>
#include <vector>

#include "binding/checks.h"
#include "binding/context.h"
#include "binding/status.h"
#include "merge/call.h"
#include "merge/heuristics.h"

namespace pylora::merge {
namespace {

/// A log tensor begins with this; chunk headers and payloads follow.
struct LogHeader {
  char magic[8] = {'P', 'Y', 'L', 'O', 'R', 'A', 'M', '2'};
  int64_t count = 0, rows = 0, columns = 0;
  int64_t data_bytes = 0;
  uint8_t dtype = 0;
  uint8_t fused = 0;
  uint8_t transposed = 0;
  uint8_t reserved[21] = {};
};
static_assert(sizeof(LogHeader) == 64, "the log is written as bytes");

Tensor new_bytes(int64_t bytes) { return at::empty({bytes}, at::TensorOptions().dtype(at::kByte)); }

/// Whether no two elements share memory, of which threads would write each its own: rows within a matrix, and the
/// matrices of a stack, one after another or each in the gaps between the others' rows.
bool lie_apart(const Weight& w) {
  if (w.count == 0 || matrix_elements(w) == 0) return true;
  if (w.rows > 1 && w.row_stride < w.columns) return false;
  if (w.count == 1) return true;
  const bool in_gaps = w.matrix_stride >= w.columns && w.row_stride >= (w.count - 1) * w.matrix_stride + w.columns;
  return w.matrix_stride >= (w.rows - 1) * w.row_stride + w.columns || in_gaps;
}

/// One op's arguments as launchers take them; owns what they point to.
class Call {
 public:
  Call(const char* op, const Tensor& w) : op_(op), check_(op), w_(w) {
    check_.kernel_dtype("w", w);
    TORCH_CHECK_VALUE(w.dim() == 2 || w.dim() == 3, op_, ": w: expected 2 or 3 dimensions, got shape ", w.sizes());
    TORCH_CHECK_VALUE(w.is_cpu(), op_, ": w: expected a tensor on the CPU, got one on ", w.device());
    Weight& weight = args_.weight;
    const int64_t out = w.size(-2), in = w.size(-1);
    const bool as_rows = in <= 1 || w.stride(-1) == 1, as_columns = out <= 1 || w.stride(-2) == 1;
    weight.transposed = !as_rows && as_columns;
    weight.count = w.dim() == 3 ? w.size(0) : 1;
    weight.rows = weight.transposed ? in : out;
    weight.columns = weight.transposed ? out : in;
    weight.dtype = binding::to_dtype(w.scalar_type());
    const int64_t stride = w.stride(weight.transposed ? -1 : -2);
    weight.row_stride = weight.rows > 1 ? stride : weight.columns;
    weight.matrix_stride = w.dim() == 3 ? w.stride(0) : 0;
    TORCH_CHECK_VALUE((as_rows || as_columns) && lie_apart(weight), op_,
                      ": w: expected elements that do not overlap, with a stride of 1 in one of the last two "
                      "dimensions, got shape ",
                      w.sizes(), " and strides ", w.strides());
  }

  void take_out(const char* prefix, at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings,
                const RowScales& row_scales) {
    args_.take_out = adapters(&out_, prefix, a, b, scalings, row_scales);
  }
  void put_in(at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings, const RowScales& row_scales) {
    args_.put_in = adapters(&in_, "", a, b, scalings, row_scales);
  }

  /// Checks the log, but not that W is what it was made for.
  void read_log(const char* name, const OptionalTensor& log) {
    if (!log) return;
    TORCH_CHECK_TYPE(log->scalar_type() == at::kByte, op_, ": ", name, ": expected uint8, got ", log->scalar_type());
    TORCH_CHECK_VALUE(log->is_cpu() && log->dim() == 1 && log->is_contiguous(), op_, ": ", name,
                      ": expected a contiguous vector on the CPU, got shape ", log->sizes(), " on ", log->device());
    LogHeader header;
    const Weight& w = args_.weight;
    const int64_t fixed = fixed_bytes();
    TORCH_CHECK_VALUE(log->numel() >= static_cast<int64_t>(sizeof header), op_, ": ", name,
                      ": expected the log of a merge, got ", log->numel(), " bytes");
    // A view may begin anywhere; headers are read where they lie.
    const bool aligned = reinterpret_cast<uintptr_t>(log->const_data_ptr()) % alignof(ChunkHeader) == 0;
    read_storage_ = aligned ? *log : log->clone();
    uint8_t* bytes = static_cast<uint8_t*>(const_cast<void*>(read_storage_.const_data_ptr()));
    std::memcpy(&header, bytes, sizeof header);
    TORCH_CHECK_VALUE(std::memcmp(header.magic, LogHeader().magic, sizeof header.magic) == 0, op_, ": ", name,
                      ": expected the log of a merge, got other bytes");
    TORCH_CHECK_VALUE(header.count == w.count && header.rows == w.rows && header.columns == w.columns &&
                          header.dtype == static_cast<uint8_t>(w.dtype) && header.transposed == w.transposed,
                      op_, ": ", name, ": expected the log of a weight of this shape, layout and dtype, got that of ",
                      header.count, " x ", header.rows, " x ", header.columns, " as stored");
    read_.chunks = reinterpret_cast<ChunkHeader*>(bytes + sizeof header);
    read_.data = bytes + fixed;
    read_.capacity = log->numel() - fixed;
    read_.fused = header.fused;
    TORCH_CHECK_VALUE(read_.capacity >= 0 && read_.capacity == header.data_bytes && is_readable(w, read_), op_, ": ",
                      name, ": expected the whole log of a merge, got a damaged one");
    args_.read = &read_;
  }

  void check_unchanged() {
    if (!args_.read) return;
    bool unchanged = false;
    binding::throw_unless_ok(check_unchanged_cpu(context_, with_data(args_.weight), read_, &unchanged));
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
    if (args_.read && !args_.put_in.num_adapters) args_.unchanged = &unchanged;
    binding::throw_unless_ok(change_cpu(context_, args_));
    args_.unchanged = nullptr;
    throw_unless(unchanged);
    bump_version();
  }

  /// Changes W and returns the log; if memory runs out, W is as it was.
  Tensor run_with_log() {
    prepare();
    // What is taken out without a log does not come back by putting it in again: all memory has to be there before.
    return args_.take_out.num_adapters && !args_.read ? run_in_counted_room() : run_in_growing_room();
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
    const Weight& w = args_.weight;
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

  void throw_unless(bool unchanged) const {
    TORCH_CHECK_VALUE(unchanged, op_,
                      ": w: expected the values that the merge left, got others: the weight was "
                      "changed after the merge");
  }

  Change adapters(std::vector<Adapter>* list, const std::string& prefix, at::TensorList a, at::TensorList b,
                  at::ArrayRef<double> scalings, const RowScales& row_scales) {
    TORCH_CHECK_VALUE(!a.empty(), op_, ": ", prefix, "a: expected at least one adapter, got none");
    TORCH_CHECK_VALUE(b.size() == a.size() && scalings.size() == a.size(), op_, ": ", prefix, "b, ", prefix,
                      "scalings: expected as many as ", prefix, "a, ", a.size(), ", got ", b.size(), " and ",
                      scalings.size());
    TORCH_CHECK_VALUE(row_scales.empty() || row_scales.size() == a.size(), op_, ": ", prefix,
                      "row_scales: expected as many as ", prefix, "a, ", a.size(), ", or none, got ",
                      row_scales.size());
    for (size_t i = 0; i < a.size(); ++i) {
      const OptionalTensor scale = row_scales.empty() ? OptionalTensor() : OptionalTensor(row_scales.get(i));
      list->push_back(adapter(prefix, a[i], b[i], scalings[i], scale));
    }
    return {list->data(), static_cast<int64_t>(list->size())};
  }

  Adapter adapter(const std::string& prefix, const Tensor& a, const Tensor& b, double scaling,
                  const OptionalTensor& row_scale) {
    const std::string a_name = prefix + "a", b_name = prefix + "b", scale_name = prefix + "row_scales";
    const int64_t out = w_.size(-2), in = w_.size(-1);
    check_.kernel_dtype(a_name.c_str(), a);
    if (w_.dim() == 3) {
      check_.shape(a_name.c_str(), a, {w_.size(0), -1, in});
      check_.shape(b_name.c_str(), b, {w_.size(0), out, a.size(1)});
    } else {
      check_.shape(a_name.c_str(), a, {-1, in});
      check_.shape(b_name.c_str(), b, {out, a.size(0)});
    }
    TORCH_CHECK_VALUE(a.size(-2) >= 1, op_, ": ", a_name, ": expected a rank of at least 1, got shape ", a.sizes());
    check_.same_dtype(b_name.c_str(), b, a_name.c_str(), a);
    check_.same_device(a_name.c_str(), a, "w", w_);
    check_.same_device(b_name.c_str(), b, "w", w_);
    Adapter result;
    result.rank = a.size(-2);
    result.dtype = binding::to_dtype(a.scalar_type());
    result.a = {a.const_data_ptr(), a.stride(-2), a.stride(-1)};
    result.b = {b.const_data_ptr(), b.stride(-2), b.stride(-1)};
    result.a_stride = a.dim() == 3 ? a.stride(0) : 0;
    result.b_stride = b.dim() == 3 ? b.stride(0) : 0;
    result.scaling = scaling;
    if (row_scale) {
      check_.kernel_dtype(scale_name.c_str(), *row_scale);
      check_.shape(scale_name.c_str(), *row_scale, {out});
      check_.same_device(scale_name.c_str(), *row_scale, "w", w_);
      scales_.push_back(row_scale->to(binding::accumulator_type(w_.scalar_type())).contiguous());
      result.row_scale = scales_.back().const_data_ptr();
    }
    return result;
  }

  Weight with_data(Weight weight) const {
    weight.data = w_.mutable_data_ptr();
    return weight;
  }

  void prepare() {
    args_.weight = with_data(args_.weight);
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
    for (int64_t i = 0; i < num_chunks(args_.weight); ++i)
      pending += log.chunks[i].is(ChunkKind::pending);
    return pending;
  }

  /// Room for the pending chunks if they need what the others did and a quarter more, and for one panel at least.
  Tensor grown(const Tensor& data, const Log& log, int64_t pending) const {
    const Weight& w = args_.weight;
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
    const int64_t chunks = num_chunks(args_.weight);
    headers_ = new_bytes((chunks + 1) * static_cast<int64_t>(sizeof(ChunkHeader)));
    Log log;
    log.chunks = static_cast<ChunkHeader*>(headers_.mutable_data_ptr());
    for (int64_t i = 0; i < chunks; ++i)
      log.chunks[i].set(ChunkKind::pending);
    return log;
  }

  int64_t fixed_bytes() const {
    return sizeof(LogHeader) + num_chunks(args_.weight) * static_cast<int64_t>(sizeof(ChunkHeader));
  }

  int64_t payload_bytes(const Log& log) const {
    int64_t bytes = 0;
    for (int64_t i = 0; i < num_chunks(args_.weight); ++i)
      bytes += log.chunks[i].bytes;
    return bytes;
  }

  Tensor new_log_tensor(int64_t payload) const { return new_bytes(fixed_bytes() + payload); }

  /// The finished log, in the order of its chunks.
  void fill(const Tensor& result, const Log& log) const {
    const Weight& w = args_.weight;
    LogHeader header;
    header.count = w.count;
    header.rows = w.rows;
    header.columns = w.columns;
    header.data_bytes = result.numel() - fixed_bytes();
    header.dtype = static_cast<uint8_t>(w.dtype);
    header.fused = log.fused;
    header.transposed = w.transposed;
    uint8_t* to = static_cast<uint8_t*>(result.mutable_data_ptr());
    std::memcpy(to, &header, sizeof header);
    Log copy;
    copy.chunks = reinterpret_cast<ChunkHeader*>(to + sizeof header);
    copy.data = to + fixed_bytes();
    copy_log(w, log, &copy);
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

  void bump_version() const {
    if (!w_.is_inference()) w_.unsafeGetTensorImpl()->bump_version();
  }

  const char* op_;
  binding::Checks check_;
  const Tensor& w_;
  const Context context_ = binding::cpu_context();
  std::vector<Adapter> out_, in_;
  std::vector<Tensor> scales_;
  Tensor workspace_, headers_, read_storage_;
  Log read_;
  ChangeArgs args_;
};

Tensor merge(Tensor& w, at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings, const RowScales& row_scales,
             bool log) {
  Call call("merge_", w);
  call.put_in(a, b, scalings, row_scales);
  if (log) return call.run_with_log();
  call.run();
  return new_bytes(0);
}

void unmerge(Tensor& w, at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings, const RowScales& row_scales,
             const OptionalTensor& log) {
  Call call("unmerge_", w);
  call.take_out("", a, b, scalings, row_scales);
  call.read_log("log", log);
  call.run();
}

Tensor swap(Tensor& w, at::TensorList old_a, at::TensorList old_b, at::ArrayRef<double> old_scalings,
            const RowScales& old_row_scales, const OptionalTensor& old_log, at::TensorList a, at::TensorList b,
            at::ArrayRef<double> scalings, const RowScales& row_scales, bool log) {
  Call call("swap_", w);
  call.take_out("old_", old_a, old_b, old_scalings, old_row_scales);
  call.put_in(a, b, scalings, row_scales);
  call.read_log("old_log", old_log);
  call.check_unchanged();
  if (log) return call.run_with_log();
  call.run();
  return new_bytes(0);
}

bool is_finite(const Tensor& w, at::TensorList a, at::TensorList b, at::ArrayRef<double> scalings,
               const RowScales& row_scales) {
  Call call("merge_is_finite", w);
  call.put_in(a, b, scalings, row_scales);
  return call.is_finite();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pylora, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("merge_(Tensor(a!) w, Tensor[] a, Tensor[] b, float[] scalings, Tensor?[] row_scales, bool log=True) -> Tensor",
        tags);
  m.def("unmerge_(Tensor(a!) w, Tensor[] a, Tensor[] b, float[] scalings, Tensor?[] row_scales, Tensor? log) -> ()",
        tags);
  m.def(
      "swap_(Tensor(a!) w, Tensor[] old_a, Tensor[] old_b, float[] old_scalings, Tensor?[] old_row_scales, Tensor? "
      "old_log, Tensor[] a, Tensor[] b, float[] scalings, Tensor?[] row_scales, bool log=True) -> Tensor",
      tags);
  m.def("merge_is_finite(Tensor w, Tensor[] a, Tensor[] b, float[] scalings, Tensor?[] row_scales) -> bool", tags);
}

TORCH_LIBRARY_IMPL(pylora, CPU, m) {
  m.impl("merge_", &merge);
  m.impl("unmerge_", &unmerge);
  m.impl("swap_", &swap);
  m.impl("merge_is_finite", &is_finite);
}

}  // namespace pylora::merge
