// The parameter tensors that Megatron-Core builds on one rank of a Qwen3.5-VL mixture of experts.
#pragma once

#include <cstdint>
#include <megatron_bridge/torch.hpp>

/// Sizes of the vision tower, of `vision_config` in config.json.
struct VisionConfig {
  std::int64_t depth = 2;
  std::int64_t hidden_size = 32;
  std::int64_t intermediate_size = 48;
  std::int64_t in_channels = 3;
  std::int64_t num_position_embeddings = 64;
  std::int64_t out_hidden_size = 64;
};

/// Sizes and coordinates of the job.
struct Job {
  std::int64_t tp_size = 1;
  std::int64_t pp_size = 1;
  std::int64_t ep_size = 1;
  std::int64_t etp_size = 1;
  std::int64_t pp_rank = 0;
};

/// Tensors of undefined content. They depend on no coordinate but the pipeline rank: experts count
/// from 0 on every rank, and all parts of a matrix have one shape.
megatron_bridge::StateDict build_parameters(const megatron_bridge::Provider& provider,
                                            const VisionConfig& vision, const Job& job,
                                            at::ScalarType params_dtype);
