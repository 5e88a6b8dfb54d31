"""The gated delta net between its projections: the rule, the convolution, and both with the gated norm as one node."""
import math

import torch
import torch.nn.functional as F

from .problem import DTYPES, Problem, borders, operator, rounded, wide
from .norm import gated_norm

D = 128
CHUNK = 64


def unit(x):
    """Rows of length 1, as the model normalises queries and keys."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def decay_and_beta(a, b, a_log, dt_bias, dtype):
    """g [t, heads] and beta [t, heads], which is rounded as b is stored."""
    return -a_log.exp() * F.softplus(a + dt_bias), rounded(torch.sigmoid(b), dtype)


def recurrence(q, k, v, g, beta, state):
    """The rule, token by token: q, k [t, heads, d] of length 1, v [t, heads, d], g, beta [t, heads], state [heads, d, d]."""
    out = []
    for t in range(q.shape[0]):
        state = state * g[t].exp()[:, None, None]
        delta = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t][:, :, None] * delta[:, None, :]
        out.append(torch.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(D))
    return (torch.stack(out) if out else v), state


def chunks(q, k, v, g, beta, state, terms=None):
    """The same in chunks of 64 tokens, which is exact in float64. `terms` takes what a gradient of beta is the dot product of."""
    outputs = []
    for start in range(0, q.shape[0], CHUNK):
        one = slice(start, start + CHUNK)
        Q, K, V = (x[one].transpose(0, 1) for x in (q, k, v))  # [heads, m, d]
        G, B = g[one].transpose(0, 1).cumsum(-1), beta[one].transpose(0, 1)[..., None]
        m = Q.shape[1]
        lower = torch.ones(m, m, dtype=torch.bool, device=q.device).tril()
        gamma = torch.where(lower, G[:, :, None] - G[:, None, :], -math.inf).exp()
        strict = (K @ K.mT * gamma).tril(-1)
        R = V - G.exp()[..., None] * (K @ state)
        written = B * R
        delta = torch.linalg.solve_triangular(torch.eye(m, dtype=q.dtype, device=q.device) + B * strict, written, upper=False)
        if terms is not None and written.requires_grad:
            written.retain_grad()
            terms.append((one, written, (R - strict @ delta).detach()))
        out = G.exp()[..., None] * (Q @ state) + (Q @ K.mT * gamma) @ delta
        outputs.append((out / math.sqrt(D)).transpose(0, 1))
        left = (G[:, -1:] - G).exp()[..., None]
        state = G[:, -1].exp()[:, None, None] * state + (K * left).mT @ delta
    return (torch.cat(outputs) if outputs else v), state


def rule(q, k, v, g, beta, lengths, initial, form, terms=None):
    """All sequences of a pack; tokens behind the last give zeros. Returns outputs [tokens, heads, d] and states [n, heads, d, d]."""
    ratio = v.shape[1] // q.shape[1]
    q, k = (unit(x).repeat_interleave(ratio, 1) for x in (q, k))
    out, states, first = [], [], 0
    for index, length in enumerate(lengths):
        one = slice(first, first + length)
        state = initial[index] if initial is not None else v.new_zeros(v.shape[1], D, D)
        here = None if terms is None else []
        y, state = form(q[one], k[one], v[one], g[one], beta[one], state, *([here] if form is chunks else []))
        if here:
            terms += [(slice(first + s.start, first + min(s.stop, length)), written, rho) for s, written, rho in here]
        out.append(y)
        states.append(state)
        first += length
    out.append(v.new_zeros(v.shape[0] - first, *v.shape[1:]))
    return torch.cat(out), torch.stack(states) if states else v.new_zeros(0, v.shape[1], D, D)


def gate_inputs(fields, tokens, heads, dtype, random):
    """a, b [tokens, heads] and A_log, dt_bias [heads] for the case's decay and beta."""
    decay, a, b = fields["decay"], random.normal(tokens, heads), random.normal(tokens, heads, scale=1.5)
    if decay == "real":  # as transformers initialises them
        a_log, dt_bias = random.uniform(heads, low=0.01, high=16.0).log(), random.normal(heads, scale=0.1, mean=1.0)
    else:
        # g is -softplus(a) / 4: -50 a token where a is 200, beyond what exp holds in float32.
        a_log, dt_bias = random.put(torch.full((heads,), math.log(0.25))), random.put(torch.zeros(heads))
        strong = torch.zeros(tokens, 1, dtype=torch.bool)
        strong[::CHUNK if decay == "first" else 3] = decay in ("mixed", "first")
        strong = random.put(strong)
        usual = {"slow": -3.2 + 0.3 * a, "-5": 20.0 + 0 * a, "-50": 200.0 + 0 * a}.get(decay, -1000.0 + 0 * a)
        a = torch.where(strong, 200.0, usual)
    beta = fields.get("beta", "random")
    if beta in ("zero", "one"):
        b = 0 * b + (200.0 if beta == "one" else -200.0)
    elif beta == "thirty":
        b = torch.where(random.put(torch.arange(tokens) % 2 == 0)[:, None], 30.0, -30.0).expand(tokens, heads).contiguous()
    return a.to(dtype), b.to(dtype), a_log, dt_bias


def keys(kind, tokens, heads, random):
    k = random.normal(tokens, heads, D, mean=0.5 if kind == "correlated" else 0.0)
    if kind == "equal":
        k = k[:1].expand_as(k).contiguous()
    elif kind == "zero rows":
        k[::3] = 0
    elif kind == "orthogonal":
        k = random.put(torch.eye(D)[torch.arange(tokens) % D])[:, None].expand(tokens, heads, D).contiguous()
    return k.to(torch.bfloat16)


def gated_delta_rule(fields, random):
    lengths, tokens = fields["lengths"], sum(fields["lengths"]) + fields["tail"]
    key_heads, heads = fields["key_heads"], fields["key_heads"] * fields["ratio"]
    gates, gap, state = DTYPES[fields["gates"]], fields["slices"], fields["state"]
    a, b, a_log, dt_bias = gate_inputs(fields, tokens, heads, gates, random)
    q = random.normal(tokens, key_heads, D).to(torch.bfloat16)
    if fields["keys"] == "zero rows":
        q[::5] = 0
    flat = {"q": q, "k": keys(fields["keys"], tokens, key_heads, random), "v": random.normal(tokens, heads, D).to(torch.bfloat16)}
    leaves, narrow = {}, {}
    for name, x in flat.items():
        leaves[name], narrow[name] = wide(x.flatten(1), gap, random)
    leaves |= {"a": a, "b": b, "a_log": a_log, "dt_bias": dt_bias}
    if state in ("initial", "both"):
        leaves["initial_state"] = random.normal(len(lengths), heads, D, D, scale=0.3)
    cu = borders(fields, random)
    chunk_map = operator("chunk_map")(cu, tokens)
    asked = state != "unasked"

    def ours(x):
        parts = [narrow[name](x[name]).unflatten(1, (-1, D)) for name in ("q", "k", "v")]
        out, final = operator("gated_delta_rule")(*parts, x["a"], x["b"], x["a_log"], x["dt_bias"], x.get("initial_state"), cu,
                                                  chunk_map, asked)
        if state == "final only":
            return (final,)
        return (out, final) if state == "both" else (out,)

    kept = {}

    def reference(x, form=chunks):
        g, beta = decay_and_beta(x["a"], x["b"], x["a_log"], x["dt_bias"], gates)
        if g.requires_grad:
            g.retain_grad()
        terms = []
        parts = [narrow[name](x[name]).unflatten(1, (-1, D)) for name in ("q", "k", "v")]
        out, final = rule(*parts, g, beta, lengths, x.get("initial_state"), form, terms)
        kept.update(g=g, beta=beta, terms=terms, rate=x["a_log"].detach().exp())
        return (final,) if state == "final only" else (out, final) if state == "both" else (out,)

    def sizes():
        g, beta = kept["g"], kept["beta"].detach()
        if g.grad is None:
            return {}
        size = (g.grad.abs() * (g.detach().abs() + kept["rate"])).sum(0) + 1e-6
        terms = torch.zeros_like(beta)
        for where, written, rho in kept["terms"]:
            terms[where] = (written.grad * rho).abs().sum(-1).transpose(0, 1)
        return {"a_log": size, "dt_bias": size, "b": (terms * beta * (1 - beta)).norm().item()}

    def exact(outputs, gradients):
        behind = sum(lengths)
        wrong = [f"the gradient of {name} is not 0 behind the last border" for name in ("q", "k", "v", "a", "b")
                 if gradients and gradients[name][behind:].any()]
        if state not in ("final only",) and outputs[0][behind:].any():
            wrong.append("outputs are not 0 behind the last border")
        return wrong

    bounds, output_bound = {"a": 1.2e-2, "a_log": 8e-3, "dt_bias": 8e-3}, 8e-3
    if fields["keys"] == "equal":
        # What tokens write cancels, and its roundings in bfloat16 add up in a chunk: twice what eight seeds showed in emulation.
        bounds["v"] = 2e-2
        if state == "none":
            bounds |= {"q": 4.4e-2, "a": 6.8e-2}
            output_bound = 3e-2
    return Problem(leaves, ours, reference, output_bound, 8e-3, bounds, sizes=sizes, exact=exact, given={"cu_seqlens": cu})


def convolve(x, weight, lengths, state):
    """silu of the causal convolution: x [tokens, channels], weight [channels, 4], state [n, channels, 3] or None."""
    out, first = [], 0
    for index, length in enumerate(lengths):
        before = state[index].mT if state is not None else x.new_zeros(3, x.shape[1])
        rows = torch.cat([before, x[first:first + length]])
        out.append(sum(rows[j:j + length] * weight[:, j] for j in range(4)))
        first += length
    out.append(x.new_zeros(x.shape[0] - first, x.shape[1]))
    return F.silu(torch.cat(out))


def causal_conv1d_silu(fields, random):
    lengths, tokens, channels = fields["lengths"], sum(fields["lengths"]) + fields["tail"], fields["channels"]
    dtype = DTYPES[fields["dtype"]]
    leaf, narrow = wide(random.normal(tokens, channels).to(dtype), fields["slices"], random)
    leaves = {"x": leaf, "weight": random.normal(channels, 4, scale=0.5).to(DTYPES[fields["weight"]])}
    if fields["state"] == "initial":
        leaves["state"] = random.normal(len(lengths), channels, 3).to(dtype)
    cu = borders(fields, random)
    chunk_map = operator("chunk_map")(cu, tokens)

    def ours(x):
        return (operator("causal_conv1d_silu")(narrow(x["x"]), x["weight"], x.get("state"), cu, chunk_map),)

    def exact(outputs, gradients):
        behind = sum(lengths)
        zeros = {"outputs": outputs[0][behind:]} | ({"the gradient of x": gradients["x"][behind:]} if gradients else {})
        return [f"{what}: not 0 behind the last border" for what, x in zeros.items() if x.any()]

    close = 1e-5 if fields["dtype"] == "float32" else 4e-3
    weight_bound = 4e-3 if fields["weight"] == "bfloat16" else max(close, 1e-5)
    return Problem(leaves, ours, lambda x: (convolve(narrow(x["x"]), x["weight"], lengths, x.get("state")),), close, close,
                   {"weight": weight_bound}, exact=exact, given={"cu_seqlens": cu})


def gdn_core(fields, random):
    lengths, tokens = fields["lengths"], sum(fields["lengths"]) + fields["tail"]
    key_heads, heads = fields["key_heads"], fields["key_heads"] * fields["ratio"]
    keys_width, values_width = key_heads * D, heads * D
    channels, parameters = 2 * keys_width + values_width, DTYPES[fields["parameters"]]
    a, b, a_log, dt_bias = gate_inputs(fields, tokens, heads, torch.bfloat16, random)
    x = torch.cat([random.normal(tokens, channels + values_width).to(torch.bfloat16), b, a], 1)
    leaves = {"x": x, "conv1d": random.normal(channels, 4, scale=0.5).to(torch.bfloat16), "a_log": a_log.to(parameters),
              "dt_bias": dt_bias.to(parameters), "out_norm": random.normal(D, scale=0.3).to(parameters)}
    conv_state = state = None
    if fields["state"] == "both":
        conv_state = random.normal(len(lengths), channels, 3).to(torch.bfloat16)
        state = random.normal(len(lengths), heads, D, D, scale=0.1)
    cu = borders(fields, random)
    chunk_map = operator("chunk_map")(cu, tokens)
    asked = state is not None
    kept = {}

    def ours(x):
        out, final = operator("gdn_core")(x["x"], x["conv1d"], x["a_log"], x["dt_bias"], x["out_norm"], conv_state, state, cu,
                                          chunk_map, key_heads, 1e-6, asked)
        return (out, final.detach()) if asked else (out,)

    def reference(x):
        mixed, z, b, a = x["x"].split([channels, values_width, heads, heads], 1)
        mixed = convolve(mixed, x["conv1d"], lengths, None if conv_state is None else conv_state.double())
        q, k, v = (part.unflatten(1, (-1, D)) for part in mixed.split([keys_width, keys_width, values_width], 1))
        g, beta = decay_and_beta(a, b, x["a_log"], x["dt_bias"], torch.bfloat16)
        if g.requires_grad:
            g.retain_grad()
        kept.update(g=g, rate=x["a_log"].detach().exp())
        core, final = rule(q, k, v, g, beta, lengths, None if state is None else state.double(), chunks)
        out = gated_norm(core, z.unflatten(1, (-1, D)), x["out_norm"], 1e-6, torch.bfloat16).flatten(1)
        return (out, final.detach()) if asked else (out,)

    def sizes():
        if kept["g"].grad is None:
            return {}
        size = (kept["g"].grad.abs() * (kept["g"].detach().abs() + kept["rate"])).sum(0) + 1e-6
        return {"a_log": size, "dt_bias": size}

    def exact(outputs, gradients):
        behind = sum(lengths)
        zeros = {"outputs": outputs[0][behind:]} | ({"the gradient of x": gradients["x"][behind:]} if gradients else {})
        return [f"{what}: not 0 behind the last border" for what, x in zeros.items() if x.any()]

    # The gated norm divides by outputs of the rule that can be nearly zero, so that errors of single rows grow.
    return Problem(leaves, ours, reference, 9e-3, 3e-2, {"a_log": 2e-2, "dt_bias": 2e-2}, sizes=sizes, exact=exact, given={"cu_seqlens": cu})


PROBLEMS = {"gated_delta_rule": gated_delta_rule, "causal_conv1d_silu": causal_conv1d_silu, "gdn_core": gdn_core}
