"""The output layer's cross entropy."""
import torch
import torch.nn.functional as F

from .problem import DTYPES, Problem, operator, rounded


def linear_cross_entropy(fields, random):
    tokens, hidden, vocabulary, dtype = fields["tokens"], fields["hidden"], fields["vocabulary"], DTYPES[fields["dtype"]]
    targets = random.integers(vocabulary, tokens)
    kind = fields["targets"]
    if kind == "all ignored":
        targets[:] = -100
    elif kind == "ends":
        targets[::2], targets[1::2] = 0, vocabulary - 1
    elif kind == "some ignored":
        targets[1::10] = -100
    counted = max(1, int((targets != -100).sum()))
    leaves = {"hidden": random.normal(tokens, hidden).to(dtype),
              # With a scale of 60, logits of 50 and more.
              "weight": random.normal(vocabulary, hidden, scale=0.2 * fields["scale"] / 8).to(dtype)}

    def reference(x):
        logits = rounded(x["hidden"] @ x["weight"].T, dtype)  # stored as activations are
        loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return (loss / counted,)

    def exact(outputs, gradients):
        if kind != "all ignored":
            return []
        zero = [outputs[0], *(gradients or {}).values()]
        return ["loss or gradients are not 0 with every target ignored"] if any(x.any() for x in zero) else []

    close = (1e-5, 2e-5) if dtype is torch.float32 else (2e-3, 8e-3)
    return Problem(leaves, lambda x: (operator("linear_cross_entropy")(x["hidden"], x["weight"], targets, float(counted)),), reference,
                   *close, exact=exact, given={"targets": targets}, products=True)


PROBLEMS = {"linear_cross_entropy": linear_cross_entropy}
