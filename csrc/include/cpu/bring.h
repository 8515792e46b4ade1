// Memory that is read soon, brought nearer by hand: gathered rows start a new stream each, and no processor foresees
// it.
#pragma once

#include <cstdint>

namespace gatedkernels {

// Into the second-level cache: a core waits for more lines on their way there than on their way to the first. Always
// inlined: this header is compiled for every instruction set.
template <class Element>
__attribute__((always_inline)) inline void bring(const Element* from, int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t at = 0; at < elements; at += kLine) __builtin_prefetch(from + at, 0, 2);
}

}  // namespace gatedkernels
