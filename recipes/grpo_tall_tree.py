"""The same with TRL's GRPO, whose penalty, k3, stands in the loss and is not to be chosen; all else is as in RLOO.

    accelerate launch recipes/grpo_tall_tree.py
    accelerate launch recipes/grpo_tall_tree.py --kl_controller pi --target_kl_per_token 0.1   # a rule moves its beta

Its beta weighs nats against rewards that are divided by their spread in the group: times that spread it is a price per
nat of the sequence, as RLOO's is. Options are those of `GRPOConfig` and `ModelConfig`; `grpo_tall_tree.yaml` holds the
defaults.
"""

from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from kl_alliteration.recipe import OnlineArguments, RecipeParser, check_options, one_line_errors, parse_recipe
from kl_alliteration.training import (
    add_instruments,
    load_policy,
    load_prompts,
    load_rewards,
    load_tokenizer,
    run_recipe,
    total_reward,
)


def build_trainer(args: OnlineArguments, training_args: GRPOConfig, model_args: ModelConfig) -> GRPOTrainer:
    trainer = GRPOTrainer(
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
    parser = RecipeParser((OnlineArguments, GRPOConfig, ModelConfig), defaults=Path(__file__).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    disable_progress_bar()
    trainer = build_trainer(args, training_args, model_args)
    run_recipe(trainer, args, model_args, parser, total_reward(trainer))


if __name__ == "__main__":
    main()
