// What the Python module asks of torch, and how it reads plain tensors: contiguous, of known types,
// without anything that a kernel would miss. What is not plain is left to Python's own checks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "density.h"
#include "python_api.h"
#include "step.h"

namespace ddim {

// Torch's names, set when the module is loaded. write_count: see kernels/torch_internals.py.
extern PyObject *s_packed, *s_needs, *s_rows, *s_scale_and_offset, *write_count;

// Loads them. False: an exception.
bool import_torch_names();

// Reads a tensor with memory of its own, on the device of another (null: on any that has steps).
// Zeros that torch knows without memory have none.
bool read_any(PyObject* object, const dlpack::Tensor* like, dlpack::Tensor* t);

// The same on any device that has steps, for a torch.nn.Parameter, too.
bool read_tensor_or_parameter(PyObject* object, dlpack::Tensor* t);

inline bool is_on_host(const dlpack::Tensor& t) { return t.device.type == dlpack::kCpu; }
inline void* address_of(const dlpack::Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// `as_new`: dimensions of size 1, too, have the strides of a new tensor. (They change no place in
// memory, but the layout that torch gives to results.)
bool contiguous(const dlpack::Tensor& t, bool as_new = false);

// Reads a plain tensor of the shape of `like` (null: of any shape). False: not plain, or an
// exception.
bool read_tensor(PyObject* object, const dlpack::Tensor* like, int64_t stride, Tensor* out, dlpack::Tensor* t);
bool read_tensor(PyObject* object, const dlpack::Tensor* like, int64_t stride, Tensor* out);

// Reads a plain one-dimensional tensor with an entry for each sample.
bool read_per_sample(PyObject* object, const dlpack::Tensor& like, uint8_t code, uint8_t bits, int64_t n_samples, const void** out);

bool read_coefficients(PyObject* packed, Step* s);

// Reads what the model's outputs and x_t share: `like`, x_t, whose shape the others have, and `other`,
// model_output. Gradients are asked for by the caller.
bool read_prediction(PyObject* x_t, PyObject* model_output, PyObject* packed, Step* s, dlpack::Tensor* like, dlpack::Tensor* other);

// Reads the unconditional output and the scale of guidance, or None for both.
bool read_guidance(PyObject* uncond, PyObject* scale, const dlpack::Tensor& like, Step* s);

// Reads how a log-probability is reduced, whose scale and offset the row computes. False: what is
// wrong with it is left to Python, or an exception.
bool read_reduction(PyObject* row, PyObject* reduction, PyObject* min_std, const Step& s, Reduction* out);

// Whether torch records gradients. The kernels record none, so a tensor that may require one is
// left to Python.
bool is_recording();
bool without_gradient(PyObject* object, bool recording);

// Whether torch allows writing: a tensor made under inference mode may be written there alone.
bool writable(PyObject* object);

// Whether a mode of torch looks at every operation, such as make_fx's, or forward-mode derivatives
// are taken: they would miss this one.
bool is_watched();

// torch's number of threads, or 1 for up to `grain` elements, of which one thread takes care.
int thread_count(int64_t n, int64_t grain);

constexpr size_t kItemSize[] = {4, 2, 2};

// Whether two stretches of memory share nothing. Null shares nothing.
bool apart(const void* a, size_t a_bytes, const void* b, size_t b_bytes);

// A new tensor on the CPU. It owns its memory: this struct, and the elements after it.
struct alignas(64) NewTensor {
  static constexpr int32_t kMostDimensions = 8;
  dlpack::ManagedTensor managed;
  int64_t shape[kMostDimensions], strides[kMostDimensions];

  // In the layout of another. Null if there is not enough memory, or there are too many dimensions.
  static NewTensor* like(const dlpack::Tensor& t, size_t bytes);
  // (n,) float32.
  static NewTensor* floats(int64_t n);
  static void destroy(dlpack::ManagedTensor* managed);

  void* elements() { return this + 1; }
  PyObject* to_python();
};

// Whether all of these are addresses, for at least one element. False: an exception. Tensors without
// memory on the CPU, such as those on the device meta, have the address 0.
bool all_given(std::initializer_list<const void*> addresses, int64_t rows, int64_t columns);

// Reads a tensor from (address, stride, dtype); address 0: not given. False: an exception.
bool read_described(PyObject* described, Tensor* out);

// With fewer elements, releasing the interpreter's lock costs more than it gains.
constexpr int64_t kReleaseLock = 65536;

// Releases the interpreter's lock while it lives.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// Calls work(), without the interpreter's lock where it takes a while.
template <typename Work>
void unlocked_for(int64_t elements, const Work& work) {
  if (elements < kReleaseLock) return work();
  Unlocked unlocked;
  work();
}

}  // namespace ddim
