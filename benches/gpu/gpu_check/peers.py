"""Other people's kernels for the same problems, in their best form.

A peer of an operator is `make(fields, problem) -> (prepare, call)`: `prepare(leaves)` is what a user of the peer has at
hand already (gates of the delta rule) and is not timed; `call(prepared)` gives the outputs. Imports happen inside, so that a peer
that is not there costs a printed line.
"""
import importlib.metadata
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from .families.moe import choices
from .families.problem import Random

PEERS = {}
PACKAGES = {"fla": "fla-core", "flash_qla": "flash-qla", "liger": "liger-kernel", "cce_exact": "cut-cross-entropy", "cce": "cut-cross-entropy",
            "quack": "quack-kernels", "causal_conv1d": "causal-conv1d", "fla + causal_conv1d": "causal-conv1d", "transformers": "transformers"}


def peer(name, *operators):
    def add(make):
        for operator in operators:
            PEERS[name, operator] = make
        return make
    return add


def versions():
    """By package; None where it is not installed."""
    found = {}
    for package in ("torch", "triton", "tilelang", "flash-linear-attention", *dict.fromkeys(PACKAGES.values())):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def as_given(leaves):
    return leaves


def gates(leaves):
    """g, in float32 as peers want it, and beta."""
    g = -leaves["a_log"].float().exp() * F.softplus(leaves["a"].float() + leaves["dt_bias"].float())
    return {**{name: leaves[name] for name in ("q", "k", "v")}, "g": g, "beta": leaves["b"].sigmoid()}


def batch(x, width=128):
    """[1, tokens, heads, d] of [tokens, heads d]."""
    return x.unflatten(-1, (-1, width))[None]


def packed(problem, fields):
    """Borders as peers want them; a single sequence runs without, which is their best form."""
    return problem.given["cu_seqlens"].long() if len(fields["lengths"]) > 1 else None


def fla_rule():
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    return chunk_gated_delta_rule


def flash_qla_rule():
    from flash_qla import chunk_gated_delta_rule
    return chunk_gated_delta_rule


def rule_with(find):
    def make(fields, problem):
        rule, cu = find(), packed(problem, fields)

        def call(x):
            out, _ = rule(batch(x["q"]), batch(x["k"]), batch(x["v"]), x["g"][None], x["beta"][None], use_qk_l2norm_in_kernel=True, cu_seqlens=cu)
            return (out[0],)

        return gates, call
    return make


PEERS["fla", "gated_delta_rule"] = rule_with(fla_rule)
PEERS["flash_qla", "gated_delta_rule"] = rule_with(flash_qla_rule)


def fla_conv(x, weight, cu_seqlens, lengths):
    from fla.modules.causal_conv1d import causal_conv1d
    out = causal_conv1d(x[None], weight, activation="silu", backend="triton", cu_seqlens=cu_seqlens)
    return (out[0] if isinstance(out, tuple) else out)[0]


def cuda_conv(x, weight, cu_seqlens, lengths):
    """Channels last, with the number of its sequence for every token of a pack."""
    from causal_conv1d import causal_conv1d_fn
    numbers = None
    if cu_seqlens is not None:
        sizes = torch.tensor(lengths, device=x.device)
        numbers = torch.repeat_interleave(torch.arange(len(lengths), device=x.device, dtype=torch.int32), sizes)[None]
    return causal_conv1d_fn(x[None].mT, weight, activation="silu", seq_idx=numbers)[0].mT


def conv_with(convolve):
    def make(fields, problem):
        cu = packed(problem, fields)
        return as_given, lambda x: (convolve(x["x"], x["weight"], cu, fields["lengths"]),)
    return make


PEERS["fla", "causal_conv1d_silu"] = conv_with(fla_conv)
PEERS["causal_conv1d", "causal_conv1d_silu"] = conv_with(cuda_conv)


def core_with(find, convolve):
    """The block as it is assembled of a peer's parts: convolution, gates, rule, gated norm."""
    def make(fields, problem):
        from fla.modules.norm.fused_norm_gate import rms_norm_gated
        rule, cu = find(), packed(problem, fields)
        heads, keys = fields["key_heads"] * fields["ratio"], fields["key_heads"] * 128
        values = heads * 128

        def call(x):
            mixed, z, b, a = x["x"].split([2 * keys + values, values, heads, heads], 1)
            mixed = convolve(mixed.contiguous(), x["conv1d"], cu, fields["lengths"])
            q, k, v = mixed.split([keys, keys, values], 1)
            g = -x["a_log"].float().exp() * F.softplus(a.float() + x["dt_bias"].float())
            out, _ = rule(batch(q).contiguous(), batch(k).contiguous(), batch(v).contiguous(), g[None], b.sigmoid()[None].contiguous(),
                          use_qk_l2norm_in_kernel=True, cu_seqlens=cu)
            out = rms_norm_gated(out.reshape(-1, 128), z.reshape(-1, 128), 1 + x["out_norm"], None, eps=1e-6)
            return (out.view(-1, values),)

        return as_given, call
    return make


PEERS["fla", "gdn_core"] = core_with(fla_rule, fla_conv)
PEERS["fla + causal_conv1d", "gdn_core"] = core_with(fla_rule, cuda_conv)
PEERS["flash_qla", "gdn_core"] = core_with(flash_qla_rule, fla_conv)


@peer("fla", "rms_norm_gated")
def fla_gated_norm(fields, problem):
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    return (lambda x: {**x, "whole": 1 + x["weight"]},
            lambda x: (rms_norm_gated(x["x"].flatten(0, 1), x["gate"].view(-1, 128), x["whole"], None, eps=1e-6).view(x["x"].shape),))


@peer("liger", "rms_norm")
def liger_norm(fields, problem):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    return as_given, lambda x: (LigerRMSNormFunction.apply(x["x"], x["weight"], 1e-6, 1.0, "gemma", False),)


@peer("liger", "add_rms_norm")
def liger_add_norm(fields, problem):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    return as_given, lambda x: LigerFusedAddRMSNormFunction.apply(x["x"], x["residual"], x["weight"], 1e-6, 1.0, "gemma", False)


@peer("quack", "rms_norm")
def quack_norm(fields, problem):
    from quack.rmsnorm import rmsnorm
    return as_given, lambda x: (rmsnorm(x["x"], x["weight"], eps=1e-6, weight_offset=1.0),)


@peer("liger", "swiglu")
def liger_swiglu(fields, problem):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    return (lambda x: dict(zip(("gate", "up"), (part.contiguous() for part in x["x"].chunk(2, -1)))),
            lambda x: (LigerSiLUMulFunction.apply(x["gate"], x["up"]),))


# What a user writes in torch, which torch.compile then fuses.
def torch_norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight.float())).to(x.dtype)


def torch_add_norm(x, residual, weight):
    total = x + residual
    return torch_norm(total, weight), total


def torch_gated_norm(x, gate, weight):
    wide = x.float()
    n = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return (n * (1 + weight.float()) * F.silu(gate.view(x.shape).float())).to(x.dtype)


def torch_swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def torch_route(logits, top_k):
    weights, experts = logits.float().softmax(-1).topk(top_k)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts


def torch_turn(x, cos, sin):
    first, second, rest = x[..., :32], x[..., 32:64], x[..., 64:]
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def fused(function):
    """torch.compile for a graph whose backward is timed again and again, so that it must keep what it saved."""
    import torch._functorch.config
    torch._functorch.config.donated_buffer = False
    return torch.compile(function)


def compiled(function, *names):
    def make(fields, problem):
        fast = fused(function)

        def call(x):
            out = fast(*(x[name] for name in names))
            return out if isinstance(out, tuple) else (out,)

        return as_given, call
    return make


PEERS["torch.compile", "rms_norm"] = compiled(torch_norm, "x", "weight")
PEERS["torch.compile", "add_rms_norm"] = compiled(torch_add_norm, "x", "residual", "weight")
PEERS["torch.compile", "rms_norm_gated"] = compiled(torch_gated_norm, "x", "gate", "weight")
PEERS["torch.compile", "swiglu"] = compiled(torch_swiglu, "x")


@peer("torch.compile", "mrope_")
def compiled_turn(fields, problem):
    cos, sin = problem.given["cos"], problem.given["sin"]
    fast = fused(lambda q, k: (torch_turn(q, cos, sin), torch_turn(k, cos, sin)))
    return as_given, lambda x: fast(x["q"], x["k"])


@peer("torch", "route")
def plain_route(fields, problem):
    return as_given, lambda x: torch_route(x["logits"], fields["top_k"])


@peer("torch.compile", "route")
def compiled_route(fields, problem):
    fast = fused(lambda logits: torch_route(logits, fields["top_k"]))
    return as_given, lambda x: fast(x["logits"])


def sort_by_expert(choice, experts):
    order = choice.flatten().argsort(stable=True)
    counts = torch.bincount(choice.flatten(), minlength=experts)
    return order, counts.cumsum(0).int()


@peer("torch", "routed_experts")
def torch_experts(fields, problem):
    """_grouped_mm with the rows gathered before and added after, as a user of torch writes it."""
    choice, top_k = problem.given["choice"], fields["top_k"]

    def call(x):
        order, ends = sort_by_expert(choice, fields["experts"])
        rows = x["x"][order // top_k]
        gate, up = torch._grouped_mm(rows, x["fc1"].mT, offs=ends).chunk(2, -1)
        out = torch._grouped_mm(F.silu(gate) * up, x["fc2"].mT, offs=ends)
        out = out * x["weights"].flatten()[order, None]
        return (torch.zeros_like(x["x"]).index_add(0, order // top_k, out),)

    return as_given, call


@peer("transformers", "routed_experts")
def transformers_experts(fields, problem):
    from transformers.integrations.moe import grouped_mm_experts_forward
    choice = problem.given["choice"]

    def gated(pre):
        gate, up = pre.chunk(2, -1)
        return F.silu(gate) * up

    def call(x):
        module = SimpleNamespace(num_experts=fields["experts"], has_gate=True, has_bias=False, is_transposed=False, gate_up_proj=x["fc1"],
                                 down_proj=x["fc2"], _apply_gate=gated)
        return (grouped_mm_experts_forward(module, x["x"], choice, x["weights"]),)

    return as_given, call


def mean_loss(function):
    """Peers average over the targets that count, as our operator is told to."""
    def make(fields, problem):
        targets, run = problem.given["targets"], function()
        return as_given, lambda x: (run(x["hidden"], x["weight"], targets).float(),)
    return make


def liger_loss():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    return lambda hidden, weight, targets: LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]


def cce_loss(filter_eps):
    def find():
        from cut_cross_entropy import linear_cross_entropy
        return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, filter_eps=filter_eps)
    return find


def quack_loss():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy
    return lambda hidden, weight, targets: chunked_linear_cross_entropy(hidden, weight, targets, chunk_size=4096)


def torch_loss():
    """In blocks of 4096 tokens, each block's logits made again for its gradient."""
    from torch.utils.checkpoint import checkpoint

    def block(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=-100, reduction="sum")

    def run(hidden, weight, targets):
        parts = [checkpoint(block, one, weight, two, use_reentrant=False) for one, two in zip(hidden.split(4096), targets.split(4096))]
        return sum(parts) / (targets != -100).sum()

    return run


PEERS["liger", "linear_cross_entropy"] = mean_loss(liger_loss)
PEERS["cce_exact", "linear_cross_entropy"] = mean_loss(cce_loss(None))
PEERS["cce", "linear_cross_entropy"] = mean_loss(cce_loss("auto"))
PEERS["quack", "linear_cross_entropy"] = mean_loss(quack_loss)
PEERS["torch", "linear_cross_entropy"] = mean_loss(torch_loss)


@peer("torch", "adamw")
def torch_adamw(fields, problem):
    """Float32 masters by torch's fused AdamW, their gradients cast from bfloat16 before and the weights copied back behind."""
    weights = [x.clone() for x in problem.given["parameters"]]
    gradients = problem.given["gradients"]
    masters = [torch.nn.Parameter(x.float()) for x in weights]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def call(_):
        wide = [master.grad for master in masters]
        torch._foreach_copy_(wide, gradients)
        norm = torch.nn.utils.get_total_norm(wide)
        torch.nn.utils.clip_grads_with_norm_(masters, fields["clip"], norm)
        optimizer.step()
        torch._foreach_copy_(weights, [master.detach() for master in masters])
        return torch.cat([master.detach() for master in masters]) if len(masters) < 9 else masters[0].detach(), norm

    return as_given, call


def grouped_products(fields, device, direction):
    """libtorch's product of sorted rows with gate and up of their experts, or its weights' gradient: rows 15 and 17, alone."""
    choice = choices(fields["routing"], fields["tokens"], fields["experts"], fields["top_k"], Random(1, device))
    order, ends = sort_by_expert(choice, fields["experts"])
    rows = torch.randn(len(order), fields["hidden"], device=device, dtype=torch.bfloat16)
    weight = torch.randn(fields["experts"], 2 * fields["inner"], fields["hidden"], device=device, dtype=torch.bfloat16) / math.sqrt(fields["hidden"])
    grad = torch.randn(len(order), 2 * fields["inner"], device=device, dtype=torch.bfloat16)
    if direction == "forward":
        return lambda: torch._grouped_mm(rows, weight.mT, offs=ends)
    return lambda: torch._grouped_mm(grad.mT, rows, offs=ends)
