// The log-density of a step and the divergence of two: calls with addresses that Python has checked, and
// with plain tensors, for samples so small that checks in Python would take longer than they do.
#include "density_calls.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "density.h"
#include "plain_tensors.h"
#include "step.h"

namespace ddim {
namespace {

// The result of each sample, and how many of its elements count, if counts is given; or, with
// d.factors, the gradients.
void run_density(Density& d, const Reduction& reduction, float* results, float* counts, int threads) {
  Step& s = d.step;
  s.blocks = blocks_of(s.n_elements);
  unlocked_for(s.n_samples * s.n_elements, [&] {
    if (d.factors) return for_blocks(s.n_samples, s.n_elements, threads, [&](Range range) { kernels->density_backward(d, range); });
    std::vector<BlockSum> sums(s.n_samples * s.blocks);
    s.block_sums = sums.data();
    for_blocks(s.n_samples, s.n_elements, threads, [&](Range range) { kernels->density(d, range); });
    reduce(reduction, sums.data(), s.n_samples, s.n_elements, results, counts);
  });
}

// The arguments of both calls with plain tensors.
enum DensityArgument {
  kXPrev,
  kXT,
  kModelOutput,
  kCoefficients,
  kModelOutputUncond,
  kGuidanceScale,
  kMask,
  kReduction,
  kMinStd,
  kNumDensityArguments,
  kGradient = kNumDensityArguments,
  kFactor,
  kCounts,
  kOfModelOutput,
  kOfUncond,
  kOfXT,
  kNumBackwardArguments
};

// Reads x_prev or mask: constants, in the dtype of x_t.
bool read_constant(PyObject* object, const dlpack::Tensor& like, const Step& s, bool recording, Tensor* out) {
  return read_tensor(object, &like, s.n_elements, out) && out->dtype == s.x_t.dtype && without_gradient(object, recording);
}

// False: what is wrong, or not plain, is left to Python, or an exception.
bool read_density(PyObject* const* a, Density* d, Reduction* reduction, dlpack::Tensor* like) {
  Step& s = d->step;
  dlpack::Tensor other;
  const bool recording = is_recording();
  Reference packed(PyObject_GetAttr(a[kCoefficients], s_packed));
  if (!packed.object || !read_prediction(a[kXT], a[kModelOutput], packed.object, &s, like, &other)) return false;
  if (!is_on_host(*like) || s.n_samples * s.n_elements == 0 || s.c.history != 0 || s.c.history_2 != 0) return false;
  if (!read_constant(a[kXPrev], *like, s, recording, &s.x_prev)) return false;
  if (a[kMask] != Py_None && !read_constant(a[kMask], *like, s, recording, &s.mask)) return false;
  if (!read_guidance(a[kModelOutputUncond], a[kGuidanceScale], *like, &s)) return false;
  return read_reduction(a[kCoefficients], a[kReduction], a[kMinStd], s, reduction);
}

// Reads memory for a gradient, like its tensor, or None.
bool read_gradient(PyObject* object, const dlpack::Tensor& like, const Tensor& of, Tensor* out) {
  if (object == Py_None) return true;
  return of.data && read_tensor(object, &like, of.stride, out) && out->dtype == of.dtype;
}

// What x_prev - mean is multiplied by in the gradient of the mean, (n_samples): _factors of
// kernels/log_prob.py, to the bit. False: not plain, or an exception.
bool read_factors(PyObject* const* a, const Density& d, const Reduction& r, const dlpack::Tensor& like, std::vector<float>* factors) {
  dlpack::Tensor gradient;
  const int64_t n = d.step.n_samples;
  if (!read_any(a[kGradient], &like, &gradient) || gradient.dtype.code != dlpack::kFloat || gradient.dtype.bits != 32) return false;
  if (gradient.ndim != 1 || gradient.shape[0] != n) return false;
  const int64_t stride = gradient.strides ? gradient.strides[0] : 1;
  const auto* given = static_cast<const float*>(address_of(gradient));
  const void* counts = nullptr;
  if (a[kCounts] != Py_None && !read_per_sample(a[kCounts], like, dlpack::kFloat, 32, n, &counts)) return false;
  const auto factor = static_cast<float>(PyFloat_AsDouble(a[kFactor]));
  for (int64_t i = 0; i < n; ++i) {
    const float product = given[i * stride] * factor;
    factors->push_back(r.mean && counts ? product / std::max(static_cast<const float*>(counts)[i], 1.0f) : product);
  }
  return !PyErr_Occurred();
}

}  // namespace

// density_of_plain(x_prev, x_t, model_output, coefficients, model_output_uncond, guidance_scale, mask,
// reduction, min_std): (log-density of each sample, how many of its elements count, or None without
// a mask), new tensors; or None, without an error, if the tensors are not plain or something is
// wrong. x_prev and mask have no gradient; whether the others do is the caller's affair.
PyObject* py_density_of_plain(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
  if (!takes(n_arguments, kNumDensityArguments)) return nullptr;
  Density d{};
  Reduction reduction;
  dlpack::Tensor like;
  const bool usable = !is_watched() && read_density(a, &d, &reduction, &like);
  NewTensor* results = usable ? NewTensor::floats(d.step.n_samples) : nullptr;
  NewTensor* counts = results && d.step.mask.data ? NewTensor::floats(d.step.n_samples) : nullptr;
  if (!results || (d.step.mask.data && !counts)) {
    if (results) NewTensor::destroy(&results->managed);
    PyErr_Clear();
    return new_none();
  }
  const int threads = thread_count(d.step.n_samples * d.step.n_elements, kThreadElements);
  run_density(d, reduction, static_cast<float*>(results->elements()), counts ? static_cast<float*>(counts->elements()) : nullptr, threads);
  Reference first(results->to_python()), second(counts ? counts->to_python() : new_none());
  return first.object && second.object ? PyTuple_Pack(2, first.object, second.object) : nullptr;
}

// density_backward_of_plain(the arguments of density_of_plain, gradient, factor, counts,
// of_model_output, of_uncond, of_x_t): fills the last three, which may be None, and returns True; or None, as above.
// `gradient` is that of the log-densities, `factor` see _factors, `counts` what
// density_of_plain returned.
PyObject* py_density_backward_of_plain(PyObject*, PyObject* const* a, Py_ssize_t n_arguments) {
  if (!takes(n_arguments, kNumBackwardArguments)) return nullptr;
  Density d{};
  Reduction reduction;
  dlpack::Tensor like;
  std::vector<float> factors;
  const Step& s = d.step;
  const bool usable = !is_watched() && read_density(a, &d, &reduction, &like) && read_factors(a, d, reduction, like, &factors) &&
                      read_gradient(a[kOfModelOutput], like, s.model_output, &d.of_model_output) &&
                      read_gradient(a[kOfUncond], like, s.model_output_uncond, &d.of_uncond) &&
                      read_gradient(a[kOfXT], like, s.x_t, &d.of_x_t);
  if (!usable) {
    PyErr_Clear();
    return new_none();
  }
  d.factors = factors.data();
  run_density(d, reduction, nullptr, nullptr, thread_count(s.n_samples * s.n_elements, kThreadElements));
  return new_bool(true);
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
  d.factors = reinterpret_cast<const float*>(factors);
  const void* compared = s.x_prev.data ? s.x_prev.data : d.reference.data;
  if (!all_given({s.x_t.data, s.model_output.data, compared}, n_samples, n_elements)) return nullptr;
  if (!factors && !all_given({reinterpret_cast<const void*>(results)}, n_samples, 1)) return nullptr;
  run_density(d, reduction, reinterpret_cast<float*>(results), reinterpret_cast<float*>(counts), threads);
  return new_none();
}

}  // namespace ddim
