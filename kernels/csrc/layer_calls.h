// Functions of the Python module, see layer_calls.cpp.
#pragma once
#include "python_api.h"

namespace ddim {

PyObject* py_convolve(PyObject* self, PyObject* arguments);
PyObject* py_convolve_plain(PyObject* self, PyObject* const* arguments, Py_ssize_t n_arguments);
PyObject* py_normalize(PyObject* self, PyObject* arguments);
PyObject* py_normalize_plain(PyObject* self, PyObject* const* arguments, Py_ssize_t n_arguments);
PyObject* py_silu(PyObject* self, PyObject* arguments);

}  // namespace ddim
