"""What whole models are held to: the cases of tests/goldens/model and their bars, and models that the kernels take."""

CASES = ("text", "text_left_padding", "text_right_padding", "image", "images_and_none", "none_and_images_right", "video", "image_and_video",
         "length_1", "length_63", "length_64", "length_65", "length_130", "length_200", "image_batch")
MODELS = ("dense_vl", "moe_vl")
# (dtype, kernels): float64 never takes a kernel, float32 takes those of norm, rotary, SwiGLU and cross entropy.
WAYS = (("float64", "reference"), ("float32", "reference"), ("float32", "auto"))
# Gradients of `loss` in tests/goldens/model, and their float32 noise as its README states it: the worst of all.
GRADIENTS = {"dense_vl": ("", 2.5e-5), "moe_vl": ("-0 -1", 2.5e-4)}
BFLOAT16 = {"dense_vl_tied_bf16": ("text", "text_right_padding", "image")}
BFLOAT16_WAYS = (("bfloat16", "reference"), ("bfloat16", "auto"))

# Twenty steps of tests/goldens/train: bars of the loss and of the gradient's norm, each up to a step. Ten times those that goldens/README.md
# and tests/golden/training.rs state for a CPU: clipped Adam amplifies roundings, and a GPU adds in another order.
TRAINING = {
    "dense_vl": (((20, 3e-10),), ((20, 5e-9),)),
    "moe_vl": (((12, 1e-7), (17, 6e-6), (20, 3e-5)), ((12, 1e-5), (17, 2e-4), (20, 1e-3))),
}
# Steps of `trainer finetune` on the GPU that follow those on the CPU: (model, dtype, kernels, steps compared, bar of the loss).
FINETUNE = (
    ("dense_vl", "float32", "auto", 5, 1e-3),
    ("moe_vl", "float32", "reference", 3, 1e-3),
    ("moe_vl", "bfloat16", "auto", 3, 3e-2),
)
FINETUNE_STEPS = 20
FINETUNE_SETTINGS = ("learning_rate=1e-4", "lr_scheduler_type=constant", "per_device_train_batch_size=4", "seed=1")

# Sizes that the kernels take: heads of 128, 64 rotary dimensions. Every token goes to every expert, since a choice that flips with a
# rounding would drown what is compared.
SIZES = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "initializer_range": 0.05,
}
ROPE = {"partial_rotary_factor": 0.5, "mrope_section": [11, 11, 10]}
KERNEL_OPS = ("gdn", "linear_cross_entropy", "moe", "norm", "rotary", "swiglu")
