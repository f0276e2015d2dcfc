#include "ngram_memory.h"

#include <algorithm>
#include <stdexcept>

namespace xspec::ngram {
namespace {

constexpr int kLowOrders =
    3;  // orders 0..2 know little but are all there is without a longer match

void check(const std::vector<std::vector<Token>>& answers, int64_t longest) {
  for (const auto& answer : answers) {
    if (answer.empty() || int64_t(answer.size()) > longest)
      throw std::invalid_argument("an answer must hold from 1 to max_tokens tokens");
    for (const Token token : answer)
      if (token < 0 || token > INT32_MAX)
        throw std::invalid_argument("token ids must be from 0 to 2147483647");
  }
}

}  // namespace

// Whether a token is new is hard to foresee, hence no branch depends on it.
void Chances::add(Token token, double chance) {
  uint32_t slot = uint32_t((uint64_t(token) * 0x9e3779b97f4a7c15u) >> (64 - kLogSlots));
  while ((slots_[slot] != 0) & (all_[slots_[slot]].token != token)) slot = (slot + 1) % kSlots;
  const uint32_t next = count_ + 1, number = slots_[slot] ? slots_[slot] : next;
  all_[next] = {token, 0.0};
  slot_of_[next] = uint16_t(slot);
  slots_[slot] = uint16_t(number);
  all_[number].chance += chance;
  count_ += number == next;
}

void Chances::clear() {
  for (uint32_t i = 1; i <= count_; ++i) slots_[slot_of_[i]] = 0;
  count_ = 0;
}

NgramCounts::NgramCounts(const Settings& settings) : settings_(settings), trie_(settings.order) {}

Weight NgramCounts::weight(uint64_t age) const {
  for (int level = 0; level < settings_.recency; ++level)
    if (age < uint64_t(1) << 2 * level) return Weight(1) << 2 * (settings_.recency - level);
  return 1;
}

void NgramCounts::extend(const std::vector<std::vector<Token>>& answers) {
  if (answers.empty()) return;
  check(answers, settings_.max_tokens);
  std::unique_lock<std::mutex> turn(gate_);
  std::unique_lock<std::shared_mutex> writing(mutex_);
  turn.unlock();
  const uint64_t first = next_;
  next_ += answers.size();
  ++version_;
  for (int level = 0; level < settings_.recency; ++level) {
    const uint64_t age = uint64_t(1) << 2 * level;  // at which the weight falls
    const uint64_t from = std::max(oldest_, first - std::min(first, age));
    const uint64_t to = std::min(first, next_ - std::min(next_, age));
    for (uint64_t known = from; known < to; ++known)
      trie_.reweigh(known - oldest_, weight(next_ - 1 - known));
  }
  for (size_t i = 0; i < answers.size(); ++i) {
    const std::vector<Token>& answer = answers[i];
    trie_.insert(answer, weight(next_ - 1 - (first + i)));
    tokens_ += int64_t(answer.size());
    ++lengths_[answer.size()];
    while (tokens_ > settings_.max_tokens) forget();
  }
}

void NgramCounts::forget() {
  const size_t length = trie_.length(0);
  trie_.forget();
  ++oldest_;
  tokens_ -= int64_t(length);
  const auto known = lengths_.find(length);
  if (!--known->second) lengths_.erase(known);
}

std::shared_lock<std::shared_mutex> NgramCounts::reading() const {
  std::lock_guard<std::mutex> turn(gate_);
  return std::shared_lock<std::shared_mutex>(mutex_);
}

uint64_t NgramCounts::version() const {
  const auto lock = reading();
  return version_;
}

std::array<uint64_t, 4> NgramCounts::statistics() const {
  const auto lock = reading();
  return {next_ - oldest_, uint64_t(tokens_), oldest_, trie_.nodes()};
}

std::vector<std::vector<Token>> NgramCounts::answers() const {
  const auto lock = reading();
  std::vector<std::vector<Token>> all(trie_.answers());
  for (size_t i = 0; i < all.size(); ++i) all[i] = trie_.answer(i);
  return all;
}

std::vector<std::vector<std::pair<Token, Weight>>> NgramCounts::counts(
    const std::vector<Token>& context) const {
  const auto lock = reading();
  Matches matches;
  trie_.match(context, matches);
  std::vector<std::vector<std::pair<Token, Weight>>> orders;
  for (int i = matches.count; i-- > 0;) {
    const Children& next = trie_.node(matches.nodes[i]).next;
    auto& order = orders.emplace_back();
    for (uint32_t k = 0; k < next.size(); ++k)
      order.emplace_back(next.data()[k].token, next.data()[k].weight);
  }
  for (int i = 0; i < matches.singles; ++i)
    orders.push_back({{trie_.after(matches.position), matches.weight}});
  return orders;
}

std::vector<std::pair<Token, double>> NgramCounts::predict(
    const std::vector<Token>& context) const {
  const auto lock = reading();
  Matches matches;
  trie_.match(context, matches);
  Parts parts;
  Chances found;
  share(matches, 1.0, parts);
  distribution(matches, parts, found);
  std::vector<Chance> sorted(found.begin(), found.end());
  std::sort(sorted.begin(), sorted.end(), likelier);
  std::vector<std::pair<Token, double>> pairs;
  for (const Chance& item : sorted) pairs.emplace_back(item.token, item.chance);
  return pairs;
}

std::vector<Token> NgramCounts::opening(int rows, double enough) const {
  const auto lock = reading();
  Matches matches, longer;
  trie_.match({}, matches);
  Parts parts;
  Chances found;
  std::vector<Token> tokens;
  while (int(tokens.size()) < rows) {
    share(matches, 1.0, parts);
    distribution(matches, parts, found);
    const Chance* best = std::min_element(found.begin(), found.end(), likelier);
    if (best == found.end() || best->chance < enough) break;
    tokens.push_back(best->token);
    trie_.advance(matches, best->token, longer);
    std::swap(matches, longer);
  }
  return tokens;
}

int64_t NgramCounts::usual_end() const {
  const auto lock = reading();
  return current_end();
}

int64_t NgramCounts::current_end() const {
  if (lengths_.empty()) return 0;
  const auto& [longest, count] = *lengths_.rbegin();
  const bool shared = count >= 4 && double(count) >= double(next_ - oldest_) / 10.0;
  return shared ? int64_t(longest) : 0;
}

double NgramCounts::share(const Matches& matches, double left, Parts& parts) const {
  int order = matches.singles + matches.count - 1;
  const auto share = [&] { return order >= kLowOrders ? settings_.share : settings_.low_share; };
  double bound = parts.single = 0.0;
  if (matches.singles) {
    const double weight = double(matches.weight);
    const double trust = weight / (weight + settings_.discount);
    // Step by step, so that a node that fell back to one occurrence gives the same bits.
    for (int i = 0; i < matches.singles; ++i, --order) {
      double part = left * trust * share();
      left -= part;
      part /= weight;
      parts.single += part * weight;
    }
    bound = parts.single;
  }
  for (int i = 0; i < matches.count; ++i, --order) {
    const Node& node = trie_.node(matches.nodes[i]);
    parts.of[i] = 0.0;
    if (!node.total) continue;
    const double total = double(node.total);
    const double trust = total / (total + settings_.discount * double(node.next.size()));
    const double part = left * trust * share();
    left -= part;
    parts.of[i] = part / total;
    bound += parts.of[i] * double(node.next.data()->weight);
  }
  return bound;
}

void NgramCounts::distribution(const Matches& matches, const Parts& parts, Chances& found) const {
  found.clear();
  if (matches.singles) found.add(trie_.after(matches.position), parts.single);
  for (int i = 0; i < matches.count; ++i) {
    const Children& next = trie_.node(matches.nodes[i]).next;
    const Entry* entries = next.data();
    const uint32_t read = std::min(kRead, next.ranked());
    const double part = parts.of[i];
    for (uint32_t k = 0; k < read; ++k)
      found.add(entries[k].token, part * double(entries[k].weight));
  }
}

}  // namespace xspec::ngram
