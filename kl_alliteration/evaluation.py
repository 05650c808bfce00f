"""Fresh stories from a trained policy, judged: reward, share of different stories, KL to the reference in nats.

Sampling is by temperature alone and the judge is separate from the trainer, so the numbers of two runs compare.
"""

import inspect
import math
import statistics
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, TrainerState

from .sampling_options import INDIFFERENT
from .text import as_dialogue, different_share, distinct_n, pairs_per_100_words

AT_ONCE = 2**27  # logits that are held at a time


@dataclass
class Judgement:
    """What `stories` fresh completions show. KL is in nats, the sampled log-ratio (k1) where it is not called exact.

    `exact_kl_per_sequence` sums the divergences of the next-token distributions, whole vocabulary, over the states
    that the completions visit: the same expectation as `kl_per_sequence`, with less noise. `None` without a reference.
    """

    stories: int
    reward_mean: float  # over those to which a reward applies
    reward_std: float
    different_share: float
    distinct_2: float  # different pairs of neighbouring words over all pairs, in the whole set
    pairs_per_100_words: float  # alliterating ones of different words, in the completions
    ended_share: float  # of completions that reached an end of text before `max_new_tokens`
    mean_length: float  # tokens
    entropy_per_token: float  # nats
    kl_per_token: float | None
    kl_per_sequence: float | None
    exact_kl_per_sequence: float | None
    rewards: list[float]  # NaN where it does not apply
    prompts: list[str]  # a conversation as its turns, without the chat template's marks
    completions: list[str]
    ref_log_ratios: list[float] | None = None  # log policy - log reference of each completion, nats per sequence
    tokens: list[list[str]] | None = None  # of each completion, the text that each token adds; see `pieces`
    token_kls: list[list[float]] | None = None  # exact KL of the next-token distributions before each of them, nats
    # Of what else was sampled of the reference, where anything was; see `yardsticks.efficiency` and `plots.PlotCount`.
    efficiency: float | None = None
    effective_plots: float | None = None
    most_told_share: float | None = None
    kl_of_plots: float | None = None

    @property
    def texts(self) -> list[str]:
        return [prompt + completion for prompt, completion in zip(self.prompts, self.completions, strict=True)]

    def numbers(self) -> dict:
        lists = ("rewards", "prompts", "completions", "ref_log_ratios", "tokens", "token_kls")
        return {name: value for name, value in asdict(self).items() if name not in lists}

    def rows(self) -> list[dict]:
        """A story each: its prompt, completion and reward; where the KL is known, its tokens and their exact KL."""
        columns = {"prompt": self.prompts, "completion": self.completions, "reward": self.rewards}
        if self.token_kls is not None:
            kls = [[round(value, 6) for value in each] for each in self.token_kls]  # nats
            columns |= {"tokens": self.tokens, "token_kls": kls}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def plain_sampling(model, tokenizer, max_new_tokens: int, temperature: float = 1.0) -> GenerationConfig:
    """By temperature alone, whatever the model's own configuration says: what log-probabilities are those of.

    A text ends where it does in TRL's training: at the model's end-of-text tokens and at the tokenizer's.

    Raises:
        `ValueError`: for a temperature that is not above 0 and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id not in (None, *ends):
        ends = [tokenizer.eos_token_id, *ends]
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds: joined, they are the decoded text.

    `""` for a special token, and for one that ends within a character: it comes with the token that completes it.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    alone = [decode([token]) for token in ids]
    if "".join(alone) == decode(ids):
        return alone
    found, start, read = [], 0, 0  # a token before those that are read, so that the first of them keeps its space
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:read]), decode(ids[start:end])
        if len(now) <= len(before) or (now.endswith("\ufffd") and end < len(ids)):
            found.append("")
        else:
            found.append(now[len(before) :])
            start, read = read, end
    return found


@contextmanager
def own_options_left_out(model):
    """Within it `generate` samples by its options alone: what they leave unset it would take from the model's own."""
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    before = [(each, vars(each).get("generation_config")) for each in holders]
    try:
        for each, own in before:
            if own is not None:
                kept = {name: getattr(own, name) for name in INDIFFERENT if hasattr(own, name)}
                each.generation_config = GenerationConfig(**kept)
        yield
    finally:
        for each, own in before:
            if own is not None:
                each.generation_config = own


class Sampled(NamedTuple):
    """Completions of B rows, as a trainer of TRL's has them."""

    ids: torch.Tensor  # (B, P + T)
    attention_mask: torch.Tensor  # (B, P + T); 1 = a token of prompt or completion
    mask: torch.Tensor  # (B, T), the completion's part of it; the end-of-text token itself counts
    ended: torch.Tensor  # (B,), whether there is one
    prompts: list[str]
    texts: list[str]
    completions: list  # the texts, or of a conversation the assistant's message
    completion_ids: list[list[int]]


def tokenize_prompts(tokenizer, rows: list[dict], **template) -> list[list[int]]:
    """As TRL's RLOO and GRPO do: a conversation by the chat template alone, which writes its special tokens itself."""
    prompts = [row["prompt"] for row in rows]
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts)["input_ids"]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True} | template
    return tokenizer.apply_chat_template(prompts, **options)["input_ids"]


def sample_rows(model, tokenizer, rows: list[dict], config: GenerationConfig, tokenize=None) -> Sampled:
    """One completion of each of B rows of a data set, whose `prompt` is plain or conversational.

    Args:
        tokenize (callable, *optional*): `(rows) -> list[list[int]]`, in place of [`tokenize_prompts`].
    """
    prompts = tokenize(rows) if tokenize is not None else tokenize_prompts(tokenizer, rows)
    tensors = [torch.tensor(ids, dtype=torch.long, device=model.device) for ids in prompts]
    padded = pad_sequence(tensors, True, config.pad_token_id or 0, padding_side="left")  # (B, P)
    prompt_mask = pad_sequence([torch.ones_like(ids) for ids in tensors], True, 0, padding_side="left")
    with own_options_left_out(model):
        ids = model.generate(input_ids=padded, attention_mask=prompt_mask, generation_config=config)
    completion = ids[:, padded.shape[1] :]  # (B, T)
    ends = torch.as_tensor(config.eos_token_id if config.eos_token_id is not None else [], device=ids.device)
    stops = torch.isin(completion, ends).int()
    mask = (stops.cumsum(-1) - stops) == 0
    completion_ids = [row[kept].tolist() for row, kept in zip(completion, mask, strict=True)]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    conversational = not isinstance(rows[0]["prompt"], str)
    return Sampled(
        ids,
        torch.cat([prompt_mask, mask.long()], dim=1),
        mask,
        stops.any(-1),
        [as_dialogue(row["prompt"]) for row in rows],
        texts,
        [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
        completion_ids,
    )


def ask_reward(reward, rows: list[dict], completions: list, completion_ids: list[list[int]]) -> list[float]:
    """A reward function's answers, handed what TRL's trainers hand over; NaN for `None`, which is "does not apply".

    That is prompts, completions, their tokens, every column of the rows, `trainer_state`, `log_extra` and
    `log_metric`. A function that takes less gets what it takes, but `prompts` and `completions`, as from TRL.
    """
    if not callable(reward) or isinstance(reward, torch.nn.Module):
        raise ValueError(f"reward must be one reward function, got {type(reward).__name__}")
    names = [name for name in rows[0] if name not in ("prompt", "completion", "completion_ids")]
    columns = {name: [row[name] for row in rows] for name in names} | {"completion_ids": completion_ids}
    columns |= {"trainer_state": TrainerState(), "log_extra": _no_log, "log_metric": _no_log}
    parameters = inspect.signature(reward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        columns = {each.name: columns[each.name] for each in parameters if each.name in columns}
    asked = columns | {"prompts": [row["prompt"] for row in rows], "completions": completions}  # no column's
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(reward.__call__):
        raise ValueError("reward: an asynchronous one is a trainer's to ask; give a function that returns the rewards")
    answer = list(reward(**asked))
    if len(answer) != len(completions):
        raise ValueError(f"reward: {len(answer)} answers for {len(completions)} completions: return one for each")
    return [math.nan if value is None else float(value) for value in answer]


def _no_log(*values) -> None:
    """In place of the trainer's log, which a judge is not part of."""


def _log_probs(model, ids, attention_mask, completion_length: int, temperature: float) -> torch.Tensor:
    """(B, T, V) of the last `completion_length` tokens under the sampling temperature."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention_mask, position_ids=positions).logits
    return (logits[:, -completion_length - 1 : -1].float() / temperature).log_softmax(-1)


def _score(model, reference, adapter_off: bool, ids, attention_mask, completion_length: int, temperature: float):
    """`(entropies, log-ratios, exact KLs)` of the last tokens, (B, T) each; without a reference `None` for the KLs."""
    scores = []
    rows = max(1, AT_ONCE // (completion_length * model.config.get_text_config().vocab_size))
    for some, mask in zip(ids.split(rows), attention_mask.split(rows), strict=True):
        asked = some, mask, completion_length, temperature
        log_p = _log_probs(model, *asked)  # (b, T, V)
        found = [-(log_p.exp() * log_p).sum(-1)]
        if reference is not None or adapter_off:
            with model.disable_adapter() if adapter_off else nullcontext():
                log_ratio = log_p - _log_probs(reference or model, *asked)
            sampled = some[:, -completion_length:].unsqueeze(-1)
            found += [log_ratio.gather(-1, sampled).squeeze(-1), (log_p.exp() * log_ratio).sum(-1)]
        scores.append(found)
    entropies, *kls = (torch.cat(each) for each in zip(*scores, strict=True))
    return entropies, *(kls or (None, None))


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    tokenizer,
    prompts: list,
    reward,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    ref_model: PreTrainedModel | None = None,
    adapter_off_is_reference: bool = False,
    batch_size: int = 50,
    seed: int = 0,
    columns: dict[str, list] | None = None,
    tokenize=None,
) -> Judgement:
    """Sample one completion a prompt and judge them.

    Args:
        prompts (`list`): Plain or conversational, as in a data set of TRL's.
        reward (callable): TRL-shaped, `reward(prompts=..., completions=..., **columns) -> list[float]`.
        ref_model ([`~transformers.PreTrainedModel`], *optional*): The reference policy.
        adapter_off_is_reference (`bool`): For a `PeftModel`: the base with the adapter off is the reference.
        seed (`int`): Of the sampling; torch's random state is put back afterwards.
        columns (`dict[str, list]`, *optional*): Further columns of the data set, one value a prompt.
        tokenize (callable, *optional*): `(rows) -> list[list[int]]`, where it is not TRL's way for online trainers.

    Raises:
        `ValueError`: without a prompt, for `adapter_off_is_reference` of a model without an adapter, and for a reward
            that is asynchronous or does not answer for each completion.
    """
    if not len(prompts):
        raise ValueError("prompts: there is none to judge by")
    if adapter_off_is_reference and not hasattr(model, "disable_adapter"):
        raise ValueError("adapter_off_is_reference: the model has no adapter; give a ref_model")
    config = plain_sampling(model, tokenizer, max_new_tokens, temperature)
    values = (columns or {}).values()
    rows = [
        {"prompt": prompt} | dict(zip(columns or {}, row, strict=True))
        for prompt, *row in zip(prompts, *values, strict=True)
    ]
    training = model.training
    model.eval()
    asked, texts, rewards, lengths, entropies, kls, tokens, token_kls, ended = [], [], [], [], [], [], [], [], 0
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                found = sample_rows(model, tokenizer, batch, config, tokenize)
                mask = found.mask
                entropy, log_ratio, exact_kl = _score(
                    model,
                    ref_model,
                    adapter_off_is_reference,
                    found.ids,
                    found.attention_mask,
                    mask.shape[1],
                    temperature,
                )
                if log_ratio is not None:
                    kls += (log_ratio * mask).sum(-1).tolist()  # (B, T) -> (B,)
                    tokens += [pieces(tokenizer, ids) for ids in found.completion_ids]
                    token_kls += [row[kept].tolist() for row, kept in zip(exact_kl, mask.bool(), strict=True)]
                rewards += ask_reward(reward, batch, found.completions, found.completion_ids)
                asked += found.prompts
                texts += found.texts
                lengths += mask.sum(-1).tolist()
                ended += int(found.ended.sum())
                entropies.append((entropy * mask).sum().item())
    finally:
        model.train(training)
    applied = [value for value in rewards if not math.isnan(value)] or [math.nan]
    return Judgement(
        stories=len(texts),
        reward_mean=statistics.fmean(applied),
        reward_std=statistics.pstdev(applied) if all(map(math.isfinite, applied)) else math.nan,
        different_share=different_share(texts),
        distinct_2=distinct_n(texts, 2),
        pairs_per_100_words=pairs_per_100_words(texts),
        ended_share=ended / len(texts),
        mean_length=statistics.fmean(lengths),
        entropy_per_token=sum(entropies) / sum(lengths),
        kl_per_token=sum(kls) / sum(lengths) if kls else None,
        kl_per_sequence=statistics.fmean(kls) if kls else None,
        exact_kl_per_sequence=statistics.fmean(map(sum, token_kls)) if token_kls else None,
        rewards=rewards,
        prompts=asked,
        completions=texts,
        ref_log_ratios=kls or None,
        tokens=tokens or None,
        token_kls=token_kls or None,
    )
