"""Peak memory of the exact KL, forward and backward, at a vocabulary of 50,257 and 1,024 positions, on a CPU.

    python benchmarks/exact_memory.py

Each line is a process of its own: resident memory at its peak less what it had before.
"""

import os
import resource
import subprocess
import sys

VOCABULARY, HIDDEN, SHAPE = 50_257, 64, (8, 128)


def measure(rows: int) -> float:
    import torch

    from kl_alliteration import kl

    torch.manual_seed(0)
    torch.set_num_threads(1)
    weights = [torch.randn(VOCABULARY, HIDDEN) * 0.1 for _ in range(2)]
    hidden, ref_hidden = torch.randn(*SHAPE, HIDDEN, requires_grad=True), torch.randn(*SHAPE, HIDDEN)
    weights[0].requires_grad_()
    weights[0].grad, hidden.grad = torch.zeros_like(weights[0]), torch.zeros_like(hidden)
    ids = torch.zeros(SHAPE, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heads = (kl.LMHead(weight) for weight in weights)
    kl.from_hidden_states(kl.exact, hidden, ref_hidden, *heads, ids, ids + 1, rows=rows).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main():
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1])))
        return
    positions = SHAPE[0] * SHAPE[1]
    print(f"B x T x V of one model in float32: {positions * VOCABULARY * 4 / 2**20:.0f} MB\n")
    print("| positions in a chunk | one chunk (MB) | peak (MB) |\n|---|---|---|")
    for rows in (16, 83, 256, positions):
        # glibc keeps freed blocks of some MB for itself; a fixed threshold makes resident memory what is in use.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        print(f"| {rows} | {rows * VOCABULARY * 4 / 2**20:.0f} | {float(done.stdout):.0f} |", flush=True)


if __name__ == "__main__":
    main()
