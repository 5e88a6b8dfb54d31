"""What an operator is tested and timed with: inputs, our operator, and its float64 reference."""
from dataclasses import dataclass, field
from typing import Callable

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Problem:
    # Inputs that a gradient may reach, in the dtypes and strides that the operator gets them in.
    leaves: dict
    # Leaves to a tuple of outputs, one of them perhaps integers.
    ours: Callable
    # The same in float64, from leaves in float64 that hold the same rounded numbers.
    reference: Callable
    # Relative L2 error: of every output, and of every gradient; `bounds` has those of single gradients by name.
    output_bound: float
    gradient_bound: float
    bounds: dict = field(default_factory=dict)
    # Leaves that have no gradient.
    constant: tuple = ()
    # Called after the reference's backward: by name of a leaf, the size that its gradient's error is measured by, where that is
    # not the gradient's own: one number for the norm, or a tensor of the gradient's shape for every element.
    sizes: Callable = lambda: {}
    # Called with outputs and gradients of ours: complaints.
    exact: Callable = lambda outputs, gradients: []
    # What else the operator is given, for peers that are given the same.
    given: dict = field(default_factory=dict)
    # Whether matrix products of libtorch are inside, whose bits may depend on its settings.
    products: bool = False


class Random:
    """Draws on the CPU, so that every device sees the same numbers, and moves them there."""

    def __init__(self, seed, device):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)

    def normal(self, *shape, scale=1.0, mean=0.0):
        return self.put(torch.randn(shape, generator=self.generator) * scale + mean)

    def uniform(self, *shape, low=0.0, high=1.0):
        return self.put(torch.rand(shape, generator=self.generator) * (high - low) + low)

    def integers(self, high, *shape):
        return self.put(torch.randint(high, shape, generator=self.generator))

    def put(self, tensor):
        return tensor.to(self.device)


class FastRandom(Random):
    """Draws on the device: for shapes that are timed."""

    def __init__(self, seed, device):
        super().__init__(seed, device)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def normal(self, *shape, scale=1.0, mean=0.0):
        return torch.randn(shape, generator=self.generator, device=self.device).mul_(scale).add_(mean)

    def uniform(self, *shape, low=0.0, high=1.0):
        return torch.rand(shape, generator=self.generator, device=self.device).mul_(high - low).add_(low)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def rounded(x, dtype):
    """x as `dtype` stores it; the gradient passes as if it were x."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def values(kind, x):
    """Rows that an operator must stand: `x` is [rows, ..]."""
    if kind == "zero rows":
        x[::3] = 0
    elif kind == "huge rows":
        x[::3] *= 1e4
    elif kind == "far":
        x *= 30
    return x


def wide(x, gap, random):
    """A leaf whose first columns are x [rows, width], with `gap` more that belong to something else; and how to get x of it."""
    if not gap:
        return x, lambda leaf: leaf
    width = x.shape[-1]
    both = torch.cat([x, random.normal(*x.shape[:-1], gap).to(x.dtype)], -1)
    return both, lambda leaf: leaf[..., :width]


def borders(fields, random):
    """cu_seqlens of a pack, on the device."""
    total, out = 0, [0]
    for length in fields["lengths"]:
        total += length
        out.append(total)
    return random.put(torch.tensor(out, dtype=torch.int64 if fields["borders"] == "int64" else torch.int32))


def operator(name):
    return getattr(torch.ops.megatron_bridge, name)
