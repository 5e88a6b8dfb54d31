"""The optimizer's step over many tensors."""
import torch

from .problem import DTYPES, Problem, operator

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1
OPERATORS = ("adamw_table", "adamw_step")


class Training:
    """Parameters with all that a step of them needs. The operators' table holds addresses, so that the tensors stay here."""

    def __init__(self, fields, parameters):
        eight = fields["eight_bit"]
        self.clip = fields["clip"]
        self.parameters = [x.clone() for x in parameters]
        self.masters = [x.float() if fields["masters"] else None for x in parameters]
        moment = torch.uint8 if eight else torch.float32
        self.moments = [[torch.zeros_like(x, dtype=moment) for x in parameters] for _ in range(2)]
        self.scales = [[x.new_zeros(-(-x.numel() // 256), dtype=torch.float32) if eight else None for x in parameters] for _ in range(2)]
        self.counts = [x.new_zeros((), dtype=torch.float32) for x in parameters]
        self.table = operator("adamw_table")(self.parameters, self.masters, *self.moments, *self.scales, self.counts, [DECAY] * len(parameters))

    def step(self, gradients):
        return operator("adamw_step")(self.table, gradients, LR, *BETAS, EPS, self.clip, False, 7)

    def trained(self):
        """What is stepped: the masters where there are some."""
        return [x if m is None else m for x, m in zip(self.parameters, self.masters)]


def adamw(fields, random):
    """`fields["steps"]` steps; outputs are the parameters and the last norm."""
    dtype, sizes, clip = DTYPES[fields["dtype"]], fields["sizes"], fields["clip"]
    start = [random.normal(n).to(dtype) for n in sizes]
    gradients = [[random.normal(n).to(dtype) for n in sizes] for _ in range(fields["steps"])]

    def ours(_):
        training = Training(fields, start)
        for given in gradients:
            norm = training.step(given)
        return torch.cat(training.trained()), norm

    def reference(_):
        parameters = [torch.nn.Parameter(x.double()) for x in start]
        optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False)
        for given in gradients:
            for parameter, gradient in zip(parameters, given):
                parameter.grad = gradient.double()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            if clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            optimizer.step()
            if not fields["masters"]:
                for parameter in parameters:
                    parameter.data = parameter.data.to(dtype).double()
        return torch.cat([p.detach() for p in parameters]), norm

    # Without masters each step rounds, and a rounding may fall on the other side; 8-bit moments hold four digits of their bits.
    close = 3e-2 if fields["eight_bit"] else 1e-6 if fields["masters"] or dtype is torch.float32 else 4e-3
    return Problem({}, ours, reference, close, close, given={"parameters": start, "gradients": gradients[0]})


PROBLEMS = {"adamw": adamw}
