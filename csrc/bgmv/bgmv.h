// bgmv: a slot for each token. Tokens are grouped by slot first, so that each adapter is read once a call whatever the
// order of the tokens; the products, and the numerics, are those of cpu/segments.h.
#pragma once

#include "common/status.h"
#include "cpu/segments.h"

namespace pylora::bgmv {

/// int32 numbers of the scratch space that `group_by_slot` fills.
constexpr int64_t scratch_size(int64_t num_tokens, int64_t num_slots) { return num_tokens + 2 * num_slots + 1; }

/// The plan that serves tokens slot by slot, in the order of the tokens within a slot; those with slot -1 are in none
/// of its segments.
///   token_slots  [num_tokens], from -1 to num_slots - 1
///   scratch      [scratch_size(num_tokens, num_slots)], has to outlive the plan
SegmentPlan group_by_slot(const int32_t* token_slots, int64_t num_tokens, int64_t num_slots, int32_t* scratch);

}  // namespace pylora::bgmv
