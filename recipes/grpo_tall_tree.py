"""The same with TRL's GRPO: any penalty, any estimator, in the reward, in the loss, or in both.

    accelerate launch recipes/grpo_tall_tree.py                                            # TRL's own: k3 in the loss
    accelerate launch recipes/grpo_tall_tree.py --kl_controller pi --target_kl_per_token 0.1    # a rule moves its beta
    accelerate launch recipes/grpo_tall_tree.py --kl_estimator exact --kl_placement both --kl_budget_per_token 0.1

GRPO divides rewards by their standard deviation in the group, a penalty in the reward with them: there beta is a price
per nat beside a reward, as in RLOO. In the loss alone it stands beside rewards that are divided. Options are
`rloo_tall_tree.py`'s, those of `GRPOConfig` and of `ModelConfig`; `grpo_tall_tree.yaml` holds the defaults.
"""

from pathlib import Path

from trl import GRPOConfig, GRPOTrainer, ModelConfig

from kl_alliteration.lab.checks import check_options
from kl_alliteration.lab.judging import total_reward
from kl_alliteration.lab.options import GRPOArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.lab.progress import clear_screen_of_libraries
from kl_alliteration.lab.run import build_trainer, run_recipe
from kl_alliteration.lab.survival import one_line_errors


@one_line_errors
def main():
    parser = RecipeParser((GRPOArguments, GRPOConfig, ModelConfig), defaults=Path(__file__).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    clear_screen_of_libraries()
    trainer = build_trainer(GRPOTrainer, args, training_args, model_args)
    run_recipe(trainer, args, model_args, parser, total_reward(trainer))


if __name__ == "__main__":
    main()
