// A launcher's Status as torch's exceptions.
#pragma once

#include <c10/util/Exception.h>

#include "common/status.h"

namespace pylora::binding {

inline void throw_unless_ok(const Status& status) {
  switch (status.code) {
    case Status::Code::ok:
      return;
    case Status::Code::unsupported:
      TORCH_CHECK_NOT_IMPLEMENTED(false, status.message);
    case Status::Code::invalid_argument:
      TORCH_CHECK_VALUE(false, status.message);
    case Status::Code::cuda_error:
      TORCH_CHECK(false, "CUDA: ", status.message);
  }
}

}  // namespace pylora::binding
