// Linear layers with gated inputs and outputs: N samples of T tokens, C inputs, K outputs (units).
#include <algorithm>
#include <array>
#include <cstring>

#include "tensors.h"

namespace gatedkernels {
namespace {

constexpr int64_t kFewTokens = 24;    // of one mask: too few to pack weights for
constexpr int64_t kMostTokens = 256;  // of one item: what a panel of units computes stays in the second-level cache
constexpr int64_t kMostPanels = 4;    // of one item
constexpr int64_t kSlack = 16;        // floats that may be read behind packed rows

enum class Use : size_t { kPanels, kPanel, kPacked };

// Memory that a thread keeps from call to call, as much as the largest needed: fresh pages, which threads wait for one
// another to get, cost more than what is written to them.
float* scratch(Use use, int64_t floats) {
  thread_local std::array<std::vector<float>, 3> kept;
  std::vector<float>& memory = kept[static_cast<size_t>(use)];
  constexpr size_t kLine = 64;  // bytes: a vector across two lines costs twice
  const size_t wanted = static_cast<size_t>(floats) + kLine / sizeof(float);
  if (memory.size() < wanted) memory.resize(wanted);
  const size_t beyond = reinterpret_cast<uintptr_t>(memory.data()) % kLine;
  return memory.data() + (beyond ? (kLine - beyond) / sizeof(float) : 0);
}

// Packed rows are computed in vectors.
int64_t whole_vectors(int64_t units) { return ceil_div(units, 16) * 16; }

// Weights (K, C) of any strides.
struct Weights {
  const float* at;
  int64_t unit_step, input_step, K, C;

  explicit Weights(const Tensor& weight)
      : at(floats(weight)),
        unit_step(weight.stride(0)),
        input_step(weight.stride(1)),
        K(weight.size(0)),
        C(weight.size(1)) {}

  float operator()(int64_t unit, int64_t input) const { return at[unit * unit_step + input * input_step]; }
};

std::array<float, kBlock> panel_bias(const float* bias, const int32_t* units, int64_t first, int64_t count) {
  std::array<float, kBlock> values = {};
  if (bias) {
    for (int64_t l = 0; l < count; ++l) values[l] = bias[units ? units[l] : first + l];
  }
  return values;
}

// Rows of kBlock units for `count` inputs. Null units: first, first + 1, …; null inputs: begin, begin + 1, …. What
// stands behind the last unit is not used.
void pack_panel(const Weights& weight, const int32_t* units, int64_t first, int64_t unit_count, const int32_t* inputs,
                int64_t begin, int64_t count, float* panel) {
  if (!inputs && weight.input_step == 1) {
    const float* rows[kBlock];
    for (int64_t l = 0; l < kBlock; ++l) {
      const int64_t unit = std::min(l, unit_count - 1);
      rows[l] = weight.at + (units ? units[unit] : first + unit) * weight.unit_step + begin;
    }
    kernels().gather_rows(rows, count, panel);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t input = inputs ? inputs[j] : begin + j;
    float* row = panel + j * kBlock;
    if (!units && weight.unit_step == 1) {
      std::memcpy(row, weight.at + first + input * weight.input_step, unit_count * sizeof(float));
      std::fill(row + unit_count, row + kBlock, 0.0f);
      continue;
    }
    for (int64_t l = 0; l < kBlock; ++l) {
      row[l] = l < unit_count ? weight(units ? units[l] : first + l, input) : 0.0f;
    }
  }
}

// Inputs that some sample reads, ascending, of a plan with a list.
std::vector<int32_t> used_inputs(const Plan& plan) {
  std::vector<uint8_t> used(plan.channels, 0);
  for (int64_t n = 0; n < plan.samples; ++n) {
    for (int32_t j = 0; j < plan.count[n]; ++j) used[plan.list(n)[j]] = 1;
  }
  std::vector<int32_t> list;
  for (int64_t c = 0; c < plan.channels; ++c) {
    if (used[c]) list.push_back(static_cast<int32_t>(c));
  }
  return list;
}

// Whether so many inputs are packed one column after another: whole rows are transposed in registers, which is faster.
bool few_of_rows(const Weights& weight, int64_t inputs) {
  return inputs < (weight.input_step == 1 ? weight.C / 4 : weight.C);
}

// The panels of the first `units` units, (units / kBlock, C, kBlock), filled in where an input is used.
float* pack_panels(const Weights& weight, const Plan* plan, int64_t units) {
  const int64_t blocks = ceil_div(units, kBlock), C = weight.C;
  float* const panels = scratch(Use::kPanels, blocks * C * kBlock);
  const bool listed = plan && plan->index;
  const std::vector<int32_t> used = listed ? used_inputs(*plan) : std::vector<int32_t>();
  const bool some = listed && few_of_rows(weight, static_cast<int64_t>(used.size()));
  constexpr int64_t kTogether = 128;
  const int64_t inputs = some ? used.size() : plan && !listed ? plan->most() : C, strips = ceil_div(inputs, kTogether);
  torch::stable::parallel_for(0, blocks * strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / strips * kBlock, units = std::min<int64_t>(kBlock, weight.K - first);
      const int64_t from = i % strips * kTogether, to = std::min(from + kTogether, inputs);
      float* panel = panels + first * C;
      if (!some) {
        pack_panel(weight, nullptr, first, units, nullptr, from, to - from, panel + from * kBlock);
        continue;
      }
      for (int64_t j = from; j < to; ++j) {
        pack_panel(weight, nullptr, first, units, used.data() + j, 0, 1, panel + used[j] * kBlock);
      }
    }
  });
  return panels;
}

// How many pieces to cut the tokens of a mask into, so that every thread finds several items, none too large.
int64_t token_bands(int64_t tokens, int64_t pieces, int64_t least) {
  const int64_t wanted = ceil_div(8 * threads(), std::max<int64_t>(pieces, 1));
  return std::max(ceil_div(tokens, kMostTokens), std::min(wanted, std::max<int64_t>(tokens / least, 1)));
}

// Whether each panel is packed by the item that uses it, for all samples: they and the panel stay in the second-level
// cache, and no thread waits for others to have packed theirs, or fetches them from another core.
bool panels_first(const Tensor& x, const Plan* plan, int64_t blocks) {
  constexpr int64_t kSmall = 1 << 17;  // floats
  const bool alone = x.size(0) == 1, listed = plan && plan->index;
  return x.numel() <= kSmall && (alone || !listed) && blocks >= (alone ? 2 : 4) * threads();
}

// Every output from the open inputs; with widths a sample's units beyond its own are zeros, which the panel that its
// width falls into, or ends before, writes for all behind it.
void run_in(const Tensor& x, const Weights& weight, const float* bias, const Plan* plan, const Plan* out_width,
            float* y) {
  const int64_t N = x.size(0), T = x.size(1), C = weight.C, K = weight.K, blocks = ceil_div(K, kBlock);
  const int64_t widest = out_width ? out_width->most() : K;
  const float* in = floats(x);
  const auto compute = [&](int64_t n, int64_t first, int64_t from, int64_t to, const float* panel, bool shared) {
    const int64_t width = out_width ? out_width->count[n] : K, units = std::min<int64_t>(kBlock, width - first);
    if (first <= width && width < std::min(first + kBlock, K)) {
      for (int64_t t = from; t < to; ++t) std::memset(y + (n * T + t) * K + width, 0, (K - width) * sizeof(float));
    }
    if (units <= 0) return;
    const std::array<float, kBlock> values = panel_bias(bias, nullptr, first, units);
    LinearPanel job = {};
    job.x = in + (n * T + from) * C, job.x_step = C, job.tokens = static_cast<int>(to - from);
    job.inputs = plan ? plan->list(n) : nullptr, job.count = static_cast<int>(plan ? plan->count[n] : C);
    job.weight = panel, job.shared = shared, job.bias = values.data();
    job.y = y + (n * T + from) * K + first, job.y_step = K, job.units = static_cast<int>(units);
    kernels().linear_panel(job);
  };
  if (panels_first(x, plan, blocks)) {
    // Some inputs of one sample, or all; whole rows are transposed in registers, as in pack_panels.
    const int32_t* list = plan && plan->index && few_of_rows(weight, plan->count[0]) ? plan->list(0) : nullptr;
    const int64_t inputs = list ? plan->count[0] : plan && !plan->index ? plan->most() : C;
    in_order(blocks, [&](int64_t block) {
      const int64_t first = block * kBlock, units = std::min<int64_t>(kBlock, widest - first);
      float* const panel = scratch(Use::kPanel, C * kBlock);
      if (units > 0) pack_panel(weight, nullptr, first, units, list, 0, inputs, panel);
      for (int64_t n = 0; n < N; ++n) compute(n, first, 0, T, panel, list == nullptr);
    });
    return;
  }
  const float* const panels = pack_panels(weight, plan, widest);
  const int64_t bands = token_bands(T, N * blocks, 24);
  in_order(N * blocks * bands, [&](int64_t item) {
    const int64_t n = item / (blocks * bands), first = item / bands % blocks * kBlock, band = item % bands;
    compute(n, first, T * band / bands, T * (band + 1) / bands, panels + first * C, true);
  });
}

// Some open units of one sample for a band of its tokens. The columns from its first unit to the next item's are its
// own, closed ones between them included.
struct OutItem {
  int64_t sample, first, count;  // units, counted along the sample's list
  int64_t token, tokens;
};

std::vector<OutItem> cut_units(const Plan& outs, int64_t tokens) {
  int64_t panels = 0;
  for (int64_t n = 0; n < outs.samples; ++n) panels += std::max<int64_t>(ceil_div(outs.count[n], kBlock), 1);
  const int64_t step = std::clamp<int64_t>(panels / (4 * threads()), 1, kMostPanels) * kBlock;
  const int64_t bands = token_bands(tokens, panels, 96);  // every band packs its weights again
  std::vector<OutItem> items;
  for (int64_t n = 0; n < outs.samples; ++n) {
    for (int64_t first = 0; first == 0 || first < outs.count[n]; first += step) {
      const int64_t count = std::min(step, outs.count[n] - first);
      for (int64_t band = 0; band < bands; ++band) {
        const int64_t token = tokens * band / bands, end = tokens * (band + 1) / bands;
        items.push_back({n, first, count, token, end - token});
      }
    }
  }
  return items;
}

// Computes the units of an item, packed in rows of `step` floats; a null plan reads every input.
void run_units(const Weights& weight, const float* bias, const float* x, const Plan* ins, const OutItem& item,
               const int32_t* units, float* packed, int64_t step) {
  float* const panel = scratch(Use::kPanel, kChain * kBlock);
  const int32_t* list = ins ? ins->list(item.sample) : nullptr;
  const int64_t inputs = ins ? ins->count[item.sample] : weight.C;
  LinearPanel job = {};
  job.x_step = weight.C, job.tokens = static_cast<int>(item.tokens), job.weight = panel, job.y_step = step;
  for (int64_t j = 0; j == 0 || j < inputs; j += kChain) {
    job.x = list ? x : x + j, job.inputs = list ? list + j : nullptr;
    job.count = static_cast<int>(std::min<int64_t>(kChain, inputs - j)), job.add = j > 0;
    for (int64_t unit = 0; unit < item.count; unit += kBlock) {
      const int64_t some = std::min<int64_t>(kBlock, item.count - unit);
      const std::array<float, kBlock> values = panel_bias(bias, units + unit, 0, some);
      pack_panel(weight, units + unit, 0, some, job.inputs, j, job.count, panel);
      job.bias = values.data(), job.y = packed + unit, job.units = static_cast<int>(whole_vectors(some));
      kernels().linear_panel(job);
    }
  }
}

// Every sample's open units, from weights that are packed for it.
void run_out(const Tensor& x, const Weights& weight, const float* bias, const Plan* ins, const Plan& outs, float* y) {
  const int64_t T = x.size(1), C = weight.C, K = weight.K;
  const std::vector<OutItem> items = cut_units(outs, T);
  const float* in = floats(x);
  in_order(static_cast<int64_t>(items.size()), [&](int64_t i) {
    const OutItem& item = items[i];
    const int64_t n = item.sample, end = item.first + item.count, row = n * T + item.token;
    const int64_t step = whole_vectors(item.count);
    const int32_t* units = outs.list(n) + item.first;
    float* const packed = scratch(Use::kPacked, item.tokens * step + kSlack);
    run_units(weight, bias, in + row * C, ins, item, units, packed, step);
    SpreadUnits spread = {packed, step, item.tokens, units, static_cast<int>(item.count)};
    spread.from = item.first ? units[0] : 0, spread.to = end < outs.count[n] ? outs.list(n)[end] : K;
    spread.y = y + row * K, spread.y_step = K;
    kernels().spread_units(spread);
  });
}

// The same for masks of few tokens each: open units are pointers to rows of weights.
void run_out_few(const Tensor& x, const Tensor& weight, const float* bias, const MaybeTensor& in_mask,
                 const Tensor& out_mask, float* y) {
  const int64_t N = x.size(0), T = x.size(1), C = x.size(2), K = weight.size(0);
  const MaybeTensor in_rows = row_major(in_mask);
  const Tensor out_rows = row_major(out_mask);
  const bool* reads = in_rows ? in_rows->const_data_ptr<bool>() : nullptr;
  const bool* open = out_rows.const_data_ptr<bool>();
  const float* in = floats(x);
  const Geometry size{1, static_cast<int>(T), 1, static_cast<int>(T), 1, 1};
  const OutConv conv{size, static_cast<int>(C), floats(weight), bias, T, false};
  torch::stable::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> units(K);
    std::vector<float> planes(K * T), opened(reads ? T * C : 0);
    for (int64_t n = begin; n < end; ++n) {
      int32_t count = 0;
      for (int64_t k = 0; k < K; ++k) {
        units[count] = static_cast<int32_t>(k);
        count += open[n * K + k];
      }
      const float* tokens = in + n * T * C;
      if (reads) {
        for (int64_t i = 0; i < T * C; ++i) opened[i] = reads[n * C + i % C] ? tokens[i] : 0.0f;
        tokens = opened.data();
      }
      kernels().out_rows(conv, tokens, units.data(), count, count, 0, 1, planes.data());
      std::memset(y + n * T * K, 0, T * K * sizeof(float));
      for (int32_t j = 0; j < count; ++j) {
        for (int64_t t = 0; t < T; ++t) y[(n * T + t) * K + units[j]] = planes[j * T + t];
      }
    }
  });
}

}  // namespace

Tensor gated_linear(const Tensor& given_x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& in_mask,
                    const MaybeTensor& out_mask) {
  check_float(given_x, 3), check_float(weight, 2);
  const Tensor x = row_major(given_x);
  const MaybeTensor b = row_major(bias);
  const int64_t N = x.size(0), T = x.size(1), K = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == x.size(2), "x and weight have as many inputs");
  Tensor y = empty({N, T, K});
  if (y.numel() == 0) return y;
  float* out = y.mutable_data_ptr<float>();
  if (out_mask && T <= kFewTokens) {
    run_out_few(x, row_major(weight), floats(b), in_mask, *out_mask, out);
    return y;
  }
  const std::optional<Plan> ins = in_mask ? std::optional<Plan>(*in_mask) : std::nullopt;
  if (out_mask) {
    run_out(x, Weights(weight), floats(b), ins ? &*ins : nullptr, Plan(*out_mask), out);
  } else {
    run_in(x, Weights(weight), floats(b), ins ? &*ins : nullptr, nullptr, out);
  }
  return y;
}

Tensor sliced_linear(const Tensor& given_x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& in_width,
                     const MaybeTensor& out_width) {
  check_float(given_x, 3), check_float(weight, 2);
  const Tensor x = row_major(given_x);
  const MaybeTensor b = row_major(bias);
  const int64_t N = x.size(0), T = x.size(1), C = x.size(2), K = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == C, "x and weight have as many inputs");
  Tensor y = empty({N, T, K});
  if (y.numel() == 0) return y;
  const std::optional<Plan> ins = in_width ? std::optional<Plan>(std::in_place, *in_width, N, C) : std::nullopt;
  const std::optional<Plan> outs = out_width ? std::optional<Plan>(std::in_place, *out_width, N, K) : std::nullopt;
  run_in(x, Weights(weight), floats(b), ins ? &*ins : nullptr, outs ? &*outs : nullptr, y.mutable_data_ptr<float>());
  return y;
}

}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("gated_linear_cpu", TORCH_BOX(&gatedkernels::gated_linear));
  m.impl("sliced_linear_cpu", TORCH_BOX(&gatedkernels::sliced_linear));
}
