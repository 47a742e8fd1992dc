// The low-rank part of multi_lora on CUDA: adapters whose factors lie where their layers keep them, by the kernels of
// csrc/cuda/segments.h, which has the numerics. What the operation is: csrc/cpu/segments.h.
//
// A call's first launch carries the adapters' addresses, ranks and scalings (and a plan that is in the host's memory) as
// arguments, the second makes the items; so a CUDA graph can hold all of it. With the plan in the device's memory a
// replay follows what is there by then.
#pragma once

#include "cuda/batch.h"

namespace pylora::multi_lora {

/// The adapters of a batch. slots: on the host, all of one dtype; the dropouts that are active have the same rng.
struct Batch {
  SegmentShape shape;
  SegmentPlan plan;
  const SegmentSlot* slots = nullptr;
  int64_t num_slots = 0, num_tokens = 0;
};

struct ForwardArgs {
  Batch batch;
  ConstMatrix x;              // [num_tokens, in_features], column stride 1
  MutableMatrix y;            // [num_tokens, out_features], column stride 1
  void* v = nullptr;          // out: [num_tokens, v_stride], accumulators; ranks beyond a slot's own are not written
  void* workspace = nullptr;  // forward_workspace_bytes(batch), aligned to 64
};

struct BackwardArgs {
  Batch batch;
  ConstMatrix dy, x;        // [num_tokens, out_features], [num_tokens, in_features], column stride 1
  const void* v = nullptr;  // the forward's
  MutableMatrix dx;         // is added to; null: not wanted
  // For each slot the gradients of its factors, contiguous [rank, in_features] and [out_features, rank], in the slot's
  // dtype: written whole, rounded once. Null: none wanted.
  void* const* da = nullptr;
  void* const* db = nullptr;
  void* workspace = nullptr;  // backward_workspace_bytes(batch), aligned to 64
};

/// An embedding: x is one-hot, so that v is a look-up in A and da a sum by column. in_features: the columns of A.
struct EmbeddingArgs {
  Batch batch;
  const int64_t* columns = nullptr;  // device, [num_tokens], 0 to in_features - 1 for tokens with a slot
  int64_t frozen_column = -1;        // da is 0 there
  MutableMatrix y;                   // forward: [num_tokens, out_features], column stride 1, is added to
  ConstMatrix dy;                    // backward: the same shape
  // As in BackwardArgs, but that da is zero before the call: columns that no token has are not written.
  void* const* da = nullptr;
  void* const* db = nullptr;
  void* workspace = nullptr;  // embedding_workspace_bytes(batch), aligned to 64
};

int64_t forward_workspace_bytes(const Batch& batch);
int64_t backward_workspace_bytes(const Batch& batch);
Status forward_cuda(const Context& context, const ForwardArgs& args);
Status backward_cuda(const Context& context, const BackwardArgs& args);
int64_t embedding_workspace_bytes(const Batch& batch);
Status embedding_forward_cuda(const Context& context, const EmbeddingArgs& args);
Status embedding_backward_cuda(const Context& context, const EmbeddingArgs& args);

}  // namespace pylora::multi_lora
