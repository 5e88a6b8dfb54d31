// A parallel layout in one line of text, for callers whose arguments are plain values.
#pragma once

#include <megatron_bridge/megatron_bridge.hpp>
#include <string>

/// Reads `KEY=NUMBER` parted by commas: `tp=2,pp=2,ep=8`. An empty text is one rank.
///
/// Keys are the fields of megatron_bridge::ParallelLayout and, short, tp, pp, vpp, cp, ep and etp.
/// `params_dtype` is `bfloat16`, `float16`, `float32` or `float64`. A
/// `pipeline_model_parallel_layout` stands last: its commas are its own.
///
/// @throws megatron_bridge::Error argument, with the keys that there are
megatron_bridge::ParallelLayout parse_layout(const std::string& text);
