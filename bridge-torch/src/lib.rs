//! The Qwen3.5/3.6-VL hybrid model on libtorch, with Megatron's parameter names and fused layout.

mod shim;
