"""The one door to torch's private operators: weights packed as oneDNN wants them. Read from torch 2.13.0."""

import torch


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this torch packs this weight: on a CPU with oneDNN, in float32, or in bfloat16 where the CPU has it."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not known or weight.device.type != "cpu":
        return False
    half = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return weight.dtype in (torch.float32, half)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """(Out, In), once."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(N, In) -> (N, Out) with a weight of [`pack`]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
