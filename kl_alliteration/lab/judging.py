"""How a run is judged before and after: by what its trainer hands to the model and to the rewards."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import yaml
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .._trl import asking
from ..adapters import base_of, go_back, is_adapter, load_adapter
from ..evaluation import Judgement, judge, tokenize_prompts
from ..sampling import use_fast_generate
from ..story_lm import MODEL_PATH, PROMPT
from .checked_rewards import ranking_reward
from .gguf import as_folder
from .inputs import load_held_out, load_prompts
from .options import ALLITERATION, StoryArguments
from .pairs import read_pairs

# Columns of a preference data set that no reward is handed, and what a trainer adds to its rows.
NO_COLUMNS = ("prompt", "chosen", "rejected", "completion", "prompt_ids", "chosen_ids", "rejected_ids")


def total_reward(trainer):
    """The rewards of a trainer that samples, asked, weighted and summed by its own code, for [`~evaluation.judge`].

    Async ones and reward models too. `None` where none of them applies.
    """

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]:
        own = {name: columns[name] for name in columns if name not in ("trainer_state", "log_extra", "log_metric")}
        rows = [
            {"prompt": prompt} | dict(zip(own, values, strict=True))
            for prompt, *values in zip(prompts, *own.values(), strict=True)
        ]
        found = asking.total_rewards(trainer, rows, completions, completion_ids)
        return [None if value != value else value for value in found]

    return reward


def judge_policy(trainer, stories: int, reward, max_new_tokens: int, temperature: float, adapted: bool) -> Judgement:
    """Fresh stories of the first held-out prompts, or else of those of the training, from the policy as it is now.

    Every process judges the same ones. Without an adapter the reference is the trainer's own.
    """
    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    dataset = dataset.select(range(min(stories, len(dataset))))
    rows = [dataset[i % len(dataset)] for i in range(stories)]
    removed = trainer.args.remove_unused_columns and hasattr(trainer, "reward_funcs")  # before its rewards see them
    names = [] if removed else [name for name in dataset.column_names if name not in NO_COLUMNS]
    with asking.whole_policy(trainer) as policy:
        return judge(
            policy,
            trainer.processing_class,
            [row["prompt"] for row in rows],
            reward,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            ref_model=(reference := asking.reference_of(trainer)),
            adapter_off_is_reference=adapted and reference is None,
            columns={name: [row[name] for row in rows] for name in names},
            tokenize=partial(asking.prompt_ids, trainer),
        )


def read_options(folder: str | Path) -> dict:
    """A finished run's `recipe.yaml`."""
    return yaml.safe_load(Path(folder, "recipe.yaml").read_text(encoding="utf-8")) or {}


def load_run(folder: str | Path, fraction: float = 1.0, untrained: bool = False):
    """`(model, reference)` of a finished run, the model at a `fraction` of the way from the base that it started from.

    The reference is `None` where it is the model with its adapter off, and for the base itself, `untrained`.
    """
    options = read_options(folder)
    named, adapter = options.get("model_name_or_path"), options.get("adapter_name_or_path")
    if named is None and (is_adapter(str(folder)) or adapter):  # then the base is the adapter's
        named = base_of(PeftConfig.from_pretrained(folder if is_adapter(str(folder)) else adapter))
    base, trusts = as_folder(named or str(MODEL_PATH)), {"trust_remote_code": options.get("trust_remote_code", False)}
    at = trusts | {"revision": options.get("model_revision", "main")}
    device, reference = PartialState().device, None
    if is_adapter(str(folder)) and not untrained:
        model = load_adapter(str(folder), base, **trusts)  # which knows the revision of its base
    else:
        model = AutoModelForCausalLM.from_pretrained(base if untrained else folder, **(at if untrained else trusts))
        if not untrained:
            reference = AutoModelForCausalLM.from_pretrained(base, **at).eval()
    go_back(model, fraction, reference)
    return model.to(device).eval(), None if reference is None else reference.to(device)


def rows_of_pairs(pairs: Dataset) -> Dataset:
    """The different prompts of DPO's pairs, with their columns."""
    rows = pairs.select_columns([name for name in pairs.column_names if name not in NO_COLUMNS[1:]]).to_list()
    return Dataset.from_list(list({json.dumps(row, sort_keys=True, default=str): row for row in rows}.values()))


def judge_run(
    folder: str | Path, stories: int, seed: int = 1, untrained: bool = False, fraction: float = 1.0
) -> Judgement:
    """Fresh stories of what a finished run of any recipe left, and the KL to the base that it started from.

    The prompts, the rewards, weighted and clipped, and the lengths are those of its `recipe.yaml`; the base is the
    reference whatever the run's own was, and also where it had none. `untrained` judges the base itself, by the same
    prompts and seed, `fraction` a point of the way from it to the trained model.
    """
    options = read_options(folder)
    model, ref_model = load_run(folder, fraction, untrained)
    use_fast_generate(model)
    if options.get("reward_model_name_or_path"):
        raise ValueError(f"run: {str(folder)!r} was paid by a reward model too, which is not loaded here")
    rewards = options.get("reward_funcs", [ALLITERATION])
    rewards = [rewards] if isinstance(rewards, str) else rewards
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    names = ("dataset_name", "dataset_config", "eval_dataset_name")
    named = {name: getattr(StoryArguments, name, None) for name in names}
    named |= {"dataset_train_split": "train", "prompt": PROMPT}
    given = SimpleNamespace(**named | {k: options[k] for k in named if k in options})
    prompts = load_held_out(given)
    if prompts is None and given.dataset_name is None and Path(options.get("pairs_from", "")).is_file():
        prompts = rows_of_pairs(read_pairs(options["pairs_from"]))
    prompts = prompts or load_prompts(given, 1)
    rows = [prompts[i % len(prompts)] for i in range(stories)]
    shared = options.get("chat_template_kwargs") or {}
    shared = json.loads(shared) if isinstance(shared, str) else shared

    def tokenize(rows: list[dict]) -> list[list[int]]:
        if any(row.get("chat_template_kwargs") for row in rows):
            return [asking.preference_prompt_ids(tokenizer, row) for row in rows]
        return tokenize_prompts(tokenizer, rows, **shared)

    return judge(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        ranking_reward(rewards, weights=options.get("reward_weights"), clip=options.get("reward_clip_range")),
        max_new_tokens=options.get("max_completion_length", 100),
        temperature=options.get("temperature", 1.0),
        ref_model=ref_model,
        adapter_off_is_reference=isinstance(model, PeftModel),
        seed=seed,
        columns={name: [row[name] for row in rows] for name in prompts.column_names if name != "prompt"},
        tokenize=tokenize,
    )
