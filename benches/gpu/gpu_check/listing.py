"""What there is to run, and whether the tables and the modules agree: without torch, so that it can be asked anywhere."""
import ast
from pathlib import Path

from . import cases, model_cases, suite

HERE = Path(__file__).parent


def parse(module):
    return ast.parse((HERE / module).read_text(), module)


def problems_defined():
    """Keys of the `PROBLEMS` of every family."""
    found = set()
    for file in (HERE / "families").glob("*.py"):
        for node in ast.walk(parse(f"families/{file.name}")):
            if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["PROBLEMS"]:
                found |= {key.value for key in node.value.keys}
    return found


def peers_defined():
    """(name, operator) of every peer: arguments of `@peer` and assignments to `PEERS[...]`."""
    found = set()
    for node in ast.walk(parse("peers.py")):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "peer":
            name, *operators = (arg.value for arg in node.args)
            found |= {(name, operator) for operator in operators}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript) and node.targets[0].value.id == "PEERS":
            words = node.targets[0].slice.elts
            found |= {tuple(word.value for word in words)} if all(isinstance(word, ast.Constant) for word in words) else set()
    return found


def disagreements():
    """Rows of tables that name what no module has, and cases that lack a field."""
    problems, peers = problems_defined(), peers_defined()
    wrong = [f"no family has {operator}" for operator in cases.BASES if operator not in problems]
    for operator, axes in cases.AXES.items():
        wrong += [f"{operator}: axis {axis} sets {name}, which its base case lacks" for axis, values in axes.items()
                  for value in values for name in value if name not in cases.BASES[operator]]
    wrong += [f"{operator} has no {what}" for what, table in (("axes", cases.AXES), ("cost", cases.COSTS))
              for operator in cases.BASES if operator not in table]
    for row in suite.ROWS:
        wrong += [f"row {row.number}: no peer {name} for {row.operator}" for name in row.peers
                  if row.operator and (name, row.operator) not in peers]
        wrong += [f"row {row.number}: {row.operator} is no operator"] if row.operator and row.operator not in problems else []
        wrong += [f"row {row.number} has no shapes"] if not (row.shapes or row.fields) else []
    numbers = {row.number for row in suite.ROWS}
    wrong += [f"row {number} is missing" for number in range(1, 22) if number not in numbers]
    return wrong


def modules():
    """Every module, parsed: a syntax error shows."""
    return [str(file.relative_to(HERE)) for file in sorted(HERE.rglob("*.py")) if parse(str(file.relative_to(HERE)))]


def lines():
    every, small, smallest = list(cases.all_cases()), cases.small_cases(), cases.smallest_cases()
    yield f"{len(modules())} modules"
    yield f"{len(every)} cases of {len(cases.BASES)} operators ({len(small)} small, {len(smallest)} under the sanitizers):"
    yield from (f"  {case.name}" for case in every)
    checks = len(model_cases.MODELS) * len(model_cases.CASES) * len(model_cases.WAYS)
    yield f"{checks} model cases against goldens, {len(model_cases.FINETUNE)} runs of finetune"
    yield "the suite:"
    for row in suite.ROWS:
        yield f"  {row.number:2} {row.title}: {len(row.shapes or row.fields)} shapes, {', '.join(row.directions)}; peers {', '.join(row.peers)}"
