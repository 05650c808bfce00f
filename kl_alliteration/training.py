"""What the recipes do with their options: prompts, rewards by path, instruments, one run from end to end."""

import html
import json
import shutil
import sys
import time
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, load_dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from trl import get_peft_config, get_quantization_config
from trl.data_utils import maybe_apply_chat_template

from . import reward_model  # noqa: F401  (to register it)
from ._trl import rollout_seam
from .adapters import (
    REFERENCE,
    MovingAverageReferenceCallback,
    ReferenceCallback,
    ResetReferenceCallback,
    check_trains,
    is_adapter,
    load_adapter,
    merge,
    name_base,
    save_stacked,
)
from .callbacks import (
    KLControlCallback,
    KLMonitorCallback,
    KLPenaltyCallback,
    MetricsFileCallback,
    StoryProgressCallback,
    StoryTableCallback,
    shown,
)
from .evaluation import Judgement, judge
from .figures import plot_curves
from .generation import use_fast_generate, use_fast_sampling
from .guard import CollapseGuardCallback
from .hub import push, write_card
from .kl import FULL_VOCABULARY
from .preferences import FILE as PAIRS
from .preferences import read_pairs, sample_pairs, write_pairs
from .recipe import (
    ALLITERATION,
    CONTROLLERS,
    LATEST,
    OnlineArguments,
    PairArguments,
    PenaltyArguments,
    RecipeParser,
    StoryArguments,
    write_recipe,
)
from .reward_paths import CheckedReward, load_rewards, ranking_reward, sum_rewards
from .runs import last_checkpoint
from .story_lm import MODEL_PATH, PROMPT
from .survival import stop_beyond, train_or_say_why

# TinyStories-33M was trained with this tokenizer and ships none (its model card says so).
TOKENIZER_OF = {"roneneldan/TinyStories-33M": "EleutherAI/gpt-neo-125M"}


def load_tokenizer(args: StoryArguments, model_args, training_args):
    name = args.tokenizer_name_or_path or TOKENIZER_OF.get(
        model_args.model_name_or_path, model_args.model_name_or_path
    )
    tokenizer = AutoTokenizer.from_pretrained(
        name, padding_side="left", trust_remote_code=training_args.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(args: StoryArguments, training_args, model_args) -> dict:
    """What a trainer takes as the model: by name, an adapter to go on with, or one merged below a new one."""
    model_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    peft_config, quantization = get_peft_config(model_args), get_quantization_config(model_args)
    if not args.adapter_name_or_path:
        training_args.model_init_kwargs = model_kwargs
        name = model_args.model_name_or_path
        return {"model": name, "peft_config": peft_config, "quantization_config": quantization}
    training_args.model_init_kwargs = None  # TRL's; the model is loaded here
    if model_kwargs["revision"] == "main":
        model_kwargs["revision"] = None  # the adapter's
    model = load_adapter(
        args.adapter_name_or_path,
        base=model_args.model_name_or_path,
        is_trainable=peft_config is None,
        trust_remote_code=training_args.trust_remote_code,
        quantization_config=quantization,
        **model_kwargs,
    )
    return {"model": model if peft_config is None else merge(model), "peft_config": peft_config}


def load_prompts(args: StoryArguments, prompts_per_batch: int) -> Dataset:
    """The prompts to train on, repeated where they are too few for a generation batch: TRL would train zero steps."""
    if args.dataset_name is None:
        if not args.prompt.strip():
            raise ValueError("prompt must not be empty; leave the option out for 'Once upon a time'")
        return Dataset.from_dict({"prompt": [args.prompt] * max(1_000, prompts_per_batch)})
    name = args.dataset_name
    if name.endswith((".json", ".jsonl")):
        if not Path(name).is_file():
            raise ValueError(f"dataset_name: there is no file {name!r}")
        dataset = load_dataset("json", data_files=name, split="train")
    else:
        dataset = load_dataset(name, name=args.dataset_config, split=args.dataset_train_split)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"dataset_name: {name!r} has no column `prompt`, only {', '.join(dataset.column_names)}")
    if len(dataset) == 0 or any(not prompt for prompt in dataset["prompt"]):
        raise ValueError(f"dataset_name: {name!r} holds an empty prompt; every row needs some text to go on from")
    repeats = -(-prompts_per_batch // len(dataset))
    return dataset.select(list(range(len(dataset))) * repeats)


def total_reward(trainer):
    """The trainer's rewards, weighted and summed as TRL does, for judging fresh stories; async ones are left out."""

    def of_model(model, tokenizer):
        def reward(prompts, completions) -> list[float]:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
            inputs = tokenizer(
                text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
            )
            with torch.inference_mode():
                return model(**inputs.to(model.device)).logits[:, 0].tolist()

        return reward

    functions, weights = [], []
    for function, tokenizer, weight in zip(
        trainer.reward_funcs, trainer.reward_processing_classes, trainer.reward_weights.tolist(), strict=True
    ):
        if isinstance(function, (torch.nn.Module, CheckedReward)):
            functions.append(of_model(function, tokenizer) if isinstance(function, torch.nn.Module) else function)
            weights.append(weight)
    return sum_rewards(functions, weights)


def add_instruments(trainer, args: OnlineArguments) -> None:
    """The reference, the penalty, the sampler, the monitor, the rule and the guard that a recipe's options ask for."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    steps, exact = trainer.args.ref_model_sync_steps, False
    if args.kl_reference == "moving_average":
        trainer.add_callback(MovingAverageReferenceCallback(trainer, trainer.args.ref_model_mixup_alpha, steps))
    elif args.kl_reference == "reset":
        trainer.add_callback(ResetReferenceCallback(trainer, steps, args.reset_at_kl, args.reset_optimizer))
    elif args.adapter_name_or_path and isinstance(model, PeftModel) and REFERENCE in model.peft_config:
        trainer.add_callback(ReferenceCallback(trainer, args.kl_reference))
    controlled = "k1"
    if isinstance(args, PenaltyArguments):
        trainer.add_callback(
            KLPenaltyCallback(
                trainer,
                kl_estimator=args.kl_estimator,
                kl_placement=args.kl_placement,
                kl_reduction=args.kl_reduction,
                kl_direction=args.kl_direction,
                kl_budget_per_token=args.kl_budget_per_token,
                kl_top_k=args.kl_top_k,
                strict=args.strict,
            )
        )
        rollout_seam(trainer).baseline = args.baseline == "leave_one_out"
        exact = args.kl_estimator == "exact"
        controlled = args.kl_estimator if args.kl_estimator in FULL_VOCABULARY else "k1"
    if args.fast_sampling:
        use_fast_sampling(trainer)
    if args.kl_monitor:
        trainer.add_callback(KLMonitorCallback(trainer, exact=exact))
    if args.kl_controller != "fixed":
        rule = CONTROLLERS[args.kl_controller](trainer.beta, args.target_kl_per_token)
        trainer.add_callback(KLControlCallback(trainer, rule, controlled))
    if args.kl_limit is not None:
        stop_beyond(trainer, args.kl_limit)
    if args.collapse_guard != "off":
        trainer.add_callback(CollapseGuardCallback(trainer, args.collapse_guard))
    if args.show_stories_every:
        trainer.add_callback(StoryTableCallback(trainer, args.show_stories_every))


def load_pairs(args: PairArguments, training_args, model_args, tokenizer) -> Dataset:
    """DPO's pairs: of `--pairs_from`, or of the run that is resumed, or sampled from the base and written."""
    here, reward = Path(training_args.output_dir, PAIRS), ranking_reward(args.reward_funcs, args.reward_timeout)
    if args.pairs_from is None and not (training_args.resume_from_checkpoint and here.is_file()):
        state, groups = PartialState(), -(-args.pairs // args.pairs_per_group)
        prompts = load_prompts(args, groups).shuffle(seed=training_args.seed)[:groups]["prompt"]
        kwargs = load_policy(args, training_args, model_args)
        model = AutoModelForCausalLM.from_pretrained(
            kwargs["model"],
            quantization_config=kwargs["quantization_config"],
            trust_remote_code=training_args.trust_remote_code,
            **training_args.model_init_kwargs,
        )
        if kwargs["quantization_config"] is None:
            model.to(state.device)
        model.eval()
        use_fast_generate(model)
        pairs = sample_pairs(
            model,
            tokenizer,
            prompts,
            reward,
            args.group_size,
            args.pairs_per_group,
            args.max_completion_length,
            args.temperature,
            seed=training_args.seed,
        )
        if not pairs:
            raise ValueError("reward_funcs: all completions of a group have the same reward: there is nothing to rank")
        if state.is_main_process:
            write_pairs(pairs, training_args.output_dir)
            means = [sum(pair[f"{side}_reward"] for pair in pairs) / len(pairs) for side in ("chosen", "rejected")]
            print(f"{len(pairs)} pairs: {means[0]:.1f} against {means[1]:.1f} on average, in {here}")
        state.wait_for_everyone()
    return read_pairs(args.pairs_from or here)


def judge_run(folder: str | Path, stories: int, seed: int = 1) -> Judgement:
    """Fresh stories of what a finished run of any recipe left, and the KL to the base that it started from.

    The prompt, the rewards and the lengths are those of its `recipe.yaml`; the base is the reference whatever the
    run's own was, and also where it had none.
    """
    options = yaml.safe_load(Path(folder, "recipe.yaml").read_text(encoding="utf-8")) or {}
    base = options.get("model_name_or_path", str(MODEL_PATH))
    adapter = is_adapter(str(folder))
    model = load_adapter(str(folder), base) if adapter else AutoModelForCausalLM.from_pretrained(folder)
    model.to(PartialState().device).eval()
    use_fast_generate(model)
    ref_model = None if adapter else AutoModelForCausalLM.from_pretrained(base).to(model.device).eval()
    rewards = options.get("reward_funcs", [ALLITERATION])
    return judge(
        model,
        AutoTokenizer.from_pretrained(folder, padding_side="left"),
        [options.get("prompt", PROMPT)] * stories,
        ranking_reward([rewards] if isinstance(rewards, str) else rewards),
        max_new_tokens=options.get("max_completion_length", 100),
        temperature=options.get("temperature", 1.0),
        ref_model=ref_model,
        adapter_off_is_reference=adapter,
        seed=seed,
    )


def build_trainer(trainer_class, args: OnlineArguments, training_args, model_args):
    """`RLOOTrainer` or `GRPOTrainer`, stock, with prompts, rewards and the instruments of the options."""
    trainer = trainer_class(
        **load_policy(args, training_args, model_args),
        reward_funcs=load_rewards(args.reward_funcs, args.reward_model_name_or_path, args.reward_timeout),
        args=training_args,
        train_dataset=load_prompts(args, training_args.generation_batch_size // training_args.num_generations),
        processing_class=load_tokenizer(args, model_args, training_args),
    )
    add_instruments(trainer, args)
    return trainer


def run_training(trainer) -> dict:
    """Train, resumed where the options say so, and under the guard where it may go back; what the guard saw."""
    guards = [c for c in trainer.callback_handler.callbacks if isinstance(c, CollapseGuardCallback)]
    train = guards[0].train if guards else trainer.train
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint == LATEST:
        checkpoint = last_checkpoint(trainer.args.output_dir)
        if trainer.is_world_process_zero():
            print(
                f"Resuming from {checkpoint}" if checkpoint else "No complete checkpoint: starting from the beginning"
            )
    train_or_say_why(trainer, lambda: train(resume_from_checkpoint=checkpoint))
    return {"collapse": guards[0].collapse, "last_good_checkpoint": guards[0].last_good} if guards else {}


def save_final(trainer, below: str | None = None) -> None:
    """The model or adapter into the output directory, each file at once: a killed run leaves the old one or the new.

    A reference adapter stays behind; it is in the checkpoints, where a resumed run needs it. An adapter that was
    trained on top of another, `below`, is saved as the sum of both.
    """
    folder = Path(trainer.args.output_dir)
    unfinished = folder / "_unfinished"
    trainer.save_model(str(unfinished), _internal_call=True)  # else it would push at once
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        if below is not None:
            save_stacked(below, str(unfinished), str(unfinished))
        for path in unfinished.iterdir():
            if path.is_file():
                path.replace(folder / path.name)
        shutil.rmtree(unfinished)


def penalty_in_words(trainer, args: StoryArguments) -> str:
    """What the card says of the penalty, its price with the unit."""
    if not isinstance(args, OnlineArguments):
        return f"the implicit one of DPO, beta {trainer.beta:g} per nat of the sequence"
    if isinstance(args, PenaltyArguments):
        place = "reward and loss" if args.kl_placement == "both" else args.kl_placement
        words = f"{args.kl_estimator} in the {place}, beta {trainer.beta:g} per nat of the "
        words += "sequence" if args.kl_reduction == "sum" else "token"
        if args.kl_budget_per_token:
            words += f" beyond a budget of {args.kl_budget_per_token:g} nats per token"
    else:
        words = f"k3 in the loss, beta {trainer.beta:g} per nat"
        words += "" if trainer.scale_rewards == "none" else " beside rewards over their spread"
    if args.kl_controller != "fixed":
        words += f", moved by `{args.kl_controller}` to hold {args.target_kl_per_token:g} nats per token"
    return words


def push_run(trainer, args: StoryArguments, before: Judgement, after: Judgement) -> bool:
    """Write the card and push, from the main process; whether the model on the Hub is the one in memory."""
    if not trainer.is_world_process_zero():
        return True
    folder = Path(trainer.args.output_dir)
    rewards = getattr(trainer, "reward_func_names", args.reward_funcs)
    write_card(folder, trainer, penalty_in_words(trainer, args), rewards, before, after)
    return push(trainer, folder)


def show(before: Judgement, after: Judgement, folder: Path) -> None:
    """The numbers and a few stories before and after, on the screen and as `stories.md`."""
    names = ("reward_mean", "different_share", "distinct_2", "entropy_per_token")
    names += ("kl_per_token", "kl_per_sequence", "exact_kl_per_sequence")
    table = Table(title=f"{after.stories} fresh stories")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        values = [getattr(judgement, name) for judgement in (before, after)]
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    console = Console()
    console.print(table)
    lines = []
    for heading, judgement in (("Before", before), ("After", after)):
        lines += [f"## {heading}", ""] + [f"> {html.escape(text, quote=False)}\n" for text in judgement.texts[:5]]
        console.print(Text(f"\n{heading}", style="bold"))
        for text in judgement.texts[:3]:
            console.print(shown(f"{text}\n"))
    Path(folder, "stories.md").write_text("\n".join(lines), encoding="utf-8")


def run_recipe(trainer, args: StoryArguments, model_args, parser: RecipeParser, reward) -> None:
    """Judge, train, judge again, save and push: all that a recipe does once it has its trainer.

    Into the output directory go the model or adapter, `curves.png`, `metrics.jsonl`, `stories.md`, `summary.json` and
    `recipe.yaml`. Ends the process with status 1 where the push failed.

    Args:
        reward (callable): TRL-shaped, of text, for judging stories from the first prompts of the trainer's dataset.
    """
    training_args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    folder = Path(training_args.output_dir)
    if isinstance(model, PeftModel):
        check_trains(model)
        name_base(model)
    trainer.add_callback(MetricsFileCallback(trainer, folder / "metrics.jsonl"))
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(StoryProgressCallback())
    tokenizer = trainer.processing_class
    rows = trainer.train_dataset[: args.eval_stories]["prompt"]
    prompts = [maybe_apply_chat_template({"prompt": p}, tokenizer)["prompt"] for p in rows]
    sampling = args if isinstance(args, PairArguments) else training_args
    adapted = bool(model_args.use_peft or args.adapter_name_or_path)

    def judge_policy() -> Judgement:
        """Fresh stories from the policy as it is now; every process judges the same ones."""
        return judge(
            trainer.accelerator.unwrap_model(trainer.model),
            tokenizer,
            (prompts * args.eval_stories)[: args.eval_stories],
            reward,
            max_new_tokens=sampling.max_completion_length,
            temperature=sampling.temperature,
            ref_model=trainer.ref_model,
            adapter_off_is_reference=adapted,
        )

    before = judge_policy()
    guarded = run_training(trainer)
    after = judge_policy()
    save_final(trainer, below=args.adapter_name_or_path if model_args.use_peft else None)
    if trainer.is_world_process_zero():
        show(before, after, folder)
        title = f"{Path(model_args.model_name_or_path).name}: {penalty_in_words(trainer, args)}"
        plot_curves(trainer.state.log_history, folder / "curves.png", title, before.reward_mean)
        summary = {"before": before.numbers(), "after": after.numbers(), "stories": after.texts[:5]}
        summary |= guarded | {"seconds": round(time.time() - parser.started, 1)}
        Path(folder, "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_recipe(folder / "recipe.yaml", parser)
        print(f"{summary['seconds']:.0f} s. Model, curves.png, stories.md, metrics.jsonl, summary.json: {folder}")
    pushed = not training_args.push_to_hub or push_run(trainer, args, before, after)
    trainer.accelerator.end_training()
    if not pushed:
        sys.exit(1)
