"""Teach a story model to alliterate with TRL's RLOO and a KL penalty.

    accelerate launch recipes/rloo_tall_tree.py                # the embedded model, a budget of KL
    accelerate launch recipes/rloo_tall_tree.py --use_peft     # a LoRA adapter; the reference is the base
    accelerate launch recipes/rloo_tall_tree.py --config recipes/fixed_beta.yaml --beta 0   # the collapse

Every option of TRL's `RLOOConfig` and `ModelConfig` works here; `rloo_tall_tree.yaml` holds the defaults, `--config`
takes another file. Into the output directory go the model or adapter, `curves.png`, `metrics.jsonl`, `stories.md` and
`summary.json`.
"""

import html
import json
import sys
import time
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback
from trl import ModelConfig, RLOOConfig, RLOOTrainer
from trl.data_utils import maybe_apply_chat_template

from kl_alliteration import (
    MetricsFileCallback,
    StoryProgressCallback,
    StoryTableCallback,
    judge,
    plot_curves,
)
from kl_alliteration.callbacks import shown
from kl_alliteration.recipe import (
    RecipeParser,
    StoryArguments,
    add_instruments,
    check_options,
    load_policy,
    load_prompts,
    load_rewards,
    load_tokenizer,
    one_line_errors,
    parse_recipe,
    push_run,
    run_training,
    save_final,
    total_reward,
    write_recipe,
)


def build_trainer(args: StoryArguments, training_args: RLOOConfig, model_args: ModelConfig) -> RLOOTrainer:
    trainer = RLOOTrainer(
        **load_policy(args, training_args, model_args),
        reward_funcs=load_rewards(args.reward_funcs, args.reward_model_name_or_path, args.reward_timeout),
        args=training_args,
        train_dataset=load_prompts(args, training_args.generation_batch_size // training_args.num_generations),
        processing_class=load_tokenizer(args, model_args, training_args),
    )
    add_instruments(trainer, args)
    trainer.add_callback(MetricsFileCallback(trainer, Path(training_args.output_dir, "metrics.jsonl")))
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(StoryProgressCallback())
    if args.show_stories_every:
        trainer.add_callback(StoryTableCallback(trainer, args.show_stories_every))
    return trainer


def judge_policy(trainer: RLOOTrainer, args: StoryArguments, model_args: ModelConfig):
    """Fresh stories from the policy as it is now; every process judges the same ones."""
    rows = trainer.train_dataset.select(range(min(args.eval_stories, len(trainer.train_dataset))))
    prompts = [maybe_apply_chat_template({"prompt": p}, trainer.processing_class)["prompt"] for p in rows["prompt"]]
    prompts = (prompts * args.eval_stories)[: args.eval_stories]
    return judge(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        prompts,
        total_reward(trainer),
        max_new_tokens=trainer.args.max_completion_length,
        temperature=trainer.args.temperature,
        ref_model=trainer.ref_model,
        adapter_off_is_reference=bool(model_args.use_peft or args.adapter_name_or_path),
    )


def show(before, after, folder: Path) -> None:
    """The numbers and a few stories before and after, on the screen and as `stories.md`."""
    names = ("reward_mean", "different_share", "distinct_2", "entropy_per_token", "kl_per_token", "kl_per_sequence")
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


@one_line_errors
def main():
    start = time.time()
    parser = RecipeParser((StoryArguments, RLOOConfig, ModelConfig), defaults=Path(__file__).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    disable_progress_bar()
    trainer = build_trainer(args, training_args, model_args)
    before = judge_policy(trainer, args, model_args)
    guarded = run_training(trainer)
    after = judge_policy(trainer, args, model_args)

    folder = Path(training_args.output_dir)
    save_final(trainer, below=args.adapter_name_or_path if model_args.use_peft else None)
    if trainer.is_world_process_zero():
        show(before, after, folder)
        title = f"{Path(model_args.model_name_or_path).name}: beta {training_args.beta:g}, {args.kl_estimator}"
        title += f", budget {args.kl_budget_per_token:g} nats per token" if args.kl_budget_per_token else ""
        plot_curves(trainer.state.log_history, folder / "curves.png", title, before.reward_mean)
        summary = {"before": before.numbers(), "after": after.numbers(), "stories": after.texts[:5]}
        summary |= guarded | {"seconds": round(time.time() - start, 1)}
        Path(folder, "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_recipe(folder / "recipe.yaml", parser)
        print(f"{summary['seconds']:.0f} s. Model, curves.png, stories.md, metrics.jsonl, summary.json: {folder}")
    pushed = not training_args.push_to_hub or push_run(trainer, args, before, after)
    trainer.accelerator.end_training()
    if not pushed:
        sys.exit(1)


if __name__ == "__main__":
    main()
