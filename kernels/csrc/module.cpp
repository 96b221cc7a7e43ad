// The Python module: chooses an instruction set when it is loaded, splits the work over threads,
// and has four entry points for a step.
//
//   step(...)      takes tensors, and runs if they are plain: CPU, contiguous, equal shapes, known types, no gradient. Otherwise
//                  it returns None without writing anything; Python then runs its own checks, which raise the errors.
//   step_to_new(...)  the same for a step that needs only its row, which it looks up. It allocates both results. It declines if what
//                  the rows were computed from has changed.
//   plain(...)     tells of tensors anywhere, as step() asks of those on the CPU, whether they need no other checks.
//   run(...)       takes addresses and strides that Python has checked.
//
// No torch headers: one build serves every Python from 3.10 and every torch.
#include "python_api.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>
#include <utility>
#include <vector>

#ifdef DDIM_WITH_X86
#include <cpuid.h>
#endif

#include "convolution.h"
#include "density.h"
#include "dlpack.h"
#include "parallel.h"
#include "same_objects.h"
#include "step.h"

namespace ddim {

PyObject* tensor_type;
const dlpack::ExchangeApi* exchange = nullptr;  // as long as it is null, step() refuses, and Python checks at its own pace

namespace {

const Kernels* kernels = &kPortable;

#ifdef DDIM_WITH_X86
// Half-precision conversions. clang has __builtin_cpu_supports("f16c") only since version 15, so
// the processor is asked itself. It needs the registers of AVX: the caller asks for avx2, too.
bool has_f16c() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The instruction sets that this build has and this processor runs, best first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef DDIM_WITH_X86
  // The builtins ask the operating system, too: it must save the wide registers when it switches
  // tasks.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f")) usable.push_back(&kAvx512);
  if (avx2) usable.push_back(&kAvx2);
#endif
  usable.push_back(&kPortable);
  return usable;
}

// ---------------------------------------------------------------------------------------------------------------- running
// Below so many elements per thread, a second thread costs more than it saves.
constexpr int64_t kGrain = 32768, kNoiseGrain = 8192;

bool one_row(const Step& s) {
  if (s.seeds || s.known_seeds || s.thresholds) return false;
  for (auto member : kPerElement)
    if ((s.*member).data && (s.*member).stride != s.n_elements) return false;
  return true;
}

void run_step(Step s, int threads) {
  if (s.n_samples == 0 || s.n_elements == 0) return;
  if (one_row(s)) {
    s.n_elements *= s.n_samples;
    s.n_samples = 1;
  }
  // Parts begin at multiples of the grain within the flattened batch; within a sample at multiples
  // of 4, where noise counters begin.
  const int64_t grain = s.seeds || s.known_seeds ? kNoiseGrain : kGrain;
  parallel_for(s.n_samples * s.n_elements, grain, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / s.n_elements, first = begin - sample * s.n_elements;
      const int64_t last = std::min(s.n_elements, first + (end - begin));
      // Round the seam inside a sample down to a multiple of 4 on both of its sides, so that
      // neighbours agree on it.
      const Range range{sample, first & ~int64_t{3}, last == s.n_elements ? last : last & ~int64_t{3}};
      if (range.begin < range.end) kernels->step(s, range);
      begin += last - first;
    }
  });
}

// The log-probability that a step is asked for: where it goes, (n_samples), or null, and how it is
// reduced.
struct LogProb {
  float* results;
  Reduction reduction;
};

void run_and_reduce(Step s, const LogProb& log_prob, int threads) {
  s.blocks = blocks_of(s.n_elements);
  std::vector<BlockSum> sums(s.n_samples * s.blocks);
  s.block_sums = sums.data();
  for_blocks(s.n_samples, s.n_elements, threads, [&](Range range) { kernels->step(s, range); });
  reduce(log_prob.reduction, sums.data(), s.n_samples, s.n_elements, log_prob.results, nullptr);
}

void run(const Step& s, int threads, const LogProb& log_prob) {
  log_prob.results ? run_and_reduce(s, log_prob, threads) : run_step(s, threads);
}

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

void run_unlocked(const Step& s, int threads, const LogProb& log_prob = {}) {
  if (s.n_samples * s.n_elements < kReleaseLock) return run(s, threads, log_prob);
  Unlocked unlocked;
  run(s, threads, log_prob);
}

// ------------------------------------------------------------------------------------------------------ what torch is asked
PyObject *get_num_threads, *grad_enabled, *inference_mode, *s_requires_grad, *s_packed, *s_needs, *s_rows, *s_scale_and_offset;
// From kernels/torch_internals.py. The last two are None where torch has no such name.
PyObject *modes_active, *forward_ad, *forward_ad_level, *write_count;
PyCFunction is_negated, is_inference;  // torch.Tensor.is_neg and is_inference, called without looking them up

bool has_elements(const dlpack::Tensor& t) {
  return std::find(t.shape, t.shape + t.ndim, 0) == t.shape + t.ndim;
}

// Whether there are steps for tensors there: here on the CPU, elsewhere in Triton.
bool has_steps(const dlpack::Device& where) {
  return where.type == dlpack::kCpu || where.type == dlpack::kCuda || where.type == dlpack::kRocm;
}

// Reads a tensor with memory of its own, on the device of another (null: on any that has steps).
// Zeros that torch knows without memory have none.
bool read_any(PyObject* object, const dlpack::Tensor* like, dlpack::Tensor* t) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != tensor_type) return false;
  if (exchange->tensor_from_object(object, t) != 0) return false;
  const dlpack::Device& where = t->device;
  if (like ? where.type != like->device.type || where.id != like->device.id : !has_steps(where)) return false;
  Reference negated(is_negated(object, nullptr));  // its memory has the other sign
  return negated.object == Py_False && (t->data || !has_elements(*t));
}

bool is_on_host(const dlpack::Tensor& t) { return t.device.type == dlpack::kCpu; }

void* address_of(const dlpack::Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// `as_new`: dimensions of size 1, too, have the strides of a new tensor. (They change no place in
// memory, but the layout that torch gives to results.)
bool contiguous(const dlpack::Tensor& t, bool as_new = false) {
  if (!t.strides) return true;
  int64_t expected = 1;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if ((as_new || t.shape[d] != 1) && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

bool read_dtype(const dlpack::DataType& type, DType* out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) return *out = kFloat32, true;
  if (type.code == dlpack::kFloat && type.bits == 16) return *out = kFloat16, true;
  if (type.code == dlpack::kBFloat && type.bits == 16) return *out = kBFloat16, true;
  return false;
}

// Reads a plain tensor of the shape of `like` (null: of any shape). False: not plain, or an
// exception.
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

// Whether torch records gradients. The kernels record none, so a tensor that may require one is
// left to Python.
bool is_recording() {
  Reference enabled(PyObject_CallNoArgs(grad_enabled));
  return enabled.object != Py_False;
}

bool without_gradient(PyObject* object, bool recording) {
  if (!recording) return true;
  Reference attribute(PyObject_GetAttr(object, s_requires_grad));
  return attribute.object == Py_False;
}

// Whether torch allows writing: a tensor made under inference mode may be written there alone.
bool writable(PyObject* object) {
  Reference inference(is_inference(object, nullptr));
  if (inference.object == Py_False) return true;
  Reference allowed(PyObject_CallNoArgs(inference_mode));
  return allowed.object == Py_True;
}

// Reads a plain one-dimensional tensor with an entry for each sample.
bool read_per_sample(PyObject* object, const dlpack::Tensor& like, uint8_t code, uint8_t bits, int64_t n_samples, const void** out) {
  dlpack::Tensor t;
  if (!read_any(object, &like, &t) || t.dtype.code != code || t.dtype.bits != bits || t.dtype.lanes != 1) return false;
  if (t.ndim != 1 || t.shape[0] != n_samples || !contiguous(t)) return false;
  *out = address_of(t);
  return true;
}

// Reads which rows of a table a step takes: one number, or one for each sample, beside the table.
bool read_index(PyObject* index, PyObject* table, const dlpack::Tensor& like) {
  dlpack::Tensor t, rows;
  if (!read_any(index, &like, &t) || t.dtype.code != dlpack::kInt || t.dtype.bits != 64 || t.dtype.lanes != 1) return false;
  const bool one = std::all_of(t.shape, t.shape + t.ndim, [](int64_t size) { return size == 1; });
  const bool each = t.ndim == 1 && t.shape[0] == like.shape[0] && contiguous(t);
  Reference held(PyObject_GetAttr(table, s_rows));
  return (one || each) && held.object && read_any(held.object, &like, &rows);
}

constexpr size_t kItemSize[] = {4, 2, 2};

// Whether two stretches of memory share nothing. Null shares nothing.
bool apart(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto *x = static_cast<const char*>(a), *y = static_cast<const char*>(b);
  return !x || !y || x + a_bytes <= y || y + b_bytes <= x;
}

// Tensors of one shape, contiguous: writing is safe where memory is the same element for element,
// or not shared at all.
bool safe_to_write(const Tensor& written, const Tensor& read, int64_t n) {
  if (written.data == read.data) return written.dtype == read.dtype;
  return apart(written.data, n * kItemSize[written.dtype], read.data, n * kItemSize[read.dtype]);
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

int thread_count(int64_t n, bool noise) {
  if (n <= (noise ? kNoiseGrain : kGrain)) return 1;
  Reference count(PyObject_CallNoArgs(get_num_threads));
  return count.object ? static_cast<int>(PyLong_AsLong(count.object)) : 1;
}

// The arguments of step(), in the order of kernels/fields.py (a test compares the names); the
// others make Python take the long way.
enum StepArgument {
  kXT,
  kModelOutput,
  kCoefficients,
  kModelOutputUncond,
  kGuidanceScale,
  kNoise,
  kSeeds,
  kNoiseStep,
  kNoiseStream,
  kThresholds,
  kXPrev,
  kX0,
  kHistory,
  kHistory2,
  kModelInputOut,
  kLogProbOut,
  kLogProbReduction,
  kMinStd,
  kNumStepArguments
};

// Where the tensors of a step may be.
enum Place { kOnHost, kAnywhere };

// Reads what every step has. `like`: x_t, whose shape the others share; `other`: model_output.
bool read_plain(PyObject* x_t, PyObject* model_output, PyObject* packed, Place place, bool recording, Step* s, dlpack::Tensor* like,
                dlpack::Tensor* other) {
  if (!exchange || !read_tensor(x_t, nullptr, 0, &s->x_t, like) || like->ndim < 1) return false;
  if (place == kOnHost && !is_on_host(*like)) return false;
  s->n_samples = like->shape[0];
  s->n_elements = 1;
  for (int32_t d = 1; d < like->ndim; ++d) s->n_elements *= like->shape[d];
  s->x_t.stride = s->n_elements;
  if (!read_tensor(model_output, like, s->n_elements, &s->model_output, other)) return false;
  if (s->model_output.dtype != s->x_t.dtype && s->x_t.dtype != kFloat32) return false;
  if (!without_gradient(x_t, recording) || !without_gradient(model_output, recording)) return false;
  return read_coefficients(packed, s);
}

// Reads the arguments of a log-probability, whose scale and offset the row computes. False: what is
// wrong with them is left to Python, or an exception.
bool read_log_prob(PyObject* const* a, const dlpack::Tensor& like, bool recording, const Step& s, LogProb* out) {
  const bool mean = PyUnicode_Check(a[kLogProbReduction]) && PyUnicode_CompareWithASCIIString(a[kLogProbReduction], "mean") == 0;
  *out = {nullptr, {0, 0, -1, mean}};
  if (a[kLogProbOut] == Py_None) return mean && a[kMinStd] == Py_None;
  if (!mean && !(PyUnicode_Check(a[kLogProbReduction]) && PyUnicode_CompareWithASCIIString(a[kLogProbReduction], "sum") == 0)) return false;
  if (a[kMinStd] != Py_None && !PyFloat_CheckExact(a[kMinStd])) return false;
  const double least = a[kMinStd] == Py_None ? 0 : PyFloat_AsDouble(a[kMinStd]);
  const double std_dev = std::max(std::fabs(double{s.c.noise}), least);
  if (!(least >= 0) || (a[kMinStd] != Py_None && least == 0) || std_dev < 0x1p-59 || std_dev > 0x1p59) return false;
  const void* results;
  if (!read_per_sample(a[kLogProbOut], like, dlpack::kFloat, 32, s.n_samples, &results)) return false;
  if (!writable(a[kLogProbOut]) || !without_gradient(a[kLogProbOut], recording)) return false;
  Reference numbers(PyObject_CallMethodObjArgs(a[kCoefficients], s_scale_and_offset, a[kMinStd], nullptr));
  if (!numbers.object || !PyTuple_Check(numbers.object) || PyTuple_Size(numbers.object) != 2) return false;
  out->reduction.scale = static_cast<float>(PyFloat_AsDouble(PyTuple_GetItem(numbers.object, 0)));
  out->reduction.offset = static_cast<float>(PyFloat_AsDouble(PyTuple_GetItem(numbers.object, 1)));
  out->results = static_cast<float*>(const_cast<void*>(results));
  return !PyErr_Occurred();
}

bool read_step(PyObject* const* a, Place place, PyObject* index, Step* s, int64_t* total, LogProb* log_prob) {
  dlpack::Tensor like, other;
  const void *seeds = nullptr, *thresholds = nullptr;
  const bool recording = is_recording();
  Reference packed(PyObject_GetAttr(a[kCoefficients], index == Py_None ? s_packed : s_needs));
  if (!packed.object || !read_plain(a[kXT], a[kModelOutput], packed.object, place, recording, s, &like, &other)) return false;
  if (index != Py_None && !read_index(index, a[kCoefficients], like)) return false;
  const int64_t stride = s->n_elements;
  *total = s->n_samples * s->n_elements;
  if (a[kModelOutputUncond] != Py_None) {
    if (!read_tensor(a[kModelOutputUncond], &like, stride, &s->model_output_uncond) || !without_gradient(a[kModelOutputUncond], recording)) return false;
    if (s->model_output_uncond.dtype != s->model_output.dtype) return false;
    s->guidance_scale = static_cast<float>(PyFloat_AsDouble(a[kGuidanceScale]));
    if (PyErr_Occurred() || !std::isfinite(s->guidance_scale)) return false;
  } else if (a[kGuidanceScale] != Py_None) {
    return false;
  }
  // Noise that the row does not add is checked like any other, and then not read.
  const bool given = a[kNoise] != Py_None, seeded = a[kSeeds] != Py_None, wanted = s->c.noise != 0;
  if ((given && seeded) || (wanted && !given && !seeded)) return false;
  if (given) {
    if (!read_tensor(a[kNoise], &like, stride, &s->noise) || s->noise.dtype != s->x_t.dtype) return false;
    if (!without_gradient(a[kNoise], recording)) return false;
    if (!wanted) s->noise.data = nullptr;
  }
  if (seeded && !read_per_sample(a[kSeeds], like, dlpack::kInt, 64, s->n_samples, &seeds)) return false;
  if (seeded || index != Py_None) {
    const unsigned long step = PyLong_AsUnsignedLong(a[kNoiseStep]), stream = PyLong_AsUnsignedLong(a[kNoiseStream]);
    if (PyErr_Occurred() || step > 0xffffffffu || stream > 0xffffffffu || s->n_elements > int64_t{1} << 34) return false;
    s->noise_step = static_cast<uint32_t>(step);
    s->noise_stream = static_cast<uint32_t>(stream);
    if (wanted) s->seeds = static_cast<const int64_t*>(seeds);
  }
  if (a[kThresholds] != Py_None) {
    if (!s->clipped || !without_gradient(a[kThresholds], recording)) return false;
    if (!read_per_sample(a[kThresholds], like, dlpack::kFloat, 32, s->n_samples, &thresholds)) return false;
    s->thresholds = static_cast<const float*>(thresholds);
    for (int64_t i = 0; is_on_host(like) && i < s->n_samples; ++i)
      if (s->thresholds[i] <= 0) return false;
  }
  if (!read_tensor(a[kXPrev], &like, stride, &s->x_prev) || s->x_prev.dtype != s->x_t.dtype || !writable(a[kXPrev])) return false;
  if (a[kXPrev] != a[kXT] && !without_gradient(a[kXPrev], recording)) return false;
  if (a[kX0] != Py_None) {
    if (!read_tensor(a[kX0], &like, stride, &s->x0) || s->x0.dtype != s->x_t.dtype || !without_gradient(a[kX0], recording)) return false;
    if (!writable(a[kX0])) return false;
  }
  if (a[kHistory] != Py_None) {
    if (!read_tensor(a[kHistory], &like, stride, &s->history) || s->history.dtype != s->x_t.dtype) return false;
    if (!writable(a[kHistory]) || !without_gradient(a[kHistory], recording)) return false;
  } else if (s->c.history != 0) {
    return false;
  }
  if (a[kHistory2] != Py_None) {
    if (a[kHistory] == Py_None || !read_tensor(a[kHistory2], &like, stride, &s->history_2) || s->history_2.dtype != s->x_t.dtype) return false;
    if (!writable(a[kHistory2]) || !without_gradient(a[kHistory2], recording)) return false;
  } else if (s->c.history_2 != 0) {
    return false;
  }
  if (a[kModelInputOut] != Py_None) {
    if (!read_tensor(a[kModelInputOut], &like, stride, &s->model_input_out)) return false;
    if (!writable(a[kModelInputOut]) || !without_gradient(a[kModelInputOut], recording)) return false;
  }
  if (!read_log_prob(a, like, recording, *s, log_prob)) return false;
  const size_t result_bytes = s->n_samples * sizeof(float);
  if (!apart(log_prob->results, result_bytes, seeds, s->n_samples * sizeof(int64_t))) return false;
  if (!apart(log_prob->results, result_bytes, thresholds, s->n_samples * sizeof(float))) return false;
  for (const Tensor* read : {&s->x_t, &s->model_output, &s->model_output_uncond, &s->noise})
    if (!apart(log_prob->results, result_bytes, read->data, *total * kItemSize[read->dtype])) return false;
  // The first three may be what is read, element for element. All others share nothing.
  const Tensor* const written[] = {&s->x_prev, &s->x0, &s->model_input_out, &s->history, &s->history_2};
  for (size_t i = 0; i < std::size(written); ++i) {
    const Tensor& w = *written[i];
    if (!w.data) continue;
    const size_t bytes = *total * kItemSize[w.dtype];
    if (!apart(w.data, bytes, seeds, s->n_samples * sizeof(int64_t))) return false;
    if (!apart(w.data, bytes, thresholds, s->n_samples * sizeof(float))) return false;
    if (!apart(w.data, bytes, log_prob->results, result_bytes)) return false;
    for (const Tensor* read : {&s->x_t, &s->model_output, &s->model_output_uncond, &s->noise})
      if (!(i < 3 ? safe_to_write(w, *read, *total) : apart(w.data, bytes, read->data, *total * kItemSize[read->dtype]))) return false;
    for (size_t j = 0; j < i; ++j)
      if (!apart(w.data, bytes, written[j]->data, *total * kItemSize[written[j]->dtype])) return false;
  }
  return true;
}

// Whether a mode of torch looks at every operation, such as make_fx's, or forward-mode derivatives
// are taken: they would miss this one.
bool is_watched() {
  PyObject* level = PyDict_GetItemWithError(forward_ad, forward_ad_level);
  if (!level || PyLong_AsLong(level) >= 0) return true;
  Reference count(PyObject_CallNoArgs(modes_active));
  return !count.object || PyLong_AsLong(count.object) != 0;
}

PyObject* py_step(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
  if (n_arguments != kNumStepArguments) {
    PyErr_Format(PyExc_TypeError, "step takes %d arguments, got %zd", int{kNumStepArguments}, n_arguments);
    return nullptr;
  }
  Step s{};
  int64_t total = 0;
  LogProb log_prob;
  if (is_watched() || !read_step(a, kOnHost, Py_None, &s, &total, &log_prob)) {
    PyErr_Clear();  // the checks in Python raise the error
    return new_none();
  }
  run_unlocked(s, thread_count(total, s.seeds || log_prob.results), log_prob);
  if (PyErr_Occurred()) return nullptr;
  Py_INCREF(a[kXPrev]);
  return a[kXPrev];
}

// plain(the arguments of step, index): (n_samples, n_elements) of a step of plain tensors, wherever they
// are, that breaks no rule; nothing is computed. Otherwise None. With an index, the coefficients are a table.
PyObject* py_plain(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
  if (n_arguments != kNumStepArguments + 1) {
    PyErr_Format(PyExc_TypeError, "plain takes %d arguments, got %zd", kNumStepArguments + 1, n_arguments);
    return nullptr;
  }
  Step s{};
  int64_t total = 0;
  LogProb log_prob;
  if (is_watched() || !read_step(a, kAnywhere, a[kNumStepArguments], &s, &total, &log_prob)) {
    PyErr_Clear();
    return new_none();
  }
  return Py_BuildValue("LL", static_cast<long long>(s.n_samples), static_cast<long long>(s.n_elements));
}

// A new tensor in the layout of another. It owns its memory: this struct, and the elements after
// it.
struct alignas(64) NewTensor {
  static constexpr int32_t kMostDimensions = 8;
  dlpack::ManagedTensor managed;
  int64_t shape[kMostDimensions], strides[kMostDimensions];

  // Null if there is not enough memory, or there are too many dimensions.
  static NewTensor* like(const dlpack::Tensor& t, size_t bytes) {
    if (t.ndim > kMostDimensions) return nullptr;
    void* memory = ::operator new(sizeof(NewTensor) + bytes, std::align_val_t{alignof(NewTensor)}, std::nothrow);
    if (!memory) return nullptr;
    auto* result = new (memory) NewTensor;
    std::copy_n(t.shape, t.ndim, result->shape);
    std::copy_n(t.strides, t.ndim, result->strides);
    result->managed = {exchange->version, nullptr, destroy, 0, {result + 1, t.device, t.ndim, t.dtype, result->shape, result->strides, 0}};
    return result;
  }

  static void destroy(dlpack::ManagedTensor* managed) { ::operator delete(managed, std::align_val_t{alignof(NewTensor)}); }

  PyObject* to_python() {
    void* object = nullptr;
    return exchange->managed_tensor_to_object(&managed, &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
  }
};

// The row of timestep t in a dictionary of rows by number, borrowed; t may be in an int64 tensor
// without dimensions.
PyObject* find_row(PyObject* rows, PyObject* t) {
  if (PyLong_CheckExact(t)) return PyDict_GetItemWithError(rows, t);
  dlpack::Tensor number;
  if (!exchange || !read_any(t, nullptr, &number) || !is_on_host(number) || number.ndim != 0) return nullptr;
  if (number.dtype.code != dlpack::kInt || number.dtype.bits != 64 || number.dtype.lanes != 1) return nullptr;
  Reference key(PyLong_FromLongLong(*static_cast<const int64_t*>(address_of(number))));
  return key.object ? PyDict_GetItemWithError(rows, key.object) : nullptr;
}

// Whether each (dictionary, key, value) of a tuple still has that very value, and each (tensor,
// number) of another counts that many writes.
bool unchanged(PyObject* values, PyObject* writes) {
  if (!PyTuple_Check(values) || !PyTuple_Check(writes)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_Size(values); ++i) {
    PyObject* entry = PyTuple_GetItem(values, i);
    PyObject* value = PyTuple_GetItem(entry, 2);
    if (!value || PyDict_GetItemWithError(PyTuple_GetItem(entry, 0), PyTuple_GetItem(entry, 1)) != value) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(writes); ++i) {
    PyObject* entry = PyTuple_GetItem(writes, i);
    PyObject* known = PyTuple_GetItem(entry, 1);
    Reference count(known ? PyObject_GetAttr(PyTuple_GetItem(entry, 0), write_count) : nullptr);
    if (!count.object || PyObject_RichCompareBool(count.object, known, Py_EQ) != 1) return false;
  }
  return true;
}

// Reads a tensor in the layout and dtype of x_t, or None. False: it is neither, or an exception.
bool read_beside(PyObject* object, const dlpack::Tensor& like, const Step& s, bool recording, Tensor* out) {
  if (object == Py_None) return true;
  dlpack::Tensor t;
  return read_tensor(object, &like, s.n_elements, out, &t) && contiguous(t, true) && out->dtype == s.x_t.dtype && without_gradient(object, recording);
}

// step_to_new(x_t, model_output, rows, t, values, writes, wants_x0=True, noise=None, history=None):
// (x_prev, x0) in new tensors, with None for an x0 that is not wanted; or None. All tensors have one
// dtype, but for a model_output of half precision, and none is written to.
PyObject* py_step_to_new(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
  if (n_arguments < 6 || n_arguments > 9 || !PyDict_Check(a[2])) {
    PyErr_SetString(PyExc_TypeError,
                    "step_to_new takes x_t, model_output, a dictionary of rows, a timestep, values, writes, whether x0 is wanted, noise, and a history");
    return nullptr;
  }
  const bool wants_x0 = n_arguments == 6 || a[6] == Py_True;
  PyObject* const noise = n_arguments > 7 ? a[7] : Py_None;
  PyObject* const history = n_arguments > 8 ? a[8] : Py_None;
  Step s{};
  Tensor remembered{};
  dlpack::Tensor like, other;
  const bool recording = is_recording();
  PyObject* row = is_watched() || !unchanged(a[4], a[5]) ? nullptr : find_row(a[2], a[3]);
  Reference packed(row ? PyObject_GetAttr(row, s_packed) : nullptr);
  bool usable = packed.object && read_plain(a[0], a[1], packed.object, kOnHost, recording, &s, &like, &other);
  usable = usable && contiguous(like, true) && contiguous(other, true);
  usable = usable && read_beside(noise, like, s, recording, &s.noise) && read_beside(history, like, s, recording, &remembered);
  usable = usable && (s.c.noise == 0 || s.noise.data) && (s.c.history == 0 || remembered.data) && s.c.history_2 == 0;
  NewTensor *x_prev = nullptr, *x0 = nullptr;
  if (usable) {
    const size_t bytes = s.n_samples * s.n_elements * kItemSize[s.x_t.dtype];
    x_prev = NewTensor::like(like, bytes);
    x0 = x_prev && (wants_x0 || remembered.data) ? NewTensor::like(like, bytes) : nullptr;
    if (x0 && remembered.data) std::memcpy(x0 + 1, remembered.data, bytes);  // a step replaces its history by its x0
    usable = x_prev && (x0 || !(wants_x0 || remembered.data));
  }
  if (!usable) {
    if (x_prev) NewTensor::destroy(&x_prev->managed);
    PyErr_Clear();
    return new_none();
  }
  if (s.c.noise == 0) s.noise.data = nullptr;
  s.x_prev = {x_prev + 1, s.x_t.stride, s.x_t.dtype};
  if (x0) (remembered.data ? s.history : s.x0) = {x0 + 1, s.x_t.stride, s.x_t.dtype};
  run_unlocked(s, thread_count(s.n_samples * s.n_elements, false));
  if (x0 && !wants_x0) NewTensor::destroy(&std::exchange(x0, nullptr)->managed);
  Reference first(x_prev->to_python()), second(x0 ? x0->to_python() : new_none());
  return first.object && second.object ? PyTuple_Pack(2, first.object, second.object) : nullptr;
}

// Whether all of these are addresses, for at least one element. False: an exception. Tensors without
// memory on the CPU, such as those on the device meta, have the address 0.
bool all_given(std::initializer_list<const void*> addresses, int64_t rows, int64_t columns) {
  if (rows >= 0 && columns >= 0 && (rows == 0 || columns == 0 || std::find(addresses.begin(), addresses.end(), nullptr) == addresses.end())) return true;
  PyErr_SetString(PyExc_ValueError, "a kernel must be given memory on the CPU, got a tensor that has none: move it with .cpu()");
  return false;
}

// Reads a tensor from (address, stride, dtype); address 0: not given. False: an exception.
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

// run(n_samples, n_elements, tensors, guidance_scale, packed, thresholds, seeds, known_seeds,
// noise_step, noise_stream, threads, log_prob=0, scale=0, offset=0, mean=False); tensors is a tuple
// of (address, stride, dtype) for each of kPerElement. log_prob: the address of float32 for each
// sample's log-probability, with the numbers of a Reduction.
PyObject* py_run(PyObject*, PyObject* arguments) {
  Step s{};
  long long n_samples, n_elements;
  int threads, mean = 0;
  float guidance;
  unsigned long long thresholds, seeds, known_seeds, results = 0;
  unsigned int noise_step, noise_stream;
  PyObject *packed, *described;
  Reduction reduction{0, 0, -1, false};
  if (!PyArg_ParseTuple(arguments, "LLO!fOKKKIIi|Kffp", &n_samples, &n_elements, &PyTuple_Type, &described, &guidance, &packed, &thresholds, &seeds,
                        &known_seeds, &noise_step, &noise_stream, &threads, &results, &reduction.scale, &reduction.offset, &mean))
    return nullptr;
  reduction.mean = mean;
  constexpr size_t n_tensors = std::size(kPerElement);
  if (PyTuple_Size(described) != static_cast<Py_ssize_t>(n_tensors) || !read_coefficients(packed, &s)) {
    PyErr_Format(PyExc_TypeError, "run takes %zu tensors, and packed coefficients of the right type and size", n_tensors);
    return nullptr;
  }
  for (size_t i = 0; i < n_tensors; ++i)
    if (!read_described(PyTuple_GetItem(described, i), &(s.*kPerElement[i]))) return nullptr;
  s.n_samples = n_samples;
  s.n_elements = n_elements;
  s.guidance_scale = guidance;
  s.thresholds = reinterpret_cast<const float*>(thresholds);
  s.seeds = reinterpret_cast<const int64_t*>(seeds);
  s.known_seeds = reinterpret_cast<const int64_t*>(known_seeds);
  s.noise_step = noise_step;
  s.noise_stream = noise_stream;
  if (!all_given({s.x_t.data, s.model_output.data, s.x_prev.data}, n_samples, n_elements)) return nullptr;
  run_unlocked(s, threads, {reinterpret_cast<float*>(results), reduction});
  return new_none();
}

// density(n_samples, n_elements, tensors, guidance_scale, packed, scale, offset, sign, mean,
// results, counts, factors, threads): the log-density or divergence of each sample to results, and
// how many of its elements count to counts, if that is given; or, with factors, the gradients. The
// tensors are x_t, model_output, model_output_uncond, x_prev, reference, reference_uncond, mask, and
// the gradients of the first three, as in run; the last four arguments but one are addresses of
// float32.
PyObject* py_density(PyObject*, PyObject* arguments) {
  Density d{};
  Step& s = d.step;
  long long n_samples, n_elements;
  int threads, mean;
  float guidance;
  unsigned long long results, counts, factors;
  PyObject *packed, *described;
  Reduction reduction;
  if (!PyArg_ParseTuple(arguments, "LLO!fOfffpKKKi", &n_samples, &n_elements, &PyTuple_Type, &described, &guidance, &packed, &reduction.scale,
                        &reduction.offset, &reduction.sign, &mean, &results, &counts, &factors, &threads))
    return nullptr;
  reduction.mean = mean;
  Tensor* const tensors[] = {&s.x_t, &s.model_output, &s.model_output_uncond, &s.x_prev, &d.reference, &d.reference_uncond, &s.mask,
                             &d.of_x_t, &d.of_model_output, &d.of_uncond};
  constexpr size_t n_tensors = std::size(tensors);
  if (PyTuple_Size(described) != static_cast<Py_ssize_t>(n_tensors) || !read_coefficients(packed, &s)) {
    PyErr_Format(PyExc_TypeError, "density takes %zu tensors, and packed coefficients of the right type and size", n_tensors);
    return nullptr;
  }
  for (size_t i = 0; i < n_tensors; ++i)
    if (!read_described(PyTuple_GetItem(described, i), tensors[i])) return nullptr;
  s.n_samples = n_samples;
  s.n_elements = n_elements;
  s.guidance_scale = guidance;
  s.blocks = blocks_of(n_elements);
  d.factors = reinterpret_cast<const float*>(factors);
  const void* compared = s.x_prev.data ? s.x_prev.data : d.reference.data;
  if (!all_given({s.x_t.data, s.model_output.data, compared}, n_samples, n_elements)) return nullptr;
  if (!factors && !all_given({reinterpret_cast<const void*>(results)}, n_samples, 1)) return nullptr;
  const auto work = [&] {
    if (factors) return for_blocks(n_samples, n_elements, threads, [&](Range range) { kernels->density_backward(d, range); });
    std::vector<BlockSum> sums(n_samples * s.blocks);
    s.block_sums = sums.data();
    for_blocks(n_samples, n_elements, threads, [&](Range range) { kernels->density(d, range); });
    reduce(reduction, sums.data(), n_samples, n_elements, reinterpret_cast<float*>(results), reinterpret_cast<float*>(counts));
  };
  if (n_samples * n_elements < kReleaseLock) {
    work();
  } else {
    Unlocked unlocked;
    work();
  }
  return new_none();
}

// normals(seeds, n_samples, n_elements, noise_step, noise_stream, z, threads): addresses of int64
// seeds and float32 z (n_samples, n_elements)
PyObject* py_normals(PyObject*, PyObject* arguments) {
  unsigned long long seeds_address, z_address;
  long long n_samples, n_elements;
  unsigned int noise_step, noise_stream;
  int threads;
  if (!PyArg_ParseTuple(arguments, "KLLIIKi", &seeds_address, &n_samples, &n_elements, &noise_step, &noise_stream, &z_address, &threads)) return nullptr;
  const auto* seeds = reinterpret_cast<const int64_t*>(seeds_address);
  auto* z = reinterpret_cast<float*>(z_address);
  if (!all_given({seeds, z}, n_samples, n_elements)) return nullptr;
  {
    Unlocked unlocked;
    const int64_t per_sample = std::max<int64_t>(1, (n_elements + kNoiseGrain - 1) / kNoiseGrain);
    parallel_for(n_samples * per_sample, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / per_sample, first = i % per_sample * kNoiseGrain;
        const int64_t count = std::min<int64_t>(kNoiseGrain, n_elements - first);
        if (count > 0) kernels->normals(seeds[sample], first, noise_step, noise_stream, z + sample * n_elements + first, count);
      }
    });
  }
  return new_none();
}

// words(seed, first_counter, noise_step, noise_stream, address, n): four uint32 words for each of n
// counters
PyObject* py_words(PyObject*, PyObject* arguments) {
  long long seed, first_counter, n;
  unsigned int noise_step, noise_stream;
  unsigned long long address;
  if (!PyArg_ParseTuple(arguments, "LLIIKL", &seed, &first_counter, &noise_step, &noise_stream, &address, &n)) return nullptr;
  auto* words = reinterpret_cast<uint32_t*>(address);
  if (!all_given({words}, n, 1)) return nullptr;
  kernels->words(seed, first_counter, noise_step, noise_stream, words, n);
  return new_none();
}

// triad(a, b, c, scale, n): addresses of float32; a = b * scale + c on the calling thread
PyObject* py_triad(PyObject*, PyObject* arguments) {
  unsigned long long a_address, b_address, c_address;
  float scale;
  long long n;
  if (!PyArg_ParseTuple(arguments, "KKKfL", &a_address, &b_address, &c_address, &scale, &n)) return nullptr;
  auto* a = reinterpret_cast<float*>(a_address);
  const auto *b = reinterpret_cast<const float*>(b_address), *c = reinterpret_cast<const float*>(c_address);
  if (!all_given({a, b, c}, n, 1)) return nullptr;
  {
    Unlocked unlocked;
    kernels->triad(a, b, c, scale, n);
  }
  return new_none();
}

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
  std::atomic<bool> enough_memory{true};
  {
    Unlocked unlocked;
    parallel_for(tile_count(c), kRowGrain, threads, [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      float* memory = scratch.of(scratch_floats(c));
      if (memory)
        kernels->convolve(c, begin, end, memory);
      else
        enough_memory = false;
    });
  }
  if (!enough_memory) return PyErr_NoMemory();
  return new_none();
}

PyObject* py_instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Kernels* k : usable_kernels()) {
    Reference name(PyUnicode_FromString(k->name));
    if (!names || !name.object || PyList_Append(names, name.object) < 0) return nullptr;
  }
  return names;
}

PyObject* py_select(PyObject*, PyObject* arguments) {
  const char* name;
  if (!PyArg_ParseTuple(arguments, "s", &name)) return nullptr;
  for (const Kernels* k : usable_kernels()) {
    if (std::strcmp(k->name, name) == 0) {
      kernels = k;
      return new_none();
    }
  }
  PyErr_Format(PyExc_ValueError, "instruction set must be one of instruction_sets(), got '%s'", name);
  return nullptr;
}

PyObject* py_selected(PyObject*, PyObject*) { return PyUnicode_FromString(kernels->name); }

// The function of a method, from which no exception of C++ comes out.
template <auto function, typename... Arguments>
PyObject* guarded(PyObject* self, Arguments... arguments) {
  try {
    return function(self, arguments...);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <auto function>
constexpr PyCFunction method = guarded<function, PyObject*>;
template <auto function>
const PyCFunction fast_method = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<function, PyObject* const*, Py_ssize_t>));

PyMethodDef methods[] = {
    {"step", fast_method<py_step>, METH_FASTCALL, nullptr},
    {"plain", fast_method<py_plain>, METH_FASTCALL, nullptr},
    {"step_to_new", fast_method<py_step_to_new>, METH_FASTCALL, nullptr},
    {"run", method<py_run>, METH_VARARGS, nullptr},
    {"density", method<py_density>, METH_VARARGS, nullptr},
    {"normals", method<py_normals>, METH_VARARGS, nullptr},
    {"words", method<py_words>, METH_VARARGS, nullptr},
    {"triad", method<py_triad>, METH_VARARGS, nullptr},
    {"convolve", method<py_convolve>, METH_VARARGS, nullptr},
    {"same_objects", fast_method<py_same_objects>, METH_FASTCALL, nullptr},
    {"layouts", method<py_layouts>, METH_O, nullptr},
    {"instruction_sets", method<py_instruction_sets>, METH_NOARGS, "The instruction sets usable here, best first."},
    {"select", method<py_select>, METH_VARARGS, "Use the named instruction set from now on, on every thread."},
    {"selected", method<py_selected>, METH_NOARGS, "The instruction set in use."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu_step", "The DDIM step in SIMD C++.", -1, methods, nullptr, nullptr, nullptr, nullptr};

// A method without arguments as a function. Null: it is none in C, or an exception.
PyCFunction method_of(PyObject* object, const char* name) {
  Reference method(object ? PyObject_GetAttrString(object, name) : nullptr);
  return method.object && PyCFunction_GetFlags(method.object) == METH_NOARGS ? PyCFunction_GetFunction(method.object) : nullptr;
}

bool import_torch_names() {
  Reference torch(PyImport_ImportModule("torch"));
  if (!torch.object) return false;
  tensor_type = PyObject_GetAttrString(torch.object, "Tensor");
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

PyObject* make_module(PyObject*) {
  kernels = usable_kernels().front();
  return import_torch_names() ? PyModule_Create(&definition) : nullptr;
}

}  // namespace
}  // namespace ddim

PyMODINIT_FUNC PyInit__cpu_step() {
  return ddim::guarded<ddim::make_module>(nullptr);
}
