#include "ngram_trie.h"

#include <algorithm>

namespace xspec::ngram {
namespace {

// A child is a node's number, kLeaf (an n-gram too long to be a context), or a position.
constexpr uint32_t kSingle = 0x80000000u;
constexpr uint32_t kLeaf = kSingle - 1;
constexpr uint32_t kPositions = kSingle - 1;  // positions count modulo 2^31

constexpr uint32_t kLast = 0x80000000u;  // beside the last token of an answer
constexpr size_t kSmallestRing = 1024;

}  // namespace

SuffixTrie::SuffixTrie(int order) : order_(order), ring_(kSmallestRing) {
  make_node();
  make_node();
}

std::vector<Token> SuffixTrie::answer(size_t number) const {
  const Answer& known = answers_[number];
  std::vector<Token> tokens(known.length);
  for (uint32_t i = 0; i < known.length; ++i) tokens[i] = stored(known.first + i) & ~kLast;
  return tokens;
}

void SuffixTrie::insert(const std::vector<Token>& answer, Weight weight) {
  store(answer, weight);
  uint32_t position = answers_.back().first;
  contexts_ = {kRoot, kStart};
  for (const Token token : answer) {
    longer_.assign(1, kRoot);
    for (int depth = 0; depth < int(contexts_.size()); ++depth) {
      Node& context = node(contexts_[depth]);
      context.total += weight;
      Entry* entry = context.next.find(token);
      if (!entry) {
        context.next.add({weight, int32_t(token), kSingle | position});
        continue;
      }
      if (entry->child & kSingle) entry->child = split(*entry, depth == order_);
      const uint32_t child = entry->child;
      context.next.change(entry, weight);
      if (depth == order_) continue;
      __builtin_prefetch(&node(child));
      longer_.push_back(child);
    }
    contexts_.swap(longer_);
    position = (position + 1) & kPositions;
  }
}

void SuffixTrie::reweigh(size_t number, Weight weight) {
  Answer& known = answers_[number];
  const Weight change = weight - known.weight;
  if (!change) return;
  contexts_ = {kRoot, kStart};
  for (uint32_t i = 0; i < known.length; ++i) {
    const Token token = stored(known.first + i) & ~kLast;
    longer_.assign(1, kRoot);
    for (int depth = 0; depth < int(contexts_.size()); ++depth) {
      Node& context = node(contexts_[depth]);
      context.total += change;
      Entry* entry = context.next.find(token);
      const uint32_t child = entry->child;
      if (entry->weight + change == 0) {
        context.next.remove(entry);
        // Not yet gone: a text that repeats itself may still be among the contexts.
        if (!(child & kSingle)) doomed_.push_back(child);
        continue;
      }
      context.next.change(entry, change);
      if ((child & kSingle) || depth == order_) continue;
      __builtin_prefetch(&node(child));
      longer_.push_back(child);
    }
    contexts_.swap(longer_);
  }
  for (const uint32_t child : doomed_) release(child);
  doomed_.clear();
  known.weight = weight;
}

void SuffixTrie::forget() {
  reweigh(0, 0);
  tokens_ -= answers_.front().length;
  answers_.pop_front();
}

void SuffixTrie::match(const std::vector<Token>& context, Matches& matches) const {
  matches.singles = matches.count = 0;
  if (context.size() < size_t(order_)) matches.nodes[matches.count++] = kStart;
  matches.nodes[matches.count++] = kRoot;
  const size_t known = std::min(context.size(), size_t(order_));
  for (size_t i = context.size() - known; i < context.size(); ++i) {
    const Matches shorter = matches;
    advance(shorter, context[i], matches);
  }
}

void SuffixTrie::advance(const Matches& from, Token token, Matches& to) const {
  for (int i = 0; i < from.count; ++i) node(from.nodes[i]).next.prefetch(token);
  to.singles = to.count = 0;
  if (from.singles && after(from.position) == token) {
    to.singles = from.singles;
    to.position = (from.position + 1) & kPositions;
    to.weight = from.weight;
  }
  uint32_t found[kMaxOrder + 1];
  int children = 0;
  for (int i = 0; i < from.count; ++i) {
    const Entry* entry = node(from.nodes[i]).next.find(token);
    if (!entry) continue;
    if (entry->child & kSingle) {
      to.position = entry->child & kPositions;
      to.weight = entry->weight;
      ++to.singles;
    } else if (entry->child != kLeaf) {
      __builtin_prefetch(&node(entry->child));
      found[children++] = entry->child;
    }
  }
  for (int i = 0; i < children; ++i) {
    if (!node(found[i]).total) continue;
    __builtin_prefetch(node(found[i]).next.data());
    to.nodes[to.count++] = found[i];
  }
  if (to.singles && after(to.position) == kNoToken) to.singles = 0;
  to.singles = std::min(to.singles, order_ - to.count);
  to.nodes[to.count++] = kRoot;
}

Token SuffixTrie::after(uint32_t position) const {
  return stored(position) & kLast ? kNoToken : Token(stored(position + 1) & ~kLast);
}

uint32_t SuffixTrie::make_node() {
  if (!free_.empty()) {
    const uint32_t number = free_.back();
    free_.pop_back();
    return number;
  }
  if (made_ == chunks_.size() * kChunk) chunks_.push_back(std::make_unique<Node[]>(kChunk));
  return made_++;
}

// The node of an n-gram that has occurred once; kLeaf if it is too long to be a context.
uint32_t SuffixTrie::split(const Entry& single, bool leaf) {
  ++nodes_;
  if (leaf) return kLeaf;
  const uint32_t number = make_node(), position = single.child & kPositions;
  const Token token = after(position);
  if (token != kNoToken) {
    node(number).total = single.weight;
    const uint32_t next = kSingle | ((position + 1) & kPositions);
    node(number).next.add({single.weight, int32_t(token), next});
  }
  return number;
}

void SuffixTrie::release(uint32_t child) {
  --nodes_;
  if (child == kLeaf) return;
  Node& gone = node(child);
  for (uint32_t i = 0; i < gone.next.size(); ++i) {
    const uint32_t below = gone.next.data()[i].child;
    if (!(below & kSingle)) release(below);
  }
  gone.next.clear();
  gone.total = 0;
  free_.push_back(child);
}

void SuffixTrie::store(const std::vector<Token>& answer, Weight weight) {
  const uint32_t oldest = uint32_t(end_ - tokens_);
  if (tokens_ + answer.size() > ring_.size()) {
    size_t size = ring_.size();
    while (size < tokens_ + answer.size()) size *= 2;
    std::vector<uint32_t> larger(size);
    for (uint32_t i = 0; i < tokens_; ++i) larger[(oldest + i) & (size - 1)] = stored(oldest + i);
    ring_.swap(larger);
  }
  answers_.push_back({end_, uint32_t(answer.size()), weight});
  for (const Token token : answer) ring_[end_++ & (ring_.size() - 1)] = uint32_t(token);
  ring_[(end_ - 1) & (ring_.size() - 1)] |= kLast;
  end_ &= kPositions;
  tokens_ += answer.size();
}

}  // namespace xspec::ngram
