#!/usr/bin/env python3
"""What Megatron's own model classes hold on each rank (tests/goldens/megatron), for the tests of the C++ library.

    goldens.py list CHECKPOINT LAYOUT DIR     writes DIR/RANK, a line a tensor: NAME SHA256
    goldens.py compare CHECKPOINT LAYOUT RANK DIR     compares files DIR/NAME of raw bytes with them
"""
import hashlib
import json
import pathlib
import sys

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / "goldens/megatron"


def ranks(checkpoint, layout):
    """Rank to name to digest; without virtual stages, as the examples know none."""
    shards = json.loads((GOLDENS / f"shards.{checkpoint}.json").read_text())
    found = {}
    for rank in shards["ranks"]:
        if rank["layout"] == layout:
            (stage,) = rank["stages"]
            found[rank["rank"]] = {name: digest for name, _, _, digest in stage["params"]}
    if not found:
        raise SystemExit(f"{checkpoint} has no layout {layout}")
    return found


def list_all(checkpoint, layout, directory):
    for rank, params in ranks(checkpoint, layout).items():
        lines = "".join(f"{name} {digest}\n" for name, digest in params.items())
        pathlib.Path(directory, str(rank)).write_text(lines)


def compare(checkpoint, layout, rank, directory):
    expected = ranks(checkpoint, layout)[int(rank)]
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in pathlib.Path(directory).iterdir()}
    different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if different:
        raise SystemExit(f"{checkpoint} {layout} rank {rank}: {len(different)} tensors differ, first {different[0]}")


{"list": list_all, "compare": compare}[sys.argv[1]](*sys.argv[2:])
