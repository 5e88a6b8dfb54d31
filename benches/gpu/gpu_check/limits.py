"""What a card cannot beat: bytes over copy speed, or operations over the rate of its matrix units, whichever takes longer."""
D, CHUNK = 128, 64
# Copy speed (bytes read and written a second) and bfloat16 products, as measured on such cards.
CEILINGS = {"NVIDIA H100 80GB HBM3": (3.0e12, 798e12), "NVIDIA H200": (4.3e12, 788e12)}


def rule(f, tokens):
    """Inputs, outputs and what the forward keeps; full squares of a chunk, as matrix units run them."""
    key_heads, heads = f["key_heads"], f["key_heads"] * f["ratio"]
    kept = heads * (2 * CHUNK + 4)
    inputs = 2 * (2 * key_heads * D + 2 * heads * D + 2 * heads)
    back = 2 * (4 * key_heads * D + 3 * heads * D + 4 * heads) + kept
    flop = tokens * heads
    return ((tokens * (inputs + kept), flop * (6 * D * D + 8 * CHUNK * D)),
            (tokens * back, flop * (16 * D * D + 22 * CHUNK * D)))


def conv(f, tokens):
    tensor = 2 * tokens * f["channels"]
    return (2 * tensor, 0), (3 * tensor, 0)


def core(f, tokens):
    """The rule, the convolution and the gated norm, each with its own traffic: what is left if they never share a pass."""
    heads = f["key_heads"] * f["ratio"]
    parts = (rule(f, tokens), conv({"channels": 2 * f["key_heads"] * D + heads * D}, tokens),
             gated_norm({"rows": tokens, "heads": heads}, 0))
    return tuple(tuple(sum(part[way][unit] for part in parts) for unit in (0, 1)) for way in (0, 1))


def gated_norm(f, _):
    tensor = 2 * f["rows"] * f["heads"] * D
    return (3 * tensor, 0), (5 * tensor, 0)


def norm(forward, backward):
    def bytes_of(f, _):
        tensor = 2 * f["rows"] * f["dim"]
        return (forward * tensor, 0), (backward * tensor, 0)
    return bytes_of


def mrope(f, _):
    moved = 2 * 2 * f["tokens"] * sum(f["heads"]) * 64
    return (moved, 0), (moved, 0)


def router(f, _):
    moved = f["tokens"] * (f["experts"] * 2 + f["top_k"] * 8)
    return (moved, 0), (2 * moved, 0)


def experts(f, _):
    """Every expert's weights once, activations once; the backward writes gradients of the weights in their dtype."""
    rows, weights = f["tokens"] * f["top_k"], 3 * f["experts"] * f["hidden"] * f["inner"]
    flop = 2 * 3 * rows * f["hidden"] * f["inner"]
    tensors = 2 * (2 * f["tokens"] * f["hidden"] + 3 * rows * f["inner"])
    return (2 * weights + tensors, flop), (4 * weights + 2 * tensors, 2 * flop)


def cross_entropy(f, _):
    """Logits, and the products of both gradients."""
    product = 2 * f["tokens"] * f["hidden"] * f["vocabulary"]
    return (0, product), (0, 2 * product)


def adamw(f, _):
    each = 28 if f["masters"] and not f["eight_bit"] else 16
    return (each * sum(f["sizes"]), 0), (0, 0)


WORK = {
    "gated_delta_rule": rule, "gdn_core": core, "causal_conv1d_silu": conv, "rms_norm": norm(2, 3), "add_rms_norm": norm(4, 4),
    "rms_norm_gated": gated_norm, "swiglu": norm(3, 5), "mrope_": mrope, "route": router, "routed_experts": experts,
    "linear_cross_entropy": cross_entropy, "adamw": adamw,
}


def work(operator, fields, direction, frozen=()):
    """(bytes, operations) of one call in `direction`."""
    forward, backward = WORK[operator](fields, sum(fields.get("lengths", ())) + fields.get("tail", 0))
    if frozen:
        backward = backward[0], backward[1] // 2
    return {"forward": forward, "backward": backward}.get(direction, tuple(a + b for a, b in zip(forward, backward)))


def limit_seconds(ceiling, amount):
    return max(amount[0] / ceiling[0], amount[1] / ceiling[1])
