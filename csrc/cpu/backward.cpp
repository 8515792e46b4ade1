// Gradients of single convolutions and of the gated block. Each is the product of an NHWC image and planes of the open
// channels, so what a mask closes costs nothing: the input's gradient is a gated convolution itself, with the filters
// turned round, and the filters' gradient has a kernel of its own.
#include <algorithm>

#include "conv.h"
#include "gradients.h"
#include "queue.h"

namespace gatedkernels {
namespace {

Tensor none() { return empty({0}); }

// A gradient where a ReLU's result is not zero. Both are read whatever they hold: a branch would guess wrong half of the
// time, and keep the loop around it from being vectorised.
inline float open(float gradient, float result) { return result <= 0.0f ? 0.0f : gradient; }

// The input's gradient, NHWC, from planes of the output's; `size` is the convolution's.
Tensor from_planes(const Geometry& size, const Tensor& weight, const Planes& planes, const bool* in_mask) {
  const Plan& plan = planes.plan();
  const int64_t C = weight.size(1);
  const float* blocks = turned_blocks(weight, plan);
  InConv conv;
  conv.size = size, conv.C = static_cast<int>(plan.channels), conv.K = static_cast<int>(C);
  conv.weight = blocks, conv.bias = nullptr;
  conv.channel_step = planes.pitch(), conv.row_step = size.OW, conv.pixel_step = 1;
  conv.gathered = false, conv.relu = false;
  if (size.stride == 1) {
    std::vector<const float*> samples;
    for (int64_t n = 0; n < plan.samples; ++n) samples.push_back(planes.at(n));
    return in_gated(conv, samples, &plan, in_mask, std::nullopt);
  }
  STD_TORCH_CHECK(size.S == 3 && size.stride == 2, "the input's gradient is computed for 3x3 filters or stride 1");
  Tensor dx = empty({plan.samples, C, size.H, size.W}, ScalarType::Float, MemoryFormat::ChannelsLast);
  if (dx.numel() == 0) return dx;
  float* out = dx.mutable_data_ptr<float>();
  const int64_t count_blocks = ceil_div(C, kBlock), pixels = int64_t{size.H} * size.W;
  // A pair of rows of all open channels is work enough for an item, unless images are tiny.
  const double operations = 18.0 * kBlock * size.OW * static_cast<double>(std::max<int64_t>(plan.channels, 1));
  const int64_t rows = std::clamp<int64_t>(static_cast<int64_t>(kItemOperations / operations), 1, size.OH);
  const int64_t bands = ceil_div(size.OH, rows);
  in_order(plan.samples * count_blocks * bands, [&](int64_t item) {
    const int64_t n = item / (count_blocks * bands), block = item / bands % count_blocks, row = item % bands * rows;
    const int64_t end = std::min<int64_t>(row + rows, size.OH);
    float* image = out + n * pixels * C;
    kernels_for(C).spread_rows(conv, planes.at(n), plan.list(n), plan.count[n], static_cast<int>(block),
                               static_cast<int>(row), static_cast<int>(end), image);
    if (!in_mask) return;
    const int64_t from = block * kBlock, to = std::min<int64_t>(from + kBlock, C);
    const int64_t first = 2 * row * size.W, last = std::min<int64_t>(2 * end, size.H) * size.W;
    for (int64_t p = first; p < last; ++p) {
      for (int64_t c = from; c < to; ++c) image[p * C + c] = in_mask[n * C + c] ? image[p * C + c] : 0.0f;
    }
  });
  return dx;
}

// With an out-mask the planes are the output gradient's, else, with an in-mask, the input's. `input`, `filters`: which
// gradients are wanted; the other one is empty.
std::tuple<Tensor, Tensor> gated_conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                 const MaybeTensor& in_mask, const MaybeTensor& out_mask,
                                                 int64_t stride, bool dense_input_grad, bool input, bool filters) {
  check_float(dy, 4), check_float(x, 4), check_float(weight, 4);
  STD_TORCH_CHECK(in_mask || out_mask, "without a mask there is nothing to gain");
  const Geometry size = geometry(x, weight.size(2), stride);
  std::tuple<Tensor, Tensor> gradients{none(), none()};
  auto& [dx, dweight] = gradients;
  if (out_mask) {
    const Plan plan(*out_mask);
    const MaybeTensor closed = dense_input_grad ? std::nullopt : row_major(in_mask);
    const Planes planes = Planes::of(dy, plan);
    if (input) dx = from_planes(size, weight, planes, closed ? closed->const_data_ptr<bool>() : nullptr);
    if (filters) dweight = filter_gradient(size, true, open_channels(x, in_mask), planes);
    return gradients;
  }
  const Plan plan(*in_mask);
  const Tensor image = channels_last(dy);
  if (input) {
    STD_TORCH_CHECK(!dense_input_grad && stride == 1, "the open channels' gradient is computed at stride 1");
    dx = out_gated(image, turned_rows(weight, plan), weight.size(1), weight.size(2), nullptr, plan, 1);
  }
  if (filters) dweight = filter_gradient(size, false, image, Planes::of(x, plan));
  return gradients;
}

// The gradient before the last ReLU, NHWC, and its sum over samples and pixels.
std::tuple<Tensor, Tensor> through_relu(const Tensor& given_dy, const Tensor& given_y) {
  const Tensor dy = channels_last(given_dy), y = channels_last(given_y);
  const int64_t N = y.size(0), K = y.size(1), pixels = y.size(2) * y.size(3);
  Tensor e = empty({N, K, y.size(2), y.size(3)}, ScalarType::Float, MemoryFormat::ChannelsLast), sum = empty({K});
  const float *above = floats(dy), *result = floats(y);
  float *to = e.mutable_data_ptr<float>(), *bias = sum.mutable_data_ptr<float>();
  // Sums of some rows of pixels each, in an order that does not depend on the threads.
  constexpr int64_t kPixels = 64;
  const int64_t rows = ceil_div(N * pixels, kPixels);
  std::vector<float> partial(rows * K, 0.0f);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kPixels, last = std::min(first + kPixels, N * pixels);
      for (int64_t at = first * K; at < last * K; ++at) to[at] = open(above[at], result[at]);
      kernels_for(K).add_pixels(to + first * K, last - first, K, K, &partial[i * K]);
    }
  });
  std::fill(bias, bias + K, 0.0f);
  if (rows) kernels_for(K).add_pixels(partial.data(), rows, K, K, bias);
  return {e, sum};
}

// Planes of the gradient before the first ReLU, from that behind the second convolution.
Planes hidden_gradient(const Tensor& e, const Tensor& weight2, const Planes& hidden) {
  const Plan& plan = hidden.plan();
  const Geometry size = geometry(e, 3, 1);
  const int64_t K = e.size(1), M = plan.channels, pixels = int64_t{size.OH} * size.OW;
  Planes planes(plan, pixels);
  const float* filters = turned_rows(weight2, plan);
  const OutConv conv{size, static_cast<int>(K), filters, nullptr, planes.pitch(), false};
  const bool whole = 9 * M > 4 * pixels;
  const double row = 18.0 * static_cast<double>(K) * size.OW;
  double operations = 0;
  for (int64_t n = 0; n < plan.samples; ++n) operations += row * size.OH * plan.count[n];
  Queue queue(plan.samples, size.OH, operations);
  for (int64_t n = 0; n < plan.samples; ++n) queue.add_rows(n, Stage::out_rows, 0, plan.count[n], 3, row, whole);
  const float* image = floats(e);
  in_order(static_cast<int64_t>(queue.items.size()), [&](int64_t at) {
    const Item& item = queue.items[at];
    const int64_t n = item.sample;
    kernels_for(K).out_rows(conv, image + n * pixels * K, plan.list(n) + item.from, item.to - item.from,
                            plan.count[n] - item.from, item.begin, item.end, planes.at(n, item.from));
    for (int64_t j = item.from; j < item.to; ++j) {
      const float* h = hidden.at(n, j);
      float* f = planes.at(n, j);
      for (int64_t p = int64_t{item.begin} * size.OW; p < int64_t{item.end} * size.OW; ++p) {
        f[p] = open(f[p], h[p]);
      }
    }
  });
  return planes;
}

// Sums of planes over samples and pixels, (channels).
Tensor plane_sums(const Planes& planes, int64_t pixels) {
  const Plan& plan = planes.plan();
  Tensor sum = empty({plan.channels});
  float* to = sum.mutable_data_ptr<float>();
  std::fill(to, to + plan.channels, 0.0f);
  std::vector<float> partial(plan.samples * plan.channels);
  torch::stable::parallel_for(0, plan.samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int32_t j = 0; j < plan.count[n]; ++j) {
        const float* plane = planes.at(n, j);
        float lanes[16] = {};
        int64_t p = 0;
        for (; p + 16 <= pixels; p += 16) {
          for (int i = 0; i < 16; ++i) lanes[i] += plane[p + i];
        }
        for (int i = 0; p < pixels; ++p, ++i) lanes[i] += plane[p];
        float all = 0.0f;
        for (const float lane : lanes) all += lane;
        partial[n * plan.channels + j] = all;
      }
    }
  });
  for (int64_t n = 0; n < plan.samples; ++n) {
    for (int32_t j = 0; j < plan.count[n]; ++j) to[plan.list(n)[j]] += partial[n * plan.channels + j];
  }
  return sum;
}

// Gradients of x, weight1, bias1, weight2, bias2 and the residual. `below`: that of the input and the first
// convolution's are wanted, `input`: that of the input is; what is not is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_block_backward(
    const Tensor& dy, const Tensor& y, const Tensor& x, const Tensor& kept, const Tensor& weight1,
    const Tensor& weight2, const Tensor& mask, int64_t stride, bool input, bool filters1, bool filters2) {
  check_float(dy, 4), check_float(y, 4), check_float(x, 4), check_float(kept, 3);
  check_float(weight1, 4), check_float(weight2, 4);
  const Plan plan(mask);
  const Geometry size1 = geometry(x, 3, stride), size2 = geometry(y, 3, 1);
  const Planes hidden(plan, kept);
  const auto [e, dbias2] = through_relu(dy, y);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients{none(), none(), none(), none(), dbias2, e};
  auto& [dx, dweight1, dbias1, dweight2, last_bias, residual] = gradients;
  if (filters2) dweight2 = filter_gradient(size2, false, e, hidden);
  if (!input && !filters1) return gradients;
  const Planes f = hidden_gradient(e, weight2, hidden);
  if (input) dx = from_planes(size1, weight1, f, nullptr);
  if (filters1) {
    dbias1 = plane_sums(f, int64_t{size2.H} * size2.W);
    dweight1 = filter_gradient(size1, true, x, f);
  }
  return gradients;
}

}  // namespace
}  // namespace gatedkernels

STABLE_TORCH_LIBRARY_IMPL(gatedkernels, CPU, m) {
  m.impl("gated_conv2d_backward_cpu", TORCH_BOX(&gatedkernels::gated_conv2d_backward));
  m.impl("gated_block_backward_cpu", TORCH_BOX(&gatedkernels::gated_block_backward));
}
