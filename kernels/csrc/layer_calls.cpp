// What layers of a model call: with addresses that Python has checked, and with plain tensors, for
// pictures so few that checks in Python would take longer than they do.
#include "layer_calls.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <initializer_list>
#include <new>

#include "convolution.h"
#include "density.h"
#include "normalization.h"
#include "parallel.h"
#include "plain_tensors.h"
#include "step.h"

namespace ddim {
namespace {

// Memory of a thread, which grows and is kept: allocating it again costs as much as a small
// convolution.
class Scratch {
 public:
  // Null if there is not enough memory.
  float* of(int64_t floats) {
    if (floats > size_) {
      free();
      memory_ = static_cast<float*>(::operator new(floats * sizeof(float), kAlignment, std::nothrow));
      size_ = memory_ ? floats : 0;
    }
    return memory_;
  }
  ~Scratch() { free(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void free() { ::operator delete(memory_, kAlignment), memory_ = nullptr; }
  float* memory_ = nullptr;
  int64_t size_ = 0;
};

// Calls work(begin, end, scratch) on parts of [0, n), as parallel_for does, without Python's lock; scratch
// is `floats` floats of the thread's own, at a multiple of 64 bytes. False: there is not enough memory.
template <typename Work>
bool with_scratch(int64_t floats, int64_t n, int64_t grain, int threads, Work work) {
  std::atomic<bool> enough_memory{true};
  {
    Unlocked unlocked;
    parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      float* memory = scratch.of(floats);
      if (memory)
        work(begin, end, memory);
      else
        enough_memory = false;
    });
  }
  return enough_memory;
}

bool run(const Convolution& c, int threads) {
  return with_scratch(scratch_floats(c), tile_count(c), kRowGrain, threads,
                      [&](int64_t begin, int64_t end, float* scratch) { kernels->convolve(c, begin, end, scratch); });
}

// How many threads are worth while for so many elements.
int useful_threads(int64_t elements, int threads) { return static_cast<int>(std::min<int64_t>(threads, elements / kThreadElements + 1)); }

bool run(const Normalization& n, int threads) {
  return with_scratch(scratch_floats(n), slab_count(n), 1, useful_threads(n.batch * n.pixels * n.channels, threads),
                      [&](int64_t begin, int64_t end, float* scratch) { kernels->normalize(n, begin, end, scratch); });
}

// Reads float32 on the CPU, of so many dimensions, that is no lazy negative.
bool read_floats(PyObject* object, int32_t dimensions, dlpack::Tensor* t) {
  if (!read_tensor_or_parameter(object, t) || !is_on_host(*t) || t->ndim != dimensions || !t->strides) return false;
  return t->dtype.code == dlpack::kFloat && t->dtype.bits == 32 && t->dtype.lanes == 1;
}

const float* floats_of(const dlpack::Tensor& t) { return static_cast<const float*>(address_of(t)); }

// The strides of channels-last pictures.
void channels_last(const int64_t* shape, int64_t* strides) {
  strides[1] = 1, strides[3] = shape[1], strides[2] = shape[3] * strides[3], strides[0] = shape[2] * strides[2];
}

// Reads (batch, channels, height, width), channels last, with at least one element.
bool read_pictures(PyObject* object, dlpack::Tensor* t) {
  if (!read_floats(object, 4, t)) return false;
  int64_t strides[4];
  channels_last(t->shape, strides);
  for (int d = 0; d < 4; ++d)
    if (t->shape[d] == 0 || (t->shape[d] != 1 && t->strides[d] != strides[d])) return false;
  return true;
}

// Reads (channels,), or None as null.
bool read_per_channel(PyObject* object, int64_t channels, const float** out) {
  dlpack::Tensor t;
  if (object == Py_None) return true;
  if (!read_floats(object, 1, &t) || t.shape[0] != channels || t.strides[0] != 1) return false;
  *out = floats_of(t);
  return true;
}

// Reads (batch, channels), whose rows may lie apart, or None as null.
bool read_rows(PyObject* object, int64_t batch, int64_t channels, const float** out, int64_t* stride) {
  dlpack::Tensor t;
  if (object == Py_None) return true;
  if (!read_floats(object, 2, &t) || t.shape[0] != batch || t.shape[1] != channels || t.strides[1] != 1) return false;
  *out = floats_of(t), *stride = t.strides[0];
  return true;
}

bool read_convolution(PyObject* const* a, Convolution* c) {
  dlpack::Tensor x, weights;
  if (!exchange || is_recording() || is_watched() || !read_pictures(a[0], &x) || !read_floats(a[1], 4, &weights)) return false;
  if (!contiguous(weights) || weights.shape[0] != kPoints || weights.shape[3] != kChannelGrain) return false;
  *c = {floats_of(x), floats_of(weights), nullptr, nullptr, x.shape[0], x.shape[2], x.shape[3], weights.shape[2], weights.shape[1] * kChannelGrain};
  if (c->out_channels == 0 || c->in_channels % kChannelGrain || x.shape[1] != c->in_channels) return false;
  return read_per_channel(a[2], c->out_channels, &c->bias);
}

bool read_normalization(PyObject* const* a, Normalization* n, dlpack::Tensor* x) {
  if (!exchange || is_recording() || is_watched() || !read_pictures(a[0], x)) return false;
  const int64_t batch = x->shape[0], channels = x->shape[1];
  *n = {floats_of(*x), nullptr, nullptr, nullptr, nullptr, 0, 0, nullptr, batch, x->shape[2] * x->shape[3], channels, 0, 0, a[7] == Py_True};
  if (!PyLong_CheckExact(a[1]) || !PyFloat_CheckExact(a[4])) return false;
  n->groups = PyLong_AsLongLong(a[1]), n->eps = PyFloat_AsDouble(a[4]);
  if (channels % kNormalizedGrain || n->groups < 1 || channels % n->groups || !(n->eps >= 0) || std::isinf(n->eps)) return false;
  return read_per_channel(a[2], channels, &n->weight) && read_per_channel(a[3], channels, &n->bias) &&
         read_rows(a[5], batch, channels, &n->scale, &n->scale_stride) && read_rows(a[6], batch, channels, &n->shift, &n->shift_stride);
}

// New channels-last pictures, filled by `of`, whose `output` they are. None: there is not enough memory,
// and the call with addresses says so.
template <typename Layer>
PyObject* filled(Layer of, int64_t channels, int64_t height, int64_t width) {
  int64_t shape[4] = {of.batch, channels, height, width}, strides[4];
  channels_last(shape, strides);
  const size_t bytes = of.batch * channels * height * width * sizeof(float);
  NewTensor* result = NewTensor::like({nullptr, {dlpack::kCpu, 0}, 4, {dlpack::kFloat, 32, 1}, shape, strides, 0}, bytes);
  if (!result) return new_none();
  of.output = static_cast<float*>(result->elements());
  if (run(of, thread_count(bytes, 0))) return result->to_python();
  NewTensor::destroy(&result->managed);
  return new_none();
}

PyObject* declined() {
  PyErr_Clear();
  return new_none();
}

}  // namespace

// convolve(input, weights, bias, output, batch, height, width, in_channels, out_channels, threads):
// addresses of float32, see convolution.h
PyObject* py_convolve(PyObject*, PyObject* arguments) {
  unsigned long long input, weights, bias, output;
  long long batch, height, width, in_channels, out_channels;
  int threads;
  if (!PyArg_ParseTuple(arguments, "KKKKLLLLLi", &input, &weights, &bias, &output, &batch, &height, &width, &in_channels, &out_channels, &threads))
    return nullptr;
  const Convolution c{reinterpret_cast<const float*>(input), reinterpret_cast<const float*>(weights), reinterpret_cast<const float*>(bias),
                      reinterpret_cast<float*>(output), batch, height, width, in_channels, out_channels};
  if (!all_given({c.input, c.weights, c.output}, batch * height, width * out_channels)) return nullptr;
  return run(c, threads) ? new_none() : PyErr_NoMemory();
}

// convolve_plain(x, weights, bias): as kernels/convolution.py, into new memory; or None, without an error,
// if the tensors are not plain, somebody records operators or gradients, or something is wrong.
PyObject* py_convolve_plain(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
  if (!takes(n_arguments, 3)) return nullptr;
  Convolution c{};
  return read_convolution(a, &c) ? filled(c, c.out_channels, c.height, c.width) : declined();
}

// normalize(input, weight, bias, scale, scale_stride, shift, shift_stride, output, batch, pixels, channels, groups, eps, silu, threads):
// addresses of float32, see normalization.h
PyObject* py_normalize(PyObject*, PyObject* arguments) {
  unsigned long long input, weight, bias, scale, shift, output;
  long long scale_stride, shift_stride, batch, pixels, channels, groups;
  double eps;
  int silu, threads;
  if (!PyArg_ParseTuple(arguments, "KKKKLKLKLLLLdpi", &input, &weight, &bias, &scale, &scale_stride, &shift, &shift_stride, &output, &batch, &pixels,
                        &channels, &groups, &eps, &silu, &threads))
    return nullptr;
  const auto floats = [](unsigned long long address) { return reinterpret_cast<const float*>(address); };
  const Normalization n{floats(input), floats(weight), floats(bias), floats(scale), floats(shift), scale_stride, shift_stride,
                        reinterpret_cast<float*>(output), batch, pixels, channels, groups, eps, silu != 0};
  if (!all_given({n.input, n.output}, batch * pixels, channels)) return nullptr;
  return run(n, threads) ? new_none() : PyErr_NoMemory();
}

// normalize_plain(x, groups, weight, bias, eps, scale, shift, silu): as kernels/normalization.py, likewise.
PyObject* py_normalize_plain(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
  if (!takes(n_arguments, 8)) return nullptr;
  Normalization n{};
  dlpack::Tensor x;
  return read_normalization(a, &n, &x) ? filled(n, n.channels, x.shape[2], x.shape[3]) : declined();
}

// silu(input, output, n, threads): addresses of float32
PyObject* py_silu(PyObject*, PyObject* arguments) {
  unsigned long long input_address, output_address;
  long long n;
  int threads;
  if (!PyArg_ParseTuple(arguments, "KKLi", &input_address, &output_address, &n, &threads)) return nullptr;
  const auto* input = reinterpret_cast<const float*>(input_address);
  auto* output = reinterpret_cast<float*>(output_address);
  if (!all_given({input, output}, n, 1)) return nullptr;
  {
    Unlocked unlocked;
    parallel_for(n, kSiluGrain, useful_threads(n, threads), [&](int64_t begin, int64_t end) { kernels->silu(input + begin, output + begin, end - begin); });
  }
  return new_none();
}

}  // namespace ddim
