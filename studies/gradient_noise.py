"""How much of a batch's gradient is signal? By what a token is credited with: its whole text, or what follows soon.

    python studies/gradient_noise.py
    python studies/gradient_noise.py --model models/smollm2-135m-instruct --lora --temperature 0.7 --batch 32 \\
        --group 8 --tokens 64 --prompts recipes/instruct_prompts.jsonl \\
        --reward kl_alliteration.rewards.content_alliteration_in_25_words

Stock RLOO of a policy that stays where it is: learning rate 0, no penalty, and so the same texts in every row. Of the
gradients of its batches, the signal is what two different ones have in common, the mean of their inner products; the
share is that over the mean squared norm of one, with the error of leaving one batch out (jackknife). Rows with another
discount have another objective.
"""

import argparse
import tempfile
from dataclasses import dataclass, field

import torch
from common import quiet
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser, TrainerCallback, set_seed
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration import use_fast_sampling, use_reward_to_go
from kl_alliteration.lab.checked_rewards import load_rewards
from kl_alliteration.lab.survival import one_line_errors
from kl_alliteration.story_lm import MODEL_PATH

CREDITS = {  # the discount and the first tokens that it is not for; `None` is TRL's own credit
    "by text": None,
    "by token, discount 1": (1.0, 0),
    "discount 0.8 behind 12 tokens": (0.8, 12),
    "discount 0.8": (0.8, 0),
    "discount 0.5": (0.5, 0),
    "discount 0": (0.0, 0),
}


@dataclass
class Arguments:
    model: str = field(default=str(MODEL_PATH), metadata={"help": "A folder or Hub id."})
    reward: str = field(default="kl_alliteration.rewards.alliteration_reward", metadata={"help": "By dotted path."})
    prompts: str | None = field(default=None, metadata={"help": "A JSONL file; none: Once upon a time."})
    batches: int = field(default=8, metadata={"help": "Whose gradients are compared."})
    batch: int = field(default=40, metadata={"help": "Completions of each."})
    group: int = field(default=40, metadata={"help": "Completions of a prompt."})
    tokens: int = field(default=100, metadata={"help": "Of a completion, at most."})
    temperature: float = 1.0
    lora: bool = field(default=False, metadata={"help": "The gradient of an adapter of rank 8 in all linear layers."})
    seed: int = 0


class Keep(TrainerCallback):
    """The gradient of every step, as one vector."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))


def gradients_of(args: Arguments, credit: tuple[float, int] | None, folder: str) -> tuple[torch.Tensor, float]:
    """(batches, parameters), and the mean reward, by which one sees that the texts are the same."""
    rows = load_dataset("json", data_files=args.prompts, split="train") if args.prompts else None
    prompts = rows["prompt"] if rows else ["Once upon a time"]
    set_seed(args.seed)  # an adapter is drawn before the trainer sets it
    keep, lora = Keep(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = RLOOTrainer(
        model=args.model,
        reward_funcs=load_rewards([args.reward]),
        args=RLOOConfig(
            output_dir=folder, learning_rate=0.0, beta=0.0, max_grad_norm=0.0, max_steps=args.batches, seed=args.seed,
            per_device_train_batch_size=args.batch, num_generations=args.group, max_completion_length=args.tokens,
            temperature=args.temperature, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
            gradient_checkpointing=False, bf16=False, model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_dict({"prompt": list(prompts) * (1 if rows else args.batches * args.batch)}),
        peft_config=lora if args.lora else None,
        callbacks=[keep],
    )  # fmt: skip
    use_fast_sampling(trainer)
    if credit is not None:
        use_reward_to_go(trainer, credit[0], opening_tokens=credit[1])
    trainer.train()
    found = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return torch.stack(keep.gradients), sum(found) / len(found)


def signal_of(products: torch.Tensor) -> tuple[float, float]:
    """(n, n) inner products of gradients -> the signal, and its share of the squared norm of one."""
    n = len(products)
    squares = products.diagonal().mean()
    signal = (products.sum() - products.diagonal().sum()) / (n * (n - 1))
    return signal.item(), (signal / squares).item()


def jackknife(products: torch.Tensor) -> float:
    """The standard error of the share."""
    n = len(products)
    left = [[j for j in range(n) if j != i] for i in range(n)]
    shares = torch.tensor([signal_of(products[rows][:, rows])[1] for rows in left])
    return ((n - 1) * shares.var(correction=0)).sqrt().item()


@one_line_errors
def main():
    raw = argparse.RawDescriptionHelpFormatter
    (args,) = HfArgumentParser(Arguments, description=__doc__, formatter_class=raw).parse_args_into_dataclasses()
    quiet()
    print("| credit | reward | squared norm of a gradient | of it signal | share (error) |\n|---|---|---|---|---|")
    for name, credit in CREDITS.items():
        with tempfile.TemporaryDirectory() as folder:
            gradients, reward = gradients_of(args, credit, folder)
        products = gradients @ gradients.T
        signal, share = signal_of(products)
        squares = products.diagonal().mean().item()
        error = jackknife(products)
        print(f"| {name} | {reward:.2f} | {squares:.4g} | {signal:.4g} | {share:.3f} ({error:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
