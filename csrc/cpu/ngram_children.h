// The tokens that follow one context, with their weights; the heaviest are kept in order.
#pragma once

#include <cstdint>
#include <utility>

namespace xspec::ngram {

using Token = int64_t;
using Weight = int64_t;

constexpr uint32_t kRead = 12;  // continuations of one context that readers may use

struct Entry {
  Weight weight;
  int32_t token;
  uint32_t child;  // what the owner keeps with it
};

// Ordered by falling weight, then by rising token: the first ranked() entries, which are at least
// kRead or all. Every change keeps them so, hence readers find them ready.
class Children {
 public:
  Children() = default;
  Children(const Children&) = delete;
  Children& operator=(const Children&) = delete;
  ~Children() { clear(); }

  uint32_t size() const { return size_; }
  uint32_t ranked() const { return ranked_; }
  const Entry* data() const { return log_capacity_ ? many_.entries : &one_; }
  // Has what `find` will read fetched.
  void prefetch(Token token) const {
    if (indexed()) __builtin_prefetch(many_.slots + home_of(int32_t(token)));
  }
  // Null where the token never followed.
  const Entry* find(Token token) const;
  Entry* find(Token token) { return const_cast<Entry*>(std::as_const(*this).find(token)); }

  // These move entries: pointers to them are void afterwards.
  void add(const Entry& entry);
  void change(Entry* entry, Weight by);
  void remove(Entry* entry);
  void clear();

 private:
  struct Many {
    Entry* entries;
    uint32_t* slots;  // hash table of entry numbers + 1; null for few entries
  };

  Entry* mine() { return log_capacity_ ? many_.entries : &one_; }
  bool indexed() const { return log_capacity_ && many_.slots; }
  uint32_t slot_of(int32_t token) const;
  uint32_t home_of(int32_t token) const {
    return (uint32_t(token) * 0x9e3779b1u) >> (31 - log_capacity_);
  }
  void grow();
  void vacate(uint32_t slot);
  void swap(uint32_t i, uint32_t j);
  uint32_t settle(uint32_t i);
  void limit_ranked();

  union {
    Entry one_;
    Many many_;
  };
  uint32_t size_ = 0;
  uint8_t ranked_ = 0;
  uint8_t log_capacity_ = 0;  // 0: the only entry is in place
};

}  // namespace xspec::ngram
