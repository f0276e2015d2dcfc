#include "ngram_request.h"

#include <algorithm>
#include <stdexcept>

namespace xspec::ngram {
namespace {

constexpr double kAbove = 1.0 + 1e-9;  // more than any rounding of a sum of probabilities

}  // namespace

NgramRequest::NgramRequest(std::shared_ptr<const NgramCounts> counts, bool chain, bool copy,
                           const CopySettings& settings, int siblings, double negligible)
    : counts_(std::move(counts)),
      chain_(chain),
      copy_(copy),
      settings_(settings),
      siblings_(siblings),
      negligible_(negligible),
      text_(settings),
      places_(kMostRows) {}

void NgramRequest::begin(const std::vector<Token>& prompt) {
  const std::lock_guard<std::mutex> turn(busy_);
  text_ = RequestText(settings_);
  if (copy_)
    for (const Token token : prompt) text_.append(token);
  answer_.clear();
  matched_ = false;
}

Tree NgramRequest::propose(const std::vector<Token>& fresh, int rows) {
  const std::lock_guard<std::mutex> turn(busy_);
  if (rows < 1 || rows > kMostRows || (fresh.empty() && answer_.empty()))
    throw std::invalid_argument("propose needs a known token and from 1 to 64 rows");
  const auto lock = counts_->reading();
  follow(fresh);
  const int64_t end = counts_->current_end(), known = int64_t(answer_.size());
  // The token that ends an answer comes free with the verify of those before it.
  return grow(rows, end && known < end ? end - known - 1 : kMostRows);
}

void NgramRequest::follow(const std::vector<Token>& fresh) {
  if (!matched_ || version_ != counts_->current_version()) {
    counts_->trie().match(answer_, matches_);
    version_ = counts_->current_version();
    matched_ = true;
  }
  for (const Token token : fresh) {
    counts_->trie().advance(matches_, token, longer_);
    std::swap(matches_, longer_);
    if (copy_) text_.learn(token);
    answer_.push_back(token);
  }
}

// Best first: the next node is always the likeliest path not yet in the tree; of equals the one
// that came first.
Tree NgramRequest::grow(int rows, int64_t depth) {
  Tree tree;
  tree.tokens.reserve(rows);
  tree.parents.reserve(rows);
  tree.scores.reserve(rows);
  tree.tokens.push_back(answer_.back());
  tree.parents.push_back(-1);
  tree.scores.push_back(1.0);
  places_[0].matches = matches_;
  places_[0].tail = copy_ ? text_.tail() : Tail();
  places_[0].level = 0;
  waiting_.clear();
  for (int node = 0;; ++node) {
    const size_t room = size_t(rows - 1 - node);
    if (room && places_[node].level < depth) expand(node, tree, room);
    if (!room || waiting_.empty()) return tree;
    const Candidate best = waiting_.front();
    waiting_.erase(waiting_.begin());
    tree.tokens.push_back(best.token);
    tree.parents.push_back(best.parent);
    tree.scores.push_back(best.path);
    places_[node + 1].level = places_[best.parent].level + 1;
  }
}

// Adds the children of a node to those that wait. Only `room` of them can still join the tree.
void NgramRequest::expand(int node, const Tree& tree, size_t room) {
  const double score = tree.scores[node];
  const bool full = waiting_.size() >= room;
  const double floor = full ? std::max(negligible_, waiting_[room - 1].path) : negligible_;
  if (score <= floor) return;  // no path is likelier than its beginning
  Place& place = places_[node];
  if (node) {
    const Place& parent = places_[tree.parents[node]];
    counts_->trie().advance(parent.matches, tree.tokens[node], place.matches);
    place.tail = parent.tail;
    if (copy_) place.tail.push(tree.tokens[node]);
  }
  children(place, score, floor);
  auto from = waiting_.begin();
  for (const Chance& child : best_) {
    const Candidate fresh{score * std::min(child.chance, 1.0), node, child.token};
    const auto lighter = [](const Candidate& a, const Candidate& b) { return a.path > b.path; };
    from = waiting_.insert(std::upper_bound(from, waiting_.end(), fresh, lighter), fresh) + 1;
  }
  if (waiting_.size() > room) waiting_.resize(room);
}

// Into best_: the likeliest next tokens whose paths are likelier than `floor`, in order.
void NgramRequest::children(const Place& place, double score, double floor) {
  best_.clear();
  std::array<RequestText::Copy, kCopies> copies;
  const int copied = text_.copies(place.tail, copies);
  std::array<double, kCopies> early;
  double left = 1.0, copy_bound = 0.0;
  for (int i = 0; i < copied; ++i) {
    copy_bound += copies[i].trust;
    if (copies[i].agreed < settings_.first) continue;
    early[i] = left * copies[i].trust;
    left -= early[i];
  }
  if (score * (counts_->share(place.matches, left, parts_) + copy_bound) * kAbove <= floor) return;
  counts_->distribution(place.matches, parts_, found_);
  double sum = 0.0;
  for (const Chance& item : found_) sum += item.chance;
  left -= sum;
  for (int i = 0; i < copied; ++i)
    if (copies[i].agreed >= settings_.first) found_.add(copies[i].token, early[i]);
  for (int i = 0; i < copied; ++i) {
    if (copies[i].agreed >= settings_.first) continue;
    found_.add(copies[i].token, left * copies[i].trust);
    left -= left * copies[i].trust;
  }
  const size_t most = chain_ ? 1 : siblings_;
  for (const Chance& item : found_) {
    if (score * std::min(item.chance, 1.0) <= floor) continue;
    if (best_.size() < most)
      best_.push_back(item);
    else if (likelier(item, best_.back()))
      best_.back() = item;
    else
      continue;
    for (size_t i = best_.size() - 1; i > 0 && likelier(best_[i], best_[i - 1]); --i)
      std::swap(best_[i], best_[i - 1]);
  }
}

}  // namespace xspec::ngram
