"""What GRPO's loss, DPO's loss and the tutorials' loss do with the KL, by enumeration in float64.

Stock trainers of TRL, one completion or pair at a time, each weighted by its probability; what they are compared with
is written here from the model's full logits.
"""

import importlib
import inspect
import itertools
from pathlib import Path

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from enumeration import (
    ENDING,
    FIXED,
    PROMPT,
    STEPS,
    Float64Head,
    Tables,
    flat,
    kl_forward,
    kl_reverse,
    move,
    parameters,
    per_state,
    reverse_kl,
)
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from kl_alliteration.lab.pairs import longest, without_added_ends

ROOT = Path(__file__).parent.parent
BETA = 0.7
PLAIN = {
    "beta": BETA,
    "model_init_kwargs": {"dtype": torch.float64},
    "gradient_checkpointing": False,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
}
EXACTLY = {"atol": 1e-10, "rtol": 0}


def rewards_of(completions) -> list[float]:
    """Some reward that tells completions apart."""
    return [float((3 * ids[0] + 2 * ids[-1]) % 7) for ids in completions]


@pytest.fixture(autouse=True)
def float64_head(monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Float64Head)


@pytest.fixture
def make_grpo(enumerated_model, tmp_path):
    def make(completions=FIXED, reward=None, **options):
        n = len(completions)

        def rollout(prompts, trainer):
            return {
                "prompt_ids": [PROMPT] * n,
                "completion_ids": completions,
                "logprobs": [[0.0] * len(c) for c in completions],
            }

        trainer = GRPOTrainer(
            model=str(enumerated_model),
            reward_funcs=lambda completion_ids, **kwargs: (reward or (lambda c: [0.0] * n))(completion_ids),
            args=GRPOConfig(
                **PLAIN | {"loss_type": "dr_grpo"} | options,
                output_dir=str(tmp_path),
                per_device_train_batch_size=n,
                num_generations=n,
                max_completion_length=STEPS,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["b c"] * n}),
            rollout_func=rollout,
        )
        trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
        move(trainer)
        return trainer

    return make


def each_loss(trainer, completions):
    """`(loss, KL that TRL logs)` of each completion alone."""
    n = len(completions)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * n)
    for i in range(n):
        row = {k: v[i : i + 1] if torch.is_tensor(v) and v.dim() and len(v) == n else v for k, v in batch.items()}
        loss = trainer._compute_loss(trainer.model, row)
        yield loss, trainer._metrics["train"]["kl"][-1]


def gradient(trainer, loss) -> torch.Tensor:
    found = torch.autograd.grad(loss, parameters(trainer), allow_unused=True)
    return flat([torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters(trainer), strict=True)])


def log_ratio(t: Tables, ids) -> torch.Tensor:
    first, *rest = ids
    return t.p1[first] - t.q1[first] + sum(t.p2[first, second] - t.q2[first, second] for second in rest)


def log_probability(t: Tables, ids) -> torch.Tensor:
    first, *rest = ids
    return t.p1[first] + sum(t.p2[first, second] for second in rest)


def expected_gradient(trainer, completions=FIXED) -> torch.Tensor:
    t = Tables(trainer)
    losses = each_loss(trainer, completions)
    return sum(
        log_probability(t, ids).exp().detach() * gradient(trainer, loss)
        for ids, (loss, _) in zip(completions, losses, strict=True)
    )


FORWARD = {"use_bias_correction_kl": False}  # True by default in TRL 1.16


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
@pytest.mark.parametrize(("options", "divergence"), [({}, kl_reverse), (FORWARD, kl_forward)], ids=["ratio", "plain"])
def test_the_gradient_of_grpo_s_k3(make_grpo, options, divergence, loss_type):
    """With the ratio that TRL multiplies it with, KL(policy || reference) of each state, states held fixed; without
    it, KL(reference || policy). Over 2 tokens by every loss type."""
    trainer = make_grpo(loss_type=loss_type, **options)
    t = Tables(trainer)
    # dapo divides by the tokens of the whole batch, where the loss of one completion is its share
    scale = len(FIXED) if loss_type == "dapo" else 1
    wanted = BETA / STEPS * t.gradient(per_state(t, divergence))
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(scale * expected_gradient(trainer), wanted, **EXACTLY)


def test_where_completions_end_grpo_s_k3_counts_the_states_that_are_visited(make_grpo):
    trainer = make_grpo(ENDING)
    t = Tables(trainer)
    visited = [state for i, state in enumerate(t.states()) if i != 1]  # nothing comes after token 0
    wanted = BETA / STEPS * t.gradient(sum(w.detach() * kl_reverse(p, q) for w, p, q in visited))
    torch.testing.assert_close(expected_gradient(trainer, ENDING), wanted, **EXACTLY)


def test_the_kl_that_grpo_logs_is_the_reverse_one(make_grpo):
    """The value of k3, not its gradient: E[k3] = KL(policy || reference), a mean over tokens."""
    trainer = make_grpo()
    t = Tables(trainer)
    logged = [kl for _, kl in each_loss(trainer, FIXED)]
    mean = sum(log_probability(t, ids).exp().item() * kl for ids, kl in zip(FIXED, logged, strict=True))
    assert STEPS * mean == pytest.approx(reverse_kl(t).item(), abs=1e-10)


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_grpo_s_beta_times_the_spread_of_rewards_is_a_price_per_nat(make_grpo, scale_rewards):
    """The loss is -1 / (T sigma) times the gain: E[reward] less beta sigma times the KLs of the states."""
    trainer = make_grpo(reward=rewards_of, scale_rewards=scale_rewards)
    rewards = torch.tensor(rewards_of(FIXED), dtype=torch.float64)
    sigma = rewards.std().item() + 1e-4 if scale_rewards == "group" else 1.0
    t = Tables(trainer)
    gain = sum(log_probability(t, ids).exp() * r for ids, r in zip(FIXED, rewards, strict=True))
    wanted = t.gradient(-gain + BETA * sigma * per_state(t, kl_reverse))
    # TRL's advantages are in float32
    torch.testing.assert_close(STEPS * sigma * expected_gradient(trainer), wanted, atol=1e-5, rtol=0)


SIDES = FIXED[::4]  # seven completions, 42 ordered pairs
PAIRS = list(itertools.permutations(SIDES, 2))


@pytest.fixture
def dpo(enumerated_model, tmp_path):
    words = {"prompt": "b c", "chosen": " a b", "rejected": " b a"}
    args = DPOConfig(**PLAIN, output_dir=str(tmp_path))
    trainer = DPOTrainer(model=str(enumerated_model), args=args, train_dataset=Dataset.from_list([words] * 4))
    move(trainer)
    trainer.model.train()
    return trainer


def pair_loss(trainer, chosen, rejected) -> torch.Tensor:
    batch = trainer.data_collator([{"prompt_ids": PROMPT, "chosen_ids": chosen, "rejected_ids": rejected}])
    return trainer._compute_loss(trainer.model, batch, return_outputs=False)


def test_dpo_s_loss_and_implicit_rewards(dpo):
    t = Tables(dpo)
    for chosen, rejected in PAIRS:
        loss = pair_loss(dpo, chosen, rejected)
        implicit = [BETA * log_ratio(t, ids) for ids in (chosen, rejected)]
        torch.testing.assert_close(loss, -logsigmoid(implicit[0] - implicit[1]), **EXACTLY)
        logged = [dpo._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")]
        assert logged == pytest.approx([each.item() for each in implicit], abs=1e-6)


def test_the_mean_implicit_reward_of_the_policy_is_beta_times_the_kl(dpo):
    t = Tables(dpo)
    logged = []
    for ids in FIXED:
        pair_loss(dpo, ids, FIXED[0])
        logged.append(dpo._metrics["train"]["rewards/chosen"][-1])
    mean = sum(log_probability(t, ids).exp().item() * value for ids, value in zip(FIXED, logged, strict=True))
    assert mean == pytest.approx(BETA * reverse_kl(t).item(), abs=1e-6)


def population_gradient(trainer, reward) -> torch.Tensor:
    """Of the mean loss over all ordered pairs, each preferred with Bradley and Terry's probability."""
    total = 0
    for chosen, rejected in PAIRS:
        preferred = torch.sigmoid(reward(chosen) - reward(rejected)).item()
        total = total + preferred * gradient(trainer, pair_loss(trainer, chosen, rejected))
    return total / len(PAIRS)


def test_dpo_pulls_the_implicit_reward_to_the_reward(dpo):
    """Its gradient is that of the log-ratios, weighted by how far the implicit preference is from the real one."""
    t = Tables(dpo)
    reward = lambda ids: torch.tensor(rewards_of([ids])[0], dtype=torch.float64)  # noqa: E731
    objective = 0
    for chosen, rejected in PAIRS:
        margin = log_ratio(t, chosen) - log_ratio(t, rejected)
        missing = torch.sigmoid(reward(chosen) - reward(rejected)) - torch.sigmoid(BETA * margin.detach())
        objective = objective - missing * BETA * margin / 2 / len(PAIRS)
    wanted = t.gradient(objective)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(population_gradient(dpo, reward), wanted, **EXACTLY)


def test_dpo_rests_where_the_policy_is_the_reference_tilted_by_the_reward(dpo):
    """policy = reference * exp(reward / beta) / Z, the optimum of E[reward] - beta KL(policy || reference)."""
    t = Tables(dpo)
    rest = population_gradient(dpo, lambda ids: BETA * log_ratio(t, ids) + 5.0)
    assert rest.abs().max() < 1e-12


def test_dpo_never_sees_the_end_of_a_story_that_was_cut_off(enumerated_model, tmp_path):
    """TRL ends every completion: that end goes where there was none, and nothing else, however long a prompt is."""
    rows = [
        {"prompt": "b c", "chosen": " a b", "rejected": " be"},
        {"prompt": "b c b", "chosen": " a b", "rejected": " a a"},
    ]
    pairs = Dataset.from_list(rows)
    probe = DPOTrainer(
        model=str(enumerated_model), args=DPOConfig(**PLAIN, output_dir=str(tmp_path)), train_dataset=pairs
    )
    tokenizer = probe.processing_class
    args = DPOConfig(**PLAIN, output_dir=str(tmp_path), max_length=longest(pairs, tokenizer, STEPS))
    trainer = DPOTrainer(model=str(enumerated_model), args=args, train_dataset=pairs)
    trainer.train_dataset = without_added_ends(trainer.train_dataset, STEPS, sampled=False)

    def seen(trainer):
        batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
        return [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]

    a, b, end = 2, 3, 0
    assert seen(probe) == [[a, b, end], [a, b, end], [b, end], [a, a, end]]
    assert seen(trainer) == [[a, b], [a, b], [b, end], [a, a]]


def expected_loss_gradient(t: Tables, loss, reward) -> torch.Tensor:
    """Over all batches of two completions."""
    logps = {tuple(ids): torch.stack([t.p1[ids[0]], t.p2[ids[0], ids[1]]]) for ids in FIXED}
    ref_logps = {tuple(ids): torch.stack([t.q1[ids[0]], t.q2[ids[0], ids[1]]]) for ids in FIXED}
    total = 0
    for batch in itertools.product(map(tuple, FIXED), repeat=2):
        rows = [torch.stack([table[ids] for ids in batch]) for table in (logps, ref_logps)]  # (2, T)
        rewards = torch.tensor(reward(batch), dtype=torch.float64)
        total = total + rows[0].sum().exp().detach() * loss(rewards, *rows, BETA)
    return t.gradient(total)


@pytest.fixture
def tutorial(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")
    return importlib.import_module("tutorial_loss")


def test_the_tutorials_loss_has_no_gradient_and_the_right_one_has_both(make_grpo, tutorial):
    trainer = make_grpo()
    nothing = expected_loss_gradient(Tables(trainer), tutorial.tutorial_loss, rewards_of)
    assert nothing.abs().max() < 1e-12
    found = expected_loss_gradient(Tables(trainer), tutorial.right_loss, rewards_of)
    t = Tables(trainer)
    gain = sum(log_probability(t, ids).exp() * r for ids, r in zip(FIXED, rewards_of(FIXED), strict=True))
    wanted = t.gradient(-gain + BETA * reverse_kl(t))
    assert wanted.abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, **EXACTLY)


def test_the_docs_show_both_losses(tutorial):
    text = (ROOT / "docs/algorithms.md").read_text()
    for loss in (tutorial.tutorial_loss, tutorial.right_loss):
        assert inspect.getsource(loss) in text
