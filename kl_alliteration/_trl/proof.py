"""Whether two ways of computing a model's states are one: a few rows, their gradients, what may not be compared."""

import torch

ROTARY = ("default", "linear", "llama3", "yarn", "proportional")  # those of dynamic and longrope change with a length


def some_that_share(row: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` rows, two of them with one prompt, and one of another where there is another."""
    order = row.argsort(stable=True)
    most = row.mode().values
    same, others = order[row[order] == most], order[row[order] != most]
    return torch.cat([same[: count - min(len(others), count // 2)], others[: count // 2]])


def what_differs(found: torch.Tensor, expected: torch.Tensor, parameters: list[torch.Tensor]) -> str | None:
    """What is beyond rounding between (N, H) states, or between their gradients by `parameters`; `None`: nothing."""
    off = apart([found], [expected])
    if not off <= tolerance(expected):
        return f"its states are {off:.2g} of their size off those without a cache"
    if parameters and expected.requires_grad:
        off = apart(*(gradients(states, parameters) for states in (found, expected)))
        if not off <= 10 * tolerance(expected):
            return f"its gradients are {off:.2g} of their size off those without a cache"
    return None


def gradients(states: torch.Tensor, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a sum of the states with weights that do not cancel out, by every parameter."""
    weights = torch.linspace(-1, 2, states.numel(), dtype=torch.float32, device=states.device).view(states.shape)
    found = torch.autograd.grad((states * weights).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The norm of all differences over that of what is expected."""
    difference = sum((f.float() - e.float()).square().sum() for f, e in zip(found, expected, strict=True))
    return (difference / sum(e.float().square().sum() for e in expected)).sqrt().item()


def tolerance(states: torch.Tensor) -> float:
    """How far apart two ways of computing the same states may be, of their size."""
    half = torch.is_autocast_enabled(states.device.type)
    return 0.03 if half else {torch.float64: 1e-6, torch.float32: 1e-4}.get(states.dtype, 0.03)


def drops(module: torch.nn.Module) -> bool:
    """Whether a module drops units while it trains: by its `p`, or by a rate that TRL's `disable_dropout` leaves."""
    rates = [getattr(module, "p", 0), *(value for name, value in vars(module).items() if "drop" in name)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def rotary_by_length(config) -> str | None:
    """The kind of a model's rotary positions, where a text's length may change those of all of its tokens."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_layers = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]  # by type, or of all
    kinds = (each.get("rope_type", "default") for each in of_layers)
    return next((kind for kind in kinds if kind not in ROTARY), None)
