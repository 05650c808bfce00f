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

from kl_alliteration.lab.options import OnlineArguments, check_options
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.lab.run import build_trainer, run_recipe, total_reward
from kl_alliteration.lab.survival import one_line_errors


@one_line_errors
def main():
    parser = RecipeParser((OnlineArguments, GRPOConfig, ModelConfig), defaults=Path(__file__).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    disable_progress_bar()
    trainer = build_trainer(GRPOTrainer, args, training_args, model_args)
    run_recipe(trainer, args, model_args, parser, total_reward(trainer))


if __name__ == "__main__":
    main()
