"""The same with TRL's GRPO: any penalty, any estimator, in the reward, in the loss, or in both.

    accelerate launch recipes/grpo_tall_tree.py                                            # TRL's own: k3 in the loss
    accelerate launch recipes/grpo_tall_tree.py --kl_controller pi --target_kl_per_token 0.1    # a rule moves its beta
    accelerate launch recipes/grpo_tall_tree.py --kl_estimator exact --kl_placement both --kl_budget_per_token 0.1

GRPO divides rewards by their standard deviation in the group, a penalty in the reward with them: there beta is a price
per nat beside a reward, as in RLOO. In the loss alone it stands beside rewards that are divided. Options are
`rloo_tall_tree.py`'s, those of `GRPOConfig` and of `ModelConfig`; `grpo_tall_tree.yaml` holds the defaults.
"""

from trl import GRPOConfig, GRPOTrainer

from kl_alliteration.lab.options import GRPOArguments
from kl_alliteration.lab.run import train_online

if __name__ == "__main__":
    train_online(GRPOTrainer, GRPOArguments, GRPOConfig, __file__)
