// A memory of past answers, and the probabilities it gives to the next token.
//
// The same arithmetic in the same order as xspec_runtime/drafters/counts.py, so that both give the
// same bits. Many threads may read at once; one that writes excludes them.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>
#include <vector>

#include "ngram_trie.h"

namespace xspec::ngram {

struct Settings {
  int order;
  int64_t max_tokens;
  int recency;
  double share, low_share, discount;
};

struct Chance {
  Token token;
  double chance;
};

// Likelier first, ties by token.
inline bool likelier(const Chance& a, const Chance& b) {
  return a.chance != b.chance ? a.chance > b.chance : a.token < b.token;
}

// Probabilities by token, in the order in which the tokens came.
class Chances {
 public:
  void add(Token token, double chance);
  void clear();
  const Chance* begin() const { return all_.data() + 1; }
  const Chance* end() const { return begin() + count_; }

 private:
  // At most kRead an order, one that occurs once, and what a request adds: always half empty.
  static constexpr int kLogSlots = 11;
  static constexpr uint32_t kSlots = 1u << kLogSlots;

  std::array<uint16_t, kSlots> slots_{};      // numbers; 0 is none
  std::array<Chance, kSlots / 2> all_{};      // from 1 on
  std::array<uint16_t, kSlots / 2> slot_of_;  // by number
  uint32_t count_ = 0;
};

// What the only continuation of the longest orders gets, and a unit of weight in each other order.
struct Parts {
  double single;
  std::array<double, kMaxOrder + 1> of;
};

class NgramCounts {
 public:
  explicit NgramCounts(const Settings& settings);

  // Learns answers, oldest first. Throws std::invalid_argument, and learns nothing, where a token
  // does not fit 31 bits or an answer is empty or longer than max_tokens.
  void extend(const std::vector<std::vector<Token>>& answers);

  uint64_t version() const;
  // Answers stored, tokens stored, answers forgotten, nodes.
  std::array<uint64_t, 4> statistics() const;
  std::vector<std::vector<Token>> answers() const;
  std::vector<std::vector<std::pair<Token, Weight>>> counts(
      const std::vector<Token>& context) const;
  std::vector<std::pair<Token, double>> predict(const std::vector<Token>& context) const;
  std::vector<Token> opening(int rows, double enough) const;
  // Length at which answers are cut, 0 if they are not.
  int64_t usual_end() const;

  // What follows is for threads that hold this lock.
  std::shared_lock<std::shared_mutex> reading() const;
  uint64_t current_version() const { return version_; }
  int64_t current_end() const;
  const SuffixTrie& trie() const { return trie_; }
  // Divides the probability `left` among the orders; returns a bound, but for rounding, of what
  // any one token can get.
  double share(const Matches& matches, double left, Parts& parts) const;
  void distribution(const Matches& matches, const Parts& parts, Chances& found) const;

 private:
  Weight weight(uint64_t age) const;
  void forget();

  const Settings settings_;
  SuffixTrie trie_;
  std::map<size_t, int64_t> lengths_;
  uint64_t version_ = 0, oldest_ = 0, next_ = 0;
  int64_t tokens_ = 0;
  // A writer waits behind the gate, which stops further readers: they cannot starve it.
  mutable std::mutex gate_;
  mutable std::shared_mutex mutex_;
};

}  // namespace xspec::ngram
