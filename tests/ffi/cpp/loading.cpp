// What loading gives, beside the bytes that the goldens say.
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "cases.hpp"

using namespace cases;

namespace {

constexpr const char* kRouter = "language_model.decoder.layers.0.mlp.router.weight";
constexpr const char* kGate = "language_model.decoder.layers.0.mlp.shared_experts.gate_weight";

std::vector<float> whole(const mb::Plan& plan, const std::string& name) {
  std::size_t count = 1;
  for (std::size_t size : plan.at(name).shape) {
    count *= size;
  }
  std::vector<float> values(count);
  plan.load(name, values.data(), count * 4, mb::Dtype::f32);
  return values;
}

}  // namespace

BRIDGE_CASE(a_provider_says_all_of_it) {
  const mb::Provider provider = mb::Checkpoint::open(args.checkpoint).provider();
  BRIDGE_CHECK_EQ(provider.class_name(), "Qwen35VLMoEModelProvider");
  BRIDGE_CHECK_EQ(provider.num_layers(), 8);
  BRIDGE_CHECK_EQ(provider.linear_attention_freq().size(), 8u);
  BRIDGE_CHECK_EQ(provider.num_moe_experts().value(), provider.integer("num_moe_experts"));
  BRIDGE_CHECK_EQ(provider.normalization(), "RMSNorm");
  BRIDGE_CHECK(provider.layernorm_epsilon() > 0);
  BRIDGE_CHECK(provider.gated_linear_unit());
  BRIDGE_CHECK_EQ(provider.mrope_section().value().size(), 3u);
  for (const std::string& field : provider.fields()) {
    BRIDGE_CHECK(provider.json().find("\"" + field + "\":") != std::string::npos);
  }
}

BRIDGE_CASE(a_layout_is_explained) {
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  mb::ParallelLayout layout;
  layout.tensor_model_parallel_size = 2;
  layout.pipeline_model_parallel_size = 2;
  layout.virtual_pipeline_model_parallel_size = 2;
  layout.expert_model_parallel_size = 2;
  layout.data_parallel_size = 2;
  layout.make_vocab_size_divisible_by = 96;
  const mb::LayoutInfo info = checkpoint.layout(layout);
  BRIDGE_CHECK_EQ(info.world_size, 8u);
  BRIDGE_CHECK_EQ(info.data_parallel_size, 2u);
  BRIDGE_CHECK_EQ(info.expert_data_parallel_size, 2u);
  BRIDGE_CHECK_EQ(info.virtual_pipeline_model_parallel_size, 2u);
  BRIDGE_CHECK_EQ(info.padded_vocab_size % 192, 0u);
  BRIDGE_CHECK_EQ(info.pipeline_model_parallel_layout, "Ett|tt|tt|ttmL");
  mb::RankCoord rank;
  rank.tp_rank = 1;
  rank.pp_rank = 1;
  rank.ep_rank = 1;
  rank.vp_stage = 1;
  const mb::RankPlace place = checkpoint.plan(layout, rank).place();
  BRIDGE_CHECK_EQ(place.pp_rank, 1u);
  BRIDGE_CHECK_EQ(place.tp_rank, 1u);
  BRIDGE_CHECK_EQ(place.ep_rank, 1u);
  BRIDGE_CHECK_EQ(place.vp_stage, 1u);
  BRIDGE_CHECK_EQ(checkpoint.plan(layout, mb::RankCoord::of(place.global_rank)).place().tp_rank,
                  1u);
}

BRIDGE_CASE(one_by_one_is_all_at_once) {
  const mb::Plan plan = mb::Checkpoint::open(args.checkpoint).plan();
  Memory memory(plan.tensors());
  const mb::LoadReport report = plan.load_all(memory.destinations());
  BRIDGE_CHECK_EQ(report.bytes, plan.bytes());
  BRIDGE_CHECK(report.seconds > 0);
  for (std::size_t at = 0; at < plan.size(); ++at) {
    std::vector<double> one(memory.data[at].size());
    plan.load(plan[at].name, one.data(), plan[at].bytes, plan[at].dtype);
    BRIDGE_CHECK(std::memcmp(one.data(), memory.data[at].data(), plan[at].bytes) == 0);
  }
}

// Rows of one tensor into columns of a larger one, ranges of rows, two tensors that take turns.
BRIDGE_CASE(rows_go_where_they_are_wanted) {
  const mb::Plan plan = mb::Checkpoint::open(args.checkpoint).plan();
  const std::vector<float> router = whole(plan, kRouter);
  const std::vector<float> gate = whole(plan, kGate);
  const std::size_t rows = plan.at(kRouter).shape[0];
  const std::size_t columns = plan.at(kRouter).shape[1];
  BRIDGE_CHECK_EQ(plan.at(kGate).shape[1], columns);
  const std::size_t width = columns + 3;
  std::vector<float> wide(rows * width, -5.0f);
  mb::Destination strided;
  strided.name = kRouter;
  strided.data = wide.data() + 1;
  strided.bytes = ((rows - 1) * width + columns) * 4;
  strided.dtype = mb::Dtype::f32;
  strided.row_stride_bytes = width * 4;
  plan.load(strided);
  for (std::size_t row = 0; row < rows; ++row) {
    const float* at = wide.data() + row * width;
    BRIDGE_CHECK(std::memcmp(at + 1, router.data() + row * columns, columns * 4) == 0);
    BRIDGE_CHECK(at[0] == -5.0f && at[width - 2] == -5.0f && at[width - 1] == -5.0f);
  }
  // The second and third row only, and between the rows those of another tensor.
  std::vector<float> turns(3 * columns, -5.0f);
  mb::Destination two = strided;
  two.data = turns.data();
  two.first_row = 1;
  two.num_rows = 2;
  two.row_stride_bytes = 2 * columns * 4;
  two.bytes = 3 * columns * 4;
  mb::Destination between;
  between.name = kGate;
  between.data = turns.data() + columns;
  between.bytes = columns * 4;
  between.dtype = mb::Dtype::f32;
  mb::LoadOptions options;
  options.partial = true;
  const mb::Destination both[] = {two, between};
  BRIDGE_CHECK_EQ(plan.load_all(both, options).bytes, 3 * columns * 4);
  BRIDGE_CHECK(std::memcmp(turns.data(), router.data() + columns, columns * 4) == 0);
  BRIDGE_CHECK(std::memcmp(turns.data() + columns, gate.data(), columns * 4) == 0);
  BRIDGE_CHECK(std::memcmp(turns.data() + 2 * columns, router.data() + 2 * columns, columns * 4) ==
               0);
  mb::Destination nothing = two;
  nothing.data = nullptr;
  nothing.num_rows = 0;
  nothing.bytes = 0;
  plan.load(nothing);
}

BRIDGE_CASE(values_are_cast_on_the_way) {
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  const mb::Plan plan = checkpoint.plan();
  const std::vector<float> values = whole(plan, kRouter);
  std::vector<std::uint16_t> narrow(values.size());
  std::vector<double> wide(values.size());
  const std::vector<mb::Destination> both = {
      {kRouter, narrow.data(), narrow.size() * 2, mb::Dtype::bf16},
      {kRouter, wide.data(), wide.size() * 8, mb::Dtype::f64},
  };
  mb::LoadOptions options;
  options.partial = true;
  BRIDGE_CHECK_EQ(plan.load_all(both, options).rounded, 1u);
  for (std::size_t at = 0; at < values.size(); ++at) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &values[at], 4);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    BRIDGE_CHECK_EQ(narrow[at], rounded);
    BRIDGE_CHECK_EQ(wide[at], static_cast<double>(values[at]));
  }
  mb::ParallelLayout layout;
  layout.params_dtype = mb::Dtype::bf16;
  BRIDGE_CHECK(checkpoint.plan(layout).at(kRouter).dtype == mb::Dtype::bf16);
  BRIDGE_CHECK_EQ(mb::size_bytes(mb::Dtype::bf16), 2u);
  BRIDGE_CHECK_EQ(mb::to_string(mb::Dtype::bf16), "bfloat16");
  BRIDGE_CHECK_EQ(mb::size_bytes(static_cast<mb::Dtype>(0)), 0u);
}

BRIDGE_CASE(progress_ends_with_everything) {
  const mb::Plan plan = mb::Checkpoint::open(args.checkpoint).plan();
  Memory memory(plan.tensors());
  for (std::size_t threads : {0, 1, 2}) {
    mb::LoadOptions options;
    options.threads = threads;
    mb::Progress last;
    options.progress = [&](const mb::Progress& progress) {
      BRIDGE_CHECK(progress.bytes_done >= last.bytes_done);
      BRIDGE_CHECK(progress.bytes_done <= progress.bytes_total);
      last = progress;
    };
    plan.load_all(memory.destinations(), options);
    BRIDGE_CHECK_EQ(last.bytes_done, plan.bytes());
    BRIDGE_CHECK_EQ(last.bytes_total, plan.bytes());
  }
}

// One plan, opened by a checkpoint that is gone, loaded by many threads at once.
BRIDGE_CASE(threads_share_a_plan) {
  std::optional<mb::Checkpoint> checkpoint = mb::Checkpoint::open(args.checkpoint);
  const mb::Plan plan = checkpoint->plan();
  checkpoint.reset();
  Memory expected(plan.tensors());
  plan.load_all(expected.destinations());
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int number = 0; number < 6; ++number) {
    threads.emplace_back([&, number, plan] {
      Memory memory(plan.tensors());
      mb::LoadOptions options;
      options.threads = 1 + number % 3;
      try {
        plan.load_all(memory.destinations(), options);
      } catch (const std::exception&) {
        ++wrong;
      }
      if (memory.data != expected.data) {
        ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  BRIDGE_CHECK_EQ(wrong.load(), 0);
}

BRIDGE_CASE(handles_are_values) {
  mb::Checkpoint one = mb::Checkpoint::open(args.checkpoint);
  mb::Checkpoint two = one;
  mb::Checkpoint three = std::move(one);
  one = two;
  two = std::move(three);
  mb::Plan plan = two.plan();
  mb::Plan other = plan;
  plan = std::move(other);
  BRIDGE_CHECK(!plan.empty());
  const std::vector<mb::Plan> stages = {plan, one.plan()};
  BRIDGE_CHECK_EQ(stages[0].bytes(), stages[1].bytes());
  BRIDGE_CHECK(!mb::version().empty());
}
