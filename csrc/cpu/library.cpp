// The library itself: its operators' schemas (a header that setup.py writes from gatedkernels/_schemas.py, so that
// they exist without Python too), the hash of its sources' schemas, and the choice of the instruction set.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "cpu/kernels.h"
#include "schemas.h"

namespace gatedkernels {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const char* cap = std::getenv("GATEDKERNELS_ISA");
    const std::string_view most = cap ? cap : "avx512";
    STD_TORCH_CHECK(most == "avx512" || most == "avx2" || most == "portable",
                    "GATEDKERNELS_ISA must be avx512, avx2 or portable");
    if (most == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return kAvx512Kernels;
    }
    if (most != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2Kernels;
#endif
    return kPortableKernels;
  }();
  return chosen;
}

}  // namespace gatedkernels

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

EXPORTED extern const char* const gatedkernels_cpu_digest;
const char* const gatedkernels_cpu_digest = GATEDKERNELS_DIGEST;

EXPORTED const char* gatedkernels_cpu_isa() { return gatedkernels::kernels().name; }

// Lets Python import the library as a module; loading it is all there is to do.
PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
}

STABLE_TORCH_LIBRARY(gatedkernels, m) {
  for (const char* schema : gatedkernels::kSchemas) m.def(schema);
}
