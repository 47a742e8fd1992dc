#include "merge/merge.h"

#include <optional>

#include "emu/driver/binder.h"
#include "merge/heuristics.h"

namespace pylora::emu {
namespace {

using namespace pylora::merge;

/// The launchers' arguments with what they point to.
struct MergeCall {
  DeviceArgs args;
  std::vector<Adapter> take_out, put_in;
  std::optional<Log> read, write;

  DeviceArgs complete() const {
    DeviceArgs complete = args;
    complete.take_out = {take_out.data(), static_cast<int64_t>(take_out.size())};
    complete.put_in = {put_in.data(), static_cast<int64_t>(put_in.size())};
    complete.read = read ? &*read : nullptr;
    complete.write = write ? &*write : nullptr;
    return complete;
  }
};

/// [out, in] or [n, out, in], a stride of 1 in one of the last two dimensions.
void assign_weight(MergeCall& call, py::handle tensor, std::vector<Region>& regions) {
  Weight& w = call.args.weight;
  assign(w.data, tensor, regions);
  const auto size = [&](int i) { return tensor.attr("size")(i).cast<int64_t>(); };
  const auto stride = [&](int i) { return tensor.attr("stride")(i).cast<int64_t>(); };
  const bool stack = tensor.attr("dim")().cast<int>() == 3;
  assign(w.dtype, tensor.attr("dtype"), regions);
  w.transposed = stride(-1) != 1 && size(-1) > 1;
  w.count = stack ? size(0) : 1;
  w.rows = size(w.transposed ? -1 : -2);
  w.columns = size(w.transposed ? -2 : -1);
  w.row_stride = w.rows > 1 ? stride(w.transposed ? -1 : -2) : w.columns;
  w.matrix_stride = stack ? stride(0) : 0;
}

void assign_factor(ConstMatrix& factor, int64_t& matrix_stride, py::handle tensor, std::vector<Region>& regions) {
  assign(factor.data, tensor, regions);
  factor.row_stride = tensor.attr("stride")(-2).cast<int64_t>();
  factor.column_stride = tensor.attr("stride")(-1).cast<int64_t>();
  matrix_stride = tensor.attr("dim")().cast<int>() == 3 ? tensor.attr("stride")(0).cast<int64_t>() : 0;
}

/// A list of (a, b, scaling, row scale or None).
Fields<MergeCall>::Setter adapters(std::vector<Adapter> MergeCall::* member) {
  return [member](MergeCall& call, py::handle list, std::vector<Region>& regions) {
    for (const py::handle item : list) {
      const auto [a, b, scaling, row_scale] = item.cast<std::tuple<py::object, py::object, double, py::object>>();
      Adapter adapter;
      adapter.rank = a.attr("size")(-2).cast<int64_t>();
      assign(adapter.dtype, a.attr("dtype"), regions);
      assign_factor(adapter.a, adapter.a_stride, a, regions);
      assign_factor(adapter.b, adapter.b_stride, b, regions);
      adapter.scaling = scaling;
      assign(adapter.row_scale, row_scale, regions);
      (call.*member).push_back(adapter);
    }
  };
}

/// (chunk headers, data), uint8.
Fields<MergeCall>::Setter log(std::optional<Log> MergeCall::* member, bool writes) {
  return [member, writes](MergeCall& call, py::handle value, std::vector<Region>& regions) {
    const auto [chunks, data] = value.cast<std::pair<py::object, py::object>>();
    Log log;
    log.chunks = reinterpret_cast<ChunkHeader*>(address_of(chunks, writes, regions));
    log.data = reinterpret_cast<uint8_t*>(address_of(data, writes, regions));
    log.capacity = data.attr("numel")().cast<int64_t>();
    call.*member = log;
  };
}

template <Status (*launcher)(const Context&, const DeviceArgs&)>
Status run(const Context& context, const MergeCall& call) {
  return launcher(context, call.complete());
}

void define(py::module_& module) {
  Fields<MergeCall> fields;
  fields.set("weight", &assign_weight)
      .set("take_out", adapters(&MergeCall::take_out))
      .set("put_in", adapters(&MergeCall::put_in))
      .set("read", log(&MergeCall::read, false))
      .set("write", log(&MergeCall::write, true))
      .field("tensor_cores", &MergeCall::args, &DeviceArgs::tensor_cores)
      .field("check", &MergeCall::args, &DeviceArgs::check)
      .field("answers", &MergeCall::args, &DeviceArgs::answers)
      .field("workspace", &MergeCall::args, &DeviceArgs::workspace);
  def_launcher(module, "change", fields, &run<change_cuda>);
  def_launcher(module, "check_unchanged", fields, &run<check_unchanged_cuda>);
  def_launcher(module, "is_finite", fields, &run<is_finite_cuda>);
  def_function(
      module, "workspace_bytes", fields, +[](const MergeCall& call) { return workspace_bytes_cuda(call.complete()); });
  def_function(module, "num_chunks", fields, +[](const MergeCall& call) { return num_tiles(call.args.weight); });
  def_function(
      module, "first_log_capacity", fields,
      +[](const MergeCall& call) { return first_log_capacity_cuda(call.args.weight); });
}

const Registration registration("merge", &define);

}  // namespace
}  // namespace pylora::emu
