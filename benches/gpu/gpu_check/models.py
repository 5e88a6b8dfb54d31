"""Whole models through the release binary: outputs, gradients, training and generation against the goldens, and kernels against the
reference on models that they take.
"""
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import load_file, save_file

from .correctness import Result
from .model_cases import (BFLOAT16, BFLOAT16_WAYS, CASES, FINETUNE, FINETUNE_SETTINGS, FINETUNE_STEPS, GRADIENTS, KERNEL_OPS, MODELS, ROPE,
                          SIZES, TRAINING, WAYS)


def batch_of(file, prefix="in."):
    return {name.removeprefix(prefix): x for name, x in file.items() if name.startswith(prefix)}


def rows(x, mask):
    """[real tokens, ..] of [batch, seq, ..] or [batch * seq, ..]."""
    return x.reshape(-1, x.shape[-1]).double()[mask.flatten().bool()]


def apart(found, expected):
    """max |a - b| / max |b|."""
    found, expected = found.double(), expected.double()
    if expected.numel() == 0:
        return 0.0
    off, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    return off / largest if largest else off


def relative(found, expected):
    """|a - b| / |b| over all elements."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


class Goldens:
    def __init__(self, root):
        self.root = root
        self.noise = json.loads((root / "model/noise.json").read_text())

    def case(self, name):
        return load_file(self.root / f"model/{name}.safetensors")

    def model(self, name):
        return self.root / "checkpoints" / name


def golden_case(trainer, goldens, model, case, dtype, kernels):
    """Every output that the golden has; gradients where it has them."""
    file = goldens.case(f"{model}_{case}")
    grads = case == "image_batch"
    out, _ = trainer.forward(goldens.model(model), batch_of(file), dtype, kernels, grads)
    noise, wide = goldens.noise[f"{model}_{case}"], dtype == "float64"
    mask, errors, complaints = file["in.attention_mask"], {}, []

    def bar(key):
        return 1e-6 if wide else 10 * noise[key]

    for name, expected in batch_of(file, "out.").items():
        if name.startswith("mtp") or name in ("rope_deltas", "total_loss"):
            continue
        if name == "position_ids" or name.endswith(".experts"):
            found = out.get(name)
            if found is None:
                complaints += [] if name.startswith("router") else [f"{name} is missing"]
            elif name == "position_ids":
                complaints += [] if torch.equal(found.long(), expected.long()) else [f"{name} differ"]
            else:
                complaints += [] if torch.equal(rows(found, mask), rows(expected, mask)) else [f"{name} differ"]
        elif name in out:
            if expected.dim() == 0:
                errors[name] = (apart(out[name], expected), 1e-6 if wide else max(2e-6, 10 * noise["loss"]))
            elif name.startswith("visual"):
                errors[name] = (apart(out[name], expected), bar(name))
            else:
                errors[name] = (apart(rows(out[name], mask), rows(expected, mask)), bar("logits" if name == "logits" else "hidden"))
        elif not name.startswith("router"):
            complaints.append(f"{name} is missing")
    if grads:
        parts, worst = GRADIENTS[model]
        for part in parts.split(" "):
            for name, expected in goldens.case(f"{model}_{case}_grads{part}").items():
                errors[name] = (apart(out[name], expected), 1e-6 if wide else 10 * worst)
    return errors, complaints


def bfloat16_case(trainer, goldens, model, case, dtype, kernels):
    """No further from float32 arithmetic than one and a half times what transformers' bfloat16 is."""
    file = goldens.case(f"{model}_{case}")
    out, _ = trainer.forward(goldens.model(model), batch_of(file), dtype, kernels)
    mask = file["in.attention_mask"]
    exact = rows(file["f32.logits"], mask)
    usual = relative(rows(file["out.logits"], mask), exact)
    return {"logits": (relative(rows(out["logits"], mask), exact), 1.5 * usual), "loss": (apart(out["loss"], file["f32.loss"]), 0.005)}, []


def kernel_config(goldens, model):
    config = json.loads((goldens.model(model) / "config.json").read_text())
    config["vision_config"]["out_hidden_size"] = SIZES["hidden_size"]
    text = config["text_config"]
    text.update(SIZES)
    if "num_experts" in text:
        text["num_experts_per_tok"] = text["num_experts"]
    text["rope_parameters"].update(ROPE)
    return config


def kernel_batches():
    """Text with padding on both sides, and one long row."""
    generator = torch.Generator().manual_seed(41)
    ids = torch.randint(960, (2, 75), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 70:] = 0, 0
    long = torch.randint(960, (1, 300), generator=generator)
    return {"padded": {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)},
            "long": {"input_ids": long, "attention_mask": torch.ones_like(long), "labels": long.clone()}}


def computed_by(log):
    """By op what the binary says that computes it."""
    line = next(row for row in log.splitlines() if "kernels (" in row)
    return dict(part.split(": ", 1) for part in re.sub(r"^.*?kernels \([^)]*\): ", "", line).split("; "))


def kernel_case(trainer, goldens, model, batch, on_gpu):
    """Kernels in bfloat16 are no further from float64 than libtorch in bfloat16 is, but for the order of sums."""
    folder = trainer.init(kernel_config(goldens, model), 3, "bfloat16")
    truth, _ = trainer.forward(folder, batch, "float64", "reference", True)
    plain, _ = trainer.forward(folder, batch, "bfloat16", "reference", True)
    ours, log = trainer.forward(folder, batch, "bfloat16", "auto", True)
    again, _ = trainer.forward(folder, batch, "bfloat16", "auto", True)
    by = computed_by(log)
    complaints = [f"{op} did not run on kernels: {by[op]}" for op in KERNEL_OPS if on_gpu and not by[op].startswith("kernels ")]
    errors = {"loss": (apart(ours["loss"], truth["loss"]), max(5e-4, 2 * apart(plain["loss"], truth["loss"])))}
    for name, expected in truth.items():
        if name.startswith("grad."):
            # Those of the decay are sums over tokens that nearly cancel.
            more = 0.1 if name.endswith(("A_log", "dt_bias")) else 5e-3
            errors[name] = (relative(ours[name], expected), 1.5 * relative(plain[name], expected) + more)
    complaints += [f"{name} differs between two runs" for name, x in ours.items() if name != "mtp_logits" and not torch.equal(x, again[name])]
    return errors, complaints


def twenty_steps(trainer, goldens, model):
    """Gradients of the binary, AdamW of torch, all in float64: the curve of tests/goldens/train."""
    recipe = json.loads((goldens.root / f"train/{model}.json").read_text())
    batches = load_file(goldens.root / f"train/{model}_batches.safetensors")
    folder = trainer.place("training")
    folder.mkdir()
    weights = {}
    for file in sorted(goldens.model(model).iterdir()):
        if file.suffix == ".safetensors":
            weights |= {name: torch.nn.Parameter(x.double()) for name, x in load_file(file).items()}
        elif file.name != "model.safetensors.index.json":
            (folder / file.name).write_bytes(file.read_bytes())
    groups = [{"params": [x for x in weights.values() if (x.dim() >= 2) == decayed], "weight_decay": recipe["weight_decay"] if decayed else 0.0}
              for decayed in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=tuple(recipe["betas"]), eps=recipe["eps"], foreach=False)
    errors = {}
    for step in range(recipe["steps"]):
        save_file({name: x.detach() for name, x in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        out, _ = trainer.forward(folder, batch_of(batches, f"batch.{step % recipe['batches']}."), "float64", "reference", True)
        for name, x in weights.items():
            x.grad = out.get(f"grad.{name}")
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), recipe["clip_norm"])
        optimizer.step()
        for key, found, bars in (("losses", out["loss"], TRAINING[model][0]), ("grad_norms", norm, TRAINING[model][1])):
            expected = recipe[key]["float64"][step]
            errors[f"{key} {step}"] = (abs(found.item() / expected - 1), next(bar for until, bar in bars if step < until))
    return errors, []


def finetune(trainer, goldens, model, dtype, kernels, compared, bar):
    """`trainer finetune` on the device follows that on the CPU while roundings are small; and it learns."""
    data = goldens.root / "data/shapes/train.jsonl"
    words = (goldens.model(model), data, FINETUNE_STEPS, dtype)
    here = trainer.finetune(*words, kernels, trainer.device, *FINETUNE_SETTINGS)
    cpu = trainer.finetune(*words, "reference", "cpu", *FINETUNE_SETTINGS)
    errors = {f"loss {step}": (abs(here[step]["loss"] / cpu[step]["loss"] - 1), bar) for step in range(compared)}
    losses = [row["loss"] for row in here]
    complaints = [] if len(losses) == FINETUNE_STEPS else [f"{len(losses)} steps were made"]
    if not sum(losses[-4:]) < sum(losses[:4]):
        complaints.append(f"the loss does not fall: {losses}")
    return errors, complaints


def generation(trainer, goldens, model, kernels):
    """Greedy ids: the text by `generate`; every prompt by one forward over prompt and answer, whose best token at each place must be
    the answer's next."""
    file, complaints = load_file(goldens.root / f"generate/{model}.safetensors"), []
    text = file["text.out.new_ids"][0].tolist()
    found = trainer.generate(goldens.model(model), file["text.in.input_ids"][0].tolist(), len(text), "float32", kernels)
    complaints += [] if found == text else [f"generate gives {found}, expected {text}"]
    for prompt in ("text", "image", "batch_left_padding"):
        batch, ids = batch_of(file, f"{prompt}.in."), file[f"{prompt}.out.new_ids"]
        begin = batch["input_ids"].shape[1]
        for name, more in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)), ("mm_token_type_ids", torch.zeros_like(ids))):
            if name in batch:
                batch[name] = torch.cat([batch[name], more.to(batch[name].dtype)], 1)
        out, _ = trainer.forward(goldens.model(model), batch, "float32", kernels)
        best = out["logits"][:, begin - 1:-1].argmax(-1)
        complaints += [] if torch.equal(best, ids) else [f"{prompt}: the best tokens are {best.tolist()}, expected {ids.tolist()}"]
    return {}, complaints


def all_checks(trainer, goldens, on_gpu):
    """(name, function without arguments) of every check."""
    for model in MODELS:
        yield f"{model}: 20 training steps, float64", lambda model=model: twenty_steps(trainer, goldens, model)
    for model in MODELS:
        for name, batch in kernel_batches().items():
            yield f"{model} at the kernels' sizes, {name}", lambda model=model, batch=batch: kernel_case(trainer, goldens, model, batch, on_gpu)
    for row in FINETUNE:
        yield f"finetune {' '.join(map(str, row[:3]))}", lambda row=row: finetune(trainer, goldens, *row)
    for model in MODELS:
        for case in CASES:
            for dtype, kernels in WAYS:
                yield (f"{model} {case}, {dtype}, kernels {kernels}",
                       lambda model=model, case=case, dtype=dtype, kernels=kernels: golden_case(trainer, goldens, model, case, dtype, kernels))
    for model, cases in BFLOAT16.items():
        for case in cases:
            for dtype, kernels in BFLOAT16_WAYS:
                yield (f"{model} {case}, {dtype}, kernels {kernels}",
                       lambda model=model, case=case, dtype=dtype, kernels=kernels: bfloat16_case(trainer, goldens, model, case, dtype, kernels))
    for model in MODELS:
        for kernels in ("reference", "auto"):
            yield f"{model} generation, kernels {kernels}", lambda model=model, kernels=kernels: generation(trainer, goldens, model, kernels)


def run(trainer, goldens, options, tell):
    """All checks, several at a time: most of one is the start of a process."""
    on_gpu = torch.device(options.device).type == "cuda"

    def one(name, function):
        begun, result = time.monotonic(), Result(name, "model")
        if begun > options.until:
            result.complaints.append("not run: the time was up")
            return result
        try:
            result.errors, result.complaints = function()
            result.complaints += [f"{key} is {error:.2e} off, the bound is {bound:.1e}" for key, (error, bound) in result.errors.items()
                                  if not error <= bound]
        except Exception as error:  # the other checks go on
            result.complaints.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        result.seconds = time.monotonic() - begun
        for complaint in result.complaints[:10]:
            tell(f"FAILED {name}: {complaint}")
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(lambda check: one(*check), all_checks(trainer, goldens, on_gpu)))
