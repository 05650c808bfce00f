"""Teach a story model to alliterate with TRL's RLOO and a KL penalty.

    accelerate launch recipes/rloo_tall_tree.py                # the embedded model, a budget of KL
    accelerate launch recipes/rloo_tall_tree.py --use_peft     # a LoRA adapter; the reference is the base
    accelerate launch recipes/rloo_tall_tree.py --config recipes/fixed_beta.yaml --beta 0   # the collapse

Every option of TRL's `RLOOConfig` and `ModelConfig` works here; `rloo_tall_tree.yaml` holds the defaults, `--config`
takes another file. Into the output directory go the model or adapter, `curves.png`, `metrics.jsonl`, `stories.md` and
`summary.json`.
"""

from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from trl import ModelConfig, RLOOConfig, RLOOTrainer

from kl_alliteration.recipe import PenaltyArguments, RecipeParser, check_options, one_line_errors, parse_recipe
from kl_alliteration.training import (
    add_instruments,
    load_policy,
    load_prompts,
    load_rewards,
    load_tokenizer,
    run_recipe,
    total_reward,
)


def build_trainer(args: PenaltyArguments, training_args: RLOOConfig, model_args: ModelConfig) -> RLOOTrainer:
    trainer = RLOOTrainer(
        **load_policy(args, training_args, model_args),
        reward_funcs=load_rewards(args.reward_funcs, args.reward_model_name_or_path, args.reward_timeout),
        args=training_args,
        train_dataset=load_prompts(args, training_args.generation_batch_size // training_args.num_generations),
        processing_class=load_tokenizer(args, model_args, training_args),
    )
    add_instruments(trainer, args)
    return trainer


@one_line_errors
def main():
    parser = RecipeParser((PenaltyArguments, RLOOConfig, ModelConfig), defaults=Path(__file__).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    disable_progress_bar()
    trainer = build_trainer(args, training_args, model_args)
    run_recipe(trainer, args, model_args, parser, total_reward(trainer))


if __name__ == "__main__":
    main()
