// Functions of the Python module, see density_calls.cpp.
#pragma once
#include "python_api.h"

namespace ddim {

PyObject* py_density(PyObject* self, PyObject* arguments);
PyObject* py_density_of_plain(PyObject* self, PyObject* const* arguments, Py_ssize_t n_arguments);
PyObject* py_density_backward_of_plain(PyObject* self, PyObject* const* arguments, Py_ssize_t n_arguments);

}  // namespace ddim
