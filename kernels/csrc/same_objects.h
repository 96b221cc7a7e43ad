// Functions of the Python module, see same_objects.cpp.
#pragma once
#include "python_api.h"

namespace ddim {

PyObject* py_same_objects(PyObject* self, PyObject* const* arguments, Py_ssize_t n_arguments);
PyObject* py_layouts(PyObject* self, PyObject* tensors);

}  // namespace ddim
