"""What a recipe trains on, from its options: tokenizer, policy, prompts, pairs."""

import copy
import json
import statistics
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config, get_quantization_config
from trl.data_utils import is_conversational

from ..adapters import check_stacks, load_adapter, merge
from ..sampling import use_fast_generate
from ..text import as_text
from .checked_rewards import ranking_reward
from .datafiles import read_dataset
from .gguf import as_folder
from .options import PairArguments, StoryArguments
from .pairs import FILE as PAIRS
from .pairs import SIDES, prompts_of, read_pairs, sample_pairs, tokenize_rows, write_pairs
from .runs import made_of, note_what_of, what_is_sampled

# TinyStories-33M was trained with this tokenizer and ships none (its model card says so).
TOKENIZER_OF = {"roneneldan/TinyStories-33M": "EleutherAI/gpt-neo-125M"}


def load_tokenizer(args: StoryArguments, model_args, training_args):
    """The tokenizer; of a GGUF file, which is made a folder for all that follows, the file's own."""
    model_args.model_name_or_path = as_folder(model_args.model_name_or_path)
    name = args.tokenizer_name_or_path or TOKENIZER_OF.get(
        model_args.model_name_or_path, model_args.model_name_or_path
    )
    own = {"revision": model_args.model_revision} if name == model_args.model_name_or_path else {}
    tokenizer = AutoTokenizer.from_pretrained(
        name, padding_side="left", trust_remote_code=training_args.trust_remote_code, **own
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(args: StoryArguments, training_args, model_args) -> dict:
    """The trainer's model: a name, an adapter to train further, or an adapter merged below a new one."""
    model_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    peft_config, quantization = get_peft_config(model_args), get_quantization_config(model_args)
    if not args.adapter_name_or_path:
        training_args.model_init_kwargs = model_kwargs
        name = model_args.model_name_or_path
        return {"model": name, "peft_config": peft_config, "quantization_config": quantization}
    if peft_config is not None:
        for config in (PeftConfig.from_pretrained(args.adapter_name_or_path), peft_config):
            check_stacks(config)
    training_args.model_init_kwargs = None  # TRL's; the model is loaded here
    if model_kwargs["revision"] == "main":
        model_kwargs["revision"] = None  # the adapter's
    model = load_adapter(
        args.adapter_name_or_path,
        base=model_args.model_name_or_path,
        is_trainable=peft_config is None,
        trust_remote_code=training_args.trust_remote_code,
        quantization_config=quantization,
        **model_kwargs,
    )
    return {"model": model if peft_config is None else merge(model), "peft_config": peft_config}


def load_prompts(args: StoryArguments, prompts_per_batch: int) -> Dataset:
    """The prompts to train on, repeated where they are too few for a generation batch: TRL would train zero steps."""
    if args.dataset_name is None:
        if not args.prompt.strip():
            raise ValueError("prompt must not be empty; leave the option out for 'Once upon a time'")
        if not is_unicode(args.prompt):
            raise ValueError("prompt is no Unicode text: it was typed or pasted in another encoding")
        return Dataset.from_dict({"prompt": [args.prompt] * max(1_000, prompts_per_batch)})
    dataset = read_dataset(args)
    check_prompts(dataset, args.dataset_name)
    repeats = -(-prompts_per_batch // len(dataset))
    return dataset.select(list(range(len(dataset))) * repeats)


def load_held_out(args: StoryArguments) -> Dataset | None:
    """The prompts that are judged and not trained on, where there are any."""
    if args.eval_dataset_name is None:
        return None
    named = copy.copy(args)
    named.dataset_name = args.eval_dataset_name
    if Path(args.eval_dataset_name).is_file():  # all of it, whatever is trained on
        named.dataset_config, named.dataset_train_split = None, "train"
    try:
        return load_prompts(named, 1)
    except ValueError as error:
        raise ValueError(f"eval_{error}" if str(error).startswith("dataset_") else str(error)) from None


def check_prompts(dataset: Dataset, name: str) -> None:
    """`ValueError` that names the first row whose prompt is none, counted from 1."""
    if "prompt" not in dataset.column_names:
        raise ValueError(f"dataset_name: {name!r} has no column `prompt`, only {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError(f"dataset_name: {name!r} has no rows")
    first = None
    for row, prompt in enumerate(dataset["prompt"], start=1):
        first = prompt if first is None else first
        where = f"dataset_name: {name!r}, row {row}: the prompt"
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError(f"dataset_name: {name!r} holds an empty prompt, row {row}: every row needs some text")
        if not isinstance(prompt, (str, list)):
            raise ValueError(
                f"{where} is a {type(prompt).__name__}, {prompt!r}; it must be text or a list of messages"
            )
        if isinstance(prompt, list) and not is_conversational({"prompt": prompt}):
            raise ValueError(f"{where} is a list, but not one of messages with `role` and `content`")
        for message in prompt if isinstance(prompt, list) else ():
            if not message.get("role") or not (message.get("content") or message.get("tool_calls")):
                raise ValueError(f"{where} has a message without `role` or `content`: {message}")
        if type(prompt) is not type(first):
            raise ValueError(f"{where} is a {type(prompt).__name__} where row 1 has a {type(first).__name__}")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def share_template_options(dataset: Dataset, training_args) -> None:
    """A data set's column `chat_template_kwargs`, which TRL's preference trainers take, as an online one's option.

    Raises:
        `ValueError`: where rows differ.
    """
    if "chat_template_kwargs" not in dataset.column_names:
        return
    values = {json.dumps(value, sort_keys=True): value for value in dataset["chat_template_kwargs"]}
    if len(values) > 1:
        raise ValueError(
            f"dataset_name: the rows of `chat_template_kwargs` differ ({', '.join(list(values)[:2])}, ...), and an "
            "online trainer of TRL's takes one value for all: make two runs, or set --chat_template_kwargs"
        )
    (value,) = values.values()
    training_args.chat_template_kwargs = (value or {}) | (training_args.chat_template_kwargs or {})


def check_lengths(
    rows: list[dict],
    tokenize,
    tokenizer,
    model_args,
    training_args,
    completion_length: int,
    name: str = "dataset_name",
) -> None:
    """What the model's configuration says before its weights are loaded: room enough, and an embedding a token.

    Args:
        rows (`list[dict]`): Rows of the data set.
        tokenize (callable): `(rows) -> list[list[int]]`, as the trainer will do it.
        name (`str`): The option that names them.

    Raises:
        `ValueError`: for a prompt that leaves no room for the completion, or a tokenizer with more ids than the model.
    """
    config = AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    ).get_text_config()
    room, embeddings = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    highest = max(tokenizer.get_vocab().values())
    if embeddings and highest >= embeddings:
        raise ValueError(
            f"tokenizer_name_or_path: the tokenizer has the id {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}), and {model_args.model_name_or_path} has {embeddings} "
            "embeddings: it is another model's, or one to which tokens were added without resizing the model"
        )
    if not isinstance(room, int) or room <= 0:
        return
    size = {}  # of one of each prompt; the longest texts have the most tokens, or nearly
    for row, prompt in enumerate(rows, start=1):
        size.setdefault(as_text(prompt["prompt"]), row)
    longest = sorted(size, key=lambda text: len(text.encode()), reverse=True)[:50]
    try:
        tokens = tokenize([rows[size[text] - 1] for text in longest])
    except Exception as error:  # of a template, which is a program of its own
        raise ValueError(f"{name}: the chat template does not take the prompts: {error}") from error
    for text, ids in zip(longest, tokens, strict=True):
        if len(ids) + completion_length > room:
            raise ValueError(
                f"{name}: the prompt of row {size[text]} has {len(ids)} tokens, and with --max_completion_length "
                f"{completion_length} it is longer than the {room} positions of {model_args.model_name_or_path}: "
                f"{text[:40]!r}..."
            )


def load_pairs(args: PairArguments, training_args, model_args, tokenizer) -> Dataset:
    """DPO's pairs: of `--pairs_from`, or of the run that is resumed, or sampled from the base and written."""
    here, reward = Path(training_args.output_dir, PAIRS), ranking_reward(args.reward_funcs, args.reward_timeout)
    tokenize = partial(tokenize_rows, tokenizer)

    def check(rows: list[dict]) -> None:
        check_lengths(rows, tokenize, tokenizer, model_args, training_args, args.max_completion_length)

    facts = what_is_sampled(args, model_args.model_name_or_path) | {"seed": training_args.seed}
    for name in ("pairs", "group_size", "pairs_per_group", "max_completion_length", "temperature"):
        facts[name] = getattr(args, name)
    there = training_args.resume_from_checkpoint and here.is_file() and made_of(here.parent, PAIRS, facts)
    if args.pairs_from is None and not there:
        state, groups = PartialState(), -(-args.pairs // args.pairs_per_group)
        rows = load_prompts(args, groups).shuffle(seed=training_args.seed).select(range(groups))
        check(rows.to_list())
        kwargs = load_policy(args, training_args, model_args)
        model = AutoModelForCausalLM.from_pretrained(
            kwargs["model"],
            quantization_config=kwargs["quantization_config"],
            trust_remote_code=training_args.trust_remote_code,
            **training_args.model_init_kwargs,
        )
        if kwargs["quantization_config"] is None:
            model.to(state.device)
        model.eval()
        use_fast_generate(model)
        pairs = sample_pairs(
            model,
            tokenizer,
            rows["prompt"],
            reward,
            args.group_size,
            args.pairs_per_group,
            args.max_completion_length,
            args.temperature,
            seed=training_args.seed,
            columns={name: rows[name] for name in rows.column_names if name not in ("prompt", *SIDES)},
        )
        if not pairs:
            raise ValueError("reward_funcs: all completions of a group have the same reward: there is nothing to rank")
        if state.is_main_process:
            write_pairs(pairs, training_args.output_dir)
            note_what_of(here.parent, PAIRS, facts)
            means = [statistics.fmean(pair[f"{side}_reward"] for pair in pairs) for side in ("chosen", "rejected")]
            print(f"{len(pairs)} pairs: {means[0]:.1f} against {means[1]:.1f} on average, in {here}")
        state.wait_for_everyone()
    pairs = read_pairs(args.pairs_from or here)
    check(prompts_of(pairs))
    return pairs
