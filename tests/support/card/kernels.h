// One operator on a card: it checks devices as CUDA's kernels do, and computes with the CPU's kernel.
//
//   1. Raise if a tensor is on another device.            Call::check_devices
//   2. Look at the card's tensors as the CPU's.           Call::borrow
//   3. Run the CPU's kernel.                              Call::run
//   4. Give what it made back as tensors of the card.     Call::return_to
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <functional>
#include <map>
#include <unordered_set>

#include "device.h"

namespace card {

// --- tensors of a card -----------------------------------------------------------------------------------------------

inline bool is_on_card(const at::Tensor& tensor) { return tensor.defined() && tensor.device().is_cuda(); }

inline at::Tensor make(at::IntArrayRef size, std::optional<at::IntArrayRef> stride, at::ScalarType dtype, at::Device device) {
  check_card(device.index());
  const Current current(device.index());
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return stride ? at::detail::empty_strided_generic(size, *stride, &g_allocator, keys, dtype)
                : at::detail::empty_generic(size, &g_allocator, keys, dtype, std::nullopt);
}

// A view of a card's tensor.
inline at::Tensor share(const at::Tensor& of, at::IntArrayRef size, at::IntArrayRef stride, int64_t offset, at::ScalarType dtype) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(of.storage()), of.key_set(), at::scalarTypeToTypeMeta(dtype));
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return view;
}

inline at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto out = make(size, std::nullopt, c10::dtype_or_default(dtype), with_index(device));
  if (format && *format != at::MemoryFormat::Preserve) out.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return out;
}

inline at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  return make(size, stride, c10::dtype_or_default(dtype), with_index(device));
}

inline at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return share(self, size, stride, offset.value_or(self.storage_offset()), self.scalar_type());
}

inline const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t needed = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  const at::Storage& storage = self.storage();
  if (needed > storage.nbytes()) {
    const Current current(self.device().index());
    auto larger = g_allocator.allocate(needed);
    if (storage.nbytes()) {
      Opened opened;
      opened.add(storage.mutable_data());
      opened.add(larger.get());
      memcpy(larger.get(), storage.data(), storage.nbytes());
    }
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

inline at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "Attempted to set the storage of a tensor on device \"", self.device(),
              "\" to a storage on different device \"", source.device(), "\" (simulated)");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.size() == size.size()) impl->set_sizes_and_strides(size, stride, offset);
  else impl->set_sizes_and_strides(size, c10::contiguous_strides(size), offset);
  return self;
}

inline at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// --- settings --------------------------------------------------------------------------------------------------------

// Operators whose CUDA wrapper compares no devices, because TensorIterator does (native_functions.yaml).
inline std::unordered_set<std::string> g_unchecked;

// Operators that fail, whatever their overload, and how: `lost` (the context), `cublas` (an error of a library), `memory` (the card is full).
inline std::unordered_map<std::string, std::string> g_failures;

// The operators of cuBLAS that take TF32. Convolutions are cuDNN's.
inline const std::unordered_set<std::string> kMatmuls = {
    "aten::mm", "aten::mm.out", "aten::addmm", "aten::addmm.out", "aten::bmm", "aten::bmm.out", "aten::baddbmm", "aten::baddbmm.out"};

inline bool contains(const std::string& text, std::initializer_list<const char*> words) {
  return std::any_of(words.begin(), words.end(), [&](const char* word) { return text.find(word) != std::string::npos; });
}

// --- a call ----------------------------------------------------------------------------------------------------------

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : op_(op), schema_(op.schema()), name_(schema_.name()), arguments_(torch::jit::pop(stack, schema_.arguments().size())) {
    if (!schema_.overload_name().empty()) name_ += "." + schema_.overload_name();
  }

  void check_devices() const;
  void borrow();
  void run();
  void return_to(torch::jit::Stack& stack);

 private:
  bool rounds_to_tf32() const;
  at::Tensor as_hosts(const at::Tensor& tensor, bool is_out = false, bool is_added = false);
  at::Tensor as_cards(const at::Tensor& tensor) const;
  c10::IValue as_hosts(const c10::IValue& value, const c10::Argument& argument);
  const at::Tensor* written_argument(const c10::AliasInfo* alias) const;
  void fill_resized() const;
  bool is_on_the_card() const { return card_.has_value(); }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  std::string name_;
  std::vector<c10::IValue> arguments_;
  torch::jit::Stack on_host_;  // the arguments, and after `run` the results, as the CPU sees them
  std::optional<at::Device> card_;  // of the first tensor of a card, or the device that the caller asks for
  Opened opened_;
  std::map<void*, at::Tensor> owners_;      // the address of a storage of the card, and a tensor of it
  std::map<void*, c10::Storage> storages_;  // the same storages, as the CPU sees them
  std::vector<std::pair<at::Tensor, at::Tensor>> resized_;  // empty outputs of the card, and what the CPU resizes
};

template <typename Visit>
void visit_tensors(const c10::IValue& value, const Visit& visit) {
  if (value.isTensor()) visit(value.toTensor(), false);
  else if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor, true);
  else if (value.isList()) for (const c10::IValue& item : value.toListRef()) if (item.isTensor()) visit(item.toTensor(), true);
}

// 1. All tensors are on one device, except the CPU's indices, and its scalars if TensorIterator takes them.
inline void Call::check_devices() const {
  if (contains(name_, {"aten::copy_", "aten::_copy_from"})) return;
  const bool iterates = g_unchecked.count(name_) > 0;
  const bool takes_indices = contains(name_, {"aten::index", "aten::_index_put", "aten::_unsafe_index"});
  std::optional<at::Device> common;
  for (size_t i = 0; i < arguments_.size(); ++i) {
    visit_tensors(arguments_[i], [&](const at::Tensor& tensor, bool in_list) {
      if (!tensor.defined() || tensor.device().is_meta()) return;
      if (tensor.device().is_cpu() && ((takes_indices && in_list) || (iterates && tensor.dim() == 0))) return;
      if (!common) common = tensor.device();
      if (*common == tensor.device()) return;
      TORCH_CHECK(!iterates, "Expected all tensors to be on the same device, but found at least two devices, ", *common,
                  " and ", tensor.device(), "! (simulated, ", name_, ")");
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", schema_.arguments()[i].name(), " is on ",
                  tensor.device(), ", different from other tensors on ", *common,
                  " (when checking argument in method wrapper_CUDA_", schema_.name().substr(6), ") (simulated)");
    });
  }
}

// Whether the card's library would round the factors to 10 bits, as the flags of torch.backends say.
inline bool Call::rounds_to_tf32() const {
  if (kMatmuls.count(name_)) return at::globalContext().allowTF32CuBLAS();
  return contains(name_, {"conv"}) && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
}

inline at::Tensor rounded_to_tf32(const at::Tensor& tensor) {
  const auto bits = tensor.clone().view(at::kInt);
  return at::bitwise_and(at::add(bits, 0x1000), ~0x1FFF).view(at::kFloat);
}

// The same memory as a tensor of the CPU. An output without elements is replaced: the CPU's kernel resizes it.
inline at::Tensor Call::as_hosts(const at::Tensor& tensor, bool is_out, bool is_added) {
  if (!is_on_card(tensor)) return tensor;
  if (!card_) card_ = tensor.device();
  if (tensor.is_sparse())
    return at::_sparse_coo_tensor_unsafe(as_hosts(tensor._indices()), as_hosts(tensor._values()),
                                         tensor.sizes(), {}, {}, {}, {}, tensor.is_coalesced());
  if (is_out && tensor.numel() == 0) {
    resized_.emplace_back(tensor, at::empty({0}, tensor.options().device(at::kCPU)));
    return resized_.back().second;
  }
  void* address = tensor.storage().mutable_data();
  if (!address) return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  if (owners_.emplace(address, tensor).second) {
    opened_.add(address);
    storages_[address] = c10::Storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                                      at::DataPtr(address, at::kCPU), nullptr, false);
  }
  auto host = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storages_[address]), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  return !is_out && !is_added && tensor.scalar_type() == at::kFloat && rounds_to_tf32() ? rounded_to_tf32(host) : host;
}

inline c10::IValue Call::as_hosts(const c10::IValue& value, const c10::Argument& argument) {
  if (value.isTensor()) {
    const bool is_out = argument.is_out() || (argument.kwarg_only() && argument.alias_info() && argument.alias_info()->isWrite());
    const bool is_added = argument.name() == "bias" || (argument.name() == "self" && contains(name_, {"addmm", "baddbmm"}));
    return as_hosts(value.toTensor(), is_out, is_added);
  }
  if (value.isTensorList()) {
    std::vector<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(as_hosts(tensor));
    return tensors;
  }
  if (value.isList() && argument.type()->str().find("Tensor?") != std::string::npos) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const c10::IValue& item : value.toListRef())
      tensors.push_back(item.isTensor() ? std::optional<at::Tensor>(as_hosts(item.toTensor())) : std::nullopt);
    return tensors;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return at::Device(at::kCPU);
  if (value.isGenerator()) {
    const at::Generator generator = value.toGenerator();
    TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
                generator.device().type(), "' (simulated)");
    return static_cast<CardGenerator*>(generator.unsafeGetGeneratorImpl())->drawn();
  }
  return value;
}

// 2. The arguments as the CPU's kernel takes them. Without a generator, the card's own draws.
inline void Call::borrow() {
  for (size_t i = 0; i < arguments_.size(); ++i) on_host_.push_back(as_hosts(arguments_[i], schema_.arguments()[i]));
  for (const c10::IValue& value : arguments_)
    if (value.isDevice() && value.toDevice().is_cuda()) card_ = with_index(value.toDevice());
  for (size_t i = 0; i < arguments_.size(); ++i)
    if (arguments_[i].isNone() && schema_.arguments()[i].name() == "generator")
      on_host_[i] = static_cast<CardGenerator*>(default_generator(card_ ? card_->index() : -1).unsafeGetGeneratorImpl())->drawn();
}

// 3. An index out of range is an assert of the card, which its context does not survive.
inline void Call::run() {
  if (auto failure = g_failures.find(schema_.name()); failure != g_failures.end()) {
    if (failure->second == "lost") lose_context(kIllegalAddress);
    if (failure->second == "memory") throw_out_of_memory(card_ ? card_->index() : t_current, 1 << 20);
    TORCH_CHECK(false, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, ...)` (simulated)");
  }
  c10::impl::ExcludeDispatchKeyGuard without_autograd(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  try {
    op_.callBoxed(&on_host_);
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    if (is_on_the_card() && contains(name_, {"index", "gather", "scatter", "embedding", "take"}) &&
        contains(text, {"out of range", "out of bounds"}))
      lose_context(kAssertTriggered);
    throw;
  }
  fill_resized();
}

inline void Call::fill_resized() const {
  for (const auto& [mine, made] : resized_) {
    if (made.numel() == 0 && made.sizes() == mine.sizes()) continue;
    resize_(mine, made.sizes(), std::nullopt);
    if (made.numel() == 0) continue;
    Opened opened;
    opened.add(mine.storage().mutable_data());
    memcpy(mine.mutable_data_ptr(), made.contiguous().const_data_ptr(), made.nbytes());
  }
}

// What the CPU's kernel made: a view of a borrowed tensor, or a new tensor, which is copied to the card.
inline at::Tensor Call::as_cards(const at::Tensor& tensor) const {
  if (!tensor.defined() || !is_on_the_card() || !tensor.device().is_cpu()) return tensor;
  if (tensor.is_sparse())
    return at::_sparse_coo_tensor_unsafe(as_cards(tensor._indices()), as_cards(tensor._values()), tensor.sizes(), {}, {},
                                         {}, {}, tensor.is_coalesced());
  auto owner = owners_.find(tensor.storage().mutable_data());
  if (owner != owners_.end() && owner->first)
    return share(owner->second, tensor.sizes(), tensor.strides(), tensor.storage_offset(), tensor.scalar_type());
  auto made = make(tensor.sizes(), tensor.strides(), tensor.scalar_type(), *card_);
  if (tensor.numel()) {
    Opened opened;
    opened.add(made.storage().mutable_data());
    size_t elements = 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
    memcpy(made.mutable_data_ptr(), tensor.const_data_ptr(), elements * tensor.element_size());
  }
  if (tensor.is_conj()) made._set_conj(true);
  return made;
}

// The argument that an operator such as `add_` wrote to and returns, or null.
inline const at::Tensor* Call::written_argument(const c10::AliasInfo* alias) const {
  if (!alias || !alias->isWrite()) return nullptr;
  for (size_t i = 0; i < arguments_.size(); ++i) {
    const auto* own = schema_.arguments()[i].alias_info();
    if (own && own->isWrite() && arguments_[i].isTensor() && own->beforeSets() == alias->beforeSets())
      return &arguments_[i].toTensor();
  }
  return nullptr;
}

// 4.
inline void Call::return_to(torch::jit::Stack& stack) {
  const auto& returns = schema_.returns();
  for (size_t r = 0; r < on_host_.size(); ++r) {
    const c10::IValue& result = on_host_[r];
    const at::Tensor* written = r < returns.size() ? written_argument(returns[r].alias_info()) : nullptr;
    if (written && written->defined() && !written->is_sparse()) stack.emplace_back(*written);
    else if (result.isTensor()) stack.emplace_back(as_cards(result.toTensor()));
    else if (result.isTensorList()) {
      std::vector<at::Tensor> tensors;
      for (const at::Tensor& tensor : result.toTensorVector()) tensors.push_back(as_cards(tensor));
      stack.emplace_back(std::move(tensors));
    } else stack.push_back(result);
  }
}

inline void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_context();
  Call one(op, *stack);
  one.check_devices();
  one.borrow();
  one.run();
  one.return_to(*stack);
}

}  // namespace card
