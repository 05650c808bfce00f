"""The one door to torch's private operators: weights packed as oneDNN wants them. Read from torch 2.13.0."""

import torch


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this torch packs this weight: float32 on a CPU with oneDNN, and the operators are there."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return known and weight.device.type == "cpu" and weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """(Out, In), once."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(N, In) -> (N, Out) with a weight of [`pack`]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
