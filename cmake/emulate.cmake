# Compiles csrc/<op>/*.cu with the C++ compiler against the emulator (csrc/emu/README.md): a static library
# libpylora_emulated.a of the real launchers, and the Python module _emulated that calls them.

file(GLOB PYLORA_EMULATED_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/*/*.cu)
file(GLOB PYLORA_EMULATOR_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/emu/*.cpp)
file(GLOB PYLORA_DRIVER_SOURCES CONFIGURE_DEPENDS ${PYLORA_CSRC}/emu/driver/*.cpp)

add_library(pylora_emulated_flags INTERFACE)
target_link_libraries(pylora_emulated_flags INTERFACE pylora_flags)
target_compile_definitions(pylora_emulated_flags INTERFACE PYLORA_EMULATE=1)
# The library runs on the machine that built it. Contraction is off so that __fmul_rn and __fadd_rn mean what they say.
target_compile_options(pylora_emulated_flags INTERFACE -O2 -march=native -ffp-contract=off)
if(PYLORA_SANITIZE STREQUAL "thread")
  target_compile_definitions(pylora_emulated_flags INTERFACE PYLORA_EMULATE_TSAN=1)
endif()

# The emulator's own files touch its bookkeeping for all threads at once, which TSan would call races; it tells TSan by
# hand which order barriers and releases make.
add_library(pylora_emulator OBJECT ${PYLORA_EMULATOR_SOURCES})
target_link_libraries(pylora_emulator PRIVATE pylora_emulated_flags)
target_compile_options(pylora_emulator PRIVATE -fno-exceptions)
if(PYLORA_SANITIZE STREQUAL "thread")
  # A source's options come after those of the libraries it links.
  set_source_files_properties(${PYLORA_EMULATOR_SOURCES} PROPERTIES COMPILE_OPTIONS -fno-sanitize=thread)
endif()

# The emulator's own tests come with kernels.
if(PYLORA_TESTS)
  file(GLOB PYLORA_EMU_TEST_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/emu/*.cu)
  file(GLOB PYLORA_EMU_TEST_DRIVER CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/tests/emu/*.cpp)
  list(APPEND PYLORA_EMULATED_SOURCES ${PYLORA_EMU_TEST_SOURCES})
  list(APPEND PYLORA_DRIVER_SOURCES ${PYLORA_EMU_TEST_DRIVER})
endif()

set_source_files_properties(${PYLORA_EMULATED_SOURCES} PROPERTIES LANGUAGE CXX)
add_library(pylora_emulated STATIC ${PYLORA_EMULATED_SOURCES} $<TARGET_OBJECTS:pylora_emulator>)
target_link_libraries(pylora_emulated PRIVATE pylora_emulated_flags)
target_compile_options(pylora_emulated PRIVATE -fno-exceptions -Wno-unknown-pragmas)

include(cmake/python.cmake)
pylora_python_module(_emulated ${PYLORA_DRIVER_SOURCES})
target_link_libraries(_emulated PRIVATE pylora_emulated pylora_emulated_flags)
