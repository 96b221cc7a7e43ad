// Runs every instruction set on the same random steps, noise, convolutions and normalizations, and compares the results bit by bit with the portable one.
// tools/same_bits.sh builds and runs it; csrc/isa_avx512.cpp is compiled over avx512_by_halves.h, so that any x86-64 with AVX2 can run it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "convolution.h"
#include "density.h"
#include "normalization.h"
#include "step.h"

using namespace ddim;

namespace {

std::mt19937_64 random_bits(1);

// Half of the values are ordinary numbers, the rest arbitrary bits: infinities, NaN and subnormal numbers among them.
void fill(std::vector<unsigned char>& bytes, DType dtype) {
  std::normal_distribution<float> normal;
  for (size_t i = 0; i + 4 <= bytes.size(); i += 4) {
    uint32_t bits = static_cast<uint32_t>(random_bits());
    if (random_bits() % 2) {
      const float x = normal(random_bits);
      std::memcpy(&bits, &x, 4);
      if (dtype == kBFloat16) bits = (bits >> 16) * 0x10001u;
      if (dtype == kFloat16) bits = 0x38003c00u ^ (bits >> 20);
    }
    std::memcpy(&bytes[i], &bits, 4);
  }
}

size_t item_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// NaN payloads may differ; that a value is NaN may not.
bool same(const unsigned char* a, const unsigned char* b, size_t n, DType dtype) {
  for (size_t i = 0; i < n; ++i) {
    uint32_t x = 0, y = 0;
    std::memcpy(&x, a + i * item_size(dtype), item_size(dtype));
    std::memcpy(&y, b + i * item_size(dtype), item_size(dtype));
    const uint32_t infinity = dtype == kFloat32 ? 0x7f800000 : dtype == kFloat16 ? 0x7c00 : 0x7f80;
    const uint32_t magnitude = infinity | (infinity - 1) | (dtype == kFloat32 ? 0x7fffff : dtype == kFloat16 ? 0x3ff : 0x7f);
    if ((x & magnitude) > infinity && (y & magnitude) > infinity) continue;
    if (x != y) return false;
  }
  return true;
}

int steps(const Kernels& k) {
  const DType pairs[][2] = {{kFloat32, kFloat32}, {kFloat16, kFloat16}, {kBFloat16, kBFloat16}, {kFloat32, kFloat16}, {kFloat32, kBFloat16}};
  std::normal_distribution<float> normal;
  int cases = 0;
  for (const auto& [state, output] : pairs)
    for (int option = 0; option < 288; ++option)
      for (int64_t n : {0, 1, 3, 15, 16, 17, 63, 64, 65, 127, 129, 2047, 2049, 4100}) {
        const size_t bytes = static_cast<size_t>(n) * 4 + 64;
        std::vector<unsigned char> x(bytes), m(bytes), u(bytes), z(bytes), mask(bytes), known(bytes), last(bytes), last_2(bytes);
        std::vector<unsigned char> out[2], x0[2], history[2], history_2[2], model_input[2];
        fill(x, state), fill(m, output), fill(u, output), fill(z, state), fill(mask, state), fill(known, state), fill(last, state), fill(last_2, state);
        const int64_t seed = static_cast<int64_t>(random_bits());
        const float threshold = 1.7f;
        Step s{};
        s.n_samples = 1, s.n_elements = n;
        s.x_t = {x.data(), n, state}, s.model_output = {m.data(), n, output};
        if (option & 1) s.model_output_uncond = {u.data(), n, output};
        s.guidance_scale = 2.5f;
        // Kinds: plain, thresholds, inpainting, a history alone, histories beside noise, and all of it.
        const int kind = option / 48, noise = kind == 3 ? 0 : option / 2 % 3, rest = option / 6 % 4;
        const bool two_histories = kind > 3 && random_bits() % 2, reads = option / 2 % 3;
        const auto input = static_cast<DType>(random_bits() % (kNumDTypes + 1));  // of the model; kNumDTypes: none
        if (noise == 1) s.noise = {z.data(), n, state};
        if (noise == 2) s.seeds = &seed, s.noise_step = static_cast<uint32_t>(option), s.noise_stream = 1;
        s.clipped = rest > 0;
        const float r[] = {normal(random_bits), normal(random_bits), normal(random_bits), normal(random_bits), normal(random_bits)};
        s.c = {r[0], r[1], 0.3f, r[2], r[3], 0.9f, rest == 2 ? 0 : r[4], rest == 1 ? 0 : r[0], r[2], r[3], 1, 0.9f, 0.6f, 0.8f, kind > 2 && reads ? -0.7f : 0, reads ? 0.4f : 0, 1.3f};
        if (rest > 0 && (kind == 1 || kind == 5)) s.thresholds = &threshold;
        if (kind == 2 || kind == 5) {  // inpainting, with the noise of the known picture given or made
          s.mask = {mask.data(), n, state}, s.known_x0 = {known.data(), n, state};
          if (option % 2) s.known_noise = {z.data(), n, state};
          else s.known_seeds = &seed;
        }
        for (int i = 0; i < 2; ++i) {
          out[i].assign(bytes, 0xa5), x0[i].assign(bytes, 0xa5);
          s.x_prev = {out[i].data(), n, state};
          history[i] = last, history_2[i] = last_2, model_input[i].assign(bytes, 0xa5);
          if (kind > 2) s.history = {history[i].data(), n, state};
          if (two_histories) s.history_2 = {history_2[i].data(), n, state};
          if (input < kNumDTypes) s.model_input_out = {model_input[i].data(), n, input};
          if (option / 24 % 2) s.x0 = {x0[i].data(), n, state};
          (i ? k : kPortable).step(s, {0, 0, n});
        }
        // The same results, and the same bytes after them.
        const auto alike = [&](const std::vector<unsigned char>* both, DType dtype) {
          const size_t used = n * item_size(dtype);
          return same(both[0].data(), both[1].data(), n, dtype) && std::memcmp(&both[0][used], &both[1][used], bytes - used) == 0;
        };
        if (!alike(out, state) || !alike(x0, state) || !alike(history, state) || !alike(history_2, state) ||
            !alike(model_input, input < kNumDTypes ? input : kFloat32)) {
          std::printf("%s differs: state %d, output %d, option %d, n %lld\n", k.name, state, output, option, static_cast<long long>(n));
          return -1;
        }
        ++cases;
      }
  return cases;
}

// Densities, divergences and their gradients, and the sums of a step.
int densities(const Kernels& k) {
  const DType pairs[][2] = {{kFloat32, kFloat32}, {kFloat16, kFloat16}, {kBFloat16, kBFloat16}, {kFloat32, kFloat16}, {kFloat32, kBFloat16}};
  std::normal_distribution<float> normal;
  int cases = 0;
  for (const auto& [state, output] : pairs)
    for (int option = 0; option < 32; ++option)
      for (int64_t n : {1, 3, 15, 16, 17, 63, 65, 127, 129, 511, 513, 2047, 2048, 2049, 4100}) {
        const size_t bytes = static_cast<size_t>(n) * 4 + 64;
        std::vector<unsigned char> x(bytes), m(bytes), u(bytes), r(bytes), ru(bytes), value(bytes), mask(bytes);
        for (auto* of_state : {&x, &value}) fill(*of_state, state);
        for (auto* of_output : {&m, &u, &r, &ru}) fill(*of_output, output);
        for (size_t i = 0; i < bytes; i += 2) mask[i + 1] = random_bits() % 3 ? 0 : 0x3c;
        const int64_t seed = static_cast<int64_t>(random_bits());
        const float factor = normal(random_bits);
        Density d{};
        Step& s = d.step;
        s.n_samples = 1, s.n_elements = n, s.blocks = blocks_of(n);
        s.x_t = {x.data(), n, state}, s.model_output = {m.data(), n, output};
        const bool guided = option & 1, clipped = option & 2, divergence = option & 4, stepped = option & 16;
        if (guided) s.model_output_uncond = {u.data(), n, output};
        if (option & 8) s.mask = {mask.data(), n, state};
        s.guidance_scale = 2.5f, s.clipped = clipped;
        s.c = {0.9f, -0.3f, 0.3f, 0.7f, -0.2f, 0.9f, 0.2f, 0.1f, 0.8f, -0.3f, 1, 0.9f, 0.6f, 0.8f, 0, 0, 1};
        d.factors = &factor;
        std::vector<unsigned char> out[2], of_m[2], of_u[2], of_x[2];
        std::vector<BlockSum> sums[2];
        for (int i = 0; i < 2; ++i) {
          const Kernels& kernels = i ? k : kPortable;
          sums[i].resize(s.blocks), s.block_sums = sums[i].data();
          out[i].assign(bytes, 0xa5);
          if (stepped) {
            Step noisy = s;
            noisy.seeds = &seed, noisy.x_prev = {out[i].data(), n, state};
            if (noisy.mask.data) noisy.known_x0 = {value.data(), n, state}, noisy.known_seeds = &seed;
            kernels.step(noisy, {0, 0, n});
            continue;
          }
          if (divergence) {
            d.reference = {r.data(), n, output};
            if (guided) d.reference_uncond = {ru.data(), n, output};
          } else {
            s.x_prev = {value.data(), n, state};
          }
          kernels.density(d, {0, 0, n});
          of_m[i].assign(bytes, 0xa5), of_u[i].assign(bytes, 0xa5), of_x[i].assign(bytes, 0xa5);
          d.of_model_output = {of_m[i].data(), n, output}, d.of_x_t = {of_x[i].data(), n, state};
          if (guided) d.of_uncond = {of_u[i].data(), n, output};
          kernels.density_backward(d, {0, 0, n});
        }
        const auto alike = [&](const std::vector<unsigned char>* both, DType dtype) {
          const size_t used = std::min(n * item_size(dtype), both[0].size());
          if (both[0].empty()) return true;
          return same(both[0].data(), both[1].data(), n, dtype) && std::memcmp(&both[0][used], &both[1][used], both[0].size() - used) == 0;
        };
        const auto* a = reinterpret_cast<const unsigned char*>(sums[0].data());
        const auto* b = reinterpret_cast<const unsigned char*>(sums[1].data());
        if (!same(a, b, 2 * s.blocks, kFloat32) || !alike(out, state) || !alike(of_m, output) || !alike(of_u, output) || !alike(of_x, state)) {
          std::printf("%s: a density differs: state %d, output %d, option %d, n %lld\n", k.name, state, output, option, static_cast<long long>(n));
          return -1;
        }
        ++cases;
      }
  return cases;
}

int noise(const Kernels& k) {
  int cases = 0;
  for (int64_t n : {1, 2, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 5000}) {
    const int64_t seed = static_cast<int64_t>(random_bits());
    const uint32_t step = static_cast<uint32_t>(random_bits()), stream = static_cast<uint32_t>(random_bits() % 5);
    const int64_t first = static_cast<int64_t>(random_bits() % (1u << 31));
    std::vector<float> a(n), b(n);
    std::vector<uint32_t> v(4 * n), w(4 * n);
    kPortable.normals(seed, 4 * first, step, stream, a.data(), n), k.normals(seed, 4 * first, step, stream, b.data(), n);
    kPortable.words(seed, first, step, stream, v.data(), n), k.words(seed, first, step, stream, w.data(), n);
    if (std::memcmp(a.data(), b.data(), 4 * n) != 0 || v != w) {
      std::printf("%s: noise differs at n %lld\n", k.name, static_cast<long long>(n));
      return -1;
    }
    ++cases;
  }
  return cases;
}

std::vector<float> normals(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& x : values) x = normal(random_bits);
  return values;
}

// All tiles at once, and from and up to some tile among them, as threads divide them; what is around the output stays.
int convolutions(const Kernels& k) {
  // Tiles of every width and height that a picture's edge leaves, less and more than a block of them, and every number of vectors.
  const int64_t sides[][2] = {{1, 1}, {2, 3}, {4, 4}, {5, 8}, {9, 7}, {13, 22}};
  const int64_t channels[][2] = {{16, 16}, {32, 48}, {16, 64}, {48, 80}, {112, 112}, {16, 128}};
  int cases = 0;
  for (const auto& [height, width] : sides)
    for (const auto& [in_channels, out_channels] : channels)
      for (int64_t batch : {1, 3}) {
        const int64_t size = batch * height * width * out_channels, around = 64;
        const std::vector<float> input = normals(batch * height * width * in_channels), bias = normals(out_channels);
        const std::vector<float> weights = normals(kPoints * in_channels * out_channels);
        std::vector<float> outputs[2];
        for (int i = 0; i < 2; ++i) {
          outputs[i].assign(size + 2 * around, -77.0f);
          const float* added = cases % 3 ? bias.data() : nullptr;
          float* output = outputs[i].data() + around;
          const Convolution c{input.data(), weights.data(), added, output, batch, height, width, in_channels, out_channels};
          std::vector<float> memory(scratch_floats(c) + 16);
          void* scratch = memory.data();
          size_t space = memory.size() * sizeof(float);
          std::align(64, scratch_floats(c) * sizeof(float), scratch, space);
          const int64_t tiles = tile_count(c), seam = i && cases % 2 ? tiles / 2 / kRowGrain * kRowGrain : 0;
          for (const auto& [begin, end] : {std::pair{int64_t{0}, seam}, std::pair{seam, tiles}})
            (i ? k : kPortable).convolve(c, begin, end, static_cast<float*>(scratch));
        }
        bool alike = std::memcmp(outputs[0].data(), outputs[1].data(), outputs[0].size() * sizeof(float)) == 0;
        for (int64_t j = 0; j < around; ++j) alike = alike && outputs[1][j] == -77.0f && outputs[1][around + size + j] == -77.0f;
        if (!alike) {
          std::printf("%s: a convolution differs: batch %d, %d x %d, channels %d to %d\n", k.name, static_cast<int>(batch),
                      static_cast<int>(height), static_cast<int>(width), static_cast<int>(in_channels), static_cast<int>(out_channels));
          return -1;
        }
        ++cases;
      }
  return cases;
}

// All slabs at once, and from and up to some slab among them; what is around the output stays.
int normalizations(const Kernels& k) {
  const int64_t sizes[][2] = {{16, 1}, {16, 8}, {16, 16}, {32, 8}, {48, 3}, {48, 16}, {96, 4}, {80, 8}, {320, 32}, {64, 64}};  // channels, groups
  int cases = 0;
  for (const auto& [channels, groups] : sizes)
    for (int64_t pixels : {1, 2, 31, 32, 33, 127, 128, 129, 1000})
      for (int option = 0; option < 8; ++option) {
        const int64_t batch = 1 + option % 3, size = batch * pixels * channels, around = 64;
        std::vector<float> input = normals(size);
        const std::vector<float> weight = normals(channels), bias = normals(channels), rows = normals(2 * batch * channels);
        if (option % 4 == 3)
          for (float& x : input) x = x * 0.01f + 1e4f;
        if (option == 6) input[random_bits() % input.size()] = INFINITY, input[random_bits() % input.size()] = NAN;
        std::vector<float> outputs[2];
        for (int i = 0; i < 2; ++i) {
          outputs[i].assign(size + 2 * around, -77.0f);
          const bool scaled = option & 2, weighted = option != 5;
          const Normalization n{input.data(), weighted ? weight.data() : nullptr, weighted ? bias.data() : nullptr, scaled ? rows.data() : nullptr,
                                scaled ? rows.data() + channels : nullptr, 2 * channels, 2 * channels, outputs[i].data() + around, batch, pixels,
                                channels, groups, 1e-5, (option & 1) != 0};
          std::vector<double> scratch((scratch_floats(n) + 1) / 2);
          const int64_t slabs = slab_count(n), seam = i && cases % 2 ? slabs / 2 : 0;
          for (const auto& [begin, end] : {std::pair{int64_t{0}, seam}, std::pair{seam, slabs}})
            (i ? k : kPortable).normalize(n, begin, end, reinterpret_cast<float*>(scratch.data()));
        }
        const auto bytes = [&](int i) { return reinterpret_cast<const unsigned char*>(outputs[i].data()); };
        bool alike = same(bytes(0), bytes(1), outputs[0].size(), kFloat32);
        for (int64_t j = 0; j < around; ++j) alike = alike && outputs[1][j] == -77.0f && outputs[1][around + size + j] == -77.0f;
        if (!alike) {
          std::printf("%s: a normalization differs: batch %d, %d pixels, %d channels in %d groups, option %d\n", k.name, static_cast<int>(batch),
                      static_cast<int>(pixels), static_cast<int>(channels), static_cast<int>(groups), option);
          return -1;
        }
        ++cases;
      }
  return cases;
}

// SiLU of any bits, in every size of a remainder.
int silus(const Kernels& k) {
  int cases = 0;
  for (int64_t n = 1; n < 70; ++n)
    for (int repeat = 0; repeat < 20; ++repeat) {
      std::vector<unsigned char> input(4 * n), outputs[2];
      fill(input, kFloat32);
      for (int i = 0; i < 2; ++i) {
        outputs[i].assign(4 * n + 64, 0xa5);
        (i ? k : kPortable).silu(reinterpret_cast<const float*>(input.data()), reinterpret_cast<float*>(outputs[i].data()), n);
      }
      if (!same(outputs[0].data(), outputs[1].data(), n, kFloat32) || std::memcmp(&outputs[0][4 * n], &outputs[1][4 * n], 64) != 0) {
        std::printf("%s: SiLU differs at n %d\n", k.name, static_cast<int>(n));
        return -1;
      }
      ++cases;
    }
  return cases;
}

}  // namespace

int main() {
  for (const Kernels* k : {&kAvx2, &kAvx512}) {
    const int s = steps(*k), d = densities(*k), z = noise(*k), c = convolutions(*k), n = normalizations(*k), l = silus(*k);
    if (s < 0 || d < 0 || z < 0 || c < 0 || n < 0 || l < 0) return 1;
    std::printf("%s: the same bits as portable in %d steps, %d densities, %d draws of noise, %d convolutions, %d normalizations and %d SiLUs\n", k->name, s, d,
                z, c, n, l);
  }
}
