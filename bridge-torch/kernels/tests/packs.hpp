// Packs of sequences that every op over positions is tested with.
#pragma once

#include "../chunks.cu"

#include "check.hpp"

namespace check {

struct Pack {
  const char* name;
  std::vector<int> lengths;
  int tail;  // tokens behind the last border
  bool wide; // int64 borders

  int64_t sequences() const { return static_cast<int64_t>(lengths.size()); }
  int64_t tokens() const {
    int64_t sum = tail;
    for (int length : lengths) {
      sum += length;
    }
    return sum;
  }
  Values borders() const {
    Values out{0.0};
    for (int length : lengths) {
      out.push_back(out.back() + length);
    }
    return out;
  }
};

// The borders and the chunk map of a pack in device memory.
class Mapped {
 public:
  Mapped(const Pack& pack, int size)
      : wide_(pack.wide), narrow_borders_(pack.wide ? Values{} : pack.borders()), wide_borders_(pack.wide ? pack.borders() : Values{}),
        chunks_(static_cast<size_t>(bridge::max_chunks(pack.tokens(), pack.sequences(), size))),
        first_(static_cast<size_t>(pack.sequences() + 2)) {
    launched(bridge::chunk_map({borders(), pack.wide, pack.sequences(), pack.tokens(), size, chunks_.data(), first_.data()},
                               nullptr));
  }
  const void* borders() { return wide_ ? static_cast<const void*>(wide_borders_.data()) : narrow_borders_.data(); }
  const bridge::Chunk* chunks() { return chunks_.data(); }
  size_t size() const { return chunks_.size(); }
  const int* first() { return first_.data(); }

 private:
  bool wide_;
  Buffer<int> narrow_borders_;
  Buffer<int64_t> wide_borders_;
  Buffer<bridge::Chunk> chunks_;
  Buffer<int> first_;
};

inline std::vector<Pack> packs() {
  std::vector<Pack> out = {{"1", {1}, 0, false},
                           {"5", {5}, 0, true},
                           {"63", {63}, 0, false},
                           {"64", {64}, 0, true},
                           {"65", {65}, 0, false},
                           {"200", {200}, 0, true},
                           {"64+64", {64, 64}, 0, false},
                           {"1+63+65+71", {1, 63, 65, 71}, 0, true},
                           {"0+70+130+0", {0, 70, 130, 0}, 0, false},
                           {"0", {0}, 0, false},
                           {"tail", {3, 0, 66}, 70, true},
                           {"2+1+4+3", {2, 1, 4, 3}, 1, false}};
  Pack many{"many", {}, 0, false};
  Random random(5);
  for (int i = 0; i < 40; ++i) {
    many.lengths.push_back(1 + random.below(9));
  }
  out.push_back(many);
  return out;
}

}  // namespace check
