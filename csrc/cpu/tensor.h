// A tensor behind the stable interface, for operators that take many of them and may be over in microseconds.
// torch::stable::Tensor allocates something of its own for every argument, and asks the library for a size, a stride
// or, one dtype after the other, a dtype whenever somebody wants to know; here all of that is asked for once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

namespace gatedkernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

// The library's numbers of dtypes.
struct DtypeCodes {
  int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t boolean = aoti_torch_dtype_bool(), int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
};
inline const DtypeCodes kDtypeCodes;

class Tensor {
 public:
  Tensor() = default;  // none
  // Takes the handle over.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    int64_t *sizes, *strides;
    int32_t code;
    if (aoti_torch_get_dim(handle, &dim_) || aoti_torch_get_sizes(handle, &sizes) ||
        aoti_torch_get_strides(handle, &strides) || aoti_torch_get_dtype(handle, &code)) {
      aoti_torch_delete_tensor_object(handle);
      STD_TORCH_CHECK(false, "the CPU kernels take strided tensors");
    }
    sizes_ = sizes, strides_ = strides;
    dtype_ = code == kDtypeCodes.float32    ? ScalarType::Float
             : code == kDtypeCodes.bfloat16 ? ScalarType::BFloat16
             : code == kDtypeCodes.boolean  ? ScalarType::Bool
             : code == kDtypeCodes.int32    ? ScalarType::Int
             : code == kDtypeCodes.int64    ? ScalarType::Long
                                            : ScalarType::Undefined;  // one that no kernel takes
  }
  Tensor(const Tensor& other)
      : handle_(other.handle_ ? other.share() : nullptr),
        sizes_(other.sizes_),
        strides_(other.strides_),
        dim_(other.dim_),
        dtype_(other.dtype_) {}
  Tensor(Tensor&& other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)),
        sizes_(other.sizes_),
        strides_(other.strides_),
        dim_(other.dim_),
        dtype_(other.dtype_) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    sizes_ = other.sizes_, strides_ = other.strides_, dim_ = other.dim_, dtype_ = other.dtype_;
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  // Gives the handle away; the tensor is of no more use.
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  // A handle of its own to the same tensor.
  AtenTensorHandle share() const {
    AtenTensorHandle other;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &other));
    return other;
  }

  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[checked(d)]; }
  int64_t stride(int64_t d) const { return strides_[checked(d)]; }
  ScalarType scalar_type() const { return dtype_; }
  int64_t element_size() const {
    switch (dtype_) {
      case ScalarType::Bool: return 1;
      case ScalarType::BFloat16: return 2;
      case ScalarType::Float:
      case ScalarType::Int: return 4;
      case ScalarType::Long: return 8;
      default: STD_TORCH_CHECK(false, "no kernel takes elements of this dtype"); return 0;
    }
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dim_; ++d) product *= sizes_[d];
    return product;
  }
  bool is_contiguous() const {
    bool is;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &is));
    return is;
  }
  bool is_cpu() const {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &type));
    return type == aoti_torch_device_type_cpu();
  }

  const void* const_data_ptr() const {
    const void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }
  template <class T>
  const T* const_data_ptr() const {
    check_dtype<T>();
    return static_cast<const T*>(const_data_ptr());
  }
  void* mutable_data_ptr() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }
  template <class T>
  T* mutable_data_ptr() const {
    check_dtype<T>();
    return static_cast<T*>(mutable_data_ptr());
  }

 private:
  int64_t checked(int64_t d) const {
    STD_TORCH_CHECK(0 <= d && d < dim_, "a tensor has fewer dimensions than the kernel takes");
    return d;
  }
  template <class T>
  void check_dtype() const {
    constexpr ScalarType wanted = std::is_same_v<T, float>     ? ScalarType::Float
                                  : std::is_same_v<T, int32_t> ? ScalarType::Int
                                  : std::is_same_v<T, int64_t> ? ScalarType::Long
                                                               : ScalarType::Bool;
    static_assert(wanted != ScalarType::Bool || std::is_same_v<T, bool>);
    STD_TORCH_CHECK(dtype_ == wanted, "a tensor has another dtype than the kernel takes");
  }

  AtenTensorHandle handle_ = nullptr;
  const int64_t *sizes_ = nullptr, *strides_ = nullptr;  // the tensor's own: nobody resizes arguments
  int64_t dim_ = 0;
  ScalarType dtype_ = ScalarType::Undefined;
};

using MaybeTensor = std::optional<Tensor>;

// What the library's own operators do, found by name: some microseconds.
inline torch::stable::Tensor theirs(const Tensor& t) { return torch::stable::Tensor(t.share()); }
inline Tensor ours(const torch::stable::Tensor& t) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &handle));
  return Tensor(handle);
}
inline Tensor library_contiguous(const Tensor& t, MemoryFormat format = MemoryFormat::Contiguous) {
  return ours(torch::stable::contiguous(theirs(t), format));
}
inline Tensor library_to(const Tensor& t, ScalarType dtype) { return ours(torch::stable::to(theirs(t), dtype)); }

}  // namespace gatedkernels

// How TORCH_BOX hands tensors over.
HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<gatedkernels::Tensor> {
  static gatedkernels::Tensor call(StableIValue value, uint64_t, bool) {
    return gatedkernels::Tensor(torch::stable::detail::to<AtenTensorHandle>(value));
  }
};

template <>
struct ToImpl<std::optional<gatedkernels::Tensor>> {
  static std::optional<gatedkernels::Tensor> call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle ? std::optional<gatedkernels::Tensor>(std::in_place, *handle) : std::nullopt;
  }
};

template <>
struct FromImpl<gatedkernels::Tensor> {
  // The caller's copy.
  static StableIValue call(gatedkernels::Tensor& value, uint64_t, bool) {
    return torch::stable::detail::from(value.release());
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)
