"""Run by tests/test_monitor.py on two processes, with the tiny model's folder.

k1 in the reward against the stock trainer, full and LoRA, accumulation 1 and 3; and the monitor's means against sums
over the completions of both processes. Process 0 prints one line of JSON.
"""

import json
import sys
import tempfile

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration import KLMonitorCallback, KLPenaltyCallback

torch.set_num_threads(1)


def reward(completions, **kwargs):
    return [float(text.split().count("tree") + len(text.split()) / 10) for text in completions]


def make(folder: str, lora: bool, accumulation: int) -> RLOOTrainer:
    return RLOOTrainer(
        model=folder,
        reward_funcs=reward,
        args=RLOOConfig(
            output_dir=tempfile.mkdtemp(),
            beta=0.5,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            num_generations=4,
            max_completion_length=6,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 24}),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )


def history(trainer) -> list[dict]:
    trainer.train()
    times = ("step_time", "train_runtime", "train_samples", "train_steps", "kl/")
    return [{k: v for k, v in entry.items() if not k.startswith(times)} for entry in trainer.state.log_history]


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]


def main(folder: str) -> None:
    found = {}
    for lora in (False, True):
        for accumulation in (1, 3):
            stock = make(folder, lora, accumulation)
            expected = history(stock), weights(stock)
            ours = make(folder, lora, accumulation)
            KLPenaltyCallback(ours, "k1")
            KLMonitorCallback(ours)
            same = history(ours) == expected[0]
            same = same and all(torch.equal(a, b) for a, b in zip(weights(ours), expected[1], strict=True))
            found[f"same-{'lora' if lora else 'full'}-{accumulation}"] = same

    trainer = make(folder, False, 1)
    KLPenaltyCallback(trainer, "k3", "both", kl_budget_per_token=None)
    monitor = KLMonitorCallback(trainer, exact=True)
    seam, rows = trainer._kl_alliteration_seam, []

    def keep(rollout):
        ratio, mask = rollout.ref_log_ratio, rollout.completion_mask
        rows.append(list(zip(((ratio * mask).sum(1)).tolist(), mask.sum(1).tolist(), strict=True)))

    assert seam.observers == [monitor.observe]
    seam.observers.append(keep)
    trainer.train()
    pooled = gather_object([rows])
    if trainer.accelerator.is_main_process:
        last = [pair for process in pooled for pair in process[-1]]
        entry = [e for e in trainer.state.log_history if "kl/k1_per_token" in e][-1]
        found["pooled"] = {
            "kl/k1_per_token": sum(s for s, _ in last) / sum(n for _, n in last),
            "kl/k1_per_sequence": sum(s for s, _ in last) / len(last),
        }
        found["logged"] = {name: entry[name] for name in found["pooled"]}
        found["lengths"] = [n for _, n in last]
        found["exact"] = entry["kl/exact_per_token"]
        print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
