"""The benchmark suite: rows of shapes, directions and peers. Goals are times as a share of the peer's: the first, and the final one.

A shape is a case of `families` at the sizes of a published model. Row numbers are those that reports and issues speak of.
"""
from dataclasses import dataclass, field

from .cases import BASES, RAGGED

# Key heads and value heads a key head. S1: 0.8B and 2B; S2: 4B, 9B and 35B-A3B; S3: 27B; S4: 122B-A10B and 397B-A17B.
CLASSES = {"S1": (16, 1), "S2": (16, 2), "S3": (16, 3), "S4": (16, 4)}
SHARDS = {"2/8": (2, 4), "4/16": (4, 4)}  # S4 in 8 and in 4 tensor-parallel ranks
TOKENS = (8192, 32768)
FORWARD, BACKWARD, BOTH, MEMORY = "forward", "backward", "forward and backward", "peak memory"


@dataclass(frozen=True)
class Row:
    number: int
    title: str
    operator: str  # a row of cases.BASES; empty while no kernel of ours is there: then peers are timed alone
    shapes: dict
    directions: tuple
    peers: dict  # name: (first goal, final goal)
    frozen: tuple = ()  # leaves that need no gradient
    note: str = ""
    fields: dict = field(default_factory=dict)  # of a row without an operator


def shape(operator, **fields):
    return {**BASES[operator], **fields}


def one(tokens):
    return (tokens,)


def eight(tokens):
    return (tokens // 8,) * 8


def ragged(tokens):
    """24 sequences of 30 to 4000 tokens, shrunk or stretched to `tokens`."""
    lengths = [max(30, length * tokens // sum(RAGGED)) for length in RAGGED]
    lengths[-1] += tokens - sum(lengths)
    return tuple(lengths)


def rules(classes, packs, tokens=TOKENS, **fields):
    shapes = {}
    for name, (key_heads, ratio) in classes.items():
        for count in tokens:
            for pack, make in packs.items():
                shapes[f"{name} {pack} {count}"] = shape("gated_delta_rule", lengths=make(count), key_heads=key_heads, ratio=ratio,
                                                         decay="real", **fields)
    return shapes


def some(*names):
    return {name: CLASSES[name] for name in names}


SLOW = {f"S2 one {count}, slow decay": shape("gated_delta_rule", lengths=one(count), key_heads=16, ratio=2) for count in TOKENS}
ALONE, EIGHT, PACK = ({"one": one}, {"eight": eight}, {"ragged": ragged})
EXPERTS = {"35B": dict(experts=256, top_k=8, hidden=2048, inner=512), "397B/EP8": dict(experts=64, top_k=10, hidden=4096, inner=1024)}


def expert_shapes(tokens=TOKENS):
    return {f"{name} {routing} {count}": shape("routed_experts", tokens=count, routing=routing, **sizes)
            for name, sizes in EXPERTS.items() for routing in ("random", "zipf") for count in tokens}


def losses(widths=(1024, 2048, 4096)):
    return {f"h {h}": shape("linear_cross_entropy", tokens=8192, hidden=h, vocabulary=248320) for h in widths}


CORE = {f"{name} one {count}": shape("gdn_core", lengths=one(count), key_heads=k, ratio=r)
        for name, (k, r) in CLASSES.items() for count in TOKENS}
NORM = {"dtype": "bfloat16", "weight": "bfloat16"}

ROWS = [
    Row(1, "delta rule, one sequence", "gated_delta_rule", rules(CLASSES, ALONE) | SLOW, (FORWARD,),
        {"flash_qla": (1.3, 0.85), "fla": (0.8, 0.45)}),
    Row(2, "delta rule, eight sequences", "gated_delta_rule", rules(some("S2", "S4"), EIGHT), (FORWARD,),
        {"flash_qla": (1.2, 0.9), "fla": (None, None)}),
    Row(3, "delta rule, ragged pack of 24", "gated_delta_rule", rules(some("S2", "S4"), PACK), (FORWARD,),
        {"flash_qla": (1.2, 0.8), "fla": (0.8, 0.45)}),
    Row(4, "delta rule, one sequence", "gated_delta_rule", rules(CLASSES, ALONE) | SLOW, (BACKWARD,),
        {"flash_qla": (1.2, 0.75), "fla": (0.7, 0.4)}),
    Row(5, "delta rule, eight sequences", "gated_delta_rule", rules(some("S2", "S4"), EIGHT), (BACKWARD,),
        {"flash_qla": (1.2, 0.75), "fla": (0.7, 0.4)}),
    Row(6, "delta rule, ragged pack of 24", "gated_delta_rule", rules(some("S2", "S4"), PACK), (BACKWARD,),
        {"flash_qla": (1.2, 0.75), "fla": (0.7, 0.4)}),
    Row(7, "delta rule, tensor-parallel shard", "gated_delta_rule", rules(SHARDS, ALONE, (32768,)), (FORWARD, BACKWARD),
        {"flash_qla": (1.5, 1.0), "fla": (None, None)}),
    Row(8, "GDN block, in_proj's output to out_proj's input", "gdn_core", CORE, (FORWARD, BACKWARD),
        {"fla": (0.8, 0.6), "fla + causal_conv1d": (0.8, 0.6), "flash_qla": (0.8, 0.6)}),
    Row(9, "causal convolution and SiLU, ragged pack", "causal_conv1d_silu",
        {f"{channels} channels": shape("causal_conv1d_silu", lengths=ragged(8192), channels=channels) for channels in (6144, 8192, 10240, 12288)},
        (FORWARD, BACKWARD), {"causal_conv1d": (1.0, 0.9), "fla": (1.0, 0.85)}),
    Row(10, "gated RMSNorm", "rms_norm_gated",
        {name: shape("rms_norm_gated", rows=8192, heads=k * r, **NORM) for name, (k, r) in CLASSES.items()},
        (FORWARD, BACKWARD), {"fla": (1.0, 0.9), "torch.compile": (1.0, 0.9)}, note="fla's weight is not zero-centred: time and error apart"),
    Row(11, "zero-centred RMSNorm", "rms_norm", {f"h {h}": shape("rms_norm", rows=8192, dim=h, **NORM) for h in (1024, 2048, 4096, 5120)},
        (FORWARD, BACKWARD), {"liger": (1.0, 0.95), "quack": (1.0, 0.95), "torch.compile": (1.0, 0.95)}),
    Row(11, "zero-centred RMSNorm behind a residual sum", "add_rms_norm",
        {f"h {h}": shape("add_rms_norm", rows=8192, dim=h, **NORM) for h in (1024, 2048, 4096, 5120)},
        (FORWARD, BACKWARD), {"liger": (1.0, 0.95), "torch.compile": (1.0, 0.95)}),
    Row(12, "mRoPE, 64 of 256 dimensions", "mrope_",
        {f"{q}/{k}": shape("mrope_", tokens=8192, heads=(q, k), dim=256) for q, k in ((8, 2), (16, 4), (24, 4), (32, 2))},
        (FORWARD,), {"torch.compile": (0.8, 0.4)}, note="in place; the gradient is the same launch"),
    Row(13, "SwiGLU", "swiglu", {f"{dim}": shape("swiglu", rows=8192, dim=dim) for dim in (3584, 12288, 17408)}, (FORWARD, BACKWARD),
        {"liger": (1.0, 0.95), "torch.compile": (1.0, 0.95)}),
    Row(14, "router", "route",
        {f"E {e} k {k}, {t}": shape("route", tokens=t, experts=e, top_k=k, logits="normal") for e, k in ((256, 8), (512, 10)) for t in TOKENS},
        (FORWARD, BACKWARD), {"torch": (0.6, 0.3), "torch.compile": (0.6, 0.3)}, note="the plan of dispatch is inside row 16"),
    Row(15, "grouped product, gate and up", "", {}, (FORWARD,), {"torch": (1.2, 0.8)}, note="no product of ours yet: libtorch's alone",
        fields=expert_shapes((8192,))),
    Row(16, "routed experts, dispatch to combine", "routed_experts", expert_shapes(), (FORWARD, BOTH),
        {"transformers": (1.0, 0.6), "torch": (1.0, 0.6)}),
    Row(17, "grouped product, weights' gradient", "", {}, (BACKWARD,), {"torch": (1.2, 0.85)}, note="no product of ours yet: libtorch's alone",
        fields=expert_shapes((8192,))),
    Row(18, "output layer and cross entropy", "linear_cross_entropy", losses(), (BOTH,),
        {"liger": (0.6, 0.4), "cce_exact": (0.8, 0.6), "cce": (None, None), "quack": (1.15, 1.0), "torch": (0.9, 0.8)}),
    Row(19, "output layer and cross entropy, frozen head", "linear_cross_entropy", losses(), (BOTH,), {"liger": (0.6, 0.4)}, ("weight",)),
    Row(20, "AdamW, 1e9 parameters in 300 tensors", "adamw",
        {"masters": shape("adamw", sizes=(3333333 // 8 * 8,) * 300, steps=1), "8-bit moments": shape("adamw", sizes=(3333333 // 8 * 8,) * 300, steps=1, eight_bit=True)},
        (FORWARD,), {"torch": (0.9, 0.8)}),
    Row(21, "peak memory: GDN block", "gdn_core", CORE, (MEMORY,), {"fla": (1.0, 0.7), "flash_qla": (1.0, 0.7)}),
    Row(21, "peak memory: routed experts", "routed_experts", expert_shapes(), (MEMORY,), {"transformers": (1.0, 0.7), "torch": (1.0, 0.7)}),
    Row(21, "peak memory: cross entropy", "linear_cross_entropy", losses(), (MEMORY,),
        {"liger": (1.0, 0.7), "cce_exact": (1.0, 0.7), "torch": (1.0, 0.7)}),
]

# What stands for the tokens of a shape, in the order in which `shrink` looks.
TOKEN_FIELDS = ("rows", "tokens")


def shrink(operator, fields, tokens, heads=None):
    """The same shape with at most `tokens` tokens: what a float64 reference can hold. Heads shrink for the emulation only."""
    small = dict(fields)
    if "lengths" in small:
        left, lengths = tokens, []
        for length in small["lengths"]:
            lengths.append(min(length, left))
            left -= lengths[-1]
        small["lengths"] = tuple(length for length in lengths if length)
    for name in TOKEN_FIELDS:
        if name in small:
            small[name] = min(small[name], tokens)
    if "sizes" in small:
        small["sizes"] = tuple(min(size, 70000) for size in small["sizes"][:4])
    if heads:
        limits = {"key_heads": heads, "channels": 64, "hidden": 64, "inner": 32, "vocabulary": 500, "dim": 128 if operator == "mrope_" else 256,
                  "experts": 16, "top_k": 4}
        small.update({name: min(small[name], limit) for name, limit in limits.items() if name in small})
        if isinstance(small.get("heads"), int):
            small["heads"] = min(small["heads"], 2)
    return small
