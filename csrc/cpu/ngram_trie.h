// Weighted counts of all n-grams of a set of answers: a suffix trie with compact singletons.
//
// A context of n tokens is a path from the root. An n-gram that occurred once is stored as its
// position alone, since the rest of it can be read in its answer; it becomes a node when it occurs
// again. The matches of a context are kept for every order at once.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "ngram_children.h"

namespace xspec::ngram {

constexpr int kMaxOrder = 64;
constexpr int64_t kMostTokens = (1 << 24) - 1;  // stored; a new answer may come on top
constexpr Token kNoToken = -1;

// A context that occurred at least twice. `total` is the weight of those that a token follows.
struct alignas(32) Node {
  Weight total = 0;
  Children next;
};

// Where a context occurs: one entry an order, the longest first. Valid until the trie changes.
struct Matches {
  int singles = 0;        // orders, the longest ones, that occur once,
  uint32_t position = 0;  // there,
  Weight weight = 0;      // in an answer of this weight
  int count = 0;          // of the shorter orders, down to order 0
  std::array<uint32_t, kMaxOrder + 1> nodes;
};

class SuffixTrie {
 public:
  // `order` is the longest context, in tokens. The start of an answer counts as one.
  explicit SuffixTrie(int order);

  size_t answers() const { return answers_.size(); }
  size_t nodes() const { return nodes_; }
  // Answers are numbered from the oldest one, 0.
  std::vector<Token> answer(size_t number) const;
  size_t length(size_t number) const { return answers_[number].length; }

  void insert(const std::vector<Token>& answer, Weight weight);
  void reweigh(size_t number, Weight weight);
  // Takes the oldest answer out as if it had never been inserted.
  void forget();

  void match(const std::vector<Token>& context, Matches& matches) const;
  void advance(const Matches& from, Token token, Matches& to) const;
  // The token that follows a position, or kNoToken at the end of its answer.
  Token after(uint32_t position) const;
  const Node& node(uint32_t number) const { return chunks_[number / kChunk][number % kChunk]; }

 private:
  static constexpr uint32_t kChunk = 1u << 14;
  static constexpr uint32_t kRoot = 0, kStart = 1;

  struct Answer {
    uint32_t first, length;
    Weight weight;
  };

  Node& node(uint32_t number) { return chunks_[number / kChunk][number % kChunk]; }
  uint32_t make_node();
  uint32_t split(const Entry& single, bool leaf);
  void release(uint32_t child);
  void store(const std::vector<Token>& answer, Weight weight);
  uint32_t stored(uint32_t position) const { return ring_[position & (ring_.size() - 1)]; }

  int order_;
  size_t nodes_ = 2;
  std::vector<std::unique_ptr<Node[]>> chunks_;
  uint32_t made_ = 0;
  std::vector<uint32_t> free_;
  // Tokens of the answers from the oldest on, at their position modulo the size, a power of two.
  std::vector<uint32_t> ring_;
  uint32_t end_ = 0;
  size_t tokens_ = 0;
  std::deque<Answer> answers_;
  std::vector<uint32_t> contexts_, longer_, doomed_;
};

}  // namespace xspec::ngram
