"""Runs cases: our operator beside its float64 reference, forward and gradients.

Of every case: relative L2 errors within the bounds of its family, no element further than 2 % of the largest in bfloat16, no NaN,
the same bits in two runs, and what a family demands exactly. In the first run every tensor that libtorch hands out without
writing it is NaN, so that an element or a workspace that is read or left unwritten shows.
"""
import contextlib
import time
import traceback
import warnings
from dataclasses import dataclass, field

import torch

from . import cases
from .families import adamw, gdn, loss, moe, norm, rotary, swiglu
from .families.problem import Random

PROBLEMS = {}
for family in (gdn, norm, swiglu, rotary, moe, loss, adamw):
    PROBLEMS |= family.PROBLEMS
# Operators of torch.ops.megatron_bridge behind a row of cases.BASES, where they are not of its name.
OPERATORS = {"adamw": adamw.OPERATORS}


@dataclass
class Result:
    name: str
    operator: str
    seconds: float = 0.0
    errors: dict = field(default_factory=dict)  # by output or gradient: (error, bound)
    complaints: list = field(default_factory=list)

    @property
    def worst(self):
        """The largest share of a bound, and whose it is."""
        return max(((error / bound, name) for name, (error, bound) in self.errors.items()), default=(0.0, ""))


def has(operator):
    """Whether the loaded library serves a row of cases."""
    return all(hasattr(torch.ops.megatron_bridge, name) for name in OPERATORS.get(operator, (operator,)))


@contextlib.contextmanager
def poisoned():
    """Memory that is handed out unwritten holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libtorch operators that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def differentiable(outputs):
    return [out for out in outputs if out.is_floating_point() and out.requires_grad]


def run(function, leaves, upstream):
    """Outputs, and the gradients of <upstream, outputs>, of fresh leaves."""
    fresh = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    outputs = function(fresh)
    reached = differentiable(outputs)
    gradients = {}
    if reached:
        torch.autograd.backward(reached, [up.to(out.dtype) for out, up in zip(reached, upstream)])
        gradients = {name: x.grad if x.grad is not None else torch.zeros_like(x) for name, x in fresh.items()}
    return [out.detach() for out in outputs], gradients


def upstream_of(problem, random):
    """What is sent into the outputs: numbers that bfloat16 holds."""
    fresh = {name: x.detach().double().requires_grad_() for name, x in problem.leaves.items()}
    return [random.normal(*out.shape).bfloat16().double() for out in differentiable(problem.reference(fresh))]


def distance(x, truth, size=None):
    """|x - truth| / |truth|, or the worst element by `size`; `size` may also be the least norm to divide by."""
    apart = x.double() - truth
    if not torch.isfinite(apart).all():
        return float("inf")
    if isinstance(size, torch.Tensor):
        return (apart.abs() / size).max().item() if apart.numel() else 0.0
    return (apart.norm() / max(truth.norm().item(), size or 0.0, 1e-3)).item() if apart.numel() else 0.0


def same(one, two):
    """Bit for bit, NaN included."""
    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(one.dtype)
    return torch.equal(one.view(bits), two.view(bits)) if bits and one.numel() else torch.equal(one, two)


def named(outputs, gradients):
    return {f"output {index}": x for index, x in enumerate(outputs)} | {f"d {name}": x for name, x in gradients.items()}


def compare(problem, outputs, gradients, truth, true_gradients):
    """Errors by name with their bounds, and complaints about elements."""
    sizes, errors, complaints = problem.sizes(), {}, []
    for name, x in named(outputs, gradients).items():
        true = named(truth, true_gradients)[name]
        if not x.is_floating_point():
            continue
        leaf = name.removeprefix("d ")
        bound = problem.output_bound if leaf == name else problem.bounds.get(leaf, problem.gradient_bound)
        errors[name] = (distance(x, true, sizes.get(leaf) if leaf != name else None), bound)
        if x.dtype is torch.bfloat16 and x.numel() and leaf not in sizes:
            far = (x.double() - true).abs().max().item()
            if not far <= max(0.02, 2 * bound) * true.abs().max().item() + 1e-3:
                complaints.append(f"{name} has an element that is {far:.2e} off, of at most {true.abs().max().item():.2e}")
    complaints += [f"{name} is {error:.2e} off, the bound is {bound:.1e}" for name, (error, bound) in errors.items() if not error <= bound]
    return errors, complaints


def check(case, device, seed=1):
    """One case."""
    begun, result = time.monotonic(), Result(case.name, case.operator)
    try:
        random = Random(seed, device)
        problem = PROBLEMS[case.operator](case.fields, random)
        upstream = upstream_of(problem, random)
        with poisoned():
            outputs, gradients = run(problem.ours, problem.leaves, upstream)
        again = run(problem.ours, problem.leaves, upstream)
        before = run(problem.ours, problem.leaves, upstream) if problem.products else (outputs, gradients)
        wide = {name: x.double() for name, x in problem.leaves.items()}
        truth, true_gradients = run(problem.reference, wide, upstream)
        result.errors, result.complaints = compare(problem, outputs, gradients, truth, true_gradients)
        result.complaints += problem.exact(outputs, gradients)
        for (name, one), two in zip(named(*before).items(), named(*again).values()):
            if not same(one, two):
                result.complaints.append(f"{name} differs between two runs")
    except Exception as error:  # a case that breaks must not hide the others
        result.complaints.append(f"{type(error).__name__}: {str(error).strip()} ({traceback.extract_tb(error.__traceback__)[-1].name})")
    result.seconds = time.monotonic() - begun
    return result


def law(function):
    """A claim about operators beyond single cases: the function gives complaints."""
    LAWS.append(function)
    return function


LAWS = []


@law
def the_chunk_form_of_the_reference_is_the_recurrence(device):
    """To 1e-10: outputs, states and every gradient."""
    complaints = []
    for change in ({"lengths": (70, 0, 65), "tail": 3, "ratio": 2, "state": "both"}, {"decay": "mixed"}, {"keys": "equal", "decay": "none"}):
        random = Random(3, device)
        problem = gdn.gated_delta_rule({**cases.BASES["gated_delta_rule"], **change}, random)
        upstream = upstream_of(problem, random)
        wide = {name: x.double() for name, x in problem.leaves.items()}
        one = named(*run(problem.reference, wide, upstream))
        two = named(*run(lambda x: problem.reference(x, form=gdn.recurrence), wide, upstream))
        complaints += [f"{change}: {name} is {distance(one[name], two[name]):.1e} off" for name in one
                       if not distance(one[name], two[name]) <= 1e-10]
    return complaints


@law
def a_pack_equals_its_sequences_alone(device):
    """Bit for bit, so that a batch, which is a pack of equal lengths, equals its rows."""
    complaints = []
    for operator, split in (("gated_delta_rule", ("q", "k", "v", "a", "b")), ("causal_conv1d_silu", ("x",))):
        for lengths in ((64, 64), (1, 63, 65, 20)):
            base = {**cases.BASES[operator], "lengths": lengths}
            whole = PROBLEMS[operator](base, random := Random(5, device))
            upstream = upstream_of(whole, random)
            outputs, gradients = run(whole.ours, whole.leaves, upstream)
            first = 0
            for length in lengths:
                one = slice(first, first + length)
                alone = PROBLEMS[operator]({**base, "lengths": (length,)}, Random(5, device))
                leaves = {name: x[one] if name in split else x for name, x in whole.leaves.items()}
                part, part_gradients = run(alone.ours, leaves, [upstream[0][one]])
                complaints += [] if same(outputs[0][one], part[0]) else [f"{operator} {lengths}: outputs of {one} differ"]
                complaints += [f"{operator} {lengths}: the gradient of {name} of {one} differs" for name in split
                               if not same(gradients[name][one], part_gradients[name])]
                first += length
    return complaints


@law
def a_sequence_may_be_cut_where_its_state_is_carried(device):
    """Anywhere: outputs and the final state stay within the bound of the rule."""
    base = {**cases.BASES["gated_delta_rule"], "lengths": (150,), "state": "both"}
    problem = gdn.gated_delta_rule(base, Random(7, device))
    with torch.no_grad():
        out, final = problem.ours(problem.leaves)
        complaints = []
        for cut in (1, 63, 64, 100):
            state, parts = problem.leaves["initial_state"], []
            for one in (slice(0, cut), slice(cut, 150)):
                part = gdn.gated_delta_rule({**base, "lengths": (one.stop - one.start,)}, Random(7, device))
                leaves = {name: x[one] if name in ("q", "k", "v", "a", "b") else x for name, x in problem.leaves.items()}
                y, state = part.ours({**leaves, "initial_state": state})
                parts.append(y)
            for name, error in (("outputs", distance(torch.cat(parts), out.double())), ("the state", distance(state, final.double()))):
                complaints += [] if error <= 8e-3 else [f"cut at {cut}: {name} {error:.1e} off"]
    return complaints


@law
def chunks_start_at_sequences_and_never_cross_a_border(device):
    """The chunk map of every pack, chunk for chunk."""
    complaints = []
    for pack in cases.PACKS:
        lengths, tail = pack["lengths"], pack.get("tail", 0)
        cu = gdn.borders({"borders": "int32", **pack}, Random(1, device))
        tokens = sum(lengths) + tail
        room = (tokens + 63) // 64 + len(lengths) + 1
        expected, starts, first = [], [], 0
        for sequence, length in enumerate((*lengths, tail)):
            starts.append(len(expected))
            expected += [[sequence, first + at, min(64, length - at), at] for at in range(0, length, 64)]
            first += length
        starts.append(len(expected))
        found = torch.ops.megatron_bridge.chunk_map(cu, tokens).cpu()
        chunks, rest = found[: 4 * room].view(room, 4).tolist(), found[4 * room:].tolist()
        if chunks[: len(expected)] != expected or any(chunk[0] != -1 for chunk in chunks[len(expected):]) or rest != starts:
            complaints.append(f"the chunk map of {cases.short(lengths)} with a tail of {tail} is wrong")
    return complaints


@law
def operators_refuse_what_they_do_not_take(device):
    """In words, not by a crash."""
    ops = torch.ops.megatron_bridge
    x = torch.zeros(4, 16, device=device, dtype=torch.float64)
    tries = {
        "float64": lambda: ops.rms_norm(x, x[0], 1e-6),
        "a weight of another length": lambda: ops.rms_norm(x.bfloat16(), x[0, :8].float(), 1e-6),
        "513 experts": lambda: ops.route(torch.zeros(2, 513, device=device), 8),
        "an odd width": lambda: ops.swiglu(torch.zeros(4, 6, device=device, dtype=torch.bfloat16)),
    }
    complaints = []
    for what, attempt in tries.items():
        try:
            attempt()
            complaints.append(f"{what} was taken")
        except RuntimeError as error:
            complaints += [] if len(str(error)) > 20 else [f"{what}: the refusal says only `{error}`"]
    return complaints


def check_laws(device):
    results = []
    for claim in LAWS:
        begun, name = time.monotonic(), claim.__name__.replace("_", " ")
        try:
            complaints = claim(device)
        except Exception as error:  # as in `check`
            complaints = [f"{type(error).__name__}: {error}"]
        results.append(Result(name, "law", time.monotonic() - begun, {}, complaints))
    return results


def run_all(chosen, options, tell, laws=True):
    """All of `chosen`, then the laws. Operators that the library lacks are said once."""
    results, missing = [], []
    for case in chosen:
        if not has(case.operator):
            missing += [case.operator] if case.operator not in missing else []
            continue
        if time.monotonic() > options.until:
            result = Result(case.name, case.operator, complaints=["not run: the time was up"])
        else:
            result = check(case, options.device)
        results.append(result)
        for complaint in result.complaints:
            tell(f"FAILED {result.name}: {complaint}")
    if laws:
        for result in check_laws(options.device):
            results.append(result)
            for complaint in result.complaints:
                tell(f"FAILED {result.name}: {complaint}")
    for operator in missing:
        tell(f"not in this library: {operator}")
    return results, missing
