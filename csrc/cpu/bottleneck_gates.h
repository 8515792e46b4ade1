// A bottleneck's tensors and gates, for the operator that computes it.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "gate.h"
#include "gate_layers.h"

namespace gatedkernels {

// The tensors of a block, in the order of the operator's list.
struct BottleneckParts {
  static constexpr size_t kMany = 16;
  const MaybeTensor *gate1, *gate2;  // four each, or nothing
  const Tensor *weight1, *bias1, *weight2, *bias2, *weight3, *bias3;
  const MaybeTensor *shortcut_weight, *shortcut_bias;

  explicit BottleneckParts(const std::vector<MaybeTensor>& p) {
    STD_TORCH_CHECK(p.size() == kMany, "a bottleneck has sixteen parts");
    STD_TORCH_CHECK(std::all_of(&p[8], &p[14], [](const MaybeTensor& t) { return t && t->is_contiguous(); }),
                    "a bottleneck has three convolutions, packed");
    for (const size_t gate : {0, 4}) {
      const bool whole = p[gate + 1] && p[gate + 2] && p[gate + 3];
      STD_TORCH_CHECK(!p[gate] || whole, "a gate has two layers");
    }
    gate1 = &p[0], gate2 = &p[4];
    weight1 = &*p[8], bias1 = &*p[9], weight2 = &*p[10], bias2 = &*p[11], weight3 = &*p[12], bias3 = &*p[13];
    shortcut_weight = &p[14], shortcut_bias = &p[15];
  }
};

// Lists of open channels, sample by sample; neighbouring channels may share a decision.
struct OpenChannels {
  int64_t channels;
  std::vector<int32_t> index, count;

  OpenChannels(int64_t samples, int64_t channels_) : channels(channels_), index(samples * channels), count(samples) {}

  void set(int64_t n, const bool* open, int64_t decisions) {
    const int64_t group = channels / decisions;
    int32_t* list = index.data() + n * channels;
    int32_t active = 0;
    for (int64_t c = 0; c < channels; ++c) {
      list[active] = static_cast<int32_t>(c);
      active += open[c / group];
    }
    count[n] = active;
  }

  const int32_t* list(int64_t n) const { return index.data() + n * channels; }
};

// One of the two gates of a block, and what is open behind it.
struct BottleneckGate {
  std::optional<GateLayers> decider;
  Tensor decided;  // bool (N, decisions)
  OpenChannels open;
  bool known;  // because the mask is given, or there is no gate

  // It decides from the means of `inputs` channels; with images at once, for all samples together.
  BottleneckGate(const MaybeTensor* layers, const MaybeTensor& given, int64_t N, int64_t inputs, int64_t channels,
                 const Tensor* images = nullptr)
      : decider(*layers && !images ? std::optional<GateLayers>(std::in_place, *layers[0], *layers[1], *layers[2],
                                                               *layers[3], inputs)
                                   : std::nullopt),
        decided(images ? channel_gate(*images, *layers[0], *layers[1], *layers[2], *layers[3])
                       : empty({N, decider ? decider->decisions() : channels}, ScalarType::Bool)),
        open(N, channels),
        known(given || !decider) {
    STD_TORCH_CHECK(decided.size(1) > 0 && channels % decided.size(1) == 0, "a gate decides about groups of channels");
    // Without a gate everything is open; a gate's own decisions follow, if there is an image.
    if (!images) std::fill_n(decided.mutable_data_ptr<bool>(), decided.numel(), true);
    if (!known) return;
    const Tensor mask = row_major(given ? *given : decided);
    const int64_t decisions = mask.size(1);
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == N && decisions > 0 &&
                        channels % decisions == 0,
                    "masks are bool, (N, M / group)");
    for (int64_t n = 0; n < N; ++n) open.set(n, mask.const_data_ptr<bool>() + n * decisions, decisions);
  }

  void decide(int64_t n, const std::vector<float>& mean) {
    bool* mask = decided.mutable_data_ptr<bool>() + n * decided.size(1);
    std::vector<float> hidden(decider->inner()), logits(decider->decisions());
    decider->run_first(1, 0, 1, mean.data(), hidden.data());
    decider->run_second(1, 0, 1, hidden.data(), logits.data(), mask);
    if (!known) open.set(n, mask, decided.size(1));
  }

  // Open channels of a sample, or a guess.
  int64_t expected(int64_t n) const { return known ? open.count[n] : ceil_div(open.channels, 2); }
};

}  // namespace gatedkernels
