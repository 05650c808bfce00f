"""The same with TRL's GRPO. Its penalty, k3, is in its loss and cannot be changed; the rest is as in RLOO.

    accelerate launch recipes/grpo_tall_tree.py
    accelerate launch recipes/grpo_tall_tree.py --kl_controller pi --target_kl_per_token 0.1   # a rule moves its beta

It divides rewards by their standard deviation in the group: beta times that is a price per nat of the sequence, as in
RLOO. Options are those of `GRPOConfig` and `ModelConfig`; `grpo_tall_tree.yaml` holds the
defaults.
"""

from pathlib import Path

from trl import GRPOConfig, GRPOTrainer, ModelConfig

from kl_alliteration.lab.judging import total_reward
from kl_alliteration.lab.options import OnlineArguments, check_options
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.lab.progress import clear_screen_of_libraries
from kl_alliteration.lab.run import build_trainer, run_recipe
from kl_alliteration.lab.survival import one_line_errors


@one_line_errors
def main():
    parser = RecipeParser((OnlineArguments, GRPOConfig, ModelConfig), defaults=Path(__file__).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    clear_screen_of_libraries()
    trainer = build_trainer(GRPOTrainer, args, training_args, model_args)
    run_recipe(trainer, args, model_args, parser, total_reward(trainer))


if __name__ == "__main__":
    main()
