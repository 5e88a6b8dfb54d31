//! Hugging Face Qwen3.5/3.6-VL checkpoints as Megatron-Core parameters, and back, with nothing lost.
