"""What the recipes do with their options: prompts, rewards by path, instruments, one run from end to end."""

import shutil
import sys
import time
import uuid
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback
from trl import ModelConfig

from .._trl import leave_baseline_out, scores_prefixes, seam_of
from ..adapters import REFERENCE, check_trains, commit_of, name_base, save_stacked
from ..control import KLControlCallback
from ..credit import use_kl_to_go, use_reward_to_go
from ..evaluation import Judgement, tokenize_prompts
from ..guard import CollapseGuardCallback
from ..health import KLHealthCallback
from ..monitor import KLMonitorCallback
from ..penalty import KLPenaltyCallback
from ..plots import PlotMonitorCallback, PlotPenalty
from ..references import (
    MovingAverageReferenceCallback,
    ReferenceCallback,
    ResetReferenceCallback,
    use_loaded_reference,
)
from ..rewards import reward_model  # noqa: F401  (to register it)
from ..sampling import score_as_sampled, use_fast_sampling, use_sampler_correction
from ..shared_prompts import share_prompts
from ..target import KLTargetCallback
from .base_samples import base_samples
from .checked_rewards import load_rewards
from .checks import check_options
from .figures import plot_curves
from .frontier import (
    EfficiencyCallback,
    beside_the_base,
    efficiency_of,
    read_base_rewards,
    reference_stays,
    sampled_as,
)
from .gguf import as_folder
from .hub import penalty_in_words, push, write_card
from .inputs import check_lengths, load_held_out, load_policy, load_prompts, load_tokenizer, share_template_options
from .judging import judge_policy, total_reward
from .options import CONTROLLERS, LATEST, REFERENCES, OnlineArguments, PairArguments, StoryArguments
from .pages import quoted
from .parser import RecipeParser, parse_recipe, say, write_recipe
from .plot_labels import plots_of
from .progress import MetricsFileCallback, StoryProgressCallback, StoryTableCallback, clear_screen_of_libraries, shown
from .runs import (
    CARD,
    STORIES,
    as_json,
    begin_record,
    is_theirs,
    last_checkpoint,
    read_record,
    remember,
    remove_ours,
    what_is_sampled,
    write_record,
)
from .survival import one_line_errors, stop_beyond, train_or_say_why
from .trackers import TensorBoardLayoutCallback

PLOTS = ("effective_plots", "most_told_share", "kl_of_plots")


def add_instruments(trainer, args: OnlineArguments, model_name_or_path: str, base_rewards=None) -> None:
    """The reference, the penalty, the sampler, the monitors, the rule and the guard that a recipe's options ask for.

    `base_rewards`: (P, M) rewards of the base where they are known; else a target samples them.
    """
    model, steps = trainer.accelerator.unwrap_model(trainer.model), trainer.args.ref_model_sync_steps
    if args.kl_reference == "loaded":
        use_loaded_reference(trainer, on_cpu=args.kl_reference_on_cpu)
    elif args.kl_reference not in REFERENCES:
        use_loaded_reference(trainer, as_folder(args.kl_reference), args.kl_reference_on_cpu)
    elif args.kl_reference == "moving_average":
        trainer.add_callback(MovingAverageReferenceCallback(trainer, trainer.args.ref_model_mixup_alpha, steps))
    elif args.kl_reference == "reset":
        trainer.add_callback(ResetReferenceCallback(trainer, steps, args.reset_at_kl, args.reset_optimizer))
    elif args.adapter_name_or_path and isinstance(model, PeftModel) and REFERENCE in model.peft_config:
        trainer.add_callback(ReferenceCallback(trainer, args.kl_reference))
    if args.score_as_sampled:
        score_as_sampled(trainer)
    trainer.add_callback(KLPenaltyCallback(trainer, args.penalty if trainer.beta else None, strict=args.strict))
    if args.baseline == "none":
        leave_baseline_out(seam_of(trainer))
    pays_prefixes = any(map(scores_prefixes, trainer.reward_funcs))
    if args.reward_discount is not None and (pays_prefixes or args.target_kl_per_sequence is None):  # which brings it
        use_reward_to_go(trainer, args.reward_discount, args.reward_prefix_tokens, args.reward_opening_tokens)
    if args.kl_to_go:
        use_kl_to_go(trainer)
    exact = args.penalty.estimator == "exact"
    controlled = args.penalty.estimator if args.penalty.full_vocabulary else "k1"
    if args.share_prompts:
        share_prompts(trainer)
    if args.fast_sampling:
        use_fast_sampling(trainer)
    correction = args.sampler_correction, args.sampler_correction_cap
    use_sampler_correction(trainer, *correction, args.sampler_divergence_type, args.sampler_divergence_threshold)
    target = args.target_kl_per_sequence
    if args.plots or args.plot_price or (target is not None and base_rewards is None):
        base = base_samples(trainer, args.base_samples, what_is_sampled(args, model_name_or_path))
        if base_rewards is None and (args.kl_reference == "start" or not args.adapter_name_or_path):
            base_rewards = base.rewards
    if target is not None:
        callback = KLTargetCallback(trainer, target, base_rewards, args.penalty)
        trainer.add_callback(callback)
        say(trainer.args, callback.price.in_words())
    if args.plots or args.plot_price:
        trainer.add_callback(PlotMonitorCallback(trainer, plots_of(model_name_or_path, base.texts), base.texts))
    if base_rewards is not None and reference_stays(args, trainer.args) and not args.plot_price:  # one reward more
        trainer.add_callback(EfficiencyCallback(trainer, base_rewards))
    if args.kl_monitor:
        trainer.add_callback(KLMonitorCallback(trainer, exact=exact))
    if args.kl_controller != "fixed":
        rule = CONTROLLERS[args.kl_controller](trainer.beta, args.target_kl_per_token)
        trainer.add_callback(KLControlCallback(trainer, rule, controlled))
    if args.kl_limit is not None:
        stop_beyond(trainer, args.kl_limit)
    if args.collapse_guard != "off":
        trainer.add_callback(CollapseGuardCallback(trainer, args.collapse_guard))
    if args.health:
        trainer.add_callback(KLHealthCallback(trainer))
    if args.show_stories_every:
        trainer.add_callback(StoryTableCallback(trainer, args.show_stories_every))


def build_trainer(trainer_class, args: OnlineArguments, training_args, model_args):
    """`RLOOTrainer` or `GRPOTrainer`, stock, with prompts, rewards and the instruments of the options.

    Whatever can be refused is, before the first model is loaded.
    """
    rewards = load_rewards(args.reward_funcs, args.reward_model_name_or_path, args.reward_timeout)
    plot_penalty = None if args.plot_price is None else PlotPenalty(args.plot_price)
    if plot_penalty is not None:
        rewards.append(plot_penalty)
        if training_args.reward_weights is not None:
            training_args.reward_weights.append(1.0)
    prompts = load_prompts(args, training_args.generation_batch_size // training_args.num_generations)
    share_template_options(prompts, training_args)
    tokenizer = load_tokenizer(args, model_args, training_args)
    tokenize = partial(tokenize_prompts, tokenizer, **(training_args.chat_template_kwargs or {}))
    held_out, length = load_held_out(args), training_args.max_completion_length
    for name, rows in {"dataset_name": prompts, "eval_dataset_name": held_out}.items():
        if rows is not None:
            check_lengths(rows.to_list(), tokenize, tokenizer, model_args, training_args, length, name)
    trainer = trainer_class(
        **load_policy(args, training_args, model_args),
        reward_funcs=rewards,
        args=training_args,
        train_dataset=prompts,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    base_rewards = read_base_rewards(args, training_args, model_args.model_name_or_path)
    add_instruments(trainer, args, model_args.model_name_or_path, base_rewards)
    for monitor in callbacks_of(trainer, PlotMonitorCallback) if plot_penalty is not None else ():
        plot_penalty.attach(monitor)
    return trainer


def callbacks_of(trainer, kind: type) -> list:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]


def run_training(trainer, **facts) -> dict:
    """Train, resume or roll back as the options say; note `facts` in the folder. Returns what the guard found."""
    guards = callbacks_of(trainer, CollapseGuardCallback)
    train = guards[0].train if guards else trainer.train
    checkpoint, folder = trainer.args.resume_from_checkpoint, trainer.args.output_dir
    if checkpoint == LATEST:
        checkpoint = last_checkpoint(folder)
        words = f"Resuming from {checkpoint}" if checkpoint else "No complete checkpoint: starting from the beginning"
        say(trainer.args, words)
    if trainer.is_world_process_zero():
        begin_record(folder, anew=checkpoint is None, **facts)
    trainer.accelerator.wait_for_everyone()
    train_or_say_why(trainer, lambda: train(resume_from_checkpoint=checkpoint))
    return {"collapse": guards[0].collapse, "last_good_checkpoint": guards[0].last_good} if guards else {}


def save_final(trainer, below: str | None = None) -> None:
    """The model or adapter into the output directory, each file at once: a killed run leaves the old one or the new.

    A reference adapter stays behind; it is in the checkpoints, where a resumed run needs it. An adapter that was
    trained on top of another, `below`, is saved as the sum of both. What an earlier run had saved here and this one
    has not, such as an adapter in the place of a whole model, is removed: it would be loaded with it.
    """
    folder = Path(trainer.args.output_dir)
    unfinished = Path(broadcast_object_list([str(folder / f"_unfinished_{uuid.uuid4().hex[:8]}")])[0])
    if trainer.is_world_process_zero():
        if left := read_record(folder).get("unfinished"):  # of a run that was killed while it saved
            shutil.rmtree(folder / left, ignore_errors=True)
        write_record(folder, unfinished=unfinished.name)
    trainer.save_model(str(unfinished), _internal_call=True)  # else it would push at once
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        if below is not None:
            base = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
            named = base.config.name_or_path, commit_of(base)
            save_stacked(below, *2 * [str(unfinished)], *named, trust_remote_code=trainer.args.trust_remote_code)
        made = [path for path in unfinished.iterdir() if path.is_file() and not is_theirs(folder / path.name)]
        earlier = set(read_record(folder).get("files", {})) - {"error.txt"}
        remove_ours(folder, *(earlier - {path.name for path in made}))
        for path in made:
            path.replace(folder / path.name)
        remember(folder, *(path.name for path in made))
        shutil.rmtree(unfinished)
        write_record(folder, unfinished=None)


def push_run(trainer, args: StoryArguments, before: Judgement, after: Judgement) -> bool:
    """Write the card and push, from the main process. Returns whether the Hub's model equals the one in memory."""
    if not trainer.is_world_process_zero():
        return True
    folder = Path(trainer.args.output_dir)
    rewards = getattr(trainer, "reward_func_names", args.reward_funcs)
    if is_theirs(folder / CARD):
        say(trainer.args, f"{folder / CARD} is none that a run wrote: it stays, and no card is written")
    else:
        temperature = getattr(args, "temperature", None) or trainer.args.temperature  # DPO's are the recipe's
        write_card(folder, trainer, penalty_in_words(trainer, args), rewards, before, after, temperature)
        remember(folder, CARD)
    return push(trainer, folder)


def with_yardsticks(trainer, before: Judgement, after: Judgement, base_rewards) -> tuple[Judgement, Judgement]:
    """Both with the efficiency and the plots, as far as the base's samples are at hand."""
    after = replace(after, efficiency=efficiency_of(before, after, base_rewards))
    for monitor in callbacks_of(trainer, PlotMonitorCallback):
        counts = (asdict(monitor.count_plots(judged.completions)) for judged in (before, after))
        before, after = (
            replace(judged, **{name: count[name] for name in PLOTS})
            for judged, count in zip((before, after), counts, strict=True)
        )
    return before, after


def show(before: Judgement, after: Judgement, folder: Path) -> None:
    """The numbers and a few stories before and after, on the screen and as `stories.md`; all of them as JSON lines."""
    names = ("reward_mean", "pairs_per_100_words", "different_share", "distinct_2", "ended_share", "mean_length")
    names += ("entropy_per_token", "kl_per_token", "kl_per_sequence", "exact_kl_per_sequence")
    names += tuple(name for name in (*PLOTS, "efficiency") if getattr(after, name) is not None)
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
        lines += [f"## {heading}", ""] + [f"{quoted(text)}\n" for text in judgement.texts[:5]]
        console.print(Text(f"\n{heading}", style="bold"))
        for text in judgement.texts[:3]:
            console.print(shown(f"{text}\n"))
    Path(folder, "stories.md").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"when": when} | row for when, found in (("before", before), ("after", after)) for row in found.rows()]
    Path(folder, STORIES).write_text("".join(as_json(row) + "\n" for row in rows), encoding="utf-8")


def run_recipe(trainer, args: StoryArguments, model_args, parser: RecipeParser, reward) -> None:
    """Judge, train, judge again, save and push: all that a recipe does once it has its trainer.

    Into the output directory go the model or adapter, `curves.png`, `metrics.jsonl`, `stories.md`, `summary.json` and
    `recipe.yaml`. Ends the process with status 1 where the push failed.

    Args:
        reward (callable): TRL-shaped, for judging stories from the first prompts of the trainer's dataset.
    """
    training_args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    folder = Path(training_args.output_dir)
    if isinstance(model, PeftModel):
        check_trains(model)
        name_base(model)
    trainer.create_model_card = lambda *args, **kwargs: None  # TRL's, at every checkpoint, over the user's
    trainer.add_callback(MetricsFileCallback(trainer, folder / "metrics.jsonl"))
    trainer.add_callback(TensorBoardLayoutCallback(trainer))
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(StoryProgressCallback())
    sampling = args if isinstance(args, PairArguments) else training_args
    targets = callbacks_of(trainer, KLTargetCallback)
    path = model_args.model_name_or_path
    base_rewards = targets[0].ref_rewards if targets else read_base_rewards(args, sampling, path)
    judged = partial(
        judge_policy,
        trainer,
        args.eval_stories,
        reward,
        sampling.max_completion_length,
        sampling.temperature,
        adapted=bool(model_args.use_peft or args.adapter_name_or_path),
    )
    before = judged()
    facts = sampled_as(args, sampling, path) | {"beside": beside_the_base(args, sampling)}
    guarded = run_training(trainer, sampled=facts)
    after = judged()
    save_final(trainer, below=args.adapter_name_or_path if model_args.use_peft else None)
    if trainer.is_world_process_zero():
        before, after = with_yardsticks(trainer, before, after, base_rewards)
        show(before, after, folder)
        title = f"{Path(path).name}: {penalty_in_words(trainer, args)}"
        plot_curves(trainer.state.log_history, folder / "curves.png", title, before.reward_mean)
        summary = {"before": before.numbers(), "after": after.numbers(), "stories": after.texts[:5]}
        summary |= guarded | {"seconds": round(time.time() - parser.started, 1)}
        Path(folder, "summary.json").write_text(as_json(summary, indent=2) + "\n", encoding="utf-8")
        write_recipe(folder / "recipe.yaml", parser)
        for health in callbacks_of(trainer, KLHealthCallback):
            print(health.examined.in_words())
        print(f"{summary['seconds']:.0f} s. Model, curves.png, stories.md, metrics.jsonl, summary.json: {folder}")
    pushed = not training_args.push_to_hub or push_run(trainer, args, before, after)
    trainer.accelerator.end_training()
    if not pushed:
        sys.exit(1)


@one_line_errors
def train_online(trainer_class, arguments: type, config: type, recipe: str) -> None:
    """A recipe that samples, from its command line to its last file; its YAML of defaults stands beside it.

    Args:
        trainer_class, config (`type`): `RLOOTrainer` or `GRPOTrainer`, and its configuration.
        arguments (`type`): [`~lab.options.OnlineArguments`], or what derives from it.
        recipe (`str`): The recipe's own path.
    """
    parser = RecipeParser((arguments, config, ModelConfig), defaults=Path(recipe).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    clear_screen_of_libraries()
    trainer = build_trainer(trainer_class, args, training_args, model_args)
    run_recipe(trainer, args, model_args, parser, total_reward(trainer))
