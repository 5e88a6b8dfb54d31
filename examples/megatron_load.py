#!/usr/bin/env python3
"""Fills a Megatron-Core model with a Hugging Face checkpoint: one call beside the job's own code.

    make torch-ops
    torchrun --nproc-per-node 2 examples/megatron_load.py --tp 2 --model DIR \\
        --library target/torch-ops/libmegatron_bridge_torch.so

DIR is a text-only Qwen3.5 checkpoint (Qwen3_5ForCausalLM). Needs torch and megatron-core. With Transformer Engine and
flash-linear-attention the model is the one that a job trains; without them, as on a machine without a GPU,
`without_transformer_engine` gives its layers Megatron-Core's plain modules under the same names.
"""
import argparse
import json
import os
import pathlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.ssm import gated_delta_net
from megatron.core.transformer import TransformerConfig

try:
    import transformer_engine  # noqa: F401

    TRANSFORMER_ENGINE = True
except ImportError:
    TRANSFORMER_ENGINE = False


def load(model, checkpoint, tp_size, library):
    """What a job adds: the operator library, once, and one call a checkpoint."""
    torch.ops.load_library(library)
    # Transformer Engine's `_extra_state` entries are no parameters, and some of them no tensors.
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_extra_state")}
    # Keys are Megatron's: tp, pp, vpp, cp, ep, etp and more. This job builds no head for multi-token prediction.
    layout = f"tp={tp_size},without_mtp=1"
    torch.ops.megatron_bridge.load_state_dict(str(checkpoint), layout, dist.get_rank(), tensors)
    return tensors


def transformer_config(text, tp_size):
    """Megatron-Core's names for what config.json says."""
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        num_attention_heads=text["num_attention_heads"],
        num_query_groups=text["num_key_value_heads"],
        kv_channels=text["head_dim"],
        layernorm_epsilon=text["rms_norm_eps"],
        attention_output_gate=True,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[int(kind == "linear_attention") for kind in text["layer_types"]],
        linear_conv_kernel_dim=text["linear_conv_kernel_dim"],
        linear_key_head_dim=text["linear_key_head_dim"],
        linear_value_head_dim=text["linear_value_head_dim"],
        linear_num_key_heads=text["linear_num_key_heads"],
        linear_num_value_heads=text["linear_num_value_heads"],
        tensor_model_parallel_size=tp_size,
        params_dtype=getattr(torch, text.get("dtype", "bfloat16")),
        transformer_impl="transformer_engine" if TRANSFORMER_ENGINE else "local",
        use_cpu_initialization=not on_gpu,
        # Every parameter is about to be loaded.
        perform_initialization=False,
    )


def build_model(text, tp_size):
    config = transformer_config(text, tp_size)
    if TRANSFORMER_ENGINE:
        from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
            get_transformer_block_with_experimental_attention_variant_spec,
        )

        spec = get_transformer_block_with_experimental_attention_variant_spec(config)
    else:
        spec = without_transformer_engine(config)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=text["vocab_size"],
        max_sequence_length=text["max_position_embeddings"],
        share_embeddings_and_output_weights=text["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_percent=text["rope_parameters"]["partial_rotary_factor"],
        rotary_base=text["rope_parameters"]["rope_theta"],
    )


def without_transformer_engine(config):
    """The layers of Transformer Engine's spec, with its parameters' names, out of Megatron-Core's own modules."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    # The parameters of a delta net need no kernels; its forward, which does, is not called here.
    gated_delta_net.HAVE_FLA = True
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")

    class Norm(torch.nn.Module):
        """RMSNorm times one plus the weight, as config.layernorm_zero_centered_gamma says."""

        def __init__(self, config, hidden_size, eps=1e-6, **_):
            super().__init__()
            self.eps = eps
            self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)

    class LayerNormColumnParallelLinear(ColumnParallelLinear):
        """Transformer Engine keeps the norm before a projection in the projection."""

        def __init__(self, input_size, output_size, *, config, **options):
            super().__init__(input_size, output_size, config=config, **options)
            self.layer_norm_weight = torch.nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype))

        def forward(self, x, *arguments, **options):
            normed = torch.nn.functional.rms_norm(
                x, self.layer_norm_weight.shape, 1 + self.layer_norm_weight, self.config.layernorm_epsilon
            )
            return super().forward(normed, *arguments, **options)

    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=LayerNormColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=Norm,
            k_layernorm=Norm,
        ),
    )
    delta_net = ModuleSpec(
        module=gated_delta_net.GatedDeltaNet,
        submodules=gated_delta_net.GatedDeltaNetSubmodules(
            in_proj=LayerNormColumnParallelLinear, out_norm=Norm, out_proj=RowParallelLinear
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=LayerNormColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    layers = [
        ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=IdentityOp,
                self_attention=delta_net if linear else attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=IdentityOp,
                mlp=mlp,
                mlp_bda=get_bias_dropout_add,
            ),
        )
        for linear in config.linear_attention_freq
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--library", required=True, help="libmegatron_bridge_torch.so of `make torch-ops`")
    parser.add_argument("--tp", type=int, default=1, help="tensor_model_parallel_size")
    parser.add_argument("--save", type=pathlib.Path, help="folder for the filled tensors, a .pt file a rank")
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=arguments.tp)
    if on_gpu:
        tensor_parallel.model_parallel_cuda_manual_seed(1234)

    text = json.loads((arguments.model / "config.json").read_text())
    model = build_model(text, arguments.tp)
    tensors = load(model, arguments.model, arguments.tp, arguments.library)
    print(f"rank {dist.get_rank()}: {len(tensors)} tensors loaded", flush=True)
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, arguments.save / f"rank_{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
