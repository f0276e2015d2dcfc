// Python module xspec_kernels._C: addresses in, nothing out. `device` -1 means the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"

namespace py = pybind11;

namespace xspec {
void bind_ngram(py::module_& m);
}

namespace {

using Address = std::uintptr_t;
constexpr int kCpu = -1;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

[[noreturn]] void fail(const char* op, const std::string& what) {
  throw std::runtime_error(std::string(op) + ": " + what);
}

#ifdef XSPEC_WITH_CUDA
void check_cuda(const char* op, int error) {
  if (error)
    fail(op, std::string(xspec::cuda_error_string(error)) + " (built for CUDA " XSPEC_ARCHS ")");
}
#else
[[noreturn]] void no_cuda(const char* op) { fail(op, "xspec_kernels._C was built without CUDA"); }
#endif

void tree_mask(Address parent_idx, Address num_rows, Address ancestor_bits, Address depth,
               Address path_slot, Address status, int batch, int nodes, int max_depth, int device,
               Address stream) {
  py::gil_scoped_release unlocked;
  const xspec::TreeMaskArgs args{as<const int32_t>(parent_idx),
                                 as<const int32_t>(num_rows),
                                 as<int64_t>(ancestor_bits),
                                 as<int32_t>(depth),
                                 as<int32_t>(path_slot),
                                 as<int32_t>(status),
                                 batch,
                                 nodes,
                                 max_depth};
  if (device == kCpu) return xspec::tree_mask_cpu(args);
#ifdef XSPEC_WITH_CUDA
  check_cuda("tree_mask", xspec::tree_mask_cuda(args, device, as<void>(stream)));
#else
  (void)stream;
  no_cuda("tree_mask");
#endif
}

template <class Token>
void verify_greedy(Address token_ids, Address parent_idx, Address target_ids, Address ancestor_bits,
                   Address num_rows, Address accept_len, Address accept_path, Address output_ids,
                   int batch, int nodes, int device, Address stream) {
  py::gil_scoped_release unlocked;
  const xspec::VerifyGreedyArgs<Token> args{as<const Token>(token_ids),
                                            as<const int32_t>(parent_idx),
                                            as<const Token>(target_ids),
                                            as<const int64_t>(ancestor_bits),
                                            as<const int32_t>(num_rows),
                                            as<int32_t>(accept_len),
                                            as<int32_t>(accept_path),
                                            as<Token>(output_ids),
                                            batch,
                                            nodes};
  if (device == kCpu) return xspec::verify_greedy_cpu(args);
#ifdef XSPEC_WITH_CUDA
  check_cuda("verify_greedy", xspec::verify_greedy_cuda(args, device, as<void>(stream)));
#else
  (void)stream;
  no_cuda("verify_greedy");
#endif
}

void sample_tokens(Address logits, Address uniforms, Address ids, int64_t rows, int vocab,
                   float inverse, int top_k, float top_p) {
  py::gil_scoped_release unlocked;
  xspec::sample_tokens_cpu({as<const float>(logits),
                            as<const double>(uniforms),
                            as<int64_t>(ids),
                            rows,
                            vocab,
                            {inverse, top_k, top_p}});
}

template <class Token>
void verify_sampling(Address logits, Address token_ids, Address parent_idx, Address ancestor_bits,
                     Address uniforms, Address num_rows, Address draft_probs, Address accept_len,
                     Address accept_path, Address output_ids, int batch, int nodes, int vocab,
                     float inverse, int top_k, float top_p) {
  py::gil_scoped_release unlocked;
  xspec::verify_sampling_cpu(xspec::VerifySamplingArgs<Token>{as<const float>(logits),
                                                              as<const Token>(token_ids),
                                                              as<const int32_t>(parent_idx),
                                                              as<const int64_t>(ancestor_bits),
                                                              as<const double>(uniforms),
                                                              as<const int32_t>(num_rows),
                                                              as<const float>(draft_probs),
                                                              as<int32_t>(accept_len),
                                                              as<int32_t>(accept_path),
                                                              as<Token>(output_ids),
                                                              batch,
                                                              nodes,
                                                              vocab,
                                                              {inverse, top_k, top_p}});
}

xspec::KvCommitArgs commit_args(const int64_t* table, Address accept_path, Address accept_len,
                                Address cache_seqlens, Address new_seqlens,
                                const std::vector<int64_t>& strides,
                                const std::vector<int32_t>& sizes) {
  if (strides.size() != 3 || sizes.size() != 7) fail("kv_commit", "expected 3 strides and 7 sizes");
  return {table,
          as<const int32_t>(accept_path),
          as<const int32_t>(accept_len),
          as<const int32_t>(cache_seqlens),
          as<int32_t>(new_seqlens),
          strides[0],
          strides[1],
          strides[2],
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          sizes[6]};
}

int kv_commit_cpu(const std::vector<int64_t>& caches, Address accept_path, Address accept_len,
                  Address cache_seqlens, Address new_seqlens, const std::vector<int64_t>& strides,
                  const std::vector<int32_t>& sizes) {
  py::gil_scoped_release unlocked;
  return xspec::kv_commit_cpu(commit_args(caches.data(), accept_path, accept_len, cache_seqlens,
                                          new_seqlens, strides, sizes));
}

void kv_commit_cuda(Address table, Address accept_path, Address accept_len, Address cache_seqlens,
                    Address new_seqlens, const std::vector<int64_t>& strides,
                    const std::vector<int32_t>& sizes, int device, Address stream) {
  py::gil_scoped_release unlocked;
  const auto args = commit_args(as<const int64_t>(table), accept_path, accept_len, cache_seqlens,
                                new_seqlens, strides, sizes);
#ifdef XSPEC_WITH_CUDA
  check_cuda("kv_commit", xspec::kv_commit_cuda(args, device, as<void>(stream)));
#else
  (void)args, (void)device, (void)stream;
  no_cuda("kv_commit");
#endif
}

bool await_change(Address word, int64_t before, int64_t microseconds) {
  py::gil_scoped_release unlocked;
  return xspec::await_change(as<const int64_t>(word), before, microseconds);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of xspec_kernels: raw addresses and a stream, no torch.";
#ifdef XSPEC_WITH_CUDA
  m.attr("built_with_cuda") = true;
  m.attr("cuda_archs") = XSPEC_ARCHS;
  m.def("device_count", &xspec::cuda_device_count);
#else
  m.attr("built_with_cuda") = false;
  m.attr("cuda_archs") = "";
  m.def("device_count", [] { return 0; });
#endif
  m.def("nvtx_attached", &xspec::nvtx_attached);
  m.def("nvtx_push", [](const char* name, uint32_t color, std::optional<int64_t> payload) {
    xspec::nvtx_push(name, color, payload ? &*payload : nullptr);
  });
  m.def("nvtx_pop", &xspec::nvtx_pop);
  m.def("await_change", &await_change);
  m.def("tree_mask", &tree_mask);
  m.def("verify_greedy_int32", &verify_greedy<int32_t>);
  m.def("verify_greedy_int64", &verify_greedy<int64_t>);
  m.def("sample_tokens", &sample_tokens);
  m.def("verify_sampling_int32", &verify_sampling<int32_t>);
  m.def("verify_sampling_int64", &verify_sampling<int64_t>);
  m.def("kv_commit_cpu", &kv_commit_cpu);
  m.def("kv_commit_cuda", &kv_commit_cuda);
  xspec::bind_ngram(m);
}
