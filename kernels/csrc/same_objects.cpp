// Whether containers still hold the very objects that they held, and where tensors are: the rule of
// kernels/same_objects.py, which looks at tens of thousands of objects in a fraction of a
// millisecond here. Nothing is kept: who asks holds the objects, so that no address is used twice.
#include "same_objects.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace ddim {
namespace {

// A record's numbers: lengths, and addresses of objects. They may lie at any address.
class Words {
 public:
  Words(const char* begin, size_t count) : next_(begin), left_(count) {}

  // The next `count` of them. Null: there are not so many.
  const char* take(size_t count) {
    if (count > left_) return nullptr;
    const char* taken = next_;
    next_ += count * sizeof(uintptr_t);
    left_ -= count;
    return taken;
  }
  size_t left() const { return left_; }

 private:
  const char* next_;
  size_t left_;
};

uintptr_t word(const char* words, size_t i) {
  uintptr_t value;
  std::memcpy(&value, words + i * sizeof value, sizeof value);
  return value;
}

bool is(const char* words, size_t i, const void* object) { return word(words, i) == reinterpret_cast<uintptr_t>(object); }

// The answers of what follows; an error is a Python exception.
enum Answer { kDiffers, kSame, kError };

Answer compared(bool same) { return same ? kSame : kDiffers; }

Answer same_length(Py_ssize_t length, uintptr_t known) {
  if (length < 0) return kError;
  return compared(static_cast<uintptr_t>(length) == known);
}

// Keys and values of a dictionary in the order of its own table, as dict.keys and dict.values have
// them, whatever a subclass says. Its length is the known one.
Answer same_items(PyObject* dict, Words* known) {
  const size_t length = PyDict_Size(dict);
  const char *keys = known->take(length), *values = known->take(length);
  if (!keys || !values) return kDiffers;
  Py_ssize_t place = 0;
  PyObject *key, *value;
  for (size_t i = 0; PyDict_Next(dict, &place, &key, &value); ++i)
    if (i == length || !is(keys, i, key) || !is(values, i, value)) return kDiffers;
  return kSame;
}

// What a list holds, or what iterating gives.
Answer same_iterated(PyObject* iterable, size_t length, Words* known) {
  const char* items = known->take(length);
  if (!items) return kDiffers;
  if (PyList_CheckExact(iterable)) {
    for (size_t i = 0; i < length; ++i)
      if (!is(items, i, PyList_GetItem(iterable, i))) return kDiffers;
    return kSame;
  }
  Reference iterator(PyObject_GetIter(iterable));
  if (!iterator.object) return kError;
  size_t i = 0;
  while (PyObject* item = PyIter_Next(iterator.object)) {
    const bool same = i < length && is(items, i, item);
    Py_DECREF(item);
    if (!same) return kDiffers;
    ++i;
  }
  return PyErr_Occurred() ? kError : compared(i == length);
}

// What a set holds, in the order of addresses: that of iteration changes with the set's history.
Answer same_members(PyObject* set, size_t length, Words* known) {
  const char* members = known->take(length);
  if (!members) return kDiffers;
  Reference iterator(PyObject_GetIter(set));
  if (!iterator.object) return kError;
  std::vector<uintptr_t> found;
  found.reserve(length);
  while (PyObject* item = PyIter_Next(iterator.object)) {
    found.push_back(reinterpret_cast<uintptr_t>(item));
    Py_DECREF(item);
  }
  if (PyErr_Occurred()) return kError;
  if (found.size() != length) return kDiffers;
  std::sort(found.begin(), found.end());
  for (size_t i = 0; i < length; ++i)
    if (word(members, i) != found[i]) return kDiffers;
  return kSame;
}

enum Argument { kDicts, kIterables, kSets, kObjects, kRecord, kNumArguments };

Answer same_objects(PyObject* const* a, Words known) {
  const Py_ssize_t n_dicts = PyTuple_Size(a[kDicts]), n_iterables = PyTuple_Size(a[kIterables]);
  const Py_ssize_t n_sets = PyTuple_Size(a[kSets]), n_objects = PyTuple_Size(a[kObjects]);
  const char* lengths = known.take(n_dicts + n_iterables + n_sets);
  if (!lengths) return kDiffers;
  for (Py_ssize_t i = 0; i < n_dicts; ++i)
    if (Answer answer = same_length(PyDict_Size(PyTuple_GetItem(a[kDicts], i)), word(lengths, i)); answer != kSame) return answer;
  for (Py_ssize_t i = 0; i < n_dicts; ++i)
    if (word(lengths, i) != 0)
      if (Answer answer = same_items(PyTuple_GetItem(a[kDicts], i), &known); answer != kSame) return answer;
  lengths += n_dicts * sizeof(uintptr_t);
  for (Py_ssize_t i = 0; i < n_iterables; ++i) {
    PyObject* iterable = PyTuple_GetItem(a[kIterables], i);
    if (Answer answer = same_length(PyObject_Size(iterable), word(lengths, i)); answer != kSame) return answer;
    if (word(lengths, i) != 0)
      if (Answer answer = same_iterated(iterable, word(lengths, i), &known); answer != kSame) return answer;
  }
  lengths += n_iterables * sizeof(uintptr_t);
  for (Py_ssize_t i = 0; i < n_sets; ++i) {
    PyObject* set = PyTuple_GetItem(a[kSets], i);
    if (Answer answer = same_length(PyObject_Size(set), word(lengths, i)); answer != kSame) return answer;
    if (word(lengths, i) != 0)
      if (Answer answer = same_members(set, word(lengths, i), &known); answer != kSame) return answer;
  }
  const char* types = known.take(n_objects);
  if (!types) return kDiffers;
  for (Py_ssize_t i = 0; i < n_objects; ++i)
    if (!is(types, i, Py_TYPE(PyTuple_GetItem(a[kObjects], i)))) return kDiffers;
  return compared(known.left() == 0);
}

}  // namespace

// same_objects(dicts, iterables, sets, objects, record): whether nothing has changed since the
// record. Four tuples, and the record's words as bytes.
PyObject* py_same_objects(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
  bool right = n_arguments == kNumArguments && PyBytes_Check(a[kRecord]);
  for (Py_ssize_t i = kDicts; right && i <= kObjects; ++i) right = PyTuple_Check(a[i]);
  for (Py_ssize_t i = 0; right && i < PyTuple_Size(a[kDicts]); ++i) right = PyDict_Check(PyTuple_GetItem(a[kDicts], i));
  if (!right) {
    PyErr_SetString(PyExc_TypeError, "same_objects takes tuples of dictionaries, iterables, sets and objects, and a record as bytes");
    return nullptr;
  }
  const Answer answer = same_objects(a, Words(PyBytes_AsString(a[kRecord]), PyBytes_Size(a[kRecord]) / sizeof(uintptr_t)));
  return answer == kError ? nullptr : new_bool(answer == kSame);
}

// layouts(tensors): where each of a tuple of tensors is, in bytes that are equal as long as no
// tensor moves and none changes its device, dtype, shape or strides. None: torch does not say so of
// all of them.
PyObject* py_layouts(PyObject*, PyObject* tensors) {
  if (!PyTuple_Check(tensors)) {
    PyErr_SetString(PyExc_TypeError, "layouts takes a tuple of tensors");
    return nullptr;
  }
  if (!exchange) return new_none();
  const Py_ssize_t count = PyTuple_Size(tensors);
  std::vector<int64_t> words;
  words.reserve(count * 12);
  for (Py_ssize_t i = 0; i < count; ++i) {
    dlpack::Tensor t;
    PyObject* object = PyTuple_GetItem(tensors, i);
    const bool is_tensor = PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(tensor_type));
    if (!is_tensor || exchange->tensor_from_object(object, &t) != 0 || (t.ndim && !t.strides)) {
      PyErr_Clear();
      return new_none();
    }
    const auto address = reinterpret_cast<uintptr_t>(t.data) + static_cast<uintptr_t>(t.byte_offset);
    words.push_back(static_cast<int64_t>(address));
    words.push_back(int64_t{t.device.type} << 32 | static_cast<uint32_t>(t.device.id));
    words.push_back(int64_t{t.dtype.code} << 32 | int64_t{t.dtype.bits} << 16 | t.dtype.lanes);
    words.push_back(t.ndim);
    words.insert(words.end(), t.shape, t.shape + t.ndim);
    words.insert(words.end(), t.strides, t.strides + t.ndim);
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

}  // namespace ddim
