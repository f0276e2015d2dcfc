// One request: its prompt and answer so far, and the trees proposed for what follows.
//
// The same arithmetic in the same order as xspec_runtime/drafters/growth.py.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "ngram_memory.h"

namespace xspec::ngram {

constexpr int kTail = 8;       // last tokens of a place that can matter
constexpr int kCopies = 4;     // different continuations that are considered
constexpr int kMostRows = 64;  // of a tree

// The last tokens of a path, the latest at the end.
struct Tail {
  int count = 0;
  std::array<Token, kTail> tokens;

  void push(Token token);
  Token back(int i) const { return tokens[count - 1 - i]; }
};

// How often going on as an earlier place did was right, and how often it was tried.
struct Tally {
  double right, tried;
};

// What of a request's text becomes trees; the same constants as in growth.py.
struct CopySettings {
  std::vector<double> trust;  // by agreeing tokens, of the best place; kTail of them
  double prior;               // cases that they count for
  double second;              // part of them that other places get
  int first;                  // agreeing tokens from which on a place precedes the memory
};

// Prompt and answer of one request, searched for places like their end.
class RequestText {
 public:
  struct Copy {
    Token token;
    double trust;
    int agreed;
  };

  explicit RequestText(const CopySettings& settings);

  void append(Token token);
  // Appends a token of the answer; what the tail made expect is judged by it.
  void learn(Token token);
  Tail tail() const;
  // Tokens that followed `tail` before, the most trusted first; returns how many.
  int copies(const Tail& tail, std::array<Copy, kCopies>& found) const;

 private:
  struct Triple {
    Token a, b, c;
    bool operator==(const Triple& o) const { return a == o.a && b == o.b && c == o.c; }
  };
  struct TripleHash {
    size_t operator()(const Triple& t) const;
  };

  int candidates(const Tail& tail, std::array<Copy, kCopies>& found) const;

  std::vector<Token> tokens_;
  // Latest place by last token and by last three, and the place before each one; 0 is none.
  std::unordered_map<Token, int32_t> by_token_;
  std::unordered_map<Triple, int32_t, TripleHash> by_triple_;
  std::vector<int32_t> before_token_, before_triple_;
  std::array<std::array<Tally, kTail>, 2> tally_;  // first choice, others
};

struct Tree {
  std::vector<Token> tokens;
  std::vector<int> parents;
  std::vector<double> scores;
};

class NgramRequest {
 public:
  NgramRequest(std::shared_ptr<const NgramCounts> counts, bool chain, bool copy,
               const CopySettings& settings, int siblings, double negligible);

  void begin(const std::vector<Token>& prompt);
  // A tree of at most `rows` nodes below the last of all fresh tokens since `begin`.
  Tree propose(const std::vector<Token>& fresh, int rows);

 private:
  struct Candidate {
    double path;
    int parent;
    Token token;
  };
  struct Place {
    Matches matches;
    Tail tail;
    int64_t level;
  };

  void follow(const std::vector<Token>& fresh);
  Tree grow(int rows, int64_t depth);
  void expand(int node, const Tree& tree, size_t room);
  void children(const Place& place, double score, double floor);

  const std::shared_ptr<const NgramCounts> counts_;
  const bool chain_, copy_;
  const CopySettings settings_;
  const size_t siblings_;
  const double negligible_;

  std::mutex busy_;  // a request serves one caller at a time
  RequestText text_;
  std::vector<Token> answer_;
  uint64_t version_ = 0;
  bool matched_ = false;
  Matches matches_, longer_;
  // Of the tree that grows: by node, and what may join it, the likeliest first.
  std::vector<Place> places_;
  std::vector<Candidate> waiting_;
  Parts parts_;
  Chances found_;
  std::vector<Chance> best_;
};

}  // namespace xspec::ngram
