// What a DDIM step needs, as plain C: all that the Python module, the dispatcher and the kernels
// share.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ddim {

constexpr uint32_t kKnownRegion = 2;  // the noise standard's stream of a known image's noise: NoiseStream.KNOWN_REGION
constexpr float kLargestScale = 0x1p64f;  // of x0 by a threshold: LARGEST_SCALE

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kNumDTypes = 3 };

// One step's row, rounded once from float64. Which columns are read depends on whether x0 is
// clipped:
//   not clipped   x_prev = fold_x * x_t + fold_m * m + history * x0_last + history_2 * x0_last_2 + noise * z
//   clipped       x_prev = clamp(clip_x * x_t + clip_m * m, -clip_bound, clip_bound) + rest_x * x_t + rest_m * m
//                          + history * x0_last + history_2 * x0_last_2 + noise * z
// where clip_x, clip_m and clip_bound include the coefficient of x0, so that the clamp's result is
// added as it is.
struct Coefficients {
  float fold_x, fold_m, noise;
  float clip_x, clip_m, clip_bound;
  float rest_x, rest_m;
  float x0_x, x0_m, x0_bound;  // x0 = clamp(x0_x * x_t + x0_m * m, -x0_bound, x0_bound), for the optional x0 output
  float clip_scale;            // coefficient of x0 in x_prev: per-sample bounds are multiplied by its magnitude
  float known_x0, known_noise; // a known image at the noise level of x_prev: known_x0 * image + known_noise * z (inpainting)
  float history;               // coefficient of x0_last, the x0 of the previous step (a multistep solver); 0: it is not read
  float history_2;             // coefficient of x0_last_2, the x0 of the step before that; 0: it is not read
  float input_scale;           // of x_prev in the model's next input
};
// The columns of kernels/coefficients.py, in its order (a test compares the names), without the
// guidance scale.
static_assert(sizeof(Coefficients) == 17 * sizeof(float) && offsetof(Coefficients, input_scale) == 16 * sizeof(float));

// A batch of samples: sample i starts at data + i * stride elements, and its elements are
// contiguous. data is null if the tensor is not given.
struct Tensor {
  void* data;
  int64_t stride;
  DType dtype;
};

// What a block of a sample adds to its log-density or divergence: the sum of (x_prev - mean)^2 in the
// order of docs/LOG_PROB.md, and how many elements count.
constexpr int64_t kSumBlock = 2048;  // BLOCK of kernels/gaussian.py
struct BlockSum {
  float squares, count;
};

struct Step {
  int64_t n_samples, n_elements;  // samples, elements of each
  Tensor x_t, model_output, model_output_uncond, noise;
  Tensor mask, known_x0, known_noise;  // inpainting, or null
  Tensor x_prev, x0;
  Tensor history;    // holds x0_last and then x0, or null
  Tensor history_2;  // holds x0_last_2 and then x0_last, or null
  Tensor model_input_out;  // receives input_scale * x_prev, in a type of its own, or null
  float guidance_scale;
  bool clipped;             // x0 is clipped
  const float* thresholds;  // per-sample bound of x0 (dynamic thresholding), or null
  const int64_t* seeds;     // per-sample 64-bit seed of in-register noise, or null
  const int64_t* known_seeds;  // the same for the noise of known_x0, in the stream kKnownRegion
  uint32_t noise_step, noise_stream;
  BlockSum* block_sums;  // (n_samples, blocks), or null: ranges are then whole blocks
  int64_t blocks;        // of a sample
  Coefficients c;
};

// The tensors of a step that have the shape of x_t: PER_ELEMENT of kernels/fields.py, in its order
// (a test compares the names).
constexpr Tensor Step::*kPerElement[] = {&Step::x_t,         &Step::model_output, &Step::model_output_uncond, &Step::noise,  &Step::mask,
                                         &Step::known_x0,    &Step::known_noise,  &Step::x_prev,              &Step::x0,     &Step::history,
                                         &Step::history_2,   &Step::model_input_out};

// The elements [begin, end) of one sample.
struct Range {
  int64_t sample, begin, end;
};

struct Convolution;
struct Density;
struct Normalization;

struct Kernels {
  const char* name;
  void (*step)(const Step&, Range);
  // z[0 .. n): the normals of elements first_element .. of the sample with this seed; first_element
  // is a multiple of 4.
  void (*normals)(int64_t seed, int64_t first_element, uint32_t step, uint32_t stream, float* z, int64_t n);
  // the four words of each of n consecutive counters, word-major within a counter
  void (*words)(int64_t seed, int64_t first_counter, uint32_t step, uint32_t stream, uint32_t* words, int64_t n);
  // a[i] = b[i] * scale + c[i]: the yardstick of the benchmarks
  void (*triad)(float* a, const float* b, const float* c, float scale, int64_t n);
  // the tiles [begin, end) of a convolution; scratch: scratch_floats(c) floats, at a multiple of 64
  // bytes
  void (*convolve)(const Convolution& c, int64_t begin, int64_t end, float* scratch);
  // the slabs [begin, end) of a group normalization; scratch: scratch_floats(n) floats, at a multiple of
  // 64 bytes
  void (*normalize)(const Normalization& n, int64_t begin, int64_t end, float* scratch);
  // output[i] = input[i] / (1 + exp(-input[i])); they may be the same
  void (*silu)(const float* input, float* output, int64_t n);
  // the sums of whole blocks of a log-density or divergence
  void (*density)(const Density&, Range);
  // its gradients, of any range
  void (*density_backward)(const Density&, Range);
};

extern const Kernels* kernels;  // those in use
extern const Kernels kPortable;
#ifdef DDIM_WITH_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace ddim
