#!/usr/bin/env python3
"""torch_dist directories between this project, torch.distributed.checkpoint and Megatron-Core.

    megatron_loads_output.py --trainer target/release/trainer

1. What `trainer convert import` writes holds, tensor for tensor, what Megatron-Core itself saved of the same model (goldens).
2. torch.distributed.checkpoint and megatron.core.dist_checkpointing load it with 1 and with 2 processes, each its part.
3. `trainer convert export` makes the reference of what both of them save, with 1 and with 2 processes.
4. Norms that --exact-norms stores in float32 load into a bfloat16 model.
5. PyYAML reads run_config.yaml with numbers as numbers, torch reads train_state.pt and common.pt without code in them.
Run by `make test-peers`; prints one line a check and exits 1 if any fails.
"""
import filecmp, hashlib, json, os, pathlib, tempfile

# Of the processes too.
os.environ["PYTHONWARNINGS"] = "ignore"
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from checks import GOLDENS, Checks


def described(directory):
    entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    return tensors, [key for key in entries if key not in tensors]


def digest(tensor):
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), hashlib.sha256(raw).hexdigest()]


def parts(size, world):
    """The axis that is cut and the length of a part; none for what does not divide."""
    return (0, size[0] // world) if size and size[0] % world == 0 else (None, None)


def with_torch(rank, world, directory, whole, again):
    """Loads as torch's own sharded tensors, compares each part, saves them again."""
    mesh = init_device_mesh("cpu", (world,))
    tensors, _ = described(directory)
    state = {}
    for key, entry in tensors.items():
        empty = torch.empty(entry.size, dtype=entry.properties.dtype)
        axis, _ = parts(entry.size, world)
        state[key] = empty if axis is None else distribute_tensor(empty, mesh, [Shard(axis)])
    dcp.load(state, storage_reader=FileSystemReader(directory))
    wrong = []
    for key, tensor in state.items():
        local, expected = tensor, whole[key]
        if isinstance(tensor, DTensor):
            local, expected = tensor.to_local(), expected.chunk(world)[rank]
        wrong += [] if torch.equal(local, expected) and local.dtype == expected.dtype else [key]
    dcp.save(state, storage_writer=FileSystemWriter(again))
    return wrong


def with_megatron(rank, world, directory, whole, again):
    """Loads as Megatron-Core's sharded tensors and objects under its default strictness, compares, saves again."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    tensors, objects = described(directory)

    def sharded(fill):
        state = {}
        for key, entry in tensors.items():
            axis, length = parts(entry.size, world)
            data = fill(key, entry, axis, length)
            if axis is None:
                state[key] = ShardedTensor.from_rank_offsets(key, data, replica_id=rank)
            else:
                state[key] = ShardedTensor.from_rank_offsets(key, data, (axis, rank, world), replica_id=0)
        for key in objects:
            name, place = key.rsplit("/shard_", 1)
            offset, shape = (tuple(int(n) for n in part.split(".")) for part in place.split("_"))
            state[key] = ShardedObject(name, [None], shape, offset, replica_id=rank)
        return state

    def empty(key, entry, axis, length):
        size = list(entry.size)
        if axis is not None:
            size[axis] = length
        # What a bfloat16 model asks for, whatever the file holds.
        dtype = whole[key].dtype
        return torch.empty(size, dtype=dtype)

    loaded = dist_checkpointing.load(sharded(empty), directory)
    wrong = []
    for key, entry in tensors.items():
        axis, _ = parts(entry.size, world)
        expected = whole[key] if axis is None else whole[key].chunk(world)[rank]
        wrong += [] if torch.equal(loaded[key], expected) and loaded[key].dtype == expected.dtype else [key]
    dist_checkpointing.save(sharded(lambda key, *_: loaded[key]), again)
    return wrong


def process(rank, world, work, store, directory, whole, again, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    # Megatron-Core waits for the GPU before it saves, and counts on it after; here is none.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        results.put(work(rank, world, directory, load_file(whole), again))
    finally:
        dist.barrier()
        dist.destroy_process_group()


def in_processes(world, work, scratch, directory, whole):
    """Keys that differ, over all processes, and the directory that they saved."""
    place = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    again = place / "again"
    again.mkdir()
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(process, (world, work, place / "store", str(directory), str(whole), str(again), results), nprocs=world)
    return sorted({key for _ in range(world) for key in results.get()}), again


def main():
    checks = Checks()
    check = checks.check

    def convert(*command):
        return checks.run("convert", *command)[1]

    def same_directory(a, b):
        names = sorted(p.name for p in a.iterdir())
        return names == sorted(p.name for p in b.iterdir()) and not filecmp.cmpfiles(a, b, names, shallow=False)[1]

    def whole_of(directory, file, dtypes={}):
        """Every tensor, read without any distribution, as a file that processes compare with."""
        tensors, _ = described(directory)
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in tensors.items()}
        dcp.load(state, storage_reader=FileSystemReader(directory), no_dist=True)
        save_file({key: tensor.to(dtypes.get(key, tensor.dtype)) for key, tensor in state.items()}, file)
        return state

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name, saved, flags in (
            ("dense_vl", "mcore_dense_tp2pp2", []),
            ("dense_vl_tied_bf16", "mcore_dense_tied_bf16_tp1", ["--torch-dtype", "bfloat16"]),
            ("moe_vl_bf16", "mcore_moe_bf16_tp2pp2ep2", ["--torch-dtype", "bfloat16"]),
        ):
            out = scratch / f"{name}_rounded"
            convert("import", "--hf-model", GOLDENS / "checkpoints" / name, "--megatron-path", out, *flags)
            state = whole_of(out / "iter_0000000", scratch / "x.safetensors")
            expected = json.loads((GOLDENS / "torch_dist" / saved / "iter_0000007/expected.json").read_text())["tensors"]
            wrong = [key for key, value in expected.items() if key not in state or digest(state[key]) != [value["dtype"], value["shape"], value["sha256"]]]
            check(f"{name}: import holds the {len(expected)} tensors that Megatron-Core saved", not wrong and len(state) == len(expected), wrong[:5])

        for name in ("dense_vl", "moe_vl", "moe_vl_bf16"):
            reference = GOLDENS / "checkpoints" / name
            out = scratch / name
            convert("import", "--hf-model", reference, "--megatron-path", out)
            whole = scratch / f"{name}.safetensors"
            whole_of(out / "iter_0000000", whole)
            for what, work in (("torch.distributed.checkpoint", with_torch), ("megatron.core.dist_checkpointing", with_megatron)):
                for world in (1, 2):
                    wrong, again = in_processes(world, work, scratch, out / "iter_0000000", whole)
                    check(f"{name}: {what} loads it with {world} process(es), tensor for tensor", not wrong, wrong[:5])
                    back = scratch / "back"
                    convert("export", "--hf-model", reference, "--megatron-path", again, "--hf-path", back, "--overwrite")
                    check(f"{name}: export makes the reference of what {what} saves with {world} process(es)", same_directory(back, reference))

        # Norms of gated delta nets in bfloat16, below one half: minus one does not fit into bfloat16.
        reference = scratch / "small_norms"
        reference.mkdir()
        source = GOLDENS / "checkpoints/dense_vl_tied_bf16"
        tensors = load_file(source / "model.safetensors")
        norms = [key for key in tensors if key.endswith(".linear_attn.norm.weight")]
        for key in norms:
            tensors[key] = torch.linspace(0.3, 0.45, tensors[key].numel()).to(torch.bfloat16)
        save_file(tensors, reference / "model.safetensors", metadata={"format": "pt"})
        (reference / "config.json").write_bytes((source / "config.json").read_bytes())
        out = scratch / "exact_norms"
        said = convert("import", "--hf-model", reference, "--megatron-path", out, "--exact-norms")
        check("--exact-norms says which norms it stores in float32", f"{len(norms)} norms" in said, said)
        keys = [key for key in described(out / "iter_0000000")[0] if key.endswith(".out_norm.weight")]
        whole = scratch / "exact.safetensors"
        state = whole_of(out / "iter_0000000", whole, {key: torch.bfloat16 for key in keys})
        check("they are float32 in the directory", len(keys) == len(norms) and all(state[key].dtype == torch.float32 for key in keys), keys)
        wrong, _ = in_processes(1, with_megatron, scratch, out / "iter_0000000", whole)
        check("Megatron-Core loads them into a bfloat16 model", not wrong, wrong[:5])

        iteration = scratch / "moe_vl/iter_0000000"
        config = yaml.safe_load((iteration / "run_config.yaml").read_text())["model"]
        provider = json.loads((GOLDENS / "megatron/provider.moe_vl.json").read_text())["fields"]
        plain = (int, float, bool, str, type(None), list)
        shared = [key for key in config if key in provider and isinstance(config[key], plain) and not key.endswith("_parallel_size")]
        wrong = [key for key in shared if config[key] != provider[key] or type(config[key]) is not type(provider[key])]
        wrong = [key for key in wrong if not (isinstance(config[key], (int, float)) and float(config[key]) == provider[key])]
        check(f"PyYAML reads {len(shared)} fields of run_config.yaml as Megatron Bridge has them", len(shared) > 50 and not wrong, [(k, config[k], provider[k]) for k in wrong])
        step = torch.load(scratch / "moe_vl/latest_train_state.pt", weights_only=True)
        check("torch reads train_state.pt", step["step"].item() == 0 and len(step) == 8, step)
        common = torch.load(iteration / "common.pt", weights_only=True)
        check("torch reads common.pt", common["iteration"] == 0, common)

    checks.finish()


if __name__ == "__main__":
    main()
