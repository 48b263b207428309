// Simulated CUDA cards for a CPU build of torch.
//
// A tensor of a card is a plain torch.Tensor with torch's CUDA key and device cuda:N. Operators that torch composes of
// others do so as on a card. Every other operator comes to one fallback (kernels.h). The Python side is
// hook/simulated_cuda.py.
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels.h"

using namespace card;

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, card::CardHooks)
}  // namespace at
C10_REGISTER_GUARD_IMPL(CUDA, card::CardGuard)

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&card::call>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(card::empty));
  m.impl("empty_strided", TORCH_FN(card::empty_strided));
  m.impl("as_strided", TORCH_FN(card::as_strided));
  m.impl("resize_", TORCH_FN(card::resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(card::set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(card::set_tensor));
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&card::call>());
}

TORCH_LIBRARY_IMPL(_, SparseCUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&card::call>()); }

// A sparse tensor is made of its parts; what asks for them computes nothing.
TORCH_LIBRARY_IMPL(aten, SparseCUDA, m) {
  m.impl("_sparse_coo_tensor_with_dims_and_tensors", TORCH_FN(at::native::new_with_dims_and_tensor_sparse_symint));
  m.impl("_sparse_coo_tensor_with_dims", TORCH_FN(at::native::new_with_dims_sparse));
  m.impl("_indices", TORCH_FN(at::native::_indices_sparse));
  m.impl("_values", TORCH_FN(at::native::_values_sparse));
  m.impl("_nnz", TORCH_FN(at::native::_nnz_sparse));
  m.impl("is_coalesced", TORCH_FN(at::native::is_coalesced_sparse));
  m.impl("_coalesced_", TORCH_FN(at::native::_coalesced_sparse_));
  m.impl("indices", TORCH_FN(at::native::indices_sparse));
  m.impl("values", TORCH_FN(at::native::values_sparse));
  m.impl("sparse_dim", TORCH_FN(at::native::sparse_dim_sparse));
  m.impl("dense_dim", TORCH_FN(at::native::dense_dim_sparse));
}

PYBIND11_MODULE(simulated_card, m) {
  m.doc() = "Simulated CUDA cards; see tests/support/card.";
  m.def("begin", [](const std::vector<size_t>& memory_bytes, const std::vector<std::string>& unchecked,
                    const std::unordered_map<std::string, std::string>& failures) {
    TORCH_CHECK(memory_bytes.size() <= kMostCards, "at most ", kMostCards, " simulated cards");
    g_cards = static_cast<int>(memory_bytes.size());
    for (int card = 0; card < g_cards; ++card) g_usage[card].total = memory_bytes[card];
    g_unchecked.insert(unchecked.begin(), unchecked.end());
    g_failures = failures;
    c10::SetAllocator(at::kCUDA, &g_allocator, 255);
    at::setHostAllocator(at::kCUDA, &g_pinned_allocator, 255);
  });
  m.def("usage", [](int card) {
    check_card(card);
    std::lock_guard<std::mutex> hold(g_lock);
    return std::make_tuple(g_usage[card].used, g_usage[card].peak, g_usage[card].total);
  });
  m.def("reset_peak", [](int card) { g_usage[card].peak = g_usage[card].used; });
  m.def("current", [] { return t_current; });
  m.def("set_current", [](int card) { check_card(card); t_current = card; });
  m.def("check_context", &check_context);
  m.def("default_generator", &default_generator);
}
