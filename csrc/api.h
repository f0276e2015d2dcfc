// The contract between the Python bindings and the kernels: plain structs of raw pointers.
// No torch, Python or CUDA header may be included from here.
//
// B requests, N nodes (1 <= N <= 64), node 0 is the root, a parent precedes its children.
// num_rows[b] nodes of request b are real, the rest is padding; a null num_rows means all N.
#pragma once

#include <cstdint>

namespace xspec {

constexpr int kMaxNodes = 64;

enum TreeStatus : int32_t { kTooDeep = 1, kBadParent = 2, kCycle = 4 };

struct TreeMaskArgs {
  const int32_t* parent_idx;  // [B, N]
  const int32_t* num_rows;    // [B] or null
  int64_t* ancestor_bits;     // [B, N]
  int32_t* depth;             // [B, N]
  int32_t* path_slot;         // [B, N, max_depth], -1 padded
  int32_t* status;            // [B], TreeStatus flags
  int32_t batch, nodes, max_depth;
};

template <class Token>
struct VerifyGreedyArgs {
  const Token* token_ids;        // [B, N]
  const int32_t* parent_idx;     // [B, N]
  const Token* target_ids;       // [B, N], the target's token after each node; negative: invalid
  const int64_t* ancestor_bits;  // [B, N]
  const int32_t* num_rows;       // [B] or null
  int32_t* accept_len;           // [B]
  int32_t* accept_path;          // [B, N], -1 padded
  Token* output_ids;             // [B, N], -1 padded
  int32_t batch, nodes;
};

// How logits become probabilities; `inverse` is 1 / temperature.
struct SamplingLaw {
  float inverse;
  int32_t top_k;  // 0: all
  float top_p;    // 1: all
};

struct SampleTokensArgs {
  const float* logits;     // [rows, vocab]
  const double* uniforms;  // [rows]
  int64_t* ids;            // [rows], -1 where a row has no law
  int64_t rows;
  int32_t vocab;
  SamplingLaw law;
};

template <class Token>
struct VerifySamplingArgs {
  const float* logits;           // [B, N, vocab]
  const Token* token_ids;        // [B, N]
  const int32_t* parent_idx;     // [B, N]
  const int64_t* ancestor_bits;  // [B, N]
  const double* uniforms;        // [B, N]
  const int32_t* num_rows;       // [B] or null
  const float* draft_probs;      // [B, N, vocab], or null where drafts are given
  int32_t* accept_len;           // [B]
  int32_t* accept_path;          // [B, N], -1 padded
  Token* output_ids;             // [B, N], -1 padded
  int32_t batch, nodes, vocab;
  SamplingLaw law;
};

// Caches are [B, heads, slots, row] of one geometry. Sizes and strides count words of word_bytes.
struct KvCommitArgs {
  const int64_t* caches;         // [num_caches] base addresses, readable where the kernel runs
  const int32_t* accept_path;    // [B, path_width]
  const int32_t* accept_len;     // [B]
  const int32_t* cache_seqlens;  // [B]
  int32_t* new_seqlens;          // [B]
  int64_t stride_batch, stride_head, stride_slot;
  int32_t num_caches, batch, heads, slots, row_words, path_width, word_bytes;
};

void tree_mask_cpu(const TreeMaskArgs& args);

template <class Token>
void verify_greedy_cpu(const VerifyGreedyArgs<Token>& args);

void sample_tokens_cpu(const SampleTokensArgs& args);

template <class Token>
void verify_sampling_cpu(const VerifySamplingArgs<Token>& args);

// Returns -1, or the first request whose path does not ascend or leaves the cache; then nothing
// moved.
int kv_commit_cpu(const KvCommitArgs& args);

// Looks at a word of host memory until it is not `before`; false once the time is over. What was
// written before the word is then visible too.
bool await_change(const int64_t* word, int64_t before, int64_t microseconds);

// Whether an NVTX tool listens; push and pop do nothing otherwise. A null payload is none.
bool nvtx_attached();
void nvtx_push(const char* name, uint32_t color, const int64_t* payload);
void nvtx_pop();

#ifdef XSPEC_WITH_CUDA
// These return a cudaError_t; `stream` is a cudaStream_t.
int tree_mask_cuda(const TreeMaskArgs& args, int device, void* stream);
template <class Token>
int verify_greedy_cuda(const VerifyGreedyArgs<Token>& args, int device, void* stream);
int kv_commit_cuda(const KvCommitArgs& args, int device, void* stream);
int cuda_device_count();
const char* cuda_error_string(int error);
#endif

}  // namespace xspec
