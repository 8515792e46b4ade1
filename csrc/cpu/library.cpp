// The library itself: its operators' schemas (a header that setup.py writes from gatedkernels/_schemas.py, so that
// they exist without Python too), the hash of its sources' schemas, and the choice of the instruction set.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "cpu/kernels_bf16.h"
#include "schemas.h"

namespace gatedkernels {

namespace {

enum class Isa { portable, avx2, avx512, avx512bf16 };

// The best set of this processor, capped.
Isa best_isa() {
#if defined(__x86_64__)
  const char* given = std::getenv("GATEDKERNELS_ISA");
  const std::string_view name = given ? given : "avx512bf16";
  STD_TORCH_CHECK(name == "avx512bf16" || name == "avx512" || name == "avx2" || name == "portable",
                  "GATEDKERNELS_ISA must be avx512bf16, avx512, avx2 or portable");
  const Isa most = name == "avx512bf16" ? Isa::avx512bf16
                   : name == "avx512"   ? Isa::avx512
                   : name == "avx2"     ? Isa::avx2
                                        : Isa::portable;
  if (most >= Isa::avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return most == Isa::avx512bf16 && __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  }
  if (most >= Isa::avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa isa() {
  static const Isa chosen = best_isa();
  return chosen;
}

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return kAvx512Kernels;
  if (isa() == Isa::avx2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

const Bf16Kernels* bf16_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512bf16) return &kAvx512Bf16Kernels;
#endif
  return nullptr;
}

const Kernels& kernels_for(int64_t channels) {
#if defined(__x86_64__)
  constexpr int64_t kMany = 64;  // beyond, the last vector is a small part of them
  const bool halves = channels < kMany && channels % 16 == 8;
  if (halves && &kernels() == &kAvx512Kernels) return kAvx2Kernels;
#endif
  return kernels();
}

}  // namespace gatedkernels

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

EXPORTED extern const char* const gatedkernels_cpu_digest;
const char* const gatedkernels_cpu_digest = GATEDKERNELS_DIGEST;

EXPORTED const char* gatedkernels_cpu_isa() {
  return gatedkernels::bf16_kernels() ? "avx512bf16" : gatedkernels::kernels().name;
}

// Lets Python import the library as a module; loading it is all there is to do.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
}

STABLE_TORCH_LIBRARY(gatedkernels, m) {
  for (const char* schema : gatedkernels::kSchemas) m.def(schema);
}
