"""Which options of generation leave the sampled distribution alone, and what is said where one does not."""

import copy
import warnings

from transformers import GenerationConfig

from .kl import SAMPLED, KLWarning

# What changes the distribution token by token, and is sampled by temperature, top-k, top-p and min-p here.
WARPERS = {"temperature": (1.0,), "top_k": (0,), "top_p": (1.0,), "min_p": (0.0,)}
# How long and how often, not from which distribution: ends, padding, caches, what is returned.
INDIFFERENT = {
    "bos_token_id", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config",
    "decoder_start_token_id", "disable_compile", "do_sample", "eos_token_id", "max_length", "max_new_tokens",
    "pad_token_id", "prefill_chunk_size", "transformers_version", "use_cache",
}  # fmt: skip
# Values with which an option does nothing, beside `None`, `False` and what transformers has as its default.
NEUTRAL = {"encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "min_new_tokens": 0}
VLLM_NEUTRAL = {"repetition_penalty": 1.0, "top_k": -1}


def merged(config: GenerationConfig, model_config: GenerationConfig | None) -> GenerationConfig:
    """What `generate` samples by: what is left unset comes from the model's own configuration, then from the defaults.

    As transformers 5.23 does in `generation/utils.py`, `_prepare_generation_config`.
    """
    config = copy.deepcopy(config)
    if model_config is not None:
        config.update(**model_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    return config


def beyond_warpers(config: GenerationConfig) -> dict:
    """The options, other than temperature, top-k, top-p and min-p, that have a value which may do something.

    An option that nobody here has heard of counts as one that does something, unless it is unset.
    """
    neutral = GenerationConfig._get_default_generation_params() | NEUTRAL
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_")
        and name not in WARPERS
        and name not in INDIFFERENT
        and value is not None
        and value is not False
        and not (name in neutral and value == neutral[name])
    }


def warn_of_sampling(trainer, estimator: str, as_sampled: bool = False) -> None:
    """Warn where completions are not drawn from the distributions whose log-probabilities are compared.

    `as_sampled`: the policy is scored over the tokens that truncation leaves, which sampled estimates then are of.
    """
    others = changes_of_sampling(trainer, as_sampled)
    temperature = others.pop("temperature", 1.0)
    if as_sampled and estimator not in SAMPLED:
        warnings.warn(
            f"estimator {estimator!r} is of all tokens, and the policy is scored over those that truncated sampling "
            "leaves (score_as_sampled): use k1 in the reward.",
            KLWarning,
            stacklevel=3,
        )
    if others and estimator in SAMPLED:
        words = ", ".join(f"{name}={value}" for name, value in others.items())
        warnings.warn(
            f"{words}: completions are sampled from another distribution than the policy's, so sampled estimates of "
            "the KL are biased; the estimator 'exact' is not, at the states that are visited. On RLOO "
            "top_k, top_p and min_p can be scored as they are sampled: score_as_sampled.",
            KLWarning,
            stacklevel=3,
        )
    if temperature != 1:
        warnings.warn(
            f"temperature={temperature}: TRL divides the logits of policy and reference by it, so every "
            "KL here is that of the tempered policies, not of the models at temperature 1.",
            KLWarning,
            stacklevel=3,
        )


def changes_of_sampling(trainer, as_sampled: bool = False) -> dict:
    """The trainer's options of generation that change what is sampled, with their values; temperature last.

    TRL scores at its own temperature, and counts tokens up to its own ends: what `generation_kwargs` says instead
    stands under `generation_kwargs.NAME`. `as_sampled`: without top_k, top_p and min_p.
    """
    asked = trainer.args.generation_kwargs or {}
    config = getattr(trainer, "generation_config", None)
    if isinstance(config, GenerationConfig):
        model = trainer.accelerator.unwrap_model(trainer.model)
        config = merged(config, getattr(model, "generation_config", None))
        others = beyond_warpers(config)
        if not config.do_sample:
            others["do_sample"] = False
        ends = asked.get("eos_token_id") or []
        if more := set([ends] if isinstance(ends, int) else ends) - set(trainer.eos_token_ids):
            others["generation_kwargs.eos_token_id"] = sorted(more)
    else:  # vLLM, whose options are TRL's and `generation_kwargs`
        named = {name: getattr(trainer.args, name, None) for name in (*WARPERS, "repetition_penalty")} | asked
        named = {name: value for name, value in named.items() if value != VLLM_NEUTRAL.get(name)}
        config = GenerationConfig(**{name: value for name, value in named.items() if name in WARPERS})
        others = {name: value for name, value in named.items() if name not in WARPERS and value is not None}
    warped = {
        name: value
        for name, neutral in WARPERS.items()
        if (value := getattr(config, name, None)) is not None and name != "temperature" and value not in neutral
    }
    if asked.get("temperature", trainer.args.temperature) != trainer.args.temperature:
        others["generation_kwargs.temperature"] = asked["temperature"]
    tempered = {} if trainer.args.temperature == 1 else {"temperature": trainer.args.temperature}
    return ({} if as_sampled else warped) | others | tempered
