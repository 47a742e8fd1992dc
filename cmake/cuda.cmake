# Compiles csrc/<op>/*.cu into the library. No torch header is involved, so nvcc and a CPU build of torch are enough.
# What a program has to link besides the library is written to cuda_link.txt in the build folder, one item a line.

# PTX of the last architecture lets a newer GPU compile the kernels for itself. Architecture-specific code ("90a")
# has no such future, so its PTX is that of the plain architecture.
set(CMAKE_CUDA_ARCHITECTURES)
foreach(arch IN LISTS PYLORA_CUDA_ARCHS)
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
endforeach()
list(GET PYLORA_CUDA_ARCHS -1 last_arch)
string(REGEX REPLACE "[a-z]$" "" last_plain_arch ${last_arch})
list(APPEND CMAKE_CUDA_ARCHITECTURES ${last_plain_arch}-virtual)

enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
find_package(CUDAToolkit REQUIRED)
# Kernels call the constexpr size functions of the headers they share with their callers.
string(APPEND CMAKE_CUDA_FLAGS " --expt-relaxed-constexpr -Xptxas=-warn-spills")

file(GLOB PYLORA_CUDA_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/*/*.cu)
add_library(pylora_cuda OBJECT ${PYLORA_CUDA_SOURCES})
target_link_libraries(pylora_cuda PRIVATE pylora_flags)
string(REPLACE ";" ", " built_for "${PYLORA_CUDA_ARCHS}")
target_compile_definitions(pylora_cuda PRIVATE PYLORA_WITH_CUDA=1 "PYLORA_CUDA_ARCHS=\"${built_for}\"")

target_sources(pylora_kernels PRIVATE $<TARGET_OBJECTS:pylora_cuda>)
target_compile_definitions(pylora_kernels PUBLIC PYLORA_WITH_CUDA=1)
target_link_libraries(pylora_kernels PUBLIC CUDA::cudart_static)
file(WRITE ${CMAKE_BINARY_DIR}/cuda_link.txt "${CUDA_cudart_static_LIBRARY}\n-ldl\n-lrt\n-lpthread\n")

# The launchers as Python functions that run on a GPU: the emulator's driver with another device below it.
if(PYLORA_ON_DEVICE)
  include(cmake/python.cmake)
  file(GLOB PYLORA_DRIVER_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/emu/driver/*.cpp)
  pylora_python_module(_on_device ${PYLORA_DRIVER_SOURCES})
  target_link_libraries(_on_device PRIVATE pylora_kernels pylora_flags)
endif()
