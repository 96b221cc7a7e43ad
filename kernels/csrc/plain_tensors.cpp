#include "plain_tensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace ddim {

PyObject* tensor_type;
const dlpack::ExchangeApi* exchange = nullptr;  // as long as it is null, nothing is plain, and Python checks at its own pace
PyObject *s_packed, *s_needs, *s_rows, *s_scale_and_offset, *write_count;

namespace {

PyObject *parameter_type, *get_num_threads, *grad_enabled, *inference_mode, *s_requires_grad;
// From kernels/torch_internals.py. The last is None where torch has no such name.
PyObject *modes_active, *forward_ad, *forward_ad_level;
PyCFunction is_negated, is_inference;  // torch.Tensor.is_neg and is_inference, called without looking them up

bool has_elements(const dlpack::Tensor& t) {
  return std::find(t.shape, t.shape + t.ndim, 0) == t.shape + t.ndim;
}

// Whether there are steps for tensors there: here on the CPU, elsewhere in Triton.
bool has_steps(const dlpack::Device& where) {
  return where.type == dlpack::kCpu || where.type == dlpack::kCuda || where.type == dlpack::kRocm;
}

bool read_dtype(const dlpack::DataType& type, DType* out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) return *out = kFloat32, true;
  if (type.code == dlpack::kFloat && type.bits == 16) return *out = kFloat16, true;
  if (type.code == dlpack::kBFloat && type.bits == 16) return *out = kBFloat16, true;
  return false;
}

// A method without arguments as a function. Null: it is none in C, or an exception.
PyCFunction method_of(PyObject* object, const char* name) {
  Reference method(object ? PyObject_GetAttrString(object, name) : nullptr);
  return method.object && PyCFunction_GetFlags(method.object) == METH_NOARGS ? PyCFunction_GetFunction(method.object) : nullptr;
}

}  // namespace

bool import_torch_names() {
  Reference torch(PyImport_ImportModule("torch"));
  if (!torch.object) return false;
  tensor_type = PyObject_GetAttrString(torch.object, "Tensor");
  Reference nn(PyObject_GetAttrString(torch.object, "nn"));
  parameter_type = nn.object ? PyObject_GetAttrString(nn.object, "Parameter") : nullptr;
  get_num_threads = PyObject_GetAttrString(torch.object, "get_num_threads");
  grad_enabled = PyObject_GetAttrString(torch.object, "is_grad_enabled");
  inference_mode = PyObject_GetAttrString(torch.object, "is_inference_mode_enabled");
  Reference internals(PyImport_ImportModule("ddim_fast.kernels.torch_internals"));
  if (!internals.object) return false;
  modes_active = PyObject_GetAttrString(internals.object, "modes_active");
  forward_ad = PyObject_GetAttrString(internals.object, "FORWARD_AD");
  forward_ad_level = PyObject_GetAttrString(internals.object, "FORWARD_AD_LEVEL");
  write_count = PyObject_GetAttrString(internals.object, "WRITE_COUNT");
  s_requires_grad = PyUnicode_InternFromString("requires_grad");
  s_packed = PyUnicode_InternFromString("packed");
  s_needs = PyUnicode_InternFromString("needs");
  s_rows = PyUnicode_InternFromString("rows");
  s_scale_and_offset = PyUnicode_InternFromString("scale_and_offset");
  Reference example(PyObject_CallNoArgs(tensor_type));  // on the CPU, for any default device
  is_negated = method_of(example.object, "is_neg");
  is_inference = method_of(example.object, "is_inference");
  if (PyErr_Occurred()) return false;
  Reference capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      capsule.object ? PyCapsule_GetPointer(capsule.object, "dlpack_exchange_api") : nullptr);
  if (api && api->version.major == 1 && is_negated && is_inference) exchange = api;
  PyErr_Clear();
  return true;
}

namespace {

bool is_a(PyObject* object, PyObject* type) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type; }

bool read_memory(PyObject* object, const dlpack::Tensor* like, dlpack::Tensor* t) {
  if (exchange->tensor_from_object(object, t) != 0) return false;
  const dlpack::Device& where = t->device;
  if (like ? where.type != like->device.type || where.id != like->device.id : !has_steps(where)) return false;
  Reference negated(is_negated(object, nullptr));  // its memory has the other sign
  return negated.object == Py_False && (t->data || !has_elements(*t));
}

}  // namespace

bool read_any(PyObject* object, const dlpack::Tensor* like, dlpack::Tensor* t) { return is_a(object, tensor_type) && read_memory(object, like, t); }

bool read_tensor_or_parameter(PyObject* object, dlpack::Tensor* t) {
  return (is_a(object, tensor_type) || is_a(object, parameter_type)) && read_memory(object, nullptr, t);
}

bool contiguous(const dlpack::Tensor& t, bool as_new) {
  if (!t.strides) return true;
  int64_t expected = 1;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if ((as_new || t.shape[d] != 1) && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

bool read_tensor(PyObject* object, const dlpack::Tensor* like, int64_t stride, Tensor* out, dlpack::Tensor* t) {
  if (!read_any(object, like, t) || !read_dtype(t->dtype, &out->dtype) || !contiguous(*t)) return false;
  if (like && (t->ndim != like->ndim || !std::equal(t->shape, t->shape + t->ndim, like->shape))) return false;
  out->data = address_of(*t);
  out->stride = stride;
  return true;
}

bool read_tensor(PyObject* object, const dlpack::Tensor* like, int64_t stride, Tensor* out) {
  dlpack::Tensor t;
  return read_tensor(object, like, stride, out, &t);
}

bool is_recording() {
  Reference enabled(PyObject_CallNoArgs(grad_enabled));
  return enabled.object != Py_False;
}

bool without_gradient(PyObject* object, bool recording) {
  if (!recording) return true;
  Reference attribute(PyObject_GetAttr(object, s_requires_grad));
  return attribute.object == Py_False;
}

bool writable(PyObject* object) {
  Reference inference(is_inference(object, nullptr));
  if (inference.object == Py_False) return true;
  Reference allowed(PyObject_CallNoArgs(inference_mode));
  return allowed.object == Py_True;
}

bool read_per_sample(PyObject* object, const dlpack::Tensor& like, uint8_t code, uint8_t bits, int64_t n_samples, const void** out) {
  dlpack::Tensor t;
  if (!read_any(object, &like, &t) || t.dtype.code != code || t.dtype.bits != bits || t.dtype.lanes != 1) return false;
  if (t.ndim != 1 || t.shape[0] != n_samples || !contiguous(t)) return false;
  *out = address_of(t);
  return true;
}

bool apart(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto *x = static_cast<const char*>(a), *y = static_cast<const char*>(b);
  return !x || !y || x + a_bytes <= y || y + b_bytes <= x;
}

bool read_coefficients(PyObject* packed, Step* s) {
  if (!PyBytes_Check(packed) || PyBytes_Size(packed) != static_cast<Py_ssize_t>(sizeof(Coefficients) + sizeof(uint32_t))) return false;
  const char* bytes = PyBytes_AsString(packed);
  uint32_t clipped;
  std::memcpy(&s->c, bytes, sizeof s->c);
  std::memcpy(&clipped, bytes + sizeof s->c, sizeof clipped);
  s->clipped = clipped != 0;
  return true;
}

int thread_count(int64_t n, int64_t grain) {
  if (n <= grain) return 1;
  Reference count(PyObject_CallNoArgs(get_num_threads));
  return count.object ? static_cast<int>(PyLong_AsLong(count.object)) : 1;
}

bool is_watched() {
  PyObject* level = PyDict_GetItemWithError(forward_ad, forward_ad_level);
  if (!level || PyLong_AsLong(level) >= 0) return true;
  Reference count(PyObject_CallNoArgs(modes_active));
  return !count.object || PyLong_AsLong(count.object) != 0;
}

bool read_prediction(PyObject* x_t, PyObject* model_output, PyObject* packed, Step* s, dlpack::Tensor* like, dlpack::Tensor* other) {
  if (!exchange || !read_tensor(x_t, nullptr, 0, &s->x_t, like) || like->ndim < 1) return false;
  s->n_samples = like->shape[0];
  s->n_elements = 1;
  for (int32_t d = 1; d < like->ndim; ++d) s->n_elements *= like->shape[d];
  s->x_t.stride = s->n_elements;
  if (!read_tensor(model_output, like, s->n_elements, &s->model_output, other)) return false;
  if (s->model_output.dtype != s->x_t.dtype && s->x_t.dtype != kFloat32) return false;
  return read_coefficients(packed, s);
}

bool read_guidance(PyObject* uncond, PyObject* scale, const dlpack::Tensor& like, Step* s) {
  if (uncond == Py_None) return scale == Py_None;
  if (!read_tensor(uncond, &like, s->n_elements, &s->model_output_uncond)) return false;
  if (s->model_output_uncond.dtype != s->model_output.dtype) return false;
  s->guidance_scale = static_cast<float>(PyFloat_AsDouble(scale));
  return !PyErr_Occurred() && std::isfinite(s->guidance_scale);
}

bool read_reduction(PyObject* row, PyObject* reduction, PyObject* min_std, const Step& s, Reduction* out) {
  if (!PyUnicode_Check(reduction)) return false;
  const bool mean = PyUnicode_CompareWithASCIIString(reduction, "mean") == 0;
  if (!mean && PyUnicode_CompareWithASCIIString(reduction, "sum") != 0) return false;
  if (min_std != Py_None && !PyFloat_CheckExact(min_std)) return false;
  const double least = min_std == Py_None ? 0 : PyFloat_AsDouble(min_std);
  const double std_dev = std::max(std::fabs(double{s.c.noise}), least);
  if (!(least >= 0) || (min_std != Py_None && least == 0) || std_dev < 0x1p-59 || std_dev > 0x1p59) return false;
  Reference numbers(PyObject_CallMethodObjArgs(row, s_scale_and_offset, min_std, nullptr));
  if (!numbers.object || !PyTuple_Check(numbers.object) || PyTuple_Size(numbers.object) != 2) return false;
  const double scale = PyFloat_AsDouble(PyTuple_GetItem(numbers.object, 0)), offset = PyFloat_AsDouble(PyTuple_GetItem(numbers.object, 1));
  *out = {static_cast<float>(scale), static_cast<float>(offset), -1, mean};
  return !PyErr_Occurred();
}

NewTensor* NewTensor::like(const dlpack::Tensor& t, size_t bytes) {
  if (t.ndim > kMostDimensions) return nullptr;
  void* memory = ::operator new(sizeof(NewTensor) + bytes, std::align_val_t{alignof(NewTensor)}, std::nothrow);
  if (!memory) return nullptr;
  auto* result = new (memory) NewTensor;
  std::copy_n(t.shape, t.ndim, result->shape);
  std::copy_n(t.strides, t.ndim, result->strides);
  result->managed = {exchange->version, nullptr, destroy, 0, {result + 1, t.device, t.ndim, t.dtype, result->shape, result->strides, 0}};
  return result;
}

NewTensor* NewTensor::floats(int64_t n) {
  int64_t shape[] = {n}, strides[] = {1};
  return like({nullptr, {dlpack::kCpu, 0}, 1, {dlpack::kFloat, 32, 1}, shape, strides, 0}, n * sizeof(float));
}

void NewTensor::destroy(dlpack::ManagedTensor* managed) { ::operator delete(managed, std::align_val_t{alignof(NewTensor)}); }

PyObject* NewTensor::to_python() {
  void* object = nullptr;
  return exchange->managed_tensor_to_object(&managed, &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
}

bool all_given(std::initializer_list<const void*> addresses, int64_t rows, int64_t columns) {
  if (rows >= 0 && columns >= 0 && (rows == 0 || columns == 0 || std::find(addresses.begin(), addresses.end(), nullptr) == addresses.end())) return true;
  PyErr_SetString(PyExc_ValueError, "a kernel must be given memory on the CPU, got a tensor that has none: move it with .cpu()");
  return false;
}

bool read_described(PyObject* described, Tensor* out) {
  long long address, stride;
  int dtype;
  if (!PyArg_ParseTuple(described, "LLi", &address, &stride, &dtype)) return false;
  if (dtype < kFloat32 || dtype > kBFloat16) {
    PyErr_Format(PyExc_ValueError, "dtype must be a code of csrc/step.h, got %d", dtype);
    return false;
  }
  *out = {reinterpret_cast<void*>(address), stride, static_cast<DType>(dtype)};
  return true;
}

}  // namespace ddim
