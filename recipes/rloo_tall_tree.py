"""Teach a story model to alliterate with TRL's RLOO and a KL penalty.

    accelerate launch recipes/rloo_tall_tree.py                # the embedded model, a budget of KL
    accelerate launch recipes/rloo_tall_tree.py --use_peft     # a LoRA adapter; the reference is the base
    accelerate launch recipes/rloo_tall_tree.py --config recipes/fixed_beta.yaml --beta 0   # the collapse

Every option of TRL's `RLOOConfig` and `ModelConfig` works here; `rloo_tall_tree.yaml` holds the defaults, `--config`
takes another file. Into the output directory go the model or adapter, `curves.png`, `metrics.jsonl`, `stories.md` and
`summary.json`.
"""

from pathlib import Path

from trl import ModelConfig, RLOOConfig, RLOOTrainer

from kl_alliteration.lab.checks import check_options
from kl_alliteration.lab.judging import total_reward
from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.lab.progress import clear_screen_of_libraries
from kl_alliteration.lab.run import build_trainer, run_recipe
from kl_alliteration.lab.survival import one_line_errors


@one_line_errors
def main():
    parser = RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), defaults=Path(__file__).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    clear_screen_of_libraries()
    trainer = build_trainer(RLOOTrainer, args, training_args, model_args)
    run_recipe(trainer, args, model_args, parser, total_reward(trainer))


if __name__ == "__main__":
    main()
