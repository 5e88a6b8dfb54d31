//! The Qwen3.5/3.6-VL hybrid model on libtorch, with Megatron's parameter names and fused layout.

pub mod batch;
pub mod generate;
pub mod model;
pub mod ops;
pub mod optim;
pub mod params;
pub mod shim;
