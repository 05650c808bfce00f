"""Faster sampling for a stock trainer: `use_fast_sampling(trainer)`."""

import ctypes
import platform

from .._trl import seam_of
from ..kl import autocast_dtype
from .as_sampled import score_as_sampled
from .correction import use_sampler_correction
from .generate import use_fast_generate

__all__ = [
    "keep_freed_memory",
    "score_as_sampled",
    "use_fast_generate",
    "use_fast_sampling",
    "use_sampler_correction",
]


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, where its C library is glibc; `False` elsewhere.

    On a CPU every large tensor is memory that the kernel has to map and clear anew, and gets back when it is freed:
    with a small model that is half of a training step. The options are `M_TRIM_THRESHOLD` and `M_MMAP_MAX` of
    `mallopt(3)`. The process holds on to its peak from then on.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # names of options in malloc.h
    return bool(libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0))


def use_fast_sampling(trainer, one_forward: bool = True, keep_memory: bool = True) -> None:
    """Let a stock trainer sample its completions with this module: `generate` of its model is replaced.

    Supported are Llama, Qwen2, GPT-2 and GPT-Neo, full or LoRA, with temperature, top-k, top-p, min-p, any set of
    end-of-text tokens and left padding, also in mixed precision. Each distinct prompt is computed once. Dropout is off
    while sampling. Anything else goes to transformers' own `generate` with one line in the log, and so do sharded
    weights (FSDP, DeepSpeed). With vLLM there is nothing to do.

    `one_forward`: where a generation batch is one micro-batch, the loss uses the scoring pass and its graph, in place
    of a second forward pass. It holds the graph while the reference scores and the rewards are computed.

    `keep_memory`: on a CPU, [`keep_freed_memory`].
    """
    accelerator = trainer.accelerator
    if keep_memory and accelerator.device.type == "cpu":
        keep_freed_memory()
    if one_forward:
        seam_of(trainer).use_one_forward()
    use_fast_generate(
        accelerator.unwrap_model(trainer.model),
        sharded=accelerator.distributed_type in ("FSDP", "DEEPSPEED"),
        dtype=autocast_dtype(accelerator),
        keep=seam_of(trainer).keep_sampled if hasattr(trainer, "reward_funcs") else None,  # DPO's scores nothing
    )
