"""The gated activation."""
import torch.nn.functional as F

from .problem import DTYPES, Problem, operator, values, wide


def swiglu(fields, random):
    dim, dtype = fields["dim"], DTYPES[fields["dtype"]]
    leaf, narrow = wide(values(fields["values"], random.normal(fields["rows"], 2 * dim, scale=2.0)).to(dtype), fields["slices"], random)

    def reference(x):
        gate, up = narrow(x["x"]).chunk(2, -1)
        return (F.silu(gate) * up,)

    close = 1e-5 if fields["dtype"] == "float32" else 4e-3
    return Problem({"x": leaf}, lambda x: (operator("swiglu")(narrow(x["x"])),), reference, close, close)


PROBLEMS = {"swiglu": swiglu}
