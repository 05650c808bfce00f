"""Bias and variance of the KL estimators against the exact KL, at three distances from the reference.

    python studies/estimators.py [--completions 2000] [--snapshots 6 20 50]

The policies are the embedded model after that many steps of the recipe's RLOO (learning rate 3e-4, beta 0.05, seed 0).
Prints a Markdown table: nats per sequence, mean difference to exact with its standard error, and standard deviation
over completions.
"""

import argparse
import copy
import tempfile

import torch
from common import quiet
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration import alliteration_reward, kl
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

TOKENS = 100
ESTIMATES = {
    **{name: (name, {}) for name in kl.SAMPLED},
    "top_k, k = 16": ("top_k", {"k": 16}),
    "top_k, k = 64": ("top_k", {"k": 64}),
}


class Snapshots(TrainerCallback):
    def __init__(self, steps):
        self.steps, self.models = steps, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.models[state.global_step] = copy.deepcopy(model.state_dict())


def train(steps: list[int]) -> dict:
    config = RLOOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=max(steps),
        beta=0.05,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        num_generations=10,
        per_device_train_batch_size=40,
        max_completion_length=TOKENS,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1000,
        seed=0,
    )
    prompts = Dataset.from_dict({"prompt": [PROMPT] * 10_000})
    trainer = RLOOTrainer(str(MODEL_PATH), alliteration_reward, args=config, train_dataset=prompts)
    snapshots = Snapshots(steps)
    trainer.add_callback(snapshots)
    trainer.train()
    return snapshots.models


@torch.no_grad()
def per_sequence(policy, reference, tokenizer, count: int) -> dict[str, torch.Tensor]:
    """Every estimate of `count` completions of the policy, (count,) nats per sequence each."""
    found = {name: [] for name in ("exact", *ESTIMATES)}
    prompt = tokenizer([PROMPT] * 100, return_tensors="pt")
    width = prompt["input_ids"].shape[1]
    for _ in range(count // 100):
        ids = policy.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=TOKENS)
        completion = ids[:, width:]
        ends = (completion == tokenizer.eos_token_id).int()
        mask = (ends.cumsum(-1) - ends) == 0  # the end itself counts
        hidden = [m.base_model(ids).last_hidden_state[:, width - 1 : -1] for m in (policy, reference)]
        heads = [kl.LMHead.of(m) for m in (policy, reference)]

        def estimate(name, hidden=hidden, heads=heads, completion=completion, mask=mask, **options):
            function = kl.full_vocabulary_estimate(name, **options)
            return kl.from_hidden_states(function, *hidden, *heads, completion, mask)

        log_probs = [
            head.log_probs(h.flatten(0, 1)).view(*h.shape[:2], -1).gather(-1, completion[..., None])[..., 0]
            for h, head in zip(hidden, heads, strict=True)
        ]
        found["exact"].append(kl.reduce_per_sequence(estimate("exact"), mask, "sum"))
        for label, (name, options) in ESTIMATES.items():
            values = kl.SAMPLED[name](log_probs[0] - log_probs[1]) if name in kl.SAMPLED else estimate(name, **options)
            found[label].append(kl.reduce_per_sequence(values, mask, "sum"))
    return {name: torch.cat(parts) for name, parts in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=2000)
    parser.add_argument("--snapshots", type=int, nargs="+", default=[6, 20, 50])
    args = parser.parse_args()
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    reference = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
    policy = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
    states = train(args.snapshots)
    torch.manual_seed(1)
    print("| steps of RLOO | estimator | mean | bias (standard error) | standard deviation |\n|---|---|---|---|---|")
    for steps, state in states.items():
        policy.load_state_dict(state)
        values = per_sequence(policy, reference, tokenizer, args.completions)
        for name, value in values.items():
            difference = value - values["exact"]
            error = difference.std() / len(value) ** 0.5
            bias = "" if name == "exact" else f"{difference.mean():+.3f} ({error:.3f})"
            print(f"| {steps} | {name} | {value.mean():.3f} | {bias} | {value.std():.3f} |", flush=True)


if __name__ == "__main__":
    main()
