#include "ngram_children.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace xspec::ngram {
namespace {

// Slack above kRead, so that entries which fall out of order rarely cost a new ranking.
constexpr uint32_t kRankedMost = 32;
constexpr uint32_t kScanned = 16;  // up to so many entries are looked through one by one

bool before(const Entry& a, const Entry& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

}  // namespace

// The token's slot, or the empty one where it belongs. The table is at most half full.
uint32_t Children::slot_of(int32_t token) const {
  const uint32_t mask = (2u << log_capacity_) - 1;
  uint32_t slot = home_of(token);
  while (many_.slots[slot] && many_.entries[many_.slots[slot] - 1].token != token)
    slot = (slot + 1) & mask;
  return slot;
}

const Entry* Children::find(Token token) const {
  if (token < 0 || token > INT32_MAX) return nullptr;
  if (indexed()) {
    const uint32_t number = many_.slots[slot_of(int32_t(token))];
    return number ? many_.entries + number - 1 : nullptr;
  }
  const Entry* entries = data();
  for (uint32_t i = 0; i < size_; ++i)
    if (entries[i].token == token) return entries + i;
  return nullptr;
}

void Children::add(const Entry& entry) {
  if (size_ == 1u << log_capacity_) grow();
  const uint32_t last = size_++;
  mine()[last] = entry;
  if (indexed()) many_.slots[slot_of(entry.token)] = last + 1;
  if (ranked_ < last && !before(entry, data()[ranked_ - 1])) return;
  swap(last, ranked_);
  settle(ranked_++);
  limit_ranked();
}

void Children::change(Entry* entry, Weight by) {
  entry->weight += by;
  uint32_t i = uint32_t(entry - data());
  if (i >= ranked_) {
    if (!before(*entry, data()[ranked_ - 1])) return;
    swap(i, ranked_);
    i = ranked_++;
  }
  i = settle(i);
  // Lighter and last in order: one of those that are not in order may be heavier.
  if (by < 0 && i + 1 == ranked_ && ranked_ < size_) --ranked_;
  limit_ranked();
}

void Children::remove(Entry* entry) {
  uint32_t i = uint32_t(entry - data());
  if (i < ranked_) {
    for (; i + 1 < ranked_; ++i) swap(i, i + 1);
    --ranked_;
  }
  swap(i, size_ - 1);
  if (indexed()) vacate(slot_of(data()[size_ - 1].token));
  if (!--size_) return clear();
  limit_ranked();
}

void Children::clear() {
  if (log_capacity_) {
    std::free(many_.entries);
    std::free(many_.slots);
  }
  size_ = ranked_ = log_capacity_ = 0;
}

void Children::grow() {
  const uint32_t capacity = 2u << log_capacity_;
  const bool hashed = capacity > kScanned;
  void* entries = std::malloc(capacity * sizeof(Entry));
  void* slots = hashed ? std::calloc(2 * size_t(capacity), sizeof(uint32_t)) : nullptr;
  if (!entries || (hashed && !slots)) {
    std::free(entries);
    std::free(slots);
    throw std::bad_alloc();
  }
  std::copy(data(), data() + size_, static_cast<Entry*>(entries));
  if (log_capacity_) {
    std::free(many_.entries);
    std::free(many_.slots);
  }
  ++log_capacity_;
  many_ = {static_cast<Entry*>(entries), static_cast<uint32_t*>(slots)};
  for (uint32_t i = 0; hashed && i < size_; ++i)
    many_.slots[slot_of(many_.entries[i].token)] = i + 1;
}

// Empties a slot and moves those behind it that could no longer be found.
void Children::vacate(uint32_t slot) {
  const uint32_t mask = (2u << log_capacity_) - 1;
  uint32_t* slots = many_.slots;
  for (uint32_t next = (slot + 1) & mask; slots[next]; next = (next + 1) & mask) {
    const uint32_t home = home_of(many_.entries[slots[next] - 1].token);
    if (((next - home) & mask) < ((next - slot) & mask)) continue;
    slots[slot] = slots[next];
    slot = next;
  }
  slots[slot] = 0;
}

void Children::swap(uint32_t i, uint32_t j) {
  if (i == j) return;
  Entry* entries = mine();
  if (indexed())
    std::swap(many_.slots[slot_of(entries[i].token)], many_.slots[slot_of(entries[j].token)]);
  std::swap(entries[i], entries[j]);
}

// Moves an entry of the ordered part to its place there.
uint32_t Children::settle(uint32_t i) {
  const Entry* entries = data();
  while (i > 0 && before(entries[i], entries[i - 1])) swap(i, i - 1), --i;
  while (i + 1 < ranked_ && before(entries[i + 1], entries[i])) swap(i, i + 1), ++i;
  return i;
}

void Children::limit_ranked() {
  if (ranked_ > kRankedMost) ranked_ = kRankedMost;
  if (ranked_ >= std::min(kRead, size_)) return;
  // The best of the others, then each into its place.
  const uint32_t wanted = std::min(kRankedMost, size_) - ranked_;
  Entry best[kRankedMost];
  uint32_t count = 0;
  const Entry* entries = data();
  for (const Entry* entry = entries + ranked_; entry != entries + size_; ++entry) {
    if (count == wanted && !before(*entry, best[count - 1])) continue;
    uint32_t k = count < wanted ? count++ : count - 1;
    for (; k > 0 && before(*entry, best[k - 1]); --k) best[k] = best[k - 1];
    best[k] = *entry;
  }
  for (uint32_t k = 0; k < count; ++k) swap(uint32_t(find(best[k].token) - entries), ranked_++);
}

}  // namespace xspec::ngram
