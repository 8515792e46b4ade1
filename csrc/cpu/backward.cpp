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

// A gradient where a ReLU's result is not zero. Both are read whatever they hold: a branch would guess wrong half of
// the time, and keep the loop around it from being vectorised.
inline float open(float gradient, float result) { return result <= 0.0f ? 0.0f : gradient; }

// Filters turned for all items of work, in memory that the calling thread keeps until its next call.
const float* turned_blocks(const TurnedFilters& filters) {
  static thread_local Kept kept;
  const int64_t K = filters.weight.size(0), blocks = ceil_div(filters.weight.size(1), kBlock);
  const int64_t taps = filters.weight.size(2) * filters.weight.size(3), size = K * taps * kBlock;
  float* turned = kept.reserve(blocks * size);
  torch::stable::parallel_for(0, K, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < blocks; ++block) filters.block(block, begin, end, turned + block * size);
  });
  return turned;
}

const float* turned_rows(const TurnedFilters& filters) {
  static thread_local Kept kept;
  const int64_t C = filters.weight.size(1), row = filters.weight.numel() / std::max<int64_t>(C, 1);
  float* turned = kept.reserve(C * row);
  constexpr int64_t kTogether = 16;
  torch::stable::parallel_for(0, ceil_div(C, kTogether), 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kTogether;
    filters.rows(from, std::min(end * kTogether, C), turned + from * row);
  });
  return turned;
}

// Whether there are so many filters that they are better turned piece by piece, by the thread that needs them next,
// than written to memory and read again.
bool turned_in_pieces(const Tensor& weight, int64_t pieces) {
  return weight.numel() > kLargeFilters && pieces >= 4 * threads();
}

// Zeros in the channels [from, to) of an NHWC image's pixels [first, last) that the mask closes.
void close(float* image, int64_t C, const bool* mask, int64_t from, int64_t to, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) {
    for (int64_t c = from; c < to; ++c) image[p * C + c] = mask[c] ? image[p * C + c] : 0.0f;
  }
}

// The input's gradient, NHWC, from planes of the output's; `size` is the convolution's.
Tensor from_planes(const Geometry& size, const Tensor& weight, const Planes& planes, const bool* in_mask) {
  STD_TORCH_CHECK(size.S == 3 || size.stride == 1, "the input's gradient is computed for 3x3 filters or stride 1");
  const Plan& plan = planes.plan();
  const int64_t K = weight.size(0), C = weight.size(1), taps = size.S * size.S;
  const int64_t count_blocks = ceil_div(C, kBlock), pixels = int64_t{size.H} * size.W;
  Tensor dx = empty({plan.samples, C, size.H, size.W}, ScalarType::Float, MemoryFormat::ChannelsLast);
  if (dx.numel() == 0) return dx;
  float* out = dx.mutable_data_ptr<float>();
  InConv conv;
  conv.size = size, conv.C = static_cast<int>(K), conv.K = static_cast<int>(C);
  conv.bias = nullptr;
  conv.channel_step = planes.pitch(), conv.row_step = size.OW, conv.pixel_step = 1;
  conv.gathered = false, conv.relu = false;
  auto rows_of = [&](const InConv& own, int64_t n, int64_t block, int64_t into, int64_t row, int64_t end) {
    float* image = out + n * pixels * C;
    const auto from = static_cast<int>(block), begin = static_cast<int>(row), last = static_cast<int>(end);
    if (size.stride == 1) {
      kernels_for(C).in_rows(own, planes.at(n), plan.list(n), plan.count[n], from, from + 1, begin, last, nullptr,
                             image);
    } else {
      kernels_for(C).spread_rows(own, planes.at(n), plan.list(n), plan.count[n], from, begin, last, image);
    }
    if (!in_mask) return;
    const int64_t first = size.stride * row * size.W, behind = std::min<int64_t>(size.stride * end, size.H) * size.W;
    close(image, C, in_mask + n * C, into, std::min<int64_t>(into + kBlock, C), first, behind);
  };
  const TurnedFilters filters(weight, plan);
  if (turned_in_pieces(weight, count_blocks)) {
    in_order(count_blocks, [&](int64_t block) {
      static thread_local Kept kept;
      float* turned = kept.reserve(K * taps * kBlock);
      filters.block(block, 0, K, turned);
      InConv own = conv;
      own.weight = turned - block * K * taps * kBlock;  // where the first block would lie
      for (int64_t n = 0; n < plan.samples; ++n) rows_of(own, n, block, block * kBlock, 0, size.OH);
    });
    return dx;
  }
  conv.weight = turned_blocks(filters);
  const double operations = 2.0 * static_cast<double>(taps * kBlock * size.OW * std::max<int64_t>(K, 1));
  const int64_t rows = band(size.OH, plan.samples * count_blocks, operations), bands = ceil_div(size.OH, rows);
  in_order(plan.samples * count_blocks * bands, [&](int64_t item) {
    const int64_t n = item / (count_blocks * bands), block = item / bands % count_blocks, row = item % bands * rows;
    rows_of(conv, n, block, block * kBlock, row, std::min<int64_t>(row + rows, size.OH));
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
    const float* rows = turned_rows(TurnedFilters(weight, plan));
    dx = out_gated(image, rows, weight.size(1), weight.size(2), nullptr, plan, 1);
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
  const TurnedFilters filters(weight2, plan);
  OutConv conv{size, static_cast<int>(K), nullptr, nullptr, planes.pitch(), false};
  const float* image = floats(e);
  auto channels = [&](const OutConv& own, int64_t n, int64_t from, int64_t to, int64_t row, int64_t end) {
    kernels_for(K).out_rows(own, image + n * pixels * K, plan.list(n) + from, static_cast<int>(to - from),
                            static_cast<int>(to - from), static_cast<int>(row), static_cast<int>(end),
                            planes.at(n, from));
    for (int64_t j = from; j < to; ++j) {
      const float* h = hidden.at(n, j);
      float* f = planes.at(n, j);
      for (int64_t p = row * size.OW; p < end * size.OW; ++p) f[p] = open(f[p], h[p]);
    }
  };
  constexpr int64_t kSlice = 32;
  if (turned_in_pieces(weight2, ceil_div(M, kSlice))) {
    in_order(ceil_div(M, kSlice), [&](int64_t slice) {
      static thread_local Kept kept;
      const int64_t from = slice * kSlice, to = std::min(from + kSlice, M);
      float* turned = kept.reserve(kSlice * 9 * K);
      filters.rows(from, to, turned);
      OutConv own = conv;
      own.weight = turned - from * 9 * K;  // where the first channel's would lie
      for (int64_t n = 0; n < plan.samples; ++n) {
        const int32_t *list = plan.list(n), *last = list + plan.count[n];
        const int64_t begin = std::lower_bound(list, last, from) - list, end = std::lower_bound(list, last, to) - list;
        if (begin < end) channels(own, n, begin, end, 0, size.OH);
      }
    });
    return planes;
  }
  conv.weight = turned_rows(filters);
  const double row = 18.0 * static_cast<double>(K) * size.OW;
  double operations = 0;
  for (int64_t n = 0; n < plan.samples; ++n) operations += row * size.OH * plan.count[n];
  Queue queue(plan.samples, size.OH, operations);
  const bool whole = 9 * M > 4 * pixels;
  for (int64_t n = 0; n < plan.samples; ++n) queue.add_rows(n, Stage::out_rows, 0, plan.count[n], 3, row, whole);
  in_order(static_cast<int64_t>(queue.items.size()), [&](int64_t at) {
    const Item& item = queue.items[at];
    channels(conv, item.sample, item.from, item.to, item.begin, item.end);
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
