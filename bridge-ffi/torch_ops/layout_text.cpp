#include "layout_text.hpp"

#include <charconv>
#include <cstddef>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

namespace mb = megatron_bridge;

namespace {

[[noreturn]] void refuse(const std::string& message) {
  throw mb::Error(mb::ErrorCode::argument, message);
}

std::size_t number(std::string_view key, std::string_view value) {
  std::size_t number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size()) {
    refuse("`" + std::string(key) + "` of the layout is `" + std::string(value) +
           "`, but wants a number");
  }
  return number;
}

bool flag(std::string_view key, std::string_view value) {
  const std::size_t flag = number(key, value);
  if (flag > 1) {
    refuse("`" + std::string(key) + "` of the layout is " + std::string(value) + ", but is 0 or 1");
  }
  return flag == 1;
}

mb::Dtype dtype(std::string_view value) {
  for (const mb::Dtype dtype : {mb::Dtype::bf16, mb::Dtype::f16, mb::Dtype::f32, mb::Dtype::f64}) {
    if (mb::to_string(dtype) == value) {
      return dtype;
    }
  }
  refuse("`params_dtype` of the layout is `" + std::string(value) +
         "`, but is bfloat16, float16, float32 or float64");
}

using Layout = mb::ParallelLayout;
using Setter = std::function<void(Layout&, std::string_view key, std::string_view value)>;

Setter size(std::size_t Layout::* field) {
  return [field](Layout& layout, std::string_view key, std::string_view value) {
    layout.*field = number(key, value);
  };
}

Setter size(std::optional<std::size_t> Layout::* field) {
  return [field](Layout& layout, std::string_view key, std::string_view value) {
    layout.*field = number(key, value);
  };
}

Setter size(bool Layout::* field) {
  return [field](Layout& layout, std::string_view key, std::string_view value) {
    layout.*field = flag(key, value);
  };
}

struct Key {
  std::string_view name;
  /// Empty where there is none.
  std::string_view short_name;
  Setter set;
};

const std::vector<Key>& keys() {
  static const std::vector<Key> kKeys = {
      {"tensor_model_parallel_size", "tp", size(&Layout::tensor_model_parallel_size)},
      {"pipeline_model_parallel_size", "pp", size(&Layout::pipeline_model_parallel_size)},
      {"virtual_pipeline_model_parallel_size", "vpp",
       size(&Layout::virtual_pipeline_model_parallel_size)},
      {"context_parallel_size", "cp", size(&Layout::context_parallel_size)},
      {"expert_model_parallel_size", "ep", size(&Layout::expert_model_parallel_size)},
      {"expert_tensor_parallel_size", "etp", size(&Layout::expert_tensor_parallel_size)},
      {"data_parallel_size", "", size(&Layout::data_parallel_size)},
      {"world_size", "", size(&Layout::world_size)},
      {"num_layers_in_first_pipeline_stage", "", size(&Layout::num_layers_in_first_pipeline_stage)},
      {"num_layers_in_last_pipeline_stage", "", size(&Layout::num_layers_in_last_pipeline_stage)},
      {"account_for_embedding_in_pipeline_split", "",
       size(&Layout::account_for_embedding_in_pipeline_split)},
      {"account_for_loss_in_pipeline_split", "", size(&Layout::account_for_loss_in_pipeline_split)},
      {"make_vocab_size_divisible_by", "", size(&Layout::make_vocab_size_divisible_by)},
      {"sequential_experts", "", size(&Layout::sequential_experts)},
      {"without_mtp", "", size(&Layout::without_mtp)},
      {"params_dtype", "",
       [](Layout& layout, std::string_view, std::string_view value) {
         layout.params_dtype = dtype(value);
       }},
      {"pipeline_model_parallel_layout", "",
       [](Layout& layout, std::string_view, std::string_view value) {
         layout.pipeline_model_parallel_layout = std::string(value);
       }},
  };
  return kKeys;
}

const Key& find(std::string_view name) {
  for (const Key& key : keys()) {
    if (name == key.name || (!key.short_name.empty() && name == key.short_name)) {
      return key;
    }
  }
  std::string known;
  for (const Key& key : keys()) {
    known += (known.empty() ? "" : ", ") + std::string(key.name);
    known += key.short_name.empty() ? "" : " (" + std::string(key.short_name) + ")";
  }
  refuse("a layout has no `" + std::string(name) + "`; it has " + known);
}

}  // namespace

mb::ParallelLayout parse_layout(const std::string& text) {
  mb::ParallelLayout layout;
  std::vector<const Key*> seen;
  std::string_view rest = text;
  while (!rest.empty()) {
    const std::size_t equals = rest.find('=');
    if (equals == std::string_view::npos) {
      refuse("the layout ends in `" + std::string(rest) + "`, but is KEY=NUMBER parted by commas");
    }
    const Key& key = find(rest.substr(0, equals));
    for (const Key* earlier : seen) {
      if (earlier == &key) {
        refuse("the layout says `" + std::string(key.name) + "` twice");
      }
    }
    seen.push_back(&key);
    rest.remove_prefix(equals + 1);
    const bool takes_the_rest = key.name == "pipeline_model_parallel_layout";
    const std::size_t comma = takes_the_rest ? std::string_view::npos : rest.find(',');
    key.set(layout, key.name, rest.substr(0, comma));
    rest.remove_prefix(comma == std::string_view::npos ? rest.size() : comma + 1);
  }
  return layout;
}
