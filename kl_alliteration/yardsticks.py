"""What a reward must cost: the least KL of any policy with that reward, and best-of-n sampling beside it.

Both are read off rewards of the reference's own samples, tensors or lists. Nothing is trained.
"""

import math

import torch

SPAN = 2.0**20  # of the prices that are searched, around the rewards' spread
HALVINGS = 32
CARRY_A_BAND = 40  # times n samples, below which resampling says too little of a largest one's spread
ENOUGH = 10.0  # effective samples that carry a point of the curve
CARRY_A_RATIO = 30.0  # that carry an efficiency: the standard error of a least KL is about 1 / sqrt of them, in nats


def best_of_n(rewards: torch.Tensor, largest_n: int, points: int = 24, bootstraps: int = 200, seed: int = 0) -> list:
    """Expected reward of the best of n samples of the reference, and the largest KL that choosing it can cost.

    Args:
        rewards (`torch.Tensor`): (M,) rewards of independent samples of one prompt, or (P, M) of P prompts, whose
            means are taken. NaN, a reward that does not apply, is left out of one prompt's.
        largest_n (`int`): The last n, from 1 to M; at most `points` values from 1 on are evenly spaced in log n.

    Raises:
        `ValueError`: for an n beyond the samples, fewer than 2 points, and NaN among several prompts' rewards.

    Returns:
        `list[dict]`: `n`; `kl_per_sequence = log n - (n - 1) / n` nats (Beirami et al., arXiv 2401.01879, an upper
        bound); `reward`, the mean of the largest over all subsets of size n, which is the unbiased estimate; `low` and
        `high`, the 2.5th and 97.5th percentile of `bootstraps` sets, resampled within each prompt: they hold the truth
        in some nine of ten; `None` for fewer than 40 n samples, where they hold it less often, and are too low.
    """
    rewards = _rows(rewards)
    if len(rewards) == 1:
        rewards = rewards[:, ~rewards[0].isnan()]
    m = rewards.shape[-1]
    if not 1 <= largest_n <= m:
        raise ValueError(f"largest_n must be from 1 to the {m} samples that have a reward, got {largest_n}")
    if points < 2 or bootstraps < 1:
        raise ValueError(f"points must be >= 2 and bootstraps >= 1, got {points} and {bootstraps}")
    if rewards.isnan().any():
        raise ValueError("best_of_n of several prompts needs a reward of every sample")
    ns = sorted({round(largest_n ** (i / (points - 1))) for i in range(points)})
    places = torch.arange(1, m + 1, dtype=torch.float64)
    # The i-th smallest is the largest of C(i - 1, n - 1) subsets out of C(m, n).
    weights = torch.stack([(_log_binomial(places - 1, n - 1) - _log_binomial(places[-1:], n)).exp() for n in ns])
    generator = torch.Generator().manual_seed(seed)

    def largest(rewards: torch.Tensor) -> torch.Tensor:  # (P, M) -> (N,)
        return (rewards.sort().values @ weights.T).mean(0)

    expected = largest(rewards)
    resampled = (torch.randint(m, rewards.shape, generator=generator) for _ in range(bootstraps))
    again = torch.stack([largest(rewards.gather(-1, places)) for places in resampled])
    low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    columns = zip(ns, expected.tolist(), low.tolist(), high.tolist(), strict=True)
    found = [
        {"n": n, "kl_per_sequence": math.log(n) - (n - 1) / n, "reward": value, "low": below, "high": above}
        for n, value, below, above in columns
    ]
    return [point | ({} if point["n"] * CARRY_A_BAND <= m else {"low": None, "high": None}) for point in found]


def least_kl(
    rewards: torch.Tensor,
    prices: list[float],
    enough: float = ENOUGH,
    ref_log_ratio: torch.Tensor | None = None,
    bootstraps: int = 0,
    seed: int = 0,
) -> list[dict]:
    """The least KL that a reward costs, as a curve over prices.

    Of all policies with one mean reward the one of least KL is `ref * exp(reward / price)`. For M rewards of a prompt
    `w = softmax(rewards / price)`: its reward is `sum w rewards`, its KL `sum w log(M w)`. Samples of another policy
    are weighted back to the reference, `w = softmax(rewards / price - ref_log_ratio)`: they reach further where that
    policy is near the optimum.

    Args:
        rewards (`torch.Tensor`): (M,) rewards of independent samples of one prompt, or (P, M) of P prompts, whose
            means are taken. NaN, a reward that does not apply, is left out: the curve is that of the other texts.
        prices (`list[float]`): Reward per nat, > 0; a point each. It is the beta whose optimum the point is.
        enough (`float`): Effective samples `1 / sum w^2`, in the mean over prompts, below which a point is left out:
            there the samples do not show what the reference could do.
        ref_log_ratio (`torch.Tensor`, *optional*): log policy - log reference of each sample, in nats per sequence,
            in the shape of `rewards`, where a policy wrote them and not the reference.
        bootstraps (`int`): Sets, resampled within each prompt, of which `low` and `high` are the 2.5th and 97.5th
            percentile of the reward at the point's KL; 0 leaves them out.
        seed (`int`): Of the bootstrap.

    Returns:
        `list[dict]`: `price`, `kl_per_sequence` in nats, `reward`, `effective_samples`, `largest_weight` (of one
        sample, in the mean over prompts), and with bootstraps `low`, `high`, by rising KL.
    """
    rewards, ratio = _by_prompt(rewards, ref_log_ratio)
    points = []
    for price in sorted(prices, reverse=True):
        point = _point(rewards, ratio, price)
        if not point["effective_samples"] >= enough:
            break
        points.append(point)
    if not bootstraps or not points:
        return points
    generator, grid = torch.Generator().manual_seed(seed), torch.tensor(prices, dtype=torch.float64)
    kls = torch.tensor([point["kl_per_sequence"] for point in points], dtype=torch.float64)
    again = []
    for _ in range(bootstraps):
        places = torch.randint(rewards.shape[-1], rewards.shape, generator=generator)
        some = rewards.gather(-1, places), ratio.gather(-1, places)
        log_z = torch.stack([_log_z(*some, price).nanmean() for price in prices])
        again.append((grid * (log_z + kls[:, None])).amin(-1))  # the largest reward at a KL, by duality: (N,)
    bounds = torch.stack(again).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    for point, low, high in zip(points, *bounds.tolist(), strict=True):
        point |= {"low": low, "high": high}
    return points


def least_kl_at(
    rewards: torch.Tensor,
    kl_per_sequence: float | None = None,
    reward: float | None = None,
    ref_log_ratio: torch.Tensor | None = None,
) -> dict:
    """The point of [`least_kl`]'s curve with this KL, or with this mean reward: its `price` is the beta to ask for.

    However few samples carry it, there is an answer: `effective_samples` below about ten says that it is a guess.

    Args:
        rewards, ref_log_ratio (`torch.Tensor`): As for [`least_kl`].
        kl_per_sequence (`float`, *optional*): In nats, > 0.
        reward (`float`, *optional*): The mean reward, in place of it. At or below the reference's own it costs 0.

    Raises:
        `ValueError`: where not exactly one of both is given, or no weighting of the samples reaches it.
    """
    if (kl_per_sequence is None) == (reward is None):
        raise ValueError("give one of kl_per_sequence and reward")
    rewards, ratio = _by_prompt(rewards, ref_log_ratio)
    name, value = ("kl_per_sequence", kl_per_sequence) if reward is None else ("reward", reward)
    if name == "kl_per_sequence" and not 0 < value < math.inf:
        raise ValueError(f"kl_per_sequence must be > 0 and finite, got {value}")
    low, high = (_tilted(rewards, ratio, each)[name] for each in _price_range(rewards))
    if name == "reward" and value <= low:
        # An infinite price: the reference itself.
        return _point(rewards, ratio, math.inf) | {"kl_per_sequence": 0.0}
    if not value <= high:
        raise ValueError(f"{name} {value:g} is beyond what these samples show, at most {high:.4g}: sample more texts")
    return _point(rewards, ratio, _price(rewards, ratio, name, value))


def efficiency(
    ref_rewards: torch.Tensor,
    rewards: torch.Tensor,
    ref_log_ratio: torch.Tensor,
    kl_per_sequence: float,
    one_prompt: bool = True,
) -> float | None:
    """The least KL of the mean reward that a policy reached, over the KL that it spent: at most 1.

    The least is read off the reference's samples, and beyond their reach off the policy's own. `None` where fewer than
    thirty effective samples would carry it (its standard error is about one over their root, in nats, and samples that
    miss the rare texts read too high), where nothing was spent, and where the gain in reward is within two standard
    errors of none: the ratio would be one of noise.

    Args:
        ref_rewards (`torch.Tensor`): (M,) rewards of the reference's samples of one prompt, or (P, M) of P prompts,
            beyond whose reach there is no answer; NaN does not apply.
        rewards (`torch.Tensor`): (N,) rewards of the policy's.
        ref_log_ratio (`torch.Tensor`): (N,) log policy - log reference of the policy's, in nats per sequence.
        kl_per_sequence (`float`): What was spent, in nats; the exact KL where it is known.
        one_prompt (`bool`): Whether the policy's are of one prompt. Of several, how their rewards differ would count
            as reward to be bought, so that the reference's alone are asked.
    """
    ref_rewards, rewards = _rows(ref_rewards), _rows(rewards)
    known = rewards[~rewards.isnan()]
    if not len(known):
        return None
    gain = known.mean() - ref_rewards.nanmean()
    if not kl_per_sequence > 0 or not gain > 2 * known.std(correction=0) / len(known) ** 0.5:
        return None
    samples = [(ref_rewards, None), (rewards, ref_log_ratio)]
    one_prompt = one_prompt and ref_rewards.numel() == ref_rewards.shape[-1]
    least = least_kl_carried(known.mean().item(), samples[: 2 if one_prompt else 1])
    return None if least is None else least / kl_per_sequence


def least_kl_carried(reward: float, samples: list[tuple[torch.Tensor, torch.Tensor | None]]) -> float | None:
    """The least KL of a mean reward, by the first samples of which thirty effective ones carry it; else `None`.

    Args:
        reward (`float`): The mean reward.
        samples (`list`): Pairs of rewards and `ref_log_ratio` as for [`least_kl_at`], the reference's own first.

    Returns:
        `float`: In nats per sequence. Its standard error is about one over the root of the effective samples.
    """
    for rewards, ref_log_ratio in samples:
        try:
            least = least_kl_at(rewards, reward=reward, ref_log_ratio=ref_log_ratio)
        except ValueError:  # beyond these samples
            continue
        if least["effective_samples"] >= CARRY_A_RATIO:
            return least["kl_per_sequence"]
    return None


def centred(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards of many prompts with few samples each, as of one: less their prompt's mean, plus the mean of all.

    The baseline of RLOO and GRPO takes a prompt's mean away, too. A curve of each prompt by itself would end at the
    logarithm of its few samples. It is right as far as the prompts' rewards are spread alike about their means.

    Args:
        rewards (`torch.Tensor`): (P, M); NaN does not apply.

    Returns:
        `torch.Tensor`: (P * M,) less those that do not apply.
    """
    rewards = _rows(rewards)
    if len(rewards) > 1:
        mean, m = rewards.nanmean(-1, keepdim=True), (~rewards.isnan()).sum(-1, keepdim=True)
        # Less the mean of m samples, a reward has 1 / m less variance.
        rewards = (rewards - mean) * (m / (m - 1).clamp(min=1)).sqrt() + rewards.nanmean()
    return rewards[~rewards.isnan()]


def _rows(values) -> torch.Tensor:
    """(M,) or (P, M), a tensor or lists -> (P, M) float64 on the CPU."""
    if not torch.is_tensor(values):
        rows = values if isinstance(values[0] if len(values) else None, (list, tuple)) else [values]
        values = [[math.nan if value is None else value for value in row] for row in rows]
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    if not values.numel():
        raise ValueError("rewards: there are none")
    return values.reshape(-1, values.shape[-1])


def _by_prompt(rewards: torch.Tensor, ratio: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, M) float64 of the prompts that have a reward which applies."""
    rewards = _rows(rewards)
    ratio = torch.zeros_like(rewards) if ratio is None else _rows(ratio).reshape(rewards.shape)
    some = (~rewards.isnan()).any(-1)
    if not some.any():
        raise ValueError("rewards: none of them applies")
    return rewards[some], ratio[some]


def _log_weights(rewards: torch.Tensor, ratio: torch.Tensor, price: float) -> torch.Tensor:
    """(P, M), before they are normalised."""
    return (rewards / price - ratio).where(~rewards.isnan(), -torch.inf)


def _log_z(rewards: torch.Tensor, ratio: torch.Tensor, price: float) -> torch.Tensor:
    """log of the mean weight, (P, M) -> (P,): what normalises the tilted reference."""
    return _log_weights(rewards, ratio, price).logsumexp(-1) - (~rewards.isnan()).sum(-1).double().log()


def _tilted(rewards: torch.Tensor, ratio: torch.Tensor, price: float) -> dict:
    w = _log_weights(rewards, ratio, price).softmax(-1)
    reward = (w * rewards.nan_to_num()).sum(-1)  # (P, M) -> (P,)
    kl = reward / price - _log_z(rewards, ratio, price)
    return {"kl_per_sequence": kl.mean().item(), "reward": reward.mean().item()}


def _point(rewards: torch.Tensor, ratio: torch.Tensor, price: float) -> dict:
    w = _log_weights(rewards, ratio, price).softmax(-1)
    size = {"effective_samples": (1 / w.square().sum(-1)).mean().item(), "largest_weight": w.amax(-1).mean().item()}
    return {"price": price} | _tilted(rewards, ratio, price) | size


def _price_range(rewards: torch.Tensor) -> tuple[float, float]:
    """Prices so high that nothing is bought, and so low that each prompt's best sample has all the weight."""
    known = rewards[~rewards.isnan()]
    spread = (known.max() - known.min()).item() or 1.0
    return spread * SPAN, spread / SPAN


def _price(rewards: torch.Tensor, ratio: torch.Tensor, name: str, value: float) -> float:
    """By bisection of its logarithm: KL and reward both fall as the price rises."""
    high, low = _price_range(rewards)
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _tilted(rewards, ratio, middle)[name] > value else (low, middle)
    return math.sqrt(low * high)


def _log_binomial(n: torch.Tensor, k: int) -> torch.Tensor:
    """log of n over k, -inf where k > n."""
    inside = n >= k
    safe = n.where(inside, torch.full_like(n, k))
    one = torch.ones((), dtype=n.dtype)
    found = torch.lgamma(safe + 1) - torch.lgamma(one * k + 1) - torch.lgamma(safe - k + 1)
    return found.masked_fill(~inside, -torch.inf)
