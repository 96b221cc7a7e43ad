// Python's limited API, which one build for every Python from 3.10 may use, and what each file that
// talks to Python shares.
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "dlpack.h"

namespace ddim {

// Set by module.cpp when it is loaded: torch.Tensor, and how its objects are read (null before torch 2.10).
extern PyObject* tensor_type;
extern const dlpack::ExchangeApi* exchange;

// A reference that this code owns.
struct Reference {
  PyObject* object;
  explicit Reference(PyObject* o) : object(o) {}
  ~Reference() { Py_XDECREF(object); }
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
};

// None, owned by the caller. Py_RETURN_NONE of Python 3.12's and 3.13's headers counts no reference,
// even where the limited API asks for versions before 3.12, whose None can be freed.
inline PyObject* new_none() {
  Py_INCREF(Py_None);
  return Py_None;
}

inline PyObject* new_bool(bool value) {
  PyObject* object = value ? Py_True : Py_False;
  Py_INCREF(object);
  return object;
}

// Whether a function was given as many arguments as it takes. False: an exception.
inline bool takes(Py_ssize_t given, int wanted) {
  if (given != wanted) PyErr_Format(PyExc_TypeError, "this takes %d arguments, got %zd", wanted, given);
  return given == wanted;
}

}  // namespace ddim
