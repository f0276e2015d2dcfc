// verify_sampling on the CPU: only rows of accepted nodes are looked at.
#include <algorithm>
#include <numeric>
#include <vector>

#include "sampling.h"

namespace xspec {
namespace {

// Draws the token after every node whose own token was drawn; the others cannot be accepted.
template <class Token>
void draw_targets(const VerifySamplingArgs<Token>& a, RowLaw& law, int b, Token* target) {
  const int64_t base = int64_t(b) * a.nodes;
  const int rows = a.num_rows ? std::clamp(a.num_rows[b], 0, a.nodes) : a.nodes;
  std::fill(target, target + a.nodes, Token(-1));
  uint64_t accepted = 0;
  for (int i = 0; i < rows; ++i) {
    const int p = a.parent_idx[base + i];
    const bool reached =
        i == 0 || (p >= 0 && p < i && (accepted >> p & 1) && target[p] == a.token_ids[base + i]);
    if (!reached || !law.read(a.logits + (base + i) * a.vocab)) continue;
    accepted |= uint64_t(1) << i;
    target[i] = Token(draw(law.weights(), law.total(), a.uniforms[base + i]));
  }
}

// The rejections of one request.
template <class Token>
class Walk {
 public:
  Walk(const VerifySamplingArgs<Token>& args, RowLaw& law, int b)
      : a_(args), row_(law), base_(int64_t(b) * args.nodes), p_(args.vocab), q_(args.vocab) {
    rows_ = a_.num_rows ? std::clamp(a_.num_rows[b], 0, a_.nodes) : a_.nodes;
    std::fill_n(a_.accept_path + base_, a_.nodes, -1);
    std::fill_n(a_.output_ids + base_, a_.nodes, Token(-1));
    int32_t length = -1;
    if (rows_) {
      length = 0;
      for (int node = 0; (node = step(node, length)) >= 0; ++length) {
        a_.accept_path[base_ + length] = node;
        a_.output_ids[base_ + length] = a_.token_ids[base_ + node];
      }
    }
    a_.accept_len[b] = length;
  }

 private:
  // The accepted child, or -1; then the token drawn instead is put out.
  int step(int node, int32_t length) {
    if (!row_.read(a_.logits + (base_ + node) * a_.vocab)) return -1;
    fill();
    const float* draft = a_.draft_probs + (base_ + node) * a_.vocab;
    for (int i = 0; i < a_.vocab; ++i) q_[i] = int64_t(double(draft[i]) * kOne);
    int64_t left = std::accumulate(q_.begin(), q_.end(), int64_t(0));
    for (int child = node + 1; child < rows_; ++child) {
      const int64_t token = a_.token_ids[base_ + child];
      if (a_.parent_idx[base_ + child] != node || token < 0 || token >= a_.vocab) continue;
      const int64_t drawn = elder_has(node, child) ? 0 : q_[token];
      const double grow = drawn ? kOne / double(left) : 0;
      double bound = double(mass_), share = double(p_[token]);
      if (drawn) {
        bound = double(int64_t(double(drawn) * grow)) * bound;
        share *= kOne;
      }
      if (a_.uniforms[base_ + child] * bound < share) return child;
      reject(token, drawn ? grow : 0);
      if (!mass_) {
        fill();
        break;
      }
      left -= drawn;
    }
    a_.output_ids[base_ + length] = Token(draw(p_, mass_, a_.uniforms[base_]));
    return -1;
  }

  bool elder_has(int node, int child) const {
    for (int i = node + 1; i < child; ++i)
      if (a_.parent_idx[base_ + i] == node &&
          a_.token_ids[base_ + i] == a_.token_ids[base_ + child])
        return true;
    return false;
  }

  // The target's own law.
  void fill() {
    const double factor = kOne / double(row_.total());
    const std::vector<int64_t>& weights = row_.weights();
    for (int i = 0; i < a_.vocab; ++i) p_[i] = int64_t(double(weights[i]) * factor);
    mass_ = std::accumulate(p_.begin(), p_.end(), int64_t(0));
  }

  // Takes the rejected token's draft law out, or with a `grow` of 0 just the token.
  void reject(int64_t token, double grow) {
    const double shrink = kOne / double(mass_);
    if (grow > 0)
      for (int i = 0; i < a_.vocab; ++i) {
        const int64_t rest = int64_t(double(p_[i]) * shrink) - int64_t(double(q_[i]) * grow);
        p_[i] = std::max(rest, int64_t(0));
      }
    else
      p_[token] = 0;
    mass_ = std::accumulate(p_.begin(), p_.end(), int64_t(0));
  }

  const VerifySamplingArgs<Token>& a_;
  RowLaw& row_;
  const int64_t base_;
  int rows_;
  int64_t mass_ = 0;
  std::vector<int64_t> p_, q_;
};

}  // namespace

template <class Token>
void verify_sampling_cpu(const VerifySamplingArgs<Token>& a) {
  RowLaw law(a.law, a.vocab);
  if (a.draft_probs) {
    for (int b = 0; b < a.batch; ++b) Walk<Token>(a, law, b);
    return;
  }
  std::vector<Token> target(size_t(a.batch) * a.nodes);
  for (int b = 0; b < a.batch; ++b) draw_targets(a, law, b, target.data() + int64_t(b) * a.nodes);
  verify_greedy_cpu(VerifyGreedyArgs<Token>{a.token_ids, a.parent_idx, target.data(),
                                            a.ancestor_bits, a.num_rows, a.accept_len,
                                            a.accept_path, a.output_ids, a.batch, a.nodes});
}

template void verify_sampling_cpu(const VerifySamplingArgs<int32_t>&);
template void verify_sampling_cpu(const VerifySamplingArgs<int64_t>&);

}  // namespace xspec
