"""Router and routed experts."""
import torch
import torch.nn.functional as F

from .problem import DTYPES, Problem, operator


def logits_of(kind, tokens, experts, top_k, random):
    if kind == "random":
        # A permutation a row: no two are equal.
        return random.put(torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(i)) for i in range(tokens)])) * 0.25
    x = random.normal(tokens, experts)
    if kind == "ties":
        x = (x * 2).round() / 2 + 0.0  # no -0, which is an order of its own
    elif kind == "equal":
        x = x * 0 + 0.5
    elif kind == "-inf":  # just enough finite ones
        lowest = random.put(torch.arange(experts) >= top_k)
        x = torch.where(lowest, -torch.inf, x)
    elif kind == "one for all":
        x[:, experts // 2] += 50
    elif kind == "far":
        x = x * 80
    return x


def route(fields, random):
    tokens, experts, top_k, dtype = fields["tokens"], fields["experts"], fields["top_k"], DTYPES[fields["dtype"]]
    logits = logits_of(fields["logits"], tokens, experts, top_k, random).to(dtype)
    # Among equals the lower number first.
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]

    def exact(outputs, gradients):
        wrong = [] if torch.equal(outputs[1], order) else ["the chosen experts, or their order, are not the reference's"]
        if gradients:
            rest = gradients["logits"].clone()
            rest.scatter_(1, order, 0)
            wrong += ["an expert that was not chosen has a gradient"] if rest.any() else []
        return wrong

    def reference(x):
        return x["logits"].gather(1, order).softmax(-1), order

    close = (1e-5, 1e-5) if dtype is torch.float32 else (4e-3, 8e-3)
    return Problem({"logits": logits}, lambda x: operator("route")(x["logits"], top_k), reference, *close, exact=exact)


def choices(kind, tokens, experts, top_k, random):
    """Distinct experts of each token [tokens, top_k]."""
    weight = torch.ones(experts)
    if kind == "empty experts":
        weight[1::2] = 0
    elif kind == "zipf":
        weight = 1.0 / torch.arange(1, experts + 1)
    elif kind == "one for all":
        weight[1:] = 0
    generator = torch.Generator().manual_seed(experts)
    return random.put(torch.multinomial(weight.expand(tokens, experts), top_k, generator=generator))


def experts_reference(x, choice, shared):
    fc1, fc2 = x["fc1"], x["fc2"]
    out = torch.zeros_like(x["x"])
    for expert in range(fc1.shape[0]):
        token, place = (choice == expert).nonzero(as_tuple=True)
        gate, up = (x["x"][token] @ fc1[expert].T).chunk(2, -1)
        y = (F.silu(gate) * up) @ fc2[expert].T
        out = out.index_add(0, token, x["weights"][token, place, None] * y)
    return out + torch.sigmoid(x["gate"]) * x["shared"] if shared else out


def routed_experts(fields, random):
    tokens, experts, top_k, hidden, inner = (fields[name] for name in ("tokens", "experts", "top_k", "hidden", "inner"))
    choice = choices(fields["routing"], tokens, experts, top_k, random)
    weights = random.normal(tokens, top_k).softmax(-1)
    leaves = {"x": random.normal(tokens, hidden), "weights": weights,
              "fc1": random.normal(experts, 2 * inner, hidden, scale=1.6 / hidden**0.5),
              "fc2": random.normal(experts, hidden, inner, scale=1.6 / inner**0.5)}
    if fields["shared"]:
        leaves |= {"shared": random.normal(tokens, hidden), "gate": random.normal(tokens, 1)}
    leaves = {name: x.to(torch.bfloat16) for name, x in leaves.items()}

    def ours(x):
        return (operator("routed_experts")(x["x"], x["weights"], x["fc1"], x["fc2"], choice, x.get("shared"), x.get("gate")),)

    def exact(_, gradients):
        if not gradients:
            return []
        empty = torch.ones(experts, dtype=torch.bool, device=choice.device)
        empty[choice.flatten()] = False
        return [f"the gradient of {name} is not 0 for an expert without tokens" for name in ("fc1", "fc2") if gradients[name][empty].any()]

    return Problem(leaves, ours, lambda x: (experts_reference(x, choice, fields["shared"]),), 8e-3, 1e-2, exact=exact,
                   given={"choice": choice}, products=True)


PROBLEMS = {"route": route, "routed_experts": routed_experts}
