"""Peak memory of LoRA with a KL penalty over full fine-tuning with one, at the shape of TinyStories-33M.

    python benchmarks/adapter_memory.py

Two updates of ten texts of 100 tokens, AdamW, in float32 on a CPU, in bfloat16 on a GPU. Each line is a process of its
own: memory at its peak less what it had before the model. `held`: what models, optimizer and gradients keep between
two updates.
"""

import gc
import os
import resource
import subprocess
import sys

import torch
from common import device, make_trainer, model_folder, quiet

from kl_alliteration import KLPenaltyCallback, use_fast_sampling
from kl_alliteration.adapters import default_lora_config

VARIANTS = {"full": None, "lora": default_lora_config}
MB = 2**20


def peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(variant: str, fast: bool, folder: str) -> tuple[float, float]:
    """`(peak, held)` in MB."""
    quiet()
    before = peak()  # the model was made by another process, whose peak would hide a part of this one's
    config = VARIANTS[variant]
    trainer = make_trainer(
        folder, config and config(), per_device_train_batch_size=10, max_steps=2, beta=0.4, learning_rate=1e-4
    )
    trainer.add_callback(KLPenaltyCallback(trainer))
    if fast:
        use_fast_sampling(trainer)
    trainer.train()
    gc.collect()
    live = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            for tensor in (each, each.grad if each.is_leaf else None):
                if tensor is not None:
                    live[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return peak() - before, sum(live.values()) / MB


def main():
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1], sys.argv[2] == "fast", sys.argv[3]))
        return
    quiet()
    folder = model_folder("33M")
    heads = "sampling", "full: peak (held), MB", "LoRA: peak (held), MB", "peak, LoRA over full"
    print(f"{device()}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    # glibc keeps freed blocks of some MB for itself; a fixed threshold makes resident memory what is in use.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for sampling in ("generate", "fast"):
        found = []
        for variant in VARIANTS:
            command = [sys.executable, __file__, variant, sampling, folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            found.append(tuple(map(float, done.stdout.splitlines()[-1].split())))
        cells = " | ".join(f"{top:.0f} ({held:.0f})" for top, held in found)
        print(f"| {sampling} | {cells} | {found[1][0] / found[0][0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
