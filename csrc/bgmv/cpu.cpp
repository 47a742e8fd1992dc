// A counting sort of tokens by slot.
#include "bgmv/bgmv.h"

namespace pylora::bgmv {

SegmentPlan group_by_slot(const int32_t* token_slots, int64_t num_tokens, int64_t num_slots, int32_t* scratch) {
  int32_t* order = scratch;
  int32_t* indptr = order + num_tokens;     // [num_slots + 1]
  int32_t* slots = indptr + num_slots + 1;  // [num_slots]
  for (int64_t s = 0; s <= num_slots; ++s)
    indptr[s] = 0;
  for (int64_t t = 0; t < num_tokens; ++t)
    if (token_slots[t] >= 0) ++indptr[token_slots[t] + 1];
  for (int64_t s = 0; s < num_slots; ++s) {
    indptr[s + 1] += indptr[s];
    slots[s] = indptr[s];  // where the slot's next token goes
  }
  for (int64_t t = 0; t < num_tokens; ++t)
    if (token_slots[t] >= 0) order[slots[token_slots[t]]++] = static_cast<int32_t>(t);
  for (int64_t s = 0; s < num_slots; ++s)
    slots[s] = static_cast<int32_t>(s);
  SegmentPlan plan;
  plan.num_segments = num_slots;
  plan.order = order;
  plan.indptr = indptr;
  plan.slots = slots;
  return plan;
}

}  // namespace pylora::bgmv
