#!/usr/bin/env python3
"""Loads a torch_dist iteration with torch.distributed.checkpoint and compares every tensor with expected.json.

usage: torch_loads_torch_dist.py ITERATION_DIR EXPECTED_JSON
"""

import hashlib
import json
import sys

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def main() -> int:
    directory, expected_path = sys.argv[1:]
    with open(expected_path) as file:
        expected = json.load(file)["tensors"]
    reader = FileSystemReader(directory)
    described = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    if sorted(state) != sorted(expected):
        print("the names differ")
        return 1
    wrong = []
    for name, tensor in state.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape), hashlib.sha256(raw).hexdigest())
        wanted = expected[name]
        if found != (wanted["dtype"], wanted["shape"], wanted["sha256"]):
            wrong.append(name)
    print(f"{len(state) - len(wrong)} of {len(state)} tensors equal", *wrong[:10])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
