# Compiles csrc/<op>/*.cu with the C++ compiler against the emulator (csrc/emu/README.md): a static library
# libpylora_emulated.a of the real launchers, and the Python module _emulated that calls them.

file(GLOB PYLORA_EMULATED_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/*/*.cu)
file(GLOB PYLORA_EMULATOR_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/emu/*.cpp)
file(GLOB PYLORA_DRIVER_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/emu/driver/*.cpp)

add_library(pylora_emulated_flags INTERFACE)
target_link_libraries(pylora_emulated_flags INTERFACE pylora_flags)
target_compile_definitions(pylora_emulated_flags INTERFACE PYLORA_EMULATE=1)
# The library runs on the machine that built it. Contraction is off so that __fmul_rn and __fadd_rn mean what they say.
# -g1: traps and sanitizers name lines.
target_compile_options(pylora_emulated_flags INTERFACE -O2 -g1 -march=native -ffp-contract=off)
if(PYLORA_SANITIZE STREQUAL "thread")
  target_compile_definitions(pylora_emulated_flags INTERFACE PYLORA_EMULATE_TSAN=1)
endif()

# The emulator's own files touch its bookkeeping for all threads at once, which TSan would call races; it tells TSan by
# hand which order barriers and releases make.
add_library(pylora_emulator OBJECT ${PYLORA_EMULATOR_SOURCES})
target_link_libraries(pylora_emulator PRIVATE pylora_emulated_flags)
target_compile_options(pylora_emulator PRIVATE -fno-exceptions)
if(PYLORA_SANITIZE STREQUAL "thread")
  target_compile_options(pylora_emulator PRIVATE -fno-sanitize=thread)
endif()

set_source_files_properties(${PYLORA_EMULATED_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
add_library(pylora_emulated STATIC ${PYLORA_EMULATED_SOURCES} $<TARGET_OBJECTS:pylora_emulator>)
target_link_libraries(pylora_emulated PRIVATE pylora_emulated_flags)
target_compile_options(pylora_emulated PRIVATE -fno-exceptions -Wno-unknown-pragmas)

find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(pybind11 REQUIRED CONFIG)
pybind11_add_module(_emulated NO_EXTRAS ${PYLORA_DRIVER_SOURCES})
target_link_libraries(_emulated PRIVATE pylora_emulated pylora_emulated_flags)
