// Norms, and squares of W's rows, kept while the tensors that they were computed from are known unchanged.
//
// A tensor is known unchanged while it has the storage, address, dtype, sizes and strides that it had, and torch has
// counted no write to it. Tensors made in inference mode have no count: they are taken as unchanged within one
// `trust`, a number above 0 that the caller changes when trust ends. With 0 there is no such trust, and below 0 torch's
// count is not trusted either: nothing is found or kept. `writes` is the caller's count of writes that torch does not
// count; norms of tensors that require a gradient do not outlive a change of it. A storage is held weakly: its memory
// can go, and its identity cannot be given to another.
//
// Not safe by itself against several threads: the Python binding calls it with the GIL held.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/intrusive_ptr.h>

#include <optional>
#include <utility>
#include <vector>

namespace pylora::dora {

using at::Tensor;

class Seen {
 public:
  explicit Seen(const Tensor& t)
      : storage_(t.storage().getWeakStorageImpl()),
        data_(t.const_data_ptr()),
        sizes_(t.sizes().vec()),
        strides_(t.strides().vec()),
        dtype_(t.scalar_type()),
        version_(t.is_inference() ? -1 : t._version()) {}

  static bool can_see(const Tensor& t) { return t.has_storage() && !t.is_meta(); }

  bool counted() const { return version_ >= 0; }

  bool is_now(const Tensor& t) const {
    return t.has_storage() && t.storage().unsafeGetStorageImpl() == storage_._unsafe_get_target() &&
           t.const_data_ptr() == data_ && (t.is_inference() ? -1 : t._version()) == version_ &&
           t.scalar_type() == dtype_ && t.sizes() == at::IntArrayRef(sizes_) &&
           t.strides() == at::IntArrayRef(strides_);
  }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  std::vector<int64_t> sizes_, strides_;
  at::ScalarType dtype_;
  int64_t version_;
};

class KeptNorms {
 public:
  /// The kept norms of W + scaling * B A, if these are what they were.
  std::optional<Tensor> find(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling, int64_t writes,
                             int64_t trust) const {
    if (trust < 0 || !norms_ || norms_->scaling != scaling || !norms_->sources[0].is_now(weight) ||
        !norms_->sources[1].is_now(a) || !norms_->sources[2].is_now(b)) {
      return std::nullopt;
    }
    const bool trains = weight.requires_grad() || a.requires_grad() || b.requires_grad();
    if (trains && norms_->writes != writes) return std::nullopt;
    for (const Seen& seen : norms_->sources)
      if (!seen.counted() && (trust == 0 || trust != norms_->trust)) return std::nullopt;
    return norms_->values;
  }

  void keep(const Tensor& weight, const Tensor& a, const Tensor& b, double scaling, int64_t writes, int64_t trust,
            const Tensor& norms) {
    norms_.reset();
    if (trust >= 0 && Seen::can_see(weight) && Seen::can_see(a) && Seen::can_see(b))
      norms_ = Norms{{Seen(weight), Seen(a), Seen(b)}, scaling, writes, trust, usable_anywhere(norms)};
  }

  std::optional<Tensor> find_squares(const Tensor& weight, int64_t writes, int64_t trust) const {
    if (trust < 0 || !squares_ || !squares_->source.is_now(weight) ||
        (weight.requires_grad() && squares_->writes != writes))
      return std::nullopt;
    return squares_->values;
  }

  /// Those of a weight without a count are not kept.
  void keep_squares(const Tensor& weight, int64_t writes, int64_t trust, const Tensor& squares) {
    squares_.reset();
    if (trust >= 0 && Seen::can_see(weight) && !weight.is_inference())
      squares_ = Squares{Seen(weight), writes, usable_anywhere(squares)};
  }

  void clear() {
    norms_.reset();
    squares_.reset();
  }

  bool empty() const { return !norms_; }

 private:
  struct Norms {
    std::vector<Seen> sources;  // W, A, B
    double scaling;
    int64_t writes, trust;
    Tensor values;
  };
  struct Squares {
    Seen source;
    int64_t writes;
    Tensor values;
  };

  /// A tensor of inference mode could not be saved for a later backward.
  static Tensor usable_anywhere(const Tensor& t) {
    const c10::InferenceMode off(false);
    return t.is_inference() ? t.clone() : t.detach();
  }

  std::optional<Norms> norms_;
  std::optional<Squares> squares_;
};

}  // namespace pylora::dora
