// What the programs that test kernels share: guarded buffers, schedules, comparison with float64, goldens.
//
// A program runs its cases under every schedule of the emulation, asks for the same bits each time, and compares with a
// float64 reference of its own. It prints one line a case group and leaves with 1 if anything was off.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cuda_types.hpp"
#include "../numbers.cuh"

namespace check {

using bridge::Bf16;
using bridge::DType;

inline int& failures() {
  static int count = 0;
  return count;
}

// What is being tested, for messages.
inline std::string& context() {
  static std::string text;
  return text;
}

template <class... Arguments>
void complain(const char* format, Arguments... arguments) {
  if (++failures() <= 20) {
    std::fprintf(stderr, "%s: ", context().c_str());
    std::fprintf(stderr, format, arguments...);
    std::fprintf(stderr, "\n");
  }
}

inline void require(bool holds, const char* claim) {
  if (!holds) {
    complain("%s", claim);
  }
}

template <class T>
inline constexpr DType dtype_of = sizeof(T) == 2 ? DType::kBf16 : DType::kF32;

template <class T>
const char* name_of() {
  return sizeof(T) == 2 ? "bf16" : "f32";
}

inline double to_double(Bf16 x) { return static_cast<double>(bridge::to_float(x)); }
inline double to_double(float x) { return static_cast<double>(x); }
inline double to_double(double x) { return x; }
inline double to_double(int x) { return x; }
inline double to_double(int64_t x) { return static_cast<double>(x); }
inline double to_double(uint8_t x) { return x; }

template <class T>
T from_double(double x) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(x);
  } else {
    return bridge::from_float<T>(static_cast<float>(x));
  }
}

// Device memory as a kernel sees it: 4 KB of NaN on both sides, and NaN in every element that nobody has written.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size), bytes_(2 * kGuard + size * sizeof(T) + 256, emulation::kPoison) {}
  explicit Buffer(const std::vector<double>& values) : Buffer(values.size()) {
    for (size_t i = 0; i < size_; ++i) {
      data()[i] = from_double<T>(values[i]);
    }
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    const unsigned char* begin = reinterpret_cast<const unsigned char*>(data());
    const unsigned char* end = begin + size_ * sizeof(T);
    for (size_t i = 0; i < kGuard - 256; ++i) {
      if (end[i] != emulation::kPoison || begin[-1 - static_cast<ptrdiff_t>(i)] != emulation::kPoison) {
        complain("wrote %zu bytes outside of a buffer of %zu elements", i + 1, size_);
        return;
      }
    }
  }

  T* data() {
    const uintptr_t base = reinterpret_cast<uintptr_t>(bytes_.data()) + kGuard;
    return reinterpret_cast<T*>((base + 255) & ~uintptr_t{255});
  }
  size_t size() const { return size_; }
  std::vector<double> values() {
    std::vector<double> out(size_);
    for (size_t i = 0; i < size_; ++i) {
      out[i] = to_double(data()[i]);
    }
    return out;
  }

 private:
  static constexpr size_t kGuard = 4096;
  size_t size_;
  std::vector<unsigned char> bytes_;
};

using Values = std::vector<double>;
using Outputs = std::map<std::string, Values>;

// A buffer whose format is known at run time only, as that of a parameter.
class AnyBuffer {
 public:
  AnyBuffer(const Values& values, DType dtype)
      : dtype_(dtype), narrow_(dtype == DType::kBf16 ? values : Values{}), wide_(dtype == DType::kF32 ? values : Values{}) {}
  AnyBuffer(size_t size, DType dtype)
      : dtype_(dtype), narrow_(dtype == DType::kBf16 ? size : 0), wide_(dtype == DType::kF32 ? size : 0) {}
  void* data() { return dtype_ == DType::kBf16 ? static_cast<void*>(narrow_.data()) : wide_.data(); }
  Values values() { return dtype_ == DType::kBf16 ? narrow_.values() : wide_.values(); }

 private:
  DType dtype_;
  Buffer<Bf16> narrow_;
  Buffer<float> wide_;
};

inline bool same_bits(const Values& a, const Values& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

// Runs `run` in every order of threads and blocks and gives its outputs, which must be the same bits each time.
inline Outputs under_every_schedule(const std::function<Outputs()>& run) {
  using emulation::Schedule;
  emulation::set_schedule(Schedule::kAscending);
  Outputs first = run();
  const std::pair<Schedule, const char*> others[] = {{Schedule::kDescending, "descending"}, {Schedule::kShuffled, "shuffled"}};
  for (const auto& [schedule, name] : others) {
    emulation::set_schedule(schedule, 7);
    for (const auto& [key, values] : run()) {
      if (!same_bits(first.at(key), values)) {
        complain("%s depends on the order of the threads (%s)", key.c_str(), name);
      }
    }
  }
  return first;
}

inline void launched(cudaError_t error) { require(error == cudaSuccess, "a launcher refused its arguments"); }

// |found - expected| <= relative |expected| + absolute for every element; nothing may be NaN.
inline void close_elements(const char* name, const Values& found, const Values& expected, double relative, double absolute) {
  if (found.size() != expected.size()) {
    complain("%s has %zu elements, expected %zu", name, found.size(), expected.size());
    return;
  }
  for (size_t i = 0; i < found.size(); ++i) {
    if (!(std::abs(found[i] - expected[i]) <= relative * std::abs(expected[i]) + absolute)) {
      complain("%s[%zu] is %.9g, expected %.9g (allowed %.2g relative, %.2g absolute)", name, i, found[i], expected[i],
               relative, absolute);
      return;
    }
  }
}

// The same for a slice of a wider tensor: what does not belong to it is NaN in `expected` and must have stayed so.
inline void close_slice(const char* name, const Values& found, const Values& expected, double relative, double absolute) {
  if (found.size() != expected.size()) {
    complain("%s has %zu elements, expected %zu", name, found.size(), expected.size());
    return;
  }
  Values inside, wanted;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isnan(expected[i])) {
      inside.push_back(found[i]);
      wanted.push_back(expected[i]);
    } else if (!std::isnan(found[i])) {
      complain("%s[%zu] is outside of the slice and was written", name, i);
      return;
    }
  }
  close_elements(name, inside, wanted, relative, absolute);
}

// ||found - expected|| <= tolerance ||expected||, or <= tolerance * floor where the reference is near zero.
inline double close_norm(const char* name, const Values& found, const Values& expected, double tolerance, double floor = 0.0) {
  if (found.size() != expected.size()) {
    complain("%s has %zu elements, expected %zu", name, found.size(), expected.size());
    return 0.0;
  }
  double off = 0.0, size = 0.0, worst = 0.0, largest = 0.0;
  for (size_t i = 0; i < found.size(); ++i) {
    if (!std::isfinite(found[i])) {
      complain("%s[%zu] is not finite", name, i);
      return 0.0;
    }
    const double d = found[i] - expected[i];
    off += d * d;
    size += expected[i] * expected[i];
    worst = std::max(worst, std::abs(d));
    largest = std::max(largest, std::abs(expected[i]));
  }
  off = std::sqrt(off);
  size = std::sqrt(size);
  if (!(off <= tolerance * std::max(size, floor))) {
    complain("%s is off by %.3g of %.3g (largest element %.3g of %.3g), allowed %.2g", name, off, size, worst, largest,
             tolerance);
  }
  return size > 0.0 ? off / size : off;
}

inline void equal(const char* name, const Values& found, const Values& expected) {
  close_elements(name, found, expected, 0.0, 0.0);
}

// The share of elements that are the very value of T next to the reference; what a bound per element cannot see.
template <class T>
void mostly_nearest(const char* name, const Values& found, const Values& expected, double share) {
  size_t same = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    same += found[i] == to_double(from_double<T>(expected[i]));
  }
  if (static_cast<double>(same) < share * static_cast<double>(found.size())) {
    complain("%s is the nearest value in %zu of %zu elements only", name, same, found.size());
  }
}

// One rounding to T at the end of a float32 computation: half a unit in the last place, and what float32 adds.
template <class T>
inline constexpr double kOneRounding = sizeof(T) == 2 ? 0.502 / 128 : 4e-6;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  Values normal(size_t n, double scale = 1.0, double mean = 0.0) {
    Values out(n);
    std::normal_distribution<double> distribution(mean, scale);
    for (auto& x : out) {
      x = distribution(engine_);
    }
    return out;
  }
  Values uniform(size_t n, double low, double high) {
    Values out(n);
    std::uniform_real_distribution<double> distribution(low, high);
    for (auto& x : out) {
      x = distribution(engine_);
    }
    return out;
  }
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }

 private:
  std::mt19937 engine_;
};

// The values as T stores them.
template <class T>
Values stored(const Values& values) {
  Values out;
  out.reserve(values.size());
  for (double x : values) {
    out.push_back(to_double(from_double<T>(x)));
  }
  return out;
}

inline Values stored(const Values& values, DType dtype) {
  return dtype == DType::kBf16 ? stored<Bf16>(values) : stored<float>(values);
}

// The largest magnitude; NaN does not count.
inline double largest(const Values& values) {
  double out = 0.0;
  for (double x : values) {
    out = std::isnan(x) ? out : std::max(out, std::abs(x));
  }
  return out;
}

inline Values part(const Values& values, size_t first, size_t count) {
  const auto begin = values.begin() + static_cast<ptrdiff_t>(first);
  return Values(begin, begin + static_cast<ptrdiff_t>(count));
}

inline void append(Values& to, const Values& values) { to.insert(to.end(), values.begin(), values.end()); }

// Rows of `width` values with `gap` values behind each.
inline Values spaced(const Values& rows, size_t width, size_t gap, double between) {
  Values out;
  for (size_t at = 0; at < rows.size(); at += width) {
    append(out, part(rows, at, width));
    out.insert(out.end(), gap, between);
  }
  return out;
}

inline double sigmoid64(double x) { return 1.0 / (1.0 + std::exp(-x)); }

inline int finish(const char* family) {
  if (failures() > 0) {
    std::fprintf(stderr, "%s: %d checks failed\n", family, failures());
    return 1;
  }
  std::printf("%s: all checks hold\n", family);
  return 0;
}

}  // namespace check
