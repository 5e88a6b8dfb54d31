// Every way in which opening, planning and loading fail.
#include <cstring>
#include <filesystem>
#include <thread>

#include "cases.hpp"

using namespace cases;
using mb::ErrorCode;

namespace {

constexpr const char* kNorm = "language_model.decoder.final_layernorm.weight";
constexpr const char* kRouter = "language_model.decoder.layers.0.mlp.router.weight";

}  // namespace

BRIDGE_CASE(a_directory_that_is_not_there) {
  fails(ErrorCode::io, {"/nowhere/config.json", "caused by: ", "No such file"},
        [&] { mb::Checkpoint::open(args.scratch + "/nowhere"); });
  fails(ErrorCode::io, {"holds neither model.safetensors"},
        [&] { mb::Checkpoint::open(args.scratch + "/config_only"); });
  fails(ErrorCode::io, {"model-00002-of-00003.safetensors"},
        [&] { mb::Checkpoint::open(args.scratch + "/missing_shard"); });
  fails(ErrorCode::checkpoint, {"is not valid JSON", "caused by: "},
        [&] { mb::Checkpoint::open(args.scratch + "/bad_config"); });
}

BRIDGE_CASE(a_reference_too_many_or_missing) {
  fails(ErrorCode::argument, {"is a torch_dist directory", "give the Hugging Face directory"},
        [&] { mb::Checkpoint::open(args.scratch + "/megatron"); });
  fails(ErrorCode::argument, {"a `reference`", "is for torch_dist directories"},
        [&] { mb::Checkpoint::open(args.checkpoint, {args.checkpoint}); });
  fails(ErrorCode::checkpoint, {"describes another model than the reference", "not_strict"},
        [&] { mb::Checkpoint::open(args.scratch + "/megatron", {args.more}); });
  // A config is enough of a reference.
  mb::Checkpoint::open(args.scratch + "/megatron", {args.checkpoint + "/config.json"});
}

BRIDGE_CASE(a_file_that_is_cut_short) {
  fails(ErrorCode::checkpoint, {"the copy or download was cut short"},
        [&] { mb::Checkpoint::open(args.scratch + "/cut"); });
  // Cut while it is open.
  const std::string dir = args.scratch + "/cut_later";
  const mb::Plan plan = mb::Checkpoint::open(dir).plan();
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    if (entry.path().extension() == ".safetensors") {
      std::filesystem::resize_file(entry.path(), 100'000);
    }
  }
  Memory memory(plan.tensors());
  fails(ErrorCode::checkpoint, {"cannot read", ".safetensors", "caused by: "},
        [&] { plan.load_all(memory.destinations()); });
}

BRIDGE_CASE(a_layout_that_does_not_fit) {
  const mb::Checkpoint checkpoint = mb::Checkpoint::open(args.checkpoint);
  mb::ParallelLayout layout;
  layout.tensor_model_parallel_size = 3;
  fails(ErrorCode::layout, {"is not divisible by TP 3 (tensor_model_parallel_size)"},
        [&] { checkpoint.plan(layout); });
  fails(ErrorCode::layout, {"is not divisible by TP 3"}, [&] { checkpoint.layout(layout); });
  layout.tensor_model_parallel_size = 0;
  fails(ErrorCode::layout, {"tensor_model_parallel_size is 0"}, [&] { checkpoint.plan(layout); });
  layout = {};
  layout.virtual_pipeline_model_parallel_size = 0;
  fails(ErrorCode::layout, {"virtual_pipeline_model_parallel_size is 0"},
        [&] { checkpoint.plan(layout); });
  layout = {};
  layout.data_parallel_size = 2;
  layout.world_size = 2;
  fails(ErrorCode::layout, {"data_parallel_size 2 and world_size 2 are both given"},
        [&] { checkpoint.plan(layout); });
  layout = {};
  layout.pipeline_model_parallel_layout = "Ex|L";
  fails(ErrorCode::layout, {"pipeline_model_parallel_layout cannot be read", "caused by: ", "'x'"},
        [&] { checkpoint.plan(layout); });
  layout.pipeline_model_parallel_layout = "E\xff";
  fails(ErrorCode::argument, {"pipeline_model_parallel_layout is not valid UTF-8"},
        [&] { checkpoint.plan(layout); });
  layout = {};
  layout.params_dtype = mb::Dtype::i32;
  fails(ErrorCode::dtype, {"params_dtype is I32"}, [&] { checkpoint.plan(layout); });
  layout.params_dtype = static_cast<mb::Dtype>(77);
  fails(ErrorCode::argument, {"dtype 77 is none of bridge_dtype"},
        [&] { checkpoint.plan(layout); });
  fails(ErrorCode::layout, {"rank 1 does not exist, there are 1"},
        [&] { checkpoint.plan({}, mb::RankCoord::of(1)); });
  fails(ErrorCode::layout, {"vp_stage 1 does not exist"},
        [&] { checkpoint.plan({}, mb::RankCoord::of(0, 1)); });
  mb::RankCoord rank;
  rank.tp_rank = 2;
  fails(ErrorCode::layout, {"tp_rank 2 does not exist"}, [&] { checkpoint.plan({}, rank); });
}

BRIDGE_CASE(a_tensor_that_there_is_not) {
  const mb::Plan plan = mb::Checkpoint::open(args.checkpoint).plan();
  BRIDGE_CHECK(plan.find("nothing") == nullptr);
  fails(ErrorCode::tensor,
        {"rank 0 has no tensor `language_model.decoder.final_layernorm.weigth` in virtual stage 0",
         std::string("did you mean `") + kNorm + "`?"},
        [&] { plan.at("language_model.decoder.final_layernorm.weigth"); });
  float value = 0;
  fails(ErrorCode::tensor, {"no tensor `nothing`"},
        [&] { plan.load("nothing", &value, 4, mb::Dtype::f32); });
  fails(ErrorCode::argument, {"the name of a tensor is not valid UTF-8: \\u{fffd}"},
        [&] { plan.load("\xff", &value, 4, mb::Dtype::f32); });
  Memory memory(plan.tensors());
  std::vector<mb::Destination> some = memory.destinations();
  some.resize(some.size() - 2);
  fails(ErrorCode::tensor,
        {"2 of the rank's tensors have no destination: `" + plan[plan.size() - 2].name + "`",
         "set partial"},
        [&] { plan.load_all(some); });
  mb::LoadOptions options;
  options.partial = true;
  BRIDGE_CHECK_EQ(plan.load_all(some, options).tensors, some.size());
  BRIDGE_CHECK_EQ(plan.load_all({}, options).tensors, 0u);
}

// Whatever is wrong is found before a byte is touched.
BRIDGE_CASE(memory_that_does_not_fit) {
  const mb::Plan plan = mb::Checkpoint::open(args.checkpoint).plan();
  const mb::TensorInfo& norm = plan.at(kNorm);
  const std::size_t count = norm.shape.at(0);
  std::vector<float> memory(2 * count, 7.0f);
  const std::size_t bytes = count * 4;
  const auto whole = [&] {
    mb::Destination destination;
    destination.name = kNorm;
    destination.data = memory.data();
    destination.bytes = bytes;
    destination.dtype = mb::Dtype::f32;
    return destination;
  };
  const auto refused = [&](ErrorCode code, const std::string& wanted,
                           const mb::Destination& destination) {
    fails(code, {wanted, kNorm}, [&] { plan.load(destination); });
    std::vector<mb::Destination> list;
    Memory rest(plan.tensors());
    for (const mb::Destination& one : rest.destinations()) {
      list.push_back(one.name == kNorm ? destination : one);
    }
    fails(code, {wanted, kNorm}, [&] { plan.load_all(list); });
    for (const std::vector<double>& tensor : rest.data) {
      for (double value : tensor) {
        BRIDGE_CHECK(value == 0.0);
      }
    }
  };
  mb::Destination one = whole();
  one.data = nullptr;
  refused(ErrorCode::argument, "is null", one);
  one = whole();
  one.bytes = bytes - 1;
  refused(ErrorCode::size, "rows of 4 bytes need " + std::to_string(bytes), one);
  one.bytes = bytes + 4;
  refused(ErrorCode::size, "has " + std::to_string(bytes + 4) + " bytes", one);
  one = whole();
  one.dtype = mb::Dtype::bf16;
  refused(ErrorCode::size, "BF16", one);
  one = whole();
  one.dtype = mb::Dtype::i32;
  refused(ErrorCode::dtype, "is of dtype I32", one);
  one.dtype = mb::Dtype::f8_e4m3;
  refused(ErrorCode::dtype, "is of dtype F8_E4M3", one);
  one = whole();
  one.data = reinterpret_cast<char*>(memory.data()) + 1;
  refused(ErrorCode::alignment, "is not a multiple of the 4 bytes of F32", one);
  one = whole();
  one.row_stride_bytes = 6;
  one.bytes = 6 * count;
  refused(ErrorCode::alignment, "row_stride_bytes", one);
  one.row_stride_bytes = 8;
  one.bytes = 8 * (count - 1) + 3;
  refused(ErrorCode::size, "8 bytes apart", one);
  one = whole();
  one.first_row = count;
  one.num_rows = 1;
  one.bytes = 4;
  refused(ErrorCode::size, "were asked for, it has " + std::to_string(count), one);
  for (float value : memory) {
    BRIDGE_CHECK_EQ(value, 7.0f);
  }
}

BRIDGE_CASE(memory_that_is_given_twice) {
  const mb::Plan plan = mb::Checkpoint::open(args.checkpoint).plan();
  const mb::TensorInfo& router = plan.at(kRouter);
  std::vector<float> memory(router.bytes / 4 + 1, 7.0f);
  mb::LoadOptions options;
  options.partial = true;
  const mb::TensorInfo& norm = plan.at(kNorm);
  std::vector<mb::Destination> list = {
      {kRouter, memory.data(), router.bytes, mb::Dtype::f32},
      {kNorm, memory.data() + router.bytes / 4 - norm.bytes / 4 + 1, norm.bytes, mb::Dtype::f32},
  };
  fails(ErrorCode::overlap, {kRouter, kNorm, "(destination 0)", "(destination 1) overlaps at 0x"},
        [&] { plan.load_all(list, options); });
  list[1] = list[0];
  fails(ErrorCode::overlap, {kRouter}, [&] { plan.load_all(list, options); });
  for (float value : memory) {
    BRIDGE_CHECK_EQ(value, 7.0f);
  }
}

BRIDGE_CASE(values_that_are_no_numbers) {
  const mb::Plan plan = mb::Checkpoint::open(args.scratch + "/not_finite").plan();
  Memory memory(plan.tensors());
  fails(ErrorCode::non_finite, {"element 3 of `model.language_model.norm.weight` is NaN"},
        [&] { plan.load_all(memory.destinations()); });
  fails(ErrorCode::non_finite, {"is NaN"}, [&] {
    std::vector<float> norm(plan.at(kNorm).bytes / 4);
    plan.load(kNorm, norm.data(), norm.size() * 4, mb::Dtype::f32);
  });
  mb::LoadOptions options;
  options.allow_non_finite = true;
  plan.load_all(memory.destinations(), options);
}

BRIDGE_CASE(work_that_is_cancelled) {
  const mb::Plan plan = mb::Checkpoint::open(args.checkpoint).plan();
  Memory memory(plan.tensors());
  mb::LoadOptions options;
  options.threads = 2;
  options.cancellation = mb::Cancellation();
  options.cancellation->cancel();
  BRIDGE_CHECK(options.cancellation->is_cancelled());
  fails(ErrorCode::cancelled, {"cancelled after 0 of " + std::to_string(plan.bytes()) + " bytes"},
        [&] { plan.load_all(memory.destinations(), options); });
  // From the callback, at the end at the latest: a copy shares the state.
  const mb::Cancellation shared;
  options.cancellation = shared;
  options.progress = [&](const mb::Progress&) { shared.cancel(); };
  try {
    plan.load_all(memory.destinations(), options);
    // The work had ended when it was asked to stop.
    BRIDGE_CHECK(shared.is_cancelled());
  } catch (const mb::Error& error) {
    BRIDGE_CHECK(error.code() == ErrorCode::cancelled);
  }
  // The same memory can be loaded afterwards.
  BRIDGE_CHECK_EQ(plan.load_all(memory.destinations()).tensors, plan.size());
}

struct Unusual {
  int number;
};

BRIDGE_CASE(a_callback_that_throws) {
  const mb::Plan plan = mb::Checkpoint::open(args.checkpoint).plan();
  Memory memory(plan.tensors());
  const std::thread::id here = std::this_thread::get_id();
  for (std::size_t threads : {1, 3}) {
    mb::LoadOptions options;
    options.threads = threads;
    options.progress = [&](const mb::Progress&) {
      BRIDGE_CHECK(std::this_thread::get_id() == here);
      throw Unusual{42};
    };
    int caught = 0;
    try {
      plan.load_all(memory.destinations(), options);
    } catch (const Unusual& unusual) {
      caught = unusual.number;
    }
    BRIDGE_CHECK_EQ(caught, 42);
  }
}

BRIDGE_CASE(fields_that_a_provider_lacks) {
  const mb::Provider provider = mb::Checkpoint::open(args.checkpoint).provider();
  fails(ErrorCode::argument, {"`num_layer` does not exist; did you mean `num_layers`?"},
        [&] { provider.integer("num_layer"); });
  fails(ErrorCode::argument, {"`num_layers` is 8, not a text"},
        [&] { provider.text("num_layers"); });
  fails(ErrorCode::argument, {"`ffn_hidden_size` is null for this model"},
        [&] { provider.integer("ffn_hidden_size"); });
  BRIDGE_CHECK(!provider.ffn_hidden_size());
  BRIDGE_CHECK(!provider.has("nothing"));
  BRIDGE_CHECK(!provider.optional_text("nothing"));
}

extern "C" std::int32_t bridge_forced_panic(struct bridge_error** error);
extern "C" const char* bridge_error_message(const struct bridge_error* error);
extern "C" void bridge_error_free(struct bridge_error* error);

BRIDGE_CASE(a_panic_does_not_cross) {
  struct bridge_error* error = nullptr;
  BRIDGE_CHECK_EQ(bridge_forced_panic(&error), 13);
  const std::string message = bridge_error_message(error);
  bridge_error_free(error);
  BRIDGE_CHECK_EQ(message, "the library has a defect, please report it: forced panic");
  BRIDGE_CHECK_EQ(bridge_forced_panic(nullptr), 13);
}
