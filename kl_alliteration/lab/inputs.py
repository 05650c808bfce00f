"""What a recipe trains on, from its options: tokenizer, policy, prompts, pairs."""

from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config, get_quantization_config

from ..adapters import load_adapter, merge
from ..sampling import use_fast_generate
from .checked_rewards import ranking_reward
from .options import PairArguments, StoryArguments
from .pairs import FILE as PAIRS
from .pairs import read_pairs, sample_pairs, write_pairs

# TinyStories-33M was trained with this tokenizer and ships none (its model card says so).
TOKENIZER_OF = {"roneneldan/TinyStories-33M": "EleutherAI/gpt-neo-125M"}


def load_tokenizer(args: StoryArguments, model_args, training_args):
    name = args.tokenizer_name_or_path or TOKENIZER_OF.get(
        model_args.model_name_or_path, model_args.model_name_or_path
    )
    tokenizer = AutoTokenizer.from_pretrained(
        name, padding_side="left", trust_remote_code=training_args.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(args: StoryArguments, training_args, model_args) -> dict:
    """What a trainer takes as the model: by name, an adapter to go on with, or one merged below a new one."""
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
        return Dataset.from_dict({"prompt": [args.prompt] * max(1_000, prompts_per_batch)})
    name = args.dataset_name
    if name.endswith((".json", ".jsonl")):
        if not Path(name).is_file():
            raise ValueError(f"dataset_name: there is no file {name!r}")
        dataset = load_dataset("json", data_files=name, split="train")
    else:
        dataset = load_dataset(name, name=args.dataset_config, split=args.dataset_train_split)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"dataset_name: {name!r} has no column `prompt`, only {', '.join(dataset.column_names)}")
    if len(dataset) == 0 or any(not prompt for prompt in dataset["prompt"]):
        raise ValueError(f"dataset_name: {name!r} holds an empty prompt; every row needs some text to go on from")
    repeats = -(-prompts_per_batch // len(dataset))
    return dataset.select(list(range(len(dataset))) * repeats)


def load_pairs(args: PairArguments, training_args, model_args, tokenizer) -> Dataset:
    """DPO's pairs: of `--pairs_from`, or of the run that is resumed, or sampled from the base and written."""
    here, reward = Path(training_args.output_dir, PAIRS), ranking_reward(args.reward_funcs, args.reward_timeout)
    if args.pairs_from is None and not (training_args.resume_from_checkpoint and here.is_file()):
        state, groups = PartialState(), -(-args.pairs // args.pairs_per_group)
        prompts = load_prompts(args, groups).shuffle(seed=training_args.seed)[:groups]["prompt"]
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
            prompts,
            reward,
            args.group_size,
            args.pairs_per_group,
            args.max_completion_length,
            args.temperature,
            seed=training_args.seed,
        )
        if not pairs:
            raise ValueError("reward_funcs: all completions of a group have the same reward: there is nothing to rank")
        if state.is_main_process:
            write_pairs(pairs, training_args.output_dir)
            means = [sum(pair[f"{side}_reward"] for pair in pairs) / len(pairs) for side in ("chosen", "rejected")]
            print(f"{len(pairs)} pairs: {means[0]:.1f} against {means[1]:.1f} on average, in {here}")
        state.wait_for_everyone()
    return read_pairs(args.pairs_from or here)
