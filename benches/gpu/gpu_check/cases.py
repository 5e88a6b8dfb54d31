"""What every operator is tested with: a base case, and for each axis the values that replace a part of it.

Axes and values are those of the kernels' emulated tests and more: lengths that a CPU cannot bear. A case that costs little
(`Case.cost`) also runs on the emulation; the cheapest of each axis runs under the sanitizers.
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    operator: str
    axis: str
    fields: dict = field(hash=False)

    @property
    def name(self):
        changed = {key: value for key, value in self.fields.items() if value != BASES[self.operator].get(key)}
        told = ", ".join(f"{key} {short(value)}" for key, value in changed.items())
        return f"{self.operator}: {self.axis}{': ' + told if told else ''}"

    @property
    def cost(self):
        """Elements that the operator works on; what a test costs goes with it."""
        f = self.fields
        return COSTS[self.operator](f, sum(f.get("lengths", ())) + f.get("tail", 0))


def short(value):
    if isinstance(value, tuple) and len(value) > 8:
        return f"{len(value)} of {min(value)} to {max(value)}"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


# Three hundred sequences of 1 to 9 tokens, and 24 of 30 to 4000 that end at 16384: written out by a rule, so that runs are equal.
MANY = tuple(1 + (7 * i * i + 3 * i) % 9 for i in range(300))
RAGGED = tuple(30 + (i * 1327) % 3971 for i in range(24))
RAGGED_16K = tuple(max(1, length * 16384 // sum(RAGGED)) for length in RAGGED)

PACKS = [
    {"lengths": (1,)}, {"lengths": (64, 64)}, {"lengths": (1, 63, 65, 71)}, {"lengths": (0, 70, 130, 0)}, {"lengths": (0,)},
    {"lengths": (3, 0, 66), "tail": 70}, {"lengths": (2, 1, 4, 3), "tail": 1}, {"lengths": MANY}, {"lengths": RAGGED_16K},
    {"lengths": (1, 63, 65, 71), "borders": "int64"}, {"lengths": (5, 5), "borders": "int64"},
]
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 1000, 4097)

BASES = {
    "gated_delta_rule": {
        "lengths": (129,), "tail": 0, "borders": "int32", "key_heads": 1, "ratio": 1, "decay": "slow", "beta": "random",
        "keys": "random", "state": "none", "gates": "bfloat16", "slices": 0,
    },
    "gdn_core": {
        "lengths": (70,), "tail": 0, "borders": "int32", "key_heads": 1, "ratio": 4, "decay": "real", "state": "none",
        "parameters": "float32",
    },
    "causal_conv1d_silu": {
        "lengths": (65,), "tail": 0, "borders": "int32", "channels": 64, "dtype": "bfloat16", "weight": "bfloat16", "state": "none",
        "slices": 0,
    },
    "rms_norm": {"rows": 7, "dim": 256, "dtype": "bfloat16", "weight": "float32", "values": "random", "slices": 0},
    "add_rms_norm": {"rows": 7, "dim": 256, "dtype": "bfloat16", "weight": "float32", "values": "random"},
    "rms_norm_gated": {
        "rows": 9, "heads": 4, "dtype": "bfloat16", "weight": "float32", "values": "random", "slices": 0,
    },
    "swiglu": {"rows": 9, "dim": 80, "dtype": "bfloat16", "values": "random", "slices": 0},
    "mrope_table": {"tokens": 50, "dtype": "float32", "farthest": 5000},
    "mrope_": {"tokens": 22, "heads": (4, 2), "dim": 128, "dtype": "bfloat16", "farthest": 5000},
    "route": {"tokens": 53, "experts": 16, "top_k": 4, "dtype": "bfloat16", "logits": "random"},
    "routed_experts": {
        "tokens": 53, "experts": 16, "top_k": 4, "hidden": 64, "inner": 32, "routing": "random", "shared": False,
    },
    "linear_cross_entropy": {
        "tokens": 37, "hidden": 64, "vocabulary": 256, "dtype": "bfloat16", "targets": "some ignored", "scale": 1.0,
    },
    "adamw": {"sizes": (300, 65536 + 7), "dtype": "bfloat16", "masters": True, "eight_bit": False, "clip": 1.0, "steps": 3},
}

DTYPES = [{"dtype": dtype, "weight": weight} for dtype in ("bfloat16", "float32") for weight in ("bfloat16", "float32")]
AXES = {
    "gated_delta_rule": {
        # Several heads: a gradient of one token is a dot product that may happen to cancel.
        "length": [{"lengths": (n,), "decay": "real", "key_heads": 8 if n < 16 else 4} for n in LENGTHS],
        "pack": [{**pack, "decay": "real", "state": "both", "ratio": 2} for pack in PACKS],
        "heads": [{"lengths": (70, 0, 65), "tail": 3, "key_heads": k, "ratio": r}
                  for k in (1, 2, 16) for r in (1, 2, 3, 4)],
        "decay": [{"lengths": (130,), "decay": decay, "state": "both"}
                  for decay in ("none", "slow", "real", "-5", "-50", "mixed", "first")] + [{"lengths": (300,), "decay": "-50"}],
        "beta": [{"beta": beta, "state": "initial"} for beta in ("zero", "one", "thirty", "random")],
        "keys": [{"keys": keys, "state": "initial"} for keys in ("equal", "orthogonal", "correlated", "zero rows")]
                + [{"keys": "equal", "decay": "none"}],
        "state": [{"state": state} for state in ("none", "initial", "both", "final only", "unasked")],
        "layout": [{"slices": 24, "key_heads": 2, "ratio": 2}, {"gates": "float32"}, {"lengths": (65, 3), "borders": "int64"}],
        # A tensor-parallel shard of the largest model, and the heads of 9B.
        "model": [{"lengths": (1500, 700), "key_heads": k, "ratio": r, "decay": "real"} for k, r in ((2, 4), (16, 2))],
    },
    "gdn_core": {
        "pack": PACKS,
        "heads": [{"lengths": (70, 0, 65), "tail": 3, "key_heads": k, "ratio": r} for k, r in ((1, 4), (2, 2), (4, 1), (2, 4), (16, 3))],
        "state": [{"state": "both"}, {"lengths": (3, 0, 66), "tail": 5, "state": "both"}],
        "parameters": [{"parameters": "bfloat16"}],
        "model": [{"lengths": (1500, 700), "key_heads": 16, "ratio": 2}],
    },
    "causal_conv1d_silu": {
        "length": [{"lengths": (n,)} for n in LENGTHS],
        "short": [{"lengths": (0, 1, 2, 3, 4, 5), "state": state} for state in ("none", "initial")],
        "pack": [{**pack, "state": "initial"} for pack in PACKS],
        "dtype": DTYPES,
        "layout": [{"slices": 32}, {"slices": 32, "state": "initial"}],
        "model": [{"lengths": (700, 324), "channels": channels} for channels in (6144, 8192, 10240, 12288)],
    },
    "rms_norm": {
        "dim": [{"dim": dim} for dim in (8, 64, 128, 1024, 1032, 2048, 2560, 4096, 5120, 8192)],
        "rows": [{"rows": rows} for rows in (1, 264, 2000)],
        "values": [{"values": values} for values in ("zero rows", "huge rows")],
        "dtype": DTYPES,
        "layout": [{"slices": 16, "dim": 64}],
    },
    "add_rms_norm": {
        "dim": [{"dim": dim} for dim in (8, 1024, 2048, 5120)],
        "values": [{"values": values} for values in ("zero rows", "huge rows")],
        "dtype": DTYPES,
    },
    "rms_norm_gated": {
        "heads": [{"heads": heads} for heads in (1, 2, 3, 16, 64)],
        "rows": [{"rows": rows} for rows in (1, 600)],
        "values": [{"values": values} for values in ("zero rows", "huge rows")],
        "dtype": DTYPES,
        "layout": [{"slices": 40}],
    },
    "swiglu": {
        "dim": [{"dim": dim} for dim in (8, 3584, 12288, 17408)],
        "values": [{"values": "far"}],
        "dtype": [{"dtype": "float32"}],
        "layout": [{"slices": 16}],
    },
    "mrope_table": {"dtype": [{"dtype": "bfloat16"}], "far": [{"farthest": 200000}], "tokens": [{"tokens": 1}, {"tokens": 5000}]},
    "mrope_": {
        "heads": [{"heads": heads} for heads in ((8, 2), (16, 4), (24, 4), (32, 2))],
        "dim": [{"dim": dim} for dim in (64, 256)],
        "dtype": [{"dtype": "float32"}],
        "far": [{"farthest": 200000}],
        "tokens": [{"tokens": 1}, {"tokens": 3000}],
    },
    "route": {
        "experts": [{"experts": e, "top_k": k} for e, k in ((8, 2), (8, 8), (16, 1), (256, 8), (512, 10), (512, 32))],
        "logits": [{"logits": logits} for logits in ("ties", "equal", "-inf", "one for all", "far")]
                  + [{"logits": logits, "experts": 512, "top_k": 10} for logits in ("ties", "equal")],
        "dtype": [{"dtype": "float32"}],
        "tokens": [{"tokens": 1}, {"tokens": 4096, "experts": 256, "top_k": 8}],
    },
    "routed_experts": {
        "routing": [{"routing": routing, "top_k": k} for routing, k in (("empty experts", 4), ("one for all", 1), ("zipf", 4))],
        "shared": [{"shared": True}],
        "size": [{"hidden": 8, "inner": 8}, {"tokens": 1}, {"tokens": 2000, "experts": 256, "top_k": 8, "hidden": 512, "inner": 128},
                 {"tokens": 500, "experts": 512, "top_k": 10, "hidden": 256, "inner": 64}],
    },
    "linear_cross_entropy": {
        "targets": [{"targets": targets} for targets in ("all ignored", "ends", "none ignored")],
        "vocabulary": [{"vocabulary": v} for v in (5, 255, 257, 1001, 32001, 248320)],
        "scale": [{"scale": 60.0}],
        "dtype": [{"dtype": "float32"}, {"dtype": "float32", "vocabulary": 1001}],
        "tokens": [{"tokens": 1}, {"tokens": 2500, "vocabulary": 248320}],  # two blocks of logits
    },
    "adamw": {
        "state": [{"masters": False}, {"masters": True, "eight_bit": True}, {"dtype": "float32", "masters": False}],
        "clip": [{"clip": 0.0}],
        "size": [{"sizes": (1,)}, {"sizes": (255, 256, 257, 3)}, {"sizes": tuple(range(1, 300))}],
    },
}

D = 128  # of the delta rule's heads
COSTS = {
    "gated_delta_rule": lambda f, t: t * f["key_heads"] * f["ratio"] * D * D,
    "gdn_core": lambda f, t: t * f["key_heads"] * f["ratio"] * D * D,
    "causal_conv1d_silu": lambda f, t: t * f["channels"],
    "rms_norm": lambda f, _: f["rows"] * f["dim"],
    "add_rms_norm": lambda f, _: f["rows"] * f["dim"],
    "rms_norm_gated": lambda f, _: f["rows"] * f["heads"] * D,
    "swiglu": lambda f, _: f["rows"] * f["dim"],
    "mrope_table": lambda f, _: f["tokens"] * 32,
    "mrope_": lambda f, _: f["tokens"] * sum(f["heads"]) * 64,
    "route": lambda f, _: f["tokens"] * f["experts"],
    "routed_experts": lambda f, _: f["tokens"] * f["top_k"] * f["hidden"] * f["inner"],
    "linear_cross_entropy": lambda f, _: f["tokens"] * f["hidden"] * f["vocabulary"],
    "adamw": lambda f, _: sum(f["sizes"]) * f["steps"],
}
# What a CPU bears in a second or so: elements of the delta rule's state products, and of everything else.
SMALL = {"gated_delta_rule": 560 * D * D, "gdn_core": 600 * D * D, "routed_experts": 1e6, "linear_cross_entropy": 4e6, "adamw": 1e6}
SMALL_ELSE = 60_000


def all_cases(operators=()):
    """Every case of `operators`, or of all."""
    for operator, axes in AXES.items():
        if operators and operator not in operators:
            continue
        yield Case(operator, "base", BASES[operator])
        for axis, values in axes.items():
            for value in values:
                yield Case(operator, axis, {**BASES[operator], **value})


def small_cases(operators=()):
    """Those that the emulation bears."""
    return [case for case in all_cases(operators) if case.cost <= SMALL.get(case.operator, SMALL_ELSE)]


def smallest_cases(operators=()):
    """The cheapest of every axis that has any work, for the sanitizers."""
    best = {}
    for case in small_cases(operators):
        key = (case.operator, case.axis)
        if case.cost and (key not in best or case.cost < best[key].cost):
            best[key] = case
    return list(best.values())
