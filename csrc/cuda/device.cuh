// The one header that a .cu file includes besides its op's own. Under nvcc it is CUDA and all of the project's inline
// PTX; compiled with PYLORA_EMULATE it is the emulator (csrc/emu/README.md), which runs the same source.
#pragma once

#include "cuda/convert.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/platform.cuh"
#include "cuda/sync.cuh"
#include "cuda/tensor_core.cuh"
