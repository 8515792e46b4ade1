// The library as Python sees it: a module to import, and the hash of the schemas it was built for. The operators are in
// torch.ops, under schemas that the CPU library (or Python) defines.
#include <Python.h>

#include "schemas.h"

extern "C" {

__attribute__((visibility("default"))) extern const char* const gatedkernels_cuda_digest;
const char* const gatedkernels_cuda_digest = GATEDKERNELS_DIGEST;

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1,
                               nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
}
