"""Run by test_deepspeed.py, in one process or under a launcher: runs whose batches are the same on one or on several.

    [accelerate launch ...] sharded_run.py MODEL OUT CASES

CASES is JSON, name to options: `penalty`, an estimator and a placement, or null for a run at beta 0 that is only
watched; `lora`; `reference`, one of `REFERENCES` or null; `output_dir`; `resume`; `killed`, in the third step.
Process 0 writes to OUT what each run logged and its weights at the end, or how it was refused.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import TINY_RUN, reward
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from trl import RLOOConfig, RLOOTrainer

from kl_alliteration import KLControlCallback, KLMonitorCallback, KLPenalty, KLPenaltyCallback
from kl_alliteration.control import LogPIRule
from kl_alliteration.references import (
    MovingAverageReferenceCallback,
    ReferenceCallback,
    ResetReferenceCallback,
    use_loaded_reference,
)

BATCH = 8  # completions, of all processes
TIMES = ("step_time", "train_runtime", "train_samples", "train_steps", "total_flos")


class OneBatch(TrainerCallback):
    """Random numbers by step, row of the whole batch, and token: however many processes there are, one batch."""

    def __init__(self, trainer):
        self.first = trainer.accelerator.process_index * trainer.args.per_device_train_batch_size
        torch.multinomial = self.draw  # by which transformers samples

    def on_step_begin(self, args, state, control, **kwargs):
        generator = torch.Generator().manual_seed(state.global_step)
        self.numbers = iter(torch.rand(args.max_steps * BATCH, BATCH, generator=generator, dtype=torch.float64))

    def draw(self, probabilities, num_samples):
        wanted = next(self.numbers)[self.first :][: len(probabilities)].unsqueeze(1)
        below = probabilities.double().cumsum(-1) < wanted
        return below.sum(-1, keepdim=True).clamp(max=probabilities.shape[1] - 1)


class Killed(TrainerCallback):
    """As a machine that is lost, in the third step: by then every process has saved its part of the second."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


REFERENCES = {
    "loaded": use_loaded_reference,
    "start": ReferenceCallback,
    "average": lambda trainer: MovingAverageReferenceCallback(trainer, alpha=0.5, steps=1),
    "reset": lambda trainer: ResetReferenceCallback(trainer, steps=2),
}


def make(model: str, options: dict) -> RLOOTrainer:
    set_seed(0)
    processes, penalty = int(os.environ.get("WORLD_SIZE", 1)), options["penalty"]
    args = TINY_RUN | {"per_device_train_batch_size": BATCH // processes, "output_dir": options["output_dir"]}
    args |= {"save_strategy": "steps", "save_steps": 2, "seed": 3, "beta": 0.5 if penalty else 0.0}
    # Not zero at the start, so that policy and base differ from the first batch on.
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = RLOOTrainer(
        model=model,
        reward_funcs=reward,
        args=RLOOConfig(**args),
        train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 24}),
        peft_config=lora if options["lora"] else None,
    )
    callbacks = []
    if options["reference"]:
        callbacks.append(REFERENCES[options["reference"]](trainer))
    if penalty:
        callbacks.append(KLPenaltyCallback(trainer, KLPenalty(*penalty)))
        callbacks.append(KLControlCallback(trainer, LogPIRule(0.5, target_kl_per_token=0.05), "k1"))
    callbacks += [KLMonitorCallback(trainer, exact=True, load_reference=True), OneBatch(trainer)]
    for callback in callbacks + ([Killed()] if options["killed"] else []):
        if callback is not None:
            trainer.add_callback(callback)
    return trainer


def run(model: str, options: dict) -> dict:
    began = time.monotonic()
    try:
        trainer = make(model, options)
        trainer.train(resume_from_checkpoint=options["resume"])
    except ValueError as refused:
        assert not options["killed"], refused
        return {"refused": str(refused)}
    log = [
        {name: value for name, value in entry.items() if not name.startswith(TIMES)}
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # the whole weights, gathered
    kind = trainer.accelerator.distributed_type
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if kind == DistributedType.DEEPSPEED else None
    head = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight
    here = head.to_local() if hasattr(head, "to_local") else head
    return {
        "log": log,
        "weights": {name.removeprefix("module."): value.float().cpu() for name, value in (state or {}).items()},
        "kind": str(kind.value),
        "stage": stage,
        "processes": trainer.accelerator.num_processes,
        "share_of_head": here.numel() / (trainer.model.config.vocab_size * trainer.model.config.hidden_size),
        "seconds": time.monotonic() - began,
    }


def let_fsdp_run_on_cpus() -> None:
    """Accelerate takes FSDP for CPUs' plain data parallelism, without a word: it asks for the type of several GPUs."""
    make_state = PartialState.__init__

    def make_state_for_fsdp(self, *args, **kwargs):
        make_state(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = make_state_for_fsdp


def main(model: str, out: str, cases: str) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        let_fsdp_run_on_cpus()
    torch.set_num_threads(1)
    found = {name: run(model, options) for name, options in json.loads(cases).items()}
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(found, out)
    sys.stdout.flush()
    os._exit(0)  # process groups that a sharded model leaves behind may abort an interpreter on its way out


main(*sys.argv[1:])
