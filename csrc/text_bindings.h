// Python's view of the text kernels, registered by bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace megatron_speech {

void register_text(pybind11::module_& m);

}  // namespace megatron_speech
