// The Python module: chooses an instruction set when it is loaded, splits the work over threads,
// and has four entry points for a step.
//
//   step(...)      takes tensors, and runs if they are plain: CPU, contiguous, equal shapes, known types, no gradient. Otherwise
//                  it returns None without writing anything; Python then runs its own checks, which raise the errors.
//   step_to_new(...)  the same for a step that needs only its row, which it looks up. It allocates both results. It declines if what
//                  the rows were computed from has changed.
//   plain(...)     tells of tensors anywhere, as step() asks of those on the CPU, whether they need no other checks.
//   run(...)       takes addresses and strides that Python has checked.
//   density calls  are in density_calls.cpp, those of a model's layers in layer_calls.cpp
//
// No torch headers: one build serves every Python from 3.10 and every torch.
#include "python_api.h"

#include <algorithm>
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

#include "density.h"
#include "density_calls.h"
#include "layer_calls.h"
#include "parallel.h"
#include "plain_tensors.h"
#include "same_objects.h"
#include "step.h"

namespace ddim {

const Kernels* kernels = &kPortable;

namespace {

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

void run_unlocked(const Step& s, int threads, const LogProb& log_prob = {}) {
  unlocked_for(s.n_samples * s.n_elements, [&] { run(s, threads, log_prob); });
}

// ------------------------------------------------------------------------------------------------------------- its arguments
// Reads which rows of a table a step takes: one number, or one for each sample, beside the table.
bool read_index(PyObject* index, PyObject* table, const dlpack::Tensor& like) {
  dlpack::Tensor t, rows;
  if (!read_any(index, &like, &t) || t.dtype.code != dlpack::kInt || t.dtype.bits != 64 || t.dtype.lanes != 1) return false;
  const bool one = std::all_of(t.shape, t.shape + t.ndim, [](int64_t size) { return size == 1; });
  const bool each = t.ndim == 1 && t.shape[0] == like.shape[0] && contiguous(t);
  Reference held(PyObject_GetAttr(table, s_rows));
  return (one || each) && held.object && read_any(held.object, &like, &rows);
}

// Tensors of one shape, contiguous: writing is safe where memory is the same element for element,
// or not shared at all.
bool safe_to_write(const Tensor& written, const Tensor& read, int64_t n) {
  if (written.data == read.data) return written.dtype == read.dtype;
  return apart(written.data, n * kItemSize[written.dtype], read.data, n * kItemSize[read.dtype]);
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
  if (!read_prediction(x_t, model_output, packed, s, like, other) || (place == kOnHost && !is_on_host(*like))) return false;
  return without_gradient(x_t, recording) && without_gradient(model_output, recording);
}

// Reads the arguments of a log-probability. False: what is wrong with them is left to Python, or an
// exception.
bool read_log_prob(PyObject* const* a, const dlpack::Tensor& like, bool recording, const Step& s, LogProb* out) {
  *out = {nullptr, {0, 0, -1, true}};
  if (a[kLogProbOut] == Py_None) {
    return a[kMinStd] == Py_None && PyUnicode_Check(a[kLogProbReduction]) && PyUnicode_CompareWithASCIIString(a[kLogProbReduction], "mean") == 0;
  }
  if (!read_reduction(a[kCoefficients], a[kLogProbReduction], a[kMinStd], s, &out->reduction)) return false;
  const void* results;
  if (!read_per_sample(a[kLogProbOut], like, dlpack::kFloat, 32, s.n_samples, &results)) return false;
  if (!writable(a[kLogProbOut]) || !without_gradient(a[kLogProbOut], recording)) return false;
  out->results = static_cast<float*>(const_cast<void*>(results));
  return true;
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
  if (!read_guidance(a[kModelOutputUncond], a[kGuidanceScale], like, s)) return false;
  if (a[kModelOutputUncond] != Py_None && !without_gradient(a[kModelOutputUncond], recording)) return false;
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
  if (a[kXPrev] == a[kXT]) {
    s->x_prev = s->x_t;
  } else if (!read_tensor(a[kXPrev], &like, stride, &s->x_prev) || s->x_prev.dtype != s->x_t.dtype || !without_gradient(a[kXPrev], recording)) {
    return false;
  }
  if (!writable(a[kXPrev])) return false;
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
  run_unlocked(s, thread_count(total, s.seeds || log_prob.results ? kNoiseGrain : kGrain), log_prob);
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
    if (x0 && remembered.data) std::memcpy(x0->elements(), remembered.data, bytes);  // a step replaces its history by its x0
    usable = x_prev && (x0 || !(wants_x0 || remembered.data));
  }
  if (!usable) {
    if (x_prev) NewTensor::destroy(&x_prev->managed);
    PyErr_Clear();
    return new_none();
  }
  if (s.c.noise == 0) s.noise.data = nullptr;
  s.x_prev = {x_prev->elements(), s.x_t.stride, s.x_t.dtype};
  if (x0) (remembered.data ? s.history : s.x0) = {x0->elements(), s.x_t.stride, s.x_t.dtype};
  run_unlocked(s, thread_count(s.n_samples * s.n_elements, kGrain));
  if (x0 && !wants_x0) NewTensor::destroy(&std::exchange(x0, nullptr)->managed);
  Reference first(x_prev->to_python()), second(x0 ? x0->to_python() : new_none());
  return first.object && second.object ? PyTuple_Pack(2, first.object, second.object) : nullptr;
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

template <typename Bits>
bool all_finite(const void* elements, int64_t n, Bits exponent) {
  const auto* bits = static_cast<const Bits*>(elements);
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) found |= Bits((bits[i] & exponent) == exponent);
  return !found;
}

// is_finite(tensor): whether no element is NaN or infinite; None if it is not a plain tensor on the CPU.
PyObject* py_is_finite(PyObject*, PyObject* object) {
  Tensor tensor;
  dlpack::Tensor t;
  if (is_watched() || !exchange || !read_tensor(object, nullptr, 0, &tensor, &t) || !is_on_host(t)) {
    PyErr_Clear();
    return new_none();
  }
  int64_t n = 1;
  for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
  bool finite = true;
  unlocked_for(n, [&] {
    finite = tensor.dtype == kFloat32 ? all_finite<uint32_t>(tensor.data, n, 0x7f800000)
                                      : all_finite<uint16_t>(tensor.data, n, tensor.dtype == kFloat16 ? 0x7c00 : 0x7f80);
  });
  return PyBool_FromLong(finite);
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
    {"density_of_plain", fast_method<py_density_of_plain>, METH_FASTCALL, nullptr},
    {"density_backward_of_plain", fast_method<py_density_backward_of_plain>, METH_FASTCALL, nullptr},
    {"normals", method<py_normals>, METH_VARARGS, nullptr},
    {"words", method<py_words>, METH_VARARGS, nullptr},
    {"triad", method<py_triad>, METH_VARARGS, nullptr},
    {"convolve", method<py_convolve>, METH_VARARGS, nullptr},
    {"convolve_plain", fast_method<py_convolve_plain>, METH_FASTCALL, nullptr},
    {"normalize", method<py_normalize>, METH_VARARGS, nullptr},
    {"normalize_plain", fast_method<py_normalize_plain>, METH_FASTCALL, nullptr},
    {"silu", method<py_silu>, METH_VARARGS, nullptr},
    {"is_finite", method<py_is_finite>, METH_O, nullptr},
    {"same_objects", fast_method<py_same_objects>, METH_FASTCALL, nullptr},
    {"layouts", method<py_layouts>, METH_O, nullptr},
    {"instruction_sets", method<py_instruction_sets>, METH_NOARGS, "The instruction sets usable here, best first."},
    {"select", method<py_select>, METH_VARARGS, "Use the named instruction set from now on, on every thread."},
    {"selected", method<py_selected>, METH_NOARGS, "The instruction set in use."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu_step", "The DDIM step in SIMD C++.", -1, methods, nullptr, nullptr, nullptr, nullptr};

PyObject* make_module(PyObject*) {
  kernels = usable_kernels().front();
  return import_torch_names() ? PyModule_Create(&definition) : nullptr;
}

}  // namespace
}  // namespace ddim

PyMODINIT_FUNC PyInit__cpu_step() {
  return ddim::guarded<ddim::make_module>(nullptr);
}
