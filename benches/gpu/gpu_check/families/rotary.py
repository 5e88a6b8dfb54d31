"""Rotary embedding in three axes: the angles of a step, and turning queries and keys by them."""
import torch

from .problem import DTYPES, Problem, operator

SECTION = (11, 11, 10)
THETA = 1e7


def frequencies(device):
    return (1.0 / THETA ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)).to(device)


def table(positions, steps):
    """cos and sin [batch, seq, 32] in float64. The angle is the float32 product that the model forms."""
    angle = (positions[..., None].float() * steps).double()
    index = torch.arange(32, device=positions.device)
    axis = torch.where((index % 3 == 1) & (index < 3 * SECTION[1]), 1, torch.where((index % 3 == 2) & (index < 3 * SECTION[2]), 2, 0))
    angle = angle.gather(0, axis.expand(1, *angle.shape[1:]))[0]
    return angle.cos(), angle.sin()


def turn(x, cos, sin):
    """x [.., heads, d]: dimension i of the first 64 with dimension i + 32."""
    first, second, rest = x[..., :32], x[..., 32:64], x[..., 64:]
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def positions(fields, random):
    return random.integers(fields["farthest"], 3, 1, fields["tokens"])


def mrope_table(fields, random):
    where, steps, dtype = positions(fields, random), frequencies(random.device), DTYPES[fields["dtype"]]
    # Angles are exact; what is left is the rounding of the result.
    close = 4e-3 if dtype is torch.bfloat16 else 1e-6
    return Problem({}, lambda _: operator("mrope_table")(where, steps, SECTION, dtype), lambda _: table(where, steps), close, close)


def mrope_(fields, random):
    dtype, tokens, (q_heads, k_heads) = DTYPES[fields["dtype"]], fields["tokens"], fields["heads"]
    where, steps = positions(fields, random), frequencies(random.device)
    cos, sin = operator("mrope_table")(where, steps, SECTION, dtype)
    leaves = {"q": random.normal(1, tokens, q_heads, fields["dim"]).to(dtype), "k": random.normal(1, tokens, k_heads, fields["dim"]).to(dtype)}

    def ours(x):
        # Fresh tensors, as the norms before it give: it turns them where they lie.
        return operator("mrope_")(x["q"] * 1.0, x["k"] * 1.0, cos, sin)

    def exact(outputs, _):
        return [f"{name} changed beyond its first 64 dimensions" for name, out in zip("qk", outputs)
                if not torch.equal(out[..., 64:], leaves[name][..., 64:])]

    close = 1e-6 if dtype is torch.float32 else 4e-3
    return Problem(leaves, ours, lambda x: tuple(turn(x[name], cos.double(), sin.double()) for name in "qk"), close, close, exact=exact,
                   given={"cos": cos, "sin": sin})


PROBLEMS = {"mrope_table": mrope_table, "mrope_": mrope_}
