"""Zero-centred RMSNorm, alone and behind a residual sum, and the gated norm of the delta net."""
import torch
import torch.nn.functional as F

from .problem import DTYPES, Problem, operator, rounded, values, wide

EPS = 1e-6


def norm(x, weight, eps=EPS):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def gated_norm(x, gate, weight, eps, dtype):
    """x, gate [tokens, heads, 128]: what is normalised is rounded to `dtype` before the weight, as the model has it."""
    n = rounded(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), dtype)
    return n * (1 + weight) * F.silu(gate)


def bounds(fields, output, gradient):
    """In float32 a few units of the last place; and the weight's gradient has the weight's own rounding."""
    exact = fields["dtype"] == "float32"
    weight = gradient if fields["weight"] == "bfloat16" else (1e-5 if exact else gradient)
    return (1e-5, 1e-5, {"weight": weight}) if exact else (output, gradient, {"weight": weight})


def rms_norm(fields, random):
    dtype = DTYPES[fields["dtype"]]
    x = values(fields["values"], random.normal(fields["rows"], fields["dim"])).to(dtype)
    leaf, narrow = wide(x, fields["slices"], random)
    leaves = {"x": leaf, "weight": random.normal(fields["dim"], scale=0.3).to(DTYPES[fields["weight"]])}
    return Problem(leaves, lambda x: (operator("rms_norm")(narrow(x["x"]), x["weight"], EPS),),
                   lambda x: (norm(narrow(x["x"]), x["weight"]),), *bounds(fields, 3e-3, 4e-3))


def add_rms_norm(fields, random):
    dtype = DTYPES[fields["dtype"]]
    shape = fields["rows"], fields["dim"]
    leaves = {"x": values(fields["values"], random.normal(*shape)).to(dtype),
              "residual": values(fields["values"], random.normal(*shape)).to(dtype),
              "weight": random.normal(fields["dim"], scale=0.3).to(DTYPES[fields["weight"]])}

    def reference(x):
        total = rounded(x["x"] + x["residual"], dtype)  # the new residual stream, which is what is normalised
        return norm(total, x["weight"]), total

    return Problem(leaves, lambda x: operator("add_rms_norm")(x["x"], x["residual"], x["weight"], EPS), reference,
                   *bounds(fields, 5e-3, 6e-3))


def rms_norm_gated(fields, random):
    dtype, rows, heads = DTYPES[fields["dtype"]], fields["rows"], fields["heads"]
    gate, narrow = wide(random.normal(rows, heads * 128, scale=2.0).to(dtype), fields["slices"], random)
    leaves = {"x": values(fields["values"], random.normal(rows, heads, 128)).to(dtype), "gate": gate,
              "weight": random.normal(128, scale=0.3).to(DTYPES[fields["weight"]])}

    def gates(x):
        return narrow(x["gate"]).unflatten(1, (heads, 128))

    return Problem(leaves, lambda x: (operator("rms_norm_gated")(x["x"], gates(x), x["weight"], EPS),),
                   lambda x: (gated_norm(x["x"], gates(x), x["weight"], EPS, dtype),), *bounds(fields, 4e-3, 5e-3))


PROBLEMS = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "rms_norm_gated": rms_norm_gated}
