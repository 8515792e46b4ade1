// The CPU kernels alone, on one core with warm weights: GFLOP/s of useful multiply-adds (taps in the padding not
// counted). The kernels on tiles do fewer; theirs are counted as if they did as many.
//
//   g++ -std=c++20 -O2 -Icsrc/include bench/kernels.cpp csrc/cpu/isa_avx512*.cpp -o build/kernels && build/kernels
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/kernels_bf16.h"

using namespace gatedkernels;

namespace {

// Memory that begins with a cache line, as PyTorch's tensors do: a row of weights that straddles lines costs a third.
template <class Element>
struct Lines {
  using value_type = Element;
  Element* allocate(size_t many) { return static_cast<Element*>(operator new(many * sizeof(Element), kLine)); }
  void deallocate(Element* memory, size_t) { operator delete(memory, kLine); }
  bool operator==(const Lines&) const = default;

 private:
  static constexpr std::align_val_t kLine{64};
};

template <class Element>
using Memory = std::vector<Element, Lines<Element>>;

// Seconds a sample: the best of five passes over all samples.
template <class Run>
double measure(int samples, const Run& run) {
  double best = 1e9;
  for (int pass = 0; pass < 5; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    for (int n = 0; n < samples; ++n) run(n);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / samples);
  }
  return best;
}

constexpr int N = 16;
constexpr int kShapes[][2] = {{64, 32}, {128, 16}, {256, 8}, {512, 4}, {64, 56}, {128, 28}, {256, 14},
                              {512, 7}, {64, 34}, {128, 17}, {256, 9}};

// `count` channels of C for every sample, in order.
std::vector<std::vector<int32_t>> draw_channels(int C, int count) {
  std::mt19937 random(1);
  std::vector<std::vector<int32_t>> channels(N, std::vector<int32_t>(C));
  for (auto& list : channels) {
    std::iota(list.begin(), list.end(), 0);
    std::shuffle(list.begin(), list.end(), random);
    std::sort(list.begin(), list.begin() + count);
  }
  return channels;
}

void print(const char* name, int C, int H, double density, int count, double out_s, double in_s) {
  const double operations = 2.0 * C * count * (3.0 * H - 2) * (3.0 * H - 2);
  std::printf("%s %3d, %2dx%-2d  %3.0f %% open  out-gated %4.0f  in-gated %4.0f\n", name, C, H, H, 100 * density,
              operations / out_s / 1e9, operations / in_s / 1e9);
}

// Transforms included, in strips as blocks cut them.
void measure_tiles(const Kernels& kernels) {
  for (const auto& [C, H] : kShapes) {
    const Geometry size = {H, H, H, H, 1, 3};
    const TileGrid grid(size);
    if (grid.tiles() < 9) continue;
    for (const double density : {0.1, 0.3, 1.0}) {
      const int count = std::max(1, static_cast<int>(density * C + 0.5)), most = std::max(16, 8192 / C);
      const size_t image = size_t(H) * H * C;
      const int64_t plane = (H * H + 15) / 16 * 16 + 16;
      const Memory<float> x(N * image, 0.01f), weight(size_t(C) * (16 * C + 16), 0.01f), bias(C, 0.01f);
      Memory<float> planes(N * C * plane), y(N * image), data(Components::floats(C, 160));
      Memory<float> scratch(tile_scratch(grid, 160));
      const auto channels = draw_channels(C, count);
      const OutConv out = {size, C, weight.data(), bias.data(), plane, true};
      const InConv in = {size, C, C, weight.data(), bias.data(), plane, H, 1, false, true};
      auto strips = [&](int longest, const auto& run) {
        const int many = (grid.tiles() + longest - 1) / longest;
        for (int i = 0; i < many; ++i) run(Strip{grid.tiles() * i / many, grid.tiles() * (i + 1) / many});
      };
      const double out_s = measure(N, [&](int n) {
        strips(most, [&](Strip strip) {
          const Components components(data.data(), C, strip.tiles());
          kernels.image_tiles(grid, strip, &x[n * image], C, 0, C, components, scratch.data());
          kernels.out_tiles(out, grid, strip, components, channels[n].data(), count, count,
                            &planes[n * C * plane], scratch.data());
        });
      });
      const double in_s = measure(N, [&](int n) {
        strips(64, [&](Strip strip) {
          const Components components(data.data(), count, strip.tiles());
          kernels.plane_tiles(grid, strip, &planes[n * C * plane], plane, 0, count, components, scratch.data());
          kernels.in_tiles(in, grid, strip, components, channels[n].data(), count, 0, C / kBlock, &x[n * image],
                           &y[n * image], scratch.data());
        });
      });
      print("tiles   ", C, H, density, count, out_s, in_s);
    }
  }
}

// `paired` listed channels share a plane.
template <class Element, class Set>
void measure_all(const char* name, const Set& kernels, Element value, int paired) {
  for (const auto& [C, H] : kShapes) {
    for (const double density : {0.1, 0.3, 1.0}) {
      const int count = std::max(1, static_cast<int>(density * C + 0.5)), blocks = C / kBlock;
      const size_t image = size_t(H) * H * C, filters = size_t(C) * C * 9;
      const int64_t plane = ((H * H + 15) / 16 * 16 + 16) * paired;
      const Memory<Element> x(N * image, value), weight(filters, value), bias(C, value);
      Memory<Element> planes(N * C * plane), y(N * image);
      const auto channels = draw_channels(C, count);
      const Geometry size = {H, H, H, H, 1, 3};
      const OutConvOf<Element> out = {size, C, weight.data(), bias.data(), plane, true};
      const InConvOf<Element> in = {size, C, C, weight.data(), bias.data(), plane, H * paired, paired, false, true};
      const double out_s = measure(N, [&](int n) {
        kernels.out_rows(out, &x[n * image], channels[n].data(), count, count, 0, H, &planes[n * C * plane]);
      });
      const double in_s = measure(N, [&](int n) {
        for (int block = 0; block < blocks; ++block) {
          kernels.in_rows(in, &planes[n * C * plane], channels[n].data(), count, block, block + 1, 0, H, &x[n * image],
                          &y[n * image]);
        }
      });
      print(name, C, H, density, count, out_s, in_s);
    }
  }
}

}  // namespace

int main() {
  if (__builtin_cpu_supports("avx512f")) measure_tiles(kAvx512Kernels);
  if (__builtin_cpu_supports("avx512f")) measure_all("float32 ", kAvx512Kernels, 0.01f, 1);
  if (__builtin_cpu_supports("avx512bf16")) measure_all("bfloat16", kAvx512Bf16Kernels, Bf16{0x3c24}, 2);
}
