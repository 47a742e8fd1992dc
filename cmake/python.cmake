# pylora_python_module(name sources...): a Python module without torch. pybind11 is the copy that comes with torch, as in
# the extension.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.util, pathlib, sysconfig; print(pathlib.Path(importlib.util.find_spec('torch').origin).parent / 'include', sysconfig.get_config_var('EXT_SUFFIX'), sep=';')"
  OUTPUT_VARIABLE PYLORA_PYTHON OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(GET PYLORA_PYTHON 0 PYLORA_PYBIND11_INCLUDE)
list(GET PYLORA_PYTHON 1 PYLORA_MODULE_SUFFIX)

function(pylora_python_module name)
  add_library(${name} MODULE ${ARGN})
  target_include_directories(${name} SYSTEM PRIVATE ${PYLORA_PYBIND11_INCLUDE})
  target_link_libraries(${name} PRIVATE Python::Module)
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ${PYLORA_MODULE_SUFFIX})
endfunction()
