"""Fresh stories from a trained policy, judged: reward, share of different stories, KL to the reference in nats.

Sampling is by temperature alone and the judge is separate from the trainer, so the numbers of two runs compare.
"""

import math
import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from .text import different_share, distinct_n

AT_ONCE = 2**27  # logits that are held at a time


@dataclass
class Judgement:
    """What `stories` fresh completions show. KL is in nats, the sampled log-ratio (k1) where it is not called exact.

    `exact_kl_per_sequence` sums the divergences of the next-token distributions, whole vocabulary, over the states
    that the completions visit: the same expectation as `kl_per_sequence`, with less noise. `None` without a reference.
    """

    stories: int
    reward_mean: float
    reward_std: float
    different_share: float
    distinct_2: float  # different pairs of neighbouring words over all pairs, in the whole set
    ended_share: float  # of completions that reached an end of text before `max_new_tokens`
    mean_length: float  # tokens
    entropy_per_token: float  # nats
    kl_per_token: float | None
    kl_per_sequence: float | None
    exact_kl_per_sequence: float | None
    prompts: list[str]
    completions: list[str]

    @property
    def texts(self) -> list[str]:
        return [prompt + completion for prompt, completion in zip(self.prompts, self.completions, strict=True)]

    def numbers(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name not in ("prompts", "completions")}


def plain_sampling(model, tokenizer, max_new_tokens: int, temperature: float = 1.0) -> GenerationConfig:
    """By temperature alone, whatever the model's own configuration says: what log-probabilities are those of."""
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )


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
    prompts: list[str],
    reward,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    ref_model: PreTrainedModel | None = None,
    adapter_off_is_reference: bool = False,
    batch_size: int = 50,
    seed: int = 0,
) -> Judgement:
    """Sample one completion a prompt (text, chat templates already applied) and judge them.

    Args:
        reward (callable): TRL-shaped, `reward(prompts=..., completions=...) -> list[float]`.
        ref_model ([`~transformers.PreTrainedModel`], *optional*): The reference policy.
        adapter_off_is_reference (`bool`): For a `PeftModel`: the base with the adapter off is the reference.
        seed (`int`): Of the sampling; torch's random state is put back afterwards.
    """
    config = plain_sampling(model, tokenizer, max_new_tokens, temperature)
    training = model.training
    model.eval()
    texts, rewards, lengths, entropies, kls, exact_kls, ended = [], [], [], [], [], [], 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
            ids = model.generate(**inputs, generation_config=config)
            width = ids.shape[1] - inputs["input_ids"].shape[1]
            completion = ids[:, -width:]
            stops = torch.isin(completion, torch.as_tensor(config.eos_token_id, device=ids.device)).int()
            mask = (stops.cumsum(-1) - stops) == 0  # (B, T), the end-of-text token itself counts
            attention_mask = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
            entropy, log_ratio, exact_kl = _score(
                model, ref_model, adapter_off_is_reference, ids, attention_mask, width, temperature
            )
            if log_ratio is not None:
                kls += (log_ratio * mask).sum(-1).tolist()  # (B, T) -> (B,)
                exact_kls += (exact_kl * mask).sum(-1).tolist()
            new = tokenizer.batch_decode(
                completion.masked_fill(~mask, tokenizer.pad_token_id), skip_special_tokens=True
            )
            texts += new
            rewards += reward(prompts=batch, completions=new)
            lengths += mask.sum(-1).tolist()
            ended += int(stops.any(-1).sum())
            entropies.append((entropy * mask).sum().item())
    model.train(training)
    return Judgement(
        stories=len(texts),
        reward_mean=statistics.fmean(rewards),
        reward_std=statistics.pstdev(rewards),
        different_share=different_share(texts),
        distinct_2=distinct_n(texts, 2),
        ended_share=ended / len(texts),
        mean_length=statistics.fmean(lengths),
        entropy_per_token=sum(entropies) / sum(lengths),
        kl_per_token=sum(kls) / sum(lengths) if kls else None,
        kl_per_sequence=statistics.fmean(kls) if kls else None,
        exact_kl_per_sequence=statistics.fmean(exact_kls) if exact_kls else None,
        prompts=list(prompts),
        completions=texts,
    )


def best_of_n(rewards: torch.Tensor, largest_n: int, points: int = 24, bootstraps: int = 200, seed: int = 0) -> list:
    """Expected reward of the best of n samples of the reference, and the most that choosing it costs.

    Args:
        rewards (`torch.Tensor`): (M,) rewards of independent samples.
        largest_n (`int`): The last n; `points` values from 1 on are evenly spaced in log n.

    Returns:
        `list[dict]`: `n`; `kl_per_sequence = log n - (n - 1) / n` nats (Beirami et al., arXiv 2401.01879, an upper
        bound); `reward`, the mean of the largest over all subsets of size n, which is the unbiased estimate; `low` and
        `high`, the 2.5th and 97.5th percentile of `bootstraps` resampled sets.
    """
    m = len(rewards)
    ns = sorted({round(largest_n ** (i / (points - 1))) for i in range(points)})
    places = torch.arange(1, m + 1, dtype=torch.float64)
    # The i-th smallest is the largest of C(i - 1, n - 1) subsets out of C(m, n).
    weights = torch.stack([(_log_binomial(places - 1, n - 1) - _log_binomial(places[-1:], n)).exp() for n in ns])
    generator = torch.Generator().manual_seed(seed)
    rewards = rewards.double()
    expected = weights @ rewards.sort().values
    again = torch.stack(
        [weights @ rewards[torch.randint(m, (m,), generator=generator)].sort().values for _ in range(bootstraps)]
    )
    low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    columns = zip(ns, expected.tolist(), low.tolist(), high.tolist(), strict=True)
    return [
        {"n": n, "kl_per_sequence": math.log(n) - (n - 1) / n, "reward": value, "low": below, "high": above}
        for n, value, below, above in columns
    ]


def _log_binomial(n: torch.Tensor, k: int) -> torch.Tensor:
    """log of n over k, -inf where k > n."""
    inside = n >= k
    safe = n.where(inside, torch.full_like(n, k))
    one = torch.ones((), dtype=n.dtype)
    found = torch.lgamma(safe + 1) - torch.lgamma(one * k + 1) - torch.lgamma(safe - k + 1)
    return found.masked_fill(~inside, -torch.inf)
