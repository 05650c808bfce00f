"""A story model learns to alliterate under a KL penalty of your choice, in less than two minutes on two CPU cores."""

import warnings

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, judge, share_prompts, use_fast_sampling
from kl_alliteration.rewards import alliteration_reward
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

warnings.filterwarnings("ignore", "`.*gradient_checkpointing` is deprecated")  # trl's affair


class Show(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if "reward" in logs:
            words = "step {:3}   reward {:5.2f}   KL {:5.2f} nats per sequence"
            print(words.format(state.global_step, logs["reward"], logs["kl/exact_per_sequence"]))


gpu = torch.cuda.is_available()
args = RLOOConfig(
    output_dir="runs/minimal", max_steps=40, logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True,
    num_generations=40, per_device_train_batch_size=40, max_completion_length=100, beta=1.0,
    learning_rate=3e-4, warmup_steps=30, lr_scheduler_type="constant_with_warmup",
    gradient_checkpointing=False, bf16=gpu, use_cpu=not gpu,
)  # fmt: skip
trainer = RLOOTrainer(
    model=str(MODEL_PATH),
    reward_funcs=alliteration_reward,
    args=args,
    train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 1000}),
)
trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both", budget_per_token=0.15)))
trainer.add_callback(KLMonitorCallback(trainer, exact=True))
trainer.add_callback(Show())
trainer.remove_callback(PrinterCallback)
share_prompts(trainer)
use_fast_sampling(trainer)
trainer.train()
for story in judge(trainer.model, trainer.processing_class, [PROMPT] * 2, alliteration_reward).texts:
    print(f"\n{story}")
