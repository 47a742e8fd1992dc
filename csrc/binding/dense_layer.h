// A dense layer's forward as one call from Python: the layer's modules are read through their dictionaries, where the
// same walk in Python takes 15 us once a weight of some MB has passed through the caches.
#pragma once

#include <torch/csrc/python_headers.h>

namespace pylora::binding {

/// The functions for module.cpp's module, ended by an empty entry.
PyMethodDef* dense_layer_functions();

}  // namespace pylora::binding
