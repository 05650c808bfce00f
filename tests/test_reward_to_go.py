"""Reward by token: its gradient by enumeration through TRL's own loss, its parts by hand, and what it is told."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_RUN
from datasets import Dataset
from enumeration import ENDING, FIXED, PROMPT, Tables, flat, kl_forward, move, parameters, per_state, reverse_kl
from test_contract import BETA, enumerated  # noqa: F401  (a fixture)
from test_grpo_penalty import FACTOR
from test_grpo_penalty import enumerated as grpo_enumerated  # noqa: F401  (a fixture)
from test_grpo_penalty import trained_gradient as grpo_gradient
from test_off_policy import UNCLIPPED
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration import KLPenalty, KLPenaltyCallback, use_fast_sampling, use_reward_to_go
from kl_alliteration._trl import partial_rewards, seam_of
from kl_alliteration.credit import less_the_mean, to_go
from kl_alliteration.kl import KLWarning

# Of texts: an "e" ends them and is not seen, nor is a "p". A prefix may be worth more than the whole.
WORTH = {"": 0.3, "a": 1.0, "b": -0.5, "c": 0.7, "a b": 2.0, "b a": 0.1, "c c": -1.0, "c a": 1.5, "b b": 0.4}


def worth(text: str) -> float:
    return WORTH.get(text, 0.0)


def reward(completions, **columns):
    return [worth(text) for text in completions]


reward.scores_prefixes = True


def rewarded(trainer, completions):
    """The trainer with that reward, and the completions' own texts."""
    texts = trainer.processing_class.batch_decode(completions, skip_special_tokens=True)
    more = [None, texts, None, {}, None, None] if isinstance(trainer, GRPOTrainer) else [texts]
    trainer._generate = lambda prompts: ([PROMPT] * len(prompts), completions, *more)
    trainer.reward_funcs = [reward]
    return trainer


def trained_gradient(trainer, completions, between=None) -> torch.Tensor:
    """E[gradient of the loss] under the policy that sampled, each completion weighted by how likely it is."""
    n = len(completions)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * n)
    if between is not None:
        between(trainer)
    for name in ("advantages", "kl_credit"):  # leave-one-out is n / (n - 1) times "less the mean", a constant
        batch[name] = batch[name] * (n - 1) / n
    total = 0
    for i in range(n):
        loss = trainer._compute_loss(trainer.model, {name: value[i : i + 1] for name, value in batch.items()})
        found = torch.autograd.grad(loss, parameters(trainer), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters(trainer), strict=True)]
        total = total + batch["old_logps"][i].exp() * flat(found)
    return total


def earned(trainer, t: Tables, discount: float, completions) -> torch.Tensor:
    """sum over t of E[(r_t + discount * r_t+1) grad log p(t)], as an objective: what is not differentiated is held."""
    decode = partial(trainer.processing_class.decode, skip_special_tokens=True)
    total = 0
    for ids in completions:
        first, second = t.p1[ids[0]].exp(), t.p2[ids[0], ids[-1]].exp()
        before, whole = worth(decode(ids[:1])), worth(decode(ids))
        if len(ids) == 1:
            total = total + first * whole
        else:
            # The first token's own reward stands in as many of these terms as there are second tokens.
            total = total + first * second.detach() * (before + discount * (whole - before))
            total = total + first.detach() * second * (whole - before)
    return total


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("completions", [FIXED, ENDING], ids=["fixed", "ending"])
@pytest.mark.parametrize("discount", [1.0, 0.6, 0.0])
def test_gradient(enumerated, discount, completions, lora):  # noqa: F811
    trainer = rewarded(enumerated(completions, lora=lora), completions)
    KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))
    use_reward_to_go(trainer, discount)
    if completions is ENDING:
        seam_of(trainer).beta = 0.0  # whose penalty the tables know of two tokens alone
    found, t = trained_gradient(trainer, completions), Tables(trainer)
    wanted = t.gradient(earned(trainer, t, discount, completions))
    t = Tables(trainer)
    charged = seam_of(trainer).beta * t.gradient(reverse_kl(t))
    torch.testing.assert_close(found, charged - wanted, atol=1e-6, rtol=0)
    assert wanted.abs().max() > 1e-3
    if discount == 1:  # the same as the whole reward's
        decode = partial(trainer.processing_class.decode, skip_special_tokens=True)
        t = Tables(trainer)
        terms = (
            (t.p1[ids[0]] + (t.p2[ids[0], ids[1]] if len(ids) > 1 else 0)).exp() * worth(decode(ids))
            for ids in completions
        )
        torch.testing.assert_close(t.gradient(sum(terms)), wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("discount", [1.0, 0.6])
def test_beyond_the_clip_range_a_token_goes_by_its_own_advantage(enumerated, discount):  # noqa: F811
    """The second pass of a batch: the smaller of ratio times advantage and clipped ratio times advantage, by token."""
    trainer = rewarded(enumerated(num_iterations=2), FIXED)
    seam_of(trainer).beta = 0.0
    use_reward_to_go(trainer, discount)
    then = Tables(trainer)
    then = torch.stack([then.p1[a] + then.p2[a, b] for a, b in FIXED]).detach()
    found = trained_gradient(trainer, FIXED, between=lambda trainer: move(trainer, seed=2, far=0.3))
    t = Tables(trainer)
    now = torch.stack([t.p1[a] + t.p2[a, b] for a, b in FIXED])
    decode = partial(trainer.processing_class.decode, skip_special_tokens=True)
    first, both = (torch.tensor([worth(decode(ids[:n])) for ids in FIXED], dtype=now.dtype) for n in (1, 2))
    earned = torch.stack([first + discount * (both - first), both - first], dim=1)
    advantage, ratio = earned - earned.mean(0), (now.detach() - then).exp().unsqueeze(1)
    clipped = ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high)
    kept = ratio * advantage <= clipped * advantage
    logps = torch.stack([torch.stack([t.p1[a], t.p2[a, b]]) for a, b in FIXED])
    pushed = (then.exp().unsqueeze(1) * ratio * advantage * kept * logps).sum()
    torch.testing.assert_close(found, -t.gradient(pushed), atol=1e-6, rtol=0)
    assert 3 < (kept.all(1)).sum() < 22 and (kept.any(1) & ~kept.all(1)).any()  # of 25: texts cut, and half cut


@pytest.mark.parametrize("penalty", [None, ("k3", "loss"), ("exact", "both")], ids=["stock", "k3", "exact"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_gradient_of_grpo(grpo_enumerated, loss_type, penalty):  # noqa: F811
    """Beside a penalty in reward and loss, TRL's own in the loss, and none."""
    trainer = rewarded(grpo_enumerated(loss_type=loss_type), FIXED)
    if penalty is not None:
        KLPenaltyCallback(trainer, KLPenalty(*penalty))
    else:
        trainer.beta = 0.0
    use_reward_to_go(trainer, 0.6)
    found, t = BETA * grpo_gradient(trainer), Tables(trainer)
    wanted = -t.gradient(earned(trainer, t, 0.6, FIXED))
    if penalty is not None:
        t = Tables(trainer)
        charged = reverse_kl(t) if penalty[0] == "exact" else per_state(t, kl_forward)
        wanted = wanted + BETA * t.gradient(charged)
    torch.testing.assert_close(found, FACTOR[loss_type] * wanted, atol=1e-6, rtol=0)


def test_grpo_divides_by_its_own_spread(grpo_enumerated):  # noqa: F811
    """That of the completions' rewards less their penalty, whatever the tokens earn."""
    trainer = rewarded(grpo_enumerated(scale_rewards="group"), FIXED)
    KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))
    use_reward_to_go(trainer)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))
    whole, first = (
        torch.tensor([worth(trainer.processing_class.decode(ids[:n], skip_special_tokens=True)) for ids in FIXED])
        for n in (2, 1)
    )
    charged = whole - BETA * seam_of(trainer).last_penalty
    expected = (charged - charged.mean() - first + first.mean()) / (charged.std() + 1e-4)
    torch.testing.assert_close(batch["advantages"][:, 1], expected.to(batch["advantages"]), atol=1e-5, rtol=0)
    assert expected.std() > 0.1


def test_tokens_of_a_group_whose_rewards_tie_have_no_thousand(grpo_enumerated):  # noqa: F811
    """GRPO divides by the spread of reward less penalty, and there that of the penalty alone is left."""
    trainer = rewarded(grpo_enumerated(scale_rewards="group"), FIXED)
    trainer.reward_funcs = [
        lambda completion_ids, **columns: [1.0 if len(ids) == 2 else float(ids[0] % 2) for ids in completion_ids]
    ]
    trainer.reward_funcs[0].scores_prefixes = True
    KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))
    use_reward_to_go(trainer)
    trainer.model.train()
    trainer.beta = 1e-3
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))
    advantages, mask = batch["advantages"], batch["completion_mask"]
    assert seam_of(trainer).batch.rewards.unique().numel() == 1
    assert 0.5 < ((advantages.square() * mask).sum() / mask.sum()).sqrt() < 2


@pytest.mark.parametrize("discount", [1.0, 0.6])
def test_gradient_after_an_update(enumerated, discount):  # noqa: F811
    """Completions of an earlier policy are weighted to the present one."""
    trainer = rewarded(enumerated(**UNCLIPPED), FIXED)
    seam_of(trainer).beta = 0.0
    use_reward_to_go(trainer, discount)
    found = trained_gradient(trainer, FIXED, between=partial(move, seed=3))
    t = Tables(trainer)
    torch.testing.assert_close(found, -t.gradient(earned(trainer, t, discount, FIXED)), atol=1e-6, rtol=0)


def test_an_opening_is_credited_with_all_that_follows(enumerated):  # noqa: F811
    """Of two tokens the first: what is left of a discount is nothing, and the gradient is that of a discount of 1."""
    found = []
    for discount, opening in ((0.3, 1), (0.3, 0), (1.0, 0)):
        trainer = rewarded(enumerated(), FIXED)
        seam_of(trainer).beta = 0.0
        use_reward_to_go(trainer, discount, opening_tokens=opening)
        found.append(trained_gradient(trainer, FIXED))
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=0)
    assert (found[1] - found[2]).abs().max() > 1e-3


def test_one_prefix_is_stock(enumerated):  # noqa: F811
    trainer = rewarded(enumerated(), FIXED)
    use_reward_to_go(trainer, every_tokens=2)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))
    assert batch["kl_credit"].abs().max() < 1e-6
    assert trainer._metrics["train"]["reward_to_go/spread"][0] == pytest.approx(1)


def test_what_is_not_counted_has_no_credit(enumerated):  # noqa: F811
    trainer = rewarded(enumerated(ENDING), ENDING)
    use_reward_to_go(trainer)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(ENDING))
    assert batch["completion_mask"][0].tolist() == [1, 0] and batch["kl_credit"][0, 1] == 0
    assert (batch["kl_credit"][1:] != 0).any(1).all()


def test_to_go_by_hand():
    added = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 0.0]])
    assert to_go(added, 1.0).tolist() == [[7, 6, 4], [-1, -1, 0]]
    assert to_go(added, 0.5).tolist() == [[3, 4, 4], [-0.5, -1, 0]]
    assert to_go(added, 0.0).tolist() == added.tolist()


def test_less_the_mean_by_hand():
    values = torch.tensor([1.0, 2.0, 6.0, 5.0, math.nan, 1.0, 3.0, math.nan, math.nan])
    assert less_the_mean(values, 3, leave_one_out=True).tolist() == [-3, -1.5, 4.5, 4, 0, -4, 0, 0, 0]
    assert less_the_mean(values, 3, leave_one_out=False).tolist() == [-2, -1, 3, 2, 0, -2, 0, 0, 0]
    pairs = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert less_the_mean(pairs, 2, leave_one_out=True).tolist() == [[-2, -4], [2, 4]]


@pytest.mark.parametrize("discount", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_beside_one_by_token_a_reward_of_whole_texts_is_credited_as_trl_does(
    enumerated, grpo_enumerated, kind, discount  # noqa: F811
):  # fmt: skip
    """One that is 0 for all prefixes; then every token has its completion's advantage."""
    trainer = rewarded((enumerated if kind == "rloo" else grpo_enumerated)(), FIXED)
    nothing, whole = (lambda completions, **columns: [0.0] * len(completions)), reward
    nothing.scores_prefixes = True
    trainer.reward_funcs = [nothing, lambda completions, **columns: whole(completions)]
    trainer.reward_func_names, trainer.reward_weights = ["nothing", "whole"], torch.tensor([1.0, 3.0])
    trainer.reward_processing_classes = [None] * 2
    told, seam = [], seam_of(trainer)
    seam.changes["told"] = lambda output: told.append(output["advantages"].clone())
    use_reward_to_go(trainer, discount)
    give, credited = seam.credit_tokens, []
    seam.credit_tokens = lambda *asked: credited.append(give(*asked)) or credited[-1]
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))
    expected = told[0].unsqueeze(1) * batch["completion_mask"]
    torch.testing.assert_close(credited[0] * batch["completion_mask"], expected.to(credited[0]), atol=1e-5, rtol=0)
    assert expected.std() > 0.1


def test_a_function_that_does_not_apply_to_a_prefix_adds_nothing(enumerated):  # noqa: F811
    """Nor does it beside another, which does: of "a c" nothing is said."""
    trainer = rewarded(enumerated(), FIXED)

    def some(completions, **columns):
        return [None if text == "a c" else float(len(text)) for text in completions]

    def nothing(completions, **columns):
        return [0.0] * len(completions)

    some.scores_prefixes = nothing.scores_prefixes = True
    trainer.reward_funcs, trainer.reward_func_names = [some, nothing], ["some", "nothing"]
    trainer.reward_weights, trainer.reward_processing_classes = torch.ones(2), [None] * 2
    ids, texts = torch.tensor([[2, 4, 2], [4, 2, 0]]), ["a c a", "c a"]  # and the end, which is not seen
    rewards, rows = torch.tensor([[5.0, 0.0], [3.0, 0.0]]), [{"prompt": "b c"}] * 2
    seam_of(trainer).batch = SimpleNamespace(rewards=rewards, rewarded=(rows, texts, ids.tolist()))
    found, ends = partial_rewards(seam_of(trainer), ids, torch.ones(2, 3), 1)
    assert found.tolist() == [[1, 1, 5], [1, 3, 3]] and ends.tolist() == [[0, 1, 2]] * 2


def make(tiny_model, tmp_path, prompts, **options):
    def vowels(completions, **columns):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [float(sum(text.count(letter) for letter in "aeiou")) for text in texts]

    vowels.scores_prefixes = True
    return RLOOTrainer(
        model=str(tiny_model),
        reward_funcs=vowels,
        args=RLOOConfig(**TINY_RUN | {"output_dir": str(tmp_path), "beta": 0.05, "logging_steps": 1} | options),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )


def test_it_trains_beside_the_rest(tiny_model, tmp_path):
    """Exact in both, the policy's own forward pass, a sampler's correction, two micro-batches of one batch."""
    from kl_alliteration import share_prompts, use_sampler_correction

    trainer = make(tiny_model, tmp_path, ["once upon a time", "there was a"] * 8, gradient_accumulation_steps=2)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    use_reward_to_go(trainer, 0.6, every_tokens=3)
    share_prompts(trainer)
    use_fast_sampling(trainer)
    use_sampler_correction(trainer, divergence_type="binary_tv")
    trainer.train()
    spread = [entry["reward_to_go/spread"] for entry in trainer.state.log_history if "reward" in entry]
    assert spread and all(0 < each < 1 for each in spread)


def test_evaluation_has_no_credit(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, ["once upon a time"] * 8)
    use_reward_to_go(trainer)
    trainer.model.eval()
    assert "kl_credit" not in trainer._generate_and_score_completions([{"prompt": "once upon a time"}] * 4)


def test_where_no_reward_scores_prefixes_it_says_so(enumerated):  # noqa: F811
    trainer = rewarded(enumerated(), FIXED)
    trainer.reward_funcs = [lambda completions, **columns: [0.0] * len(completions)]
    with pytest.warns(KLWarning, match="reward_discount does nothing: of <lambda> none has `scores_prefixes = True`"):
        use_reward_to_go(trainer)
    assert not seam_of(trainer).changes


def test_refusals(enumerated, grpo_enumerated):  # noqa: F811
    trainer = enumerated()
    for options, words in [
        ({"discount": 1.5}, "reward_discount must be from 0 to 1, got 1.5"),
        ({"discount": math.nan}, "reward_discount must be from 0 to 1, got nan"),
        ({"every_tokens": 0}, "reward_prefix_tokens must be >= 1, got 0"),
        ({"discount": 0.8, "opening_tokens": -1}, "reward_opening_tokens must be >= 0 and needs a reward_discount"),
        ({"opening_tokens": 12}, "below 1, got 12: with 1 all tokens are credited so"),
    ]:
        with pytest.raises(ValueError, match=words):
            use_reward_to_go(trainer, **options)
    trainer = enumerated(reward_clip_range=(-1.0, 1.0))
    trainer.reward_funcs = [reward, lambda completions, **columns: [0.0] * len(completions)]
    with pytest.raises(ValueError, match="reward_clip_range clips a sum of rewards by token and of whole texts"):
        use_reward_to_go(trainer)
    for trainer, words in [
        (enumerated(normalize_advantages=True), "normalize_advantages True has one advantage for a text"),
        (grpo_enumerated(importance_sampling_level="sequence"), "importance_sampling_level 'sequence' has one"),
        (grpo_enumerated(multi_objective_aggregation="normalize_then_sum"), "it is 'sum_then_normalize'"),
    ]:
        with pytest.raises(ValueError, match=words):
            use_reward_to_go(trainer)
