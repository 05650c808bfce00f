"""The same with TRL's DPO: stories of the base, ranked by the reward, and no sampling while it trains.

    accelerate launch recipes/dpo_tall_tree.py
    accelerate launch recipes/dpo_tall_tree.py --beta 0.3 --pairs_from runs/dpo_tall_tree/pairs.jsonl

Its KL is implicit, in the difference of two log-ratios; `beta` is the price per nat of the sequence. The pairs go into
`pairs.jsonl` of the output directory, and `--pairs_from` takes them from there. Options are those of `DPOConfig` and
`ModelConfig`; `dpo_tall_tree.yaml` holds the defaults.
"""

from pathlib import Path

from trl import DPOConfig, DPOTrainer, ModelConfig

from kl_alliteration import use_fast_sampling
from kl_alliteration.lab.checked_rewards import ranking_reward
from kl_alliteration.lab.checks import check_options
from kl_alliteration.lab.inputs import load_pairs, load_policy, load_tokenizer
from kl_alliteration.lab.options import PairArguments
from kl_alliteration.lab.pairs import longest, without_added_ends
from kl_alliteration.lab.parser import RecipeParser, parse_recipe
from kl_alliteration.lab.progress import clear_screen_of_libraries
from kl_alliteration.lab.run import run_recipe
from kl_alliteration.lab.survival import one_line_errors


@one_line_errors
def main():
    parser = RecipeParser((PairArguments, DPOConfig, ModelConfig), defaults=Path(__file__).with_suffix(".yaml"))
    args, training_args, model_args = parse_recipe(parser)
    check_options(args, training_args, model_args)
    clear_screen_of_libraries()
    tokenizer = load_tokenizer(args, model_args, training_args)
    pairs = load_pairs(args, training_args, model_args, tokenizer)
    length = longest(pairs, tokenizer, args.max_completion_length)
    training_args.max_length = min(training_args.max_length or length, length)
    trainer = DPOTrainer(
        **load_policy(args, training_args, model_args),
        args=training_args,
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.train_dataset = without_added_ends(
        trainer.train_dataset, args.max_completion_length, sampled=args.pairs_from is None
    )
    use_fast_sampling(trainer, one_forward=False)  # for judging
    run_recipe(trainer, args, model_args, parser, ranking_reward(args.reward_funcs, args.reward_timeout))


if __name__ == "__main__":
    main()
