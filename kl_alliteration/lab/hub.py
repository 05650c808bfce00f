"""A trained model on the Hub: checked before training, pushed with what a stranger needs, loaded back."""

import os
import shlex
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import HfApi, ModelCard, ModelCardData
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import is_conversational

from .._trl import scores_prefixes
from ..adapters import EMBEDDED, check_agreement, commit_of, is_hub_id, load_adapter, probe, read_origin
from ..evaluation import Judgement
from ..story_lm import MODEL_PATH
from .options import OnlineArguments, StoryArguments
from .pages import TEMPLATES, escaped, quoted

EMBEDDED_IN_WORDS = "the story model inside kl_alliteration"
# Checkpoints have their own places on the Hub (hub_strategy), and nobody should have to unpickle options.
LEFT_OUT = ["_*", "checkpoint-*", "training_args.bin"]


def check_hub(training_args) -> None:
    """Login, repository name and permission to write, before training; makes the repository.

    A token among the options moves into the environment: the trainer pickles its options into every checkpoint.

    Raises:
        `ValueError`: for the first that fails, with what to do.
    """
    if training_args.hub_token:
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if not PartialState().is_main_process:
        return
    api = HfApi()
    name = training_args.hub_model_id or Path(training_args.output_dir).absolute().name
    remedy = ""
    try:
        remedy = "run `hf auth login`, or leave the option out"
        what = "no valid login at the Hub"
        api.whoami()
        remedy = "take another --hub_model_id, such as user/name"
        what = f"the Hub does not take the repository {name!r}"
        repo = api.create_repo(name, private=training_args.hub_private_repo, exist_ok=True).repo_id
        remedy = "log in with a token that may write there"
        what = f"the token may not write to {repo}"
        api.auth_check(repo, write=True)
        if getattr(training_args, "hub_revision", None):
            remedy = "take another --hub_revision"
            what = f"{repo} does not take the branch {training_args.hub_revision!r}"
            api.create_branch(repo, branch=training_args.hub_revision, exist_ok=True)
    except Exception as error:
        raise ValueError(f"push_to_hub: {what} ({one_line(error)}); {remedy}") from None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def penalty_in_words(trainer, args: StoryArguments) -> str:
    """What the card says of the penalty, its price with the unit."""
    if not isinstance(args, OnlineArguments):
        return f"the implicit one of DPO, beta {trainer.beta:g} per nat of the sequence"
    if args.target_kl_per_sequence is not None:
        words = f"{args.penalty.in_words()}, held at {args.target_kl_per_sequence:g} nats"
    else:
        words = args.penalty.in_words(trainer.beta)
    if args.penalty.placement == "loss" and getattr(trainer, "scale_rewards", "none") != "none":
        words += ", beside rewards over their spread"
    if args.kl_controller != "fixed":
        words += f", moved by `{args.kl_controller}` to hold {args.target_kl_per_token:g} nats per token"
    if args.reward_discount is not None and any(map(scores_prefixes, trainer.reward_funcs)):
        words += f"; reward by token, discount {args.reward_discount:g}"
        words += f" behind {args.reward_opening_tokens} tokens" if args.reward_opening_tokens else ""
    return words + ("; KL by token" if args.kl_to_go else "")


def write_card(
    folder: Path,
    trainer,
    penalty: str,
    rewards: list[str],
    before: Judgement,
    after: Judgement,
    temperature: float = 1.0,
) -> None:
    """`README.md`: what the model is, how it was trained, numbers and stories before and after, how to load it."""
    repo_id, trained_with = trainer.hub_model_id, type(trainer).__name__
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = isinstance(model, PeftModel)
    base = model.peft_config["default"].base_model_name_or_path if adapter else model.config.name_or_path
    if base and Path(base).is_dir() and Path(base).samefile(MODEL_PATH):  # a whole model's is a path
        base = EMBEDDED
    own = model.get_base_model() if adapter else model
    # A path that is gone may read as an id: one that came from the Hub has a commit, or says so.
    commit = commit_of(own) or (adapter and model.peft_config["default"].revision)
    from_hub = commit or read_origin(own.config.name_or_path).get("hub_id") == base
    on_hub = bool(base and base != EMBEDDED and from_hub) and is_hub_id(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["trl", trained_with.removesuffix("Trainer").lower(), "kl_alliteration", *(["lora"] if adapter else [])],
        model_name=repo_id.split("/")[-1],
    )
    if base == EMBEDDED:
        base = EMBEDDED_IN_WORDS
    elif not on_hub:
        base = escaped(Path(base).name)
    if not adapter:
        loader = "transformers", "AutoModelForCausalLM.from_pretrained"
    elif on_hub:
        loader = "peft", "AutoPeftModelForCausalLM.from_pretrained"
    else:
        loader = "kl_alliteration.adapters", "load_adapter"
    ours = adapter and not on_hub and base != EMBEDDED_IN_WORDS  # the base is a folder of whoever trained it
    where = f"path/to/{base}"
    told = [f"--model_name_or_path {repo_id}", *([f"--base_model_name_or_path {where}"] if ours else [])]
    told += ["--chat"] if is_conversational(next(iter(trainer.train_dataset))) else []
    told += [f"--temperature {temperature:g}"] if temperature != 1 else []
    names = ("reward_mean", "pairs_per_100_words", "kl_per_token", "kl_per_sequence", "different_share", "distinct_2")
    names += ("entropy_per_token", "ended_share", "mean_length")
    extra = ("exact_kl_per_sequence", "efficiency", "effective_plots", "most_told_share")
    names += tuple(name for name in extra if getattr(after, name) is not None)
    made_of = read_origin(own.config.name_or_path).get("file")
    rows = [(n, getattr(before, n), getattr(after, n)) for n in names]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "card.md"),
        name=repo_id.split("/")[-1],
        what="A LoRA adapter for" if adapter else "Fine-tuned from",
        base=base + (f", as the weights of `{escaped(made_of)}`" if made_of else ""),
        trained_with=trained_with,
        rewards=", ".join(f"`{name}`" for name in rewards),
        penalty=penalty,
        stories_judged=after.stories,
        rows=[(name, *("-" if v is None else f"{v:.3f}" for v in values)) for name, *values in rows],
        loader=loader,
        loaded=f'"{repo_id}"' + (f', base="{where}"' if ours else ""),
        told=" ".join(told),
        adapter=adapter,
        stories={
            "Before": [quoted(text) for text in before.texts[:3]],
            "After": [quoted(text) for text in after.texts[:3]],
        },
    )
    card.save(Path(folder, "README.md"))


def push(trainer, folder: Path) -> bool:
    """Push a finished run's folder, load it back and compare; on failure the one command that does it later.

    Returns:
        `bool`: whether the model on the Hub is the one in memory, which is left without training's mixed precision.
    """
    args, repo = trainer.args, trainer.hub_model_id
    try:
        if trainer.push_in_progress is not None:
            trainer.push_in_progress.wait_until_done()  # checkpoints, pushed beside the training
    except Exception as error:
        print(f"a checkpoint did not reach the Hub ({one_line(error)})")
    try:
        commit = HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=LEFT_OUT,
            revision=args.hub_revision,
        )
    except Exception as error:
        later = ["hf", "upload", repo, str(folder), ".", *(word for p in LEFT_OUT for word in ("--exclude", p))]
        later += ["--revision", args.hub_revision] if args.hub_revision else []
        print(f"error: not pushed to the Hub ({one_line(error)}). Nothing is lost: it is all in {folder}. Later:")
        print(shlex.join(later))
        return False
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    own = model.get_base_model() if isinstance(model, PeftModel) else model
    options = {"dtype": model.dtype, "trust_remote_code": args.trust_remote_code}
    if (quantization := getattr(own.config, "quantization_config", None)) is not None:
        options["quantization_config"] = quantization
    try:
        if isinstance(model, PeftModel):
            here = own.config.name_or_path  # the very weights, where the base came from a folder
            back = load_adapter(repo, here if Path(here).is_dir() else None, adapter_revision=commit.oid, **options)
        else:
            back = AutoModelForCausalLM.from_pretrained(repo, revision=commit.oid, **options)
    except Exception as error:
        print(f"error: pushed to {commit.repo_url}, and it could not be loaded back ({one_line(error)})")
        return False
    try:
        difference = check_agreement(probe(back.eval()), probe(model), model.dtype, f"the model at {repo}")
    except ValueError as error:
        print(f"error: pushed to {commit.repo_url}, and what was loaded back is not it: {error}")
        return False
    print(f"Pushed to {commit.repo_url}, loaded back: log-probabilities agree ({difference:.1g} nats)")
    return True
