// Reads the golden values of single operations: a safetensors file, everything as float64.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "check.hpp"

namespace check {

struct Golden {
  std::vector<int64_t> shape;
  Values values;
};

class Goldens {
 public:
  explicit Goldens(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    if (bytes.size() < 8) {
      emulation::fail("no goldens in %s", path.c_str());
    }
    uint64_t header = 0;
    std::memcpy(&header, bytes.data(), 8);
    const std::string json = bytes.substr(8, header);
    // Our own files: {"NAME":{"dtype":"F32","shape":[..],"data_offsets":[a,b]},...}, no escapes in names.
    size_t at = 0;
    while ((at = json.find("\"dtype\"", at)) != std::string::npos) {
      const size_t name_end = json.rfind("\":{", at);
      const size_t name_start = json.rfind('"', name_end - 1) + 1;
      const std::string name = json.substr(name_start, name_end - name_start);
      const size_t end = json.find('}', at);
      const std::string entry = json.substr(at, end - at);
      const std::string dtype = entry.substr(entry.find(":\"") + 2, entry.find("\",") - entry.find(":\"") - 2);
      Golden golden;
      golden.shape = numbers(entry, "\"shape\"");
      const std::vector<int64_t> span = numbers(entry, "\"data_offsets\"");
      const char* data = bytes.data() + 8 + header;
      const size_t width = dtype == "F32" || dtype == "I32" ? 4 : 8;
      for (int64_t i = span.at(0); i < span.at(1); i += static_cast<int64_t>(width)) {
        golden.values.push_back(element(data + i, dtype));
      }
      tensors_[name] = golden;
      at = end;
    }
  }

  const Golden& at(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      emulation::fail("no golden tensor %s", name.c_str());
    }
    return found->second;
  }

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }

  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& [name, golden] : tensors_) {
      out.push_back(name);
    }
    return out;
  }

 private:
  static std::vector<int64_t> numbers(const std::string& entry, const char* key) {
    std::vector<int64_t> out;
    const size_t at = entry.find(key);
    const size_t open = entry.find('[', at), close = entry.find(']', at);
    const std::string list = entry.substr(open + 1, close - open - 1);
    for (const char* p = list.c_str(); *p != 0;) {
      char* next = nullptr;
      out.push_back(std::strtoll(p, &next, 10));
      p = *next == ',' ? next + 1 : next;
      if (next == list.c_str() + list.size()) {
        break;
      }
    }
    return list.empty() ? std::vector<int64_t>{} : out;
  }

  template <class T>
  static double read(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return static_cast<double>(value);
  }

  static double element(const char* from, const std::string& dtype) {
    if (dtype == "F64") {
      return read<double>(from);
    }
    if (dtype == "F32") {
      return read<float>(from);
    }
    if (dtype == "I64") {
      return read<int64_t>(from);
    }
    if (dtype == "I32") {
      return read<int32_t>(from);
    }
    emulation::fail("no golden is stored as %s", dtype.c_str());
  }

  std::map<std::string, Golden> tensors_;
};

// A flat list repeated: small goldens in kernels that want wide rows.
inline Values repeated(const Values& row, size_t times) {
  Values out;
  for (size_t i = 0; i < times; ++i) {
    append(out, row);
  }
  return out;
}

// The lengths of the sequences of a golden: between its cu_seqlens, or `batch` times `seq`.
inline std::vector<int> lengths_of(const Goldens& goldens, const std::string& name, int64_t batch, int64_t seq) {
  if (!goldens.has(name + ".in.cu_seqlens")) {
    return std::vector<int>(static_cast<size_t>(batch), static_cast<int>(seq));
  }
  std::vector<int> out;
  const Values& borders = goldens.at(name + ".in.cu_seqlens").values;
  for (size_t i = 1; i < borders.size(); ++i) {
    out.push_back(static_cast<int>(borders[i] - borders[i - 1]));
  }
  return out;
}

}  // namespace check
