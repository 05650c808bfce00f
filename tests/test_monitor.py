import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, reward
from datasets import Dataset
from programs import fork_ranks
from trl import GRPOConfig, GRPOTrainer
from two_processes import controlled, rewards

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, kl
from kl_alliteration._trl import seam_of
from kl_alliteration.kl import Rollout


def keep_rollouts(trainer) -> list[Rollout]:
    rollouts = []
    trainer._kl_alliteration_seam.observers.append(rollouts.append)
    return rollouts


def make_grpo(tiny_model, tmp_path, reward, **options):
    return GRPOTrainer(
        model=str(tiny_model),
        reward_funcs=reward,
        args=GRPOConfig(**TINY_RUN | {"output_dir": str(tmp_path)} | options),
        train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 8}),
    )


def entries(trainer) -> list[dict]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "kl/k1_per_token" in entry]


def test_every_number_of_a_batch(make_trainer):
    """Against sums written out here, for a policy that has moved; `kl` is TRL's own."""
    trainer = make_trainer(max_steps=4, beta=0.5)
    KLPenaltyCallback(trainer, KLPenalty("k3", "both"))
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    rollouts = keep_rollouts(trainer)
    entry, rollout = entries(trainer)[-1], rollouts[-1]
    x, mask = rollout.logps - rollout.ref_logps, rollout.completion_mask
    k3 = (torch.exp(-x) - 1 + x) * mask
    assert entry["kl/k1_per_token"] == pytest.approx(((x * mask).sum() / mask.sum()).item(), abs=1e-6)
    assert entry["kl"] == pytest.approx(entry["kl/k1_per_token"], abs=1e-6)
    assert entry["kl/k1_per_sequence"] == pytest.approx((x * mask).sum(1).mean().item(), abs=1e-6)
    assert entry["kl/k2_per_sequence"] == pytest.approx((x * x / 2 * mask).sum(1).mean().item(), abs=1e-6)
    assert entry["kl/k3_per_token"] == pytest.approx((k3.sum() / mask.sum()).item(), abs=1e-6)
    assert entry["kl/beta"] == 0.5
    exact = rollout.per_token_kl("exact")
    assert entry["kl/exact_per_token"] == pytest.approx(((exact * mask).sum() / mask.sum()).item(), abs=1e-6)
    assert entry["kl/max_per_sequence"] == pytest.approx((exact * mask).sum(1).max().item(), abs=1e-6)
    assert entry["kl/exact_per_token"] > 1e-4
    rewards = torch.tensor(list(trainer._logs["rewards"]["reward"]))
    of_groups = [
        (each - each.mean(1, keepdim=True)).std(correction=0) for each in (k3.sum(1).view(2, 4), rewards.view(2, 4))
    ]
    penalty, reward = 0.5 * of_groups[0], of_groups[1]
    assert entry["kl/share_of_spread"] == pytest.approx((penalty / (penalty + reward)).item(), rel=1e-4)
    assert "kl/budget_use" not in entry


def test_the_budget_s_use(make_trainer):
    trainer = make_trainer(max_steps=4)
    KLPenaltyCallback(trainer, KLPenalty("k1", budget_per_token=0.004))
    trainer.add_callback(KLMonitorCallback(trainer))
    rollouts = keep_rollouts(trainer)
    entry, rollout = entries(trainer)[-1], rollouts[-1]
    mask = rollout.completion_mask
    use = ((rollout.logps - rollout.ref_logps) * mask).sum(1) / (0.004 * mask.sum(1))
    assert entry["kl/budget_use"] == pytest.approx(use.mean().item(), rel=1e-4)
    assert entry["kl/over_budget_share"] == (use > 1).float().mean().item()
    assert 0 < entry["kl/over_budget_share"] < 1


def test_at_beta_zero_lora_has_its_reference_for_free(make_trainer):
    trainer = make_trainer(lora=True, beta=0.0, learning_rate=5e-2)
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    last = entries(trainer)[-1]
    assert last["kl/exact_per_token"] > 1e-4 and last["kl/beta"] == 0 and "kl/share_of_spread" not in last


def test_at_beta_zero_without_lora_a_reference_is_loaded_only_when_asked(make_trainer):
    trainer = make_trainer(beta=0.0)
    trainer.add_callback(KLMonitorCallback(trainer))
    assert entries(trainer) == []
    asked = make_trainer(beta=0.0)
    with pytest.warns(kl.KLWarning, match="the penalty charges nothing"):
        KLPenaltyCallback(asked, KLPenalty("exact", "both"))  # wants hidden states before there is a reference
    asked.add_callback(KLMonitorCallback(asked, exact=True, load_reference=True))
    rollouts = keep_rollouts(asked)
    watched = entries(asked)
    assert watched[0]["kl/exact_per_token"] == pytest.approx(0, abs=1e-6) and watched[-1]["kl/exact_per_token"] > 1e-4
    assert rollouts[0].ref_logps.shape == rollouts[0].logps.shape
    for a, b in zip(trainer.model.parameters(), asked.model.parameters(), strict=True):
        assert torch.equal(a, b)  # watching changes nothing


@pytest.mark.parametrize(
    ("options", "estimator", "words"),
    [
        ({"top_k": 50}, "k1", "top_k=50: .*sampled estimates of the KL are biased; the estimator 'exact' is not"),
        ({"top_p": 0.9, "min_p": 0.1}, "k2", "top_p=0.9, min_p=0.1"),
        ({"temperature": 0.7}, "exact", "temperature=0.7: .*tempered policies"),
    ],
)
def test_truncated_sampling_is_said(make_trainer, options, estimator, words):
    trainer = make_trainer(**options)
    with pytest.warns(kl.KLWarning, match=words):
        KLPenaltyCallback(trainer, KLPenalty(estimator, {"k1": "reward", "k2": "loss", "exact": "both"}[estimator]))


def test_exact_is_the_remedy_for_truncation_and_plain_sampling_is_silent(make_trainer, recwarn):
    truncated, plain = make_trainer(top_k=50), make_trainer()
    recwarn.clear()
    KLPenaltyCallback(truncated, KLPenalty("exact", "both"))
    KLMonitorCallback(plain)
    assert [str(w.message) for w in recwarn] == []


def test_exact_is_computed_once_for_penalty_and_monitor(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    KLPenaltyCallback(trainer, KLPenalty("exact", "both", top_k=7))
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    rollouts = keep_rollouts(trainer)
    trainer.train()
    assert [key[0] for key in rollouts[0].known] == ["exact"]


@pytest.fixture(scope="module")
def two_processes(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    printed = fork_ranks(Path(__file__).parent / "two_processes.py", tiny_model, cwd=folder, logs=folder)
    (line,) = [line for line in printed.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.parametrize("case", ["same-full-1", "same-full-3", "same-lora-1", "same-lora-3"])
def test_on_two_processes_k1_equals_the_stock_trainer_bit_for_bit(two_processes, case):
    assert two_processes[case] is True


@pytest.mark.parametrize("case", ["shared-full-1", "shared-full-3", "shared-lora-1", "shared-lora-3"])
def test_on_two_processes_shared_prompts_train_the_same_weights(two_processes, case):
    assert two_processes[case] is True


def test_on_two_processes_tokens_are_credited_beside_the_whole_group(two_processes):
    assert two_processes["by_token"] is True
    assert two_processes["kl"] is True


def test_on_two_processes_means_are_of_all_completions(two_processes):
    assert len(two_processes["lengths"]) == 8
    for name, value in two_processes["pooled"].items():
        assert two_processes["logged"][name] == pytest.approx(value, abs=1e-6)
    assert two_processes["exact"] > 0


def test_two_processes_have_one_rule_and_one_kl(two_processes):
    """And there are two: on a CPU a launcher may quietly start one."""
    assert two_processes["world"] == 2
    first, second = two_processes["ranks"]
    assert len(first) == 60 and first == second
    assert len({beta for beta, *_ in first}) > 30


def test_half_the_batch_on_each_of_two_processes_learns_as_one(two_processes, tiny_model):
    """Mean rewards of the second half of training, within three standard errors: the random streams differ."""
    alone, _ = controlled(str(tiny_model), per_device=16)
    together, alone = torch.tensor(two_processes["rewards"][30:]), torch.tensor(rewards(alone)[30:])
    error = (together.var() / len(together) + alone.var() / len(alone)).sqrt()
    assert abs(together.mean() - alone.mean()) < 3 * error + 0.05
    assert alone.mean() > torch.tensor(two_processes["rewards"][:3]).mean()


def test_a_group_of_grpo_on_two_processes_is_charged_as_one(two_processes):
    assert two_processes["grpo"] is True


def test_the_exact_kl_reads_a_head_that_fsdp2_shards(two_processes):
    assert two_processes["sharded"] is True


def test_several_updates_of_one_batch_show_how_far_the_policy_went_from_the_one_that_sampled(make_trainer):
    trainer = make_trainer(num_iterations=3, max_steps=6, learning_rate=3e-2)
    trainer.add_callback(KLMonitorCallback(trainer))
    ratios, compute = [], trainer._kl_alliteration_seam.stock.compute_loss

    def spy(model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logits = trainer.model(ids, attention_mask=mask).logits[:, :-1] / trainer.temperature
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][:, -inputs["completion_ids"].shape[1] :]
        new = (logps * inputs["completion_mask"]).sum(1)
        ratios.append((inputs["old_logps"] - new).mean().item())
        return compute(model, inputs)

    trainer._kl_alliteration_seam.stock.compute_loss = spy
    trainer.train()
    history = trainer.state.log_history
    logged = [e["kl/rollout_per_sequence"] for e in history if "kl/rollout_per_sequence" in e]
    assert len(logged) == 6 and logged == pytest.approx(ratios, abs=1e-4)
    assert max(abs(logged[0]), abs(logged[3])) < 1e-5 < 1e-3 < abs(logged[2])  # a batch is new, and used twice since


@pytest.mark.parametrize("penalty", [None, KLPenalty("exact", "both")], ids=["stock", "exact"])
@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 2}], ids=str)
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_however_a_batch_comes_to_several_updates_it_shows(make_trainer, tiny_model, tmp_path, kind, options, penalty):
    options = options | {"learning_rate": 3e-2, "max_steps": 4, "gradient_accumulation_steps": 1}
    trainer = make_trainer(**options) if kind == "rloo" else make_grpo(tiny_model, tmp_path, reward, **options)
    trainer.add_callback(KLPenaltyCallback(trainer, penalty))
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.train()
    moved = [e["kl/rollout_per_sequence"] for e in trainer.state.log_history if "loss" in e]
    assert max(abs(moved[0]), abs(moved[2])) < 1e-5 and min(abs(moved[1]), abs(moved[3])) > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("corrected", [True, False])
def test_grpo_s_kl_is_trl_s_off_policy_too(tiny_model, tmp_path, corrected, level):
    """Two runs with one policy, for their penalty is next to nothing: TRL's own, and another in its place."""
    options = {"num_iterations": 3, "beta": 1e-9, "learning_rate": 5e-2, "use_bias_correction_kl": corrected}
    options |= {"importance_sampling_level": level, "max_steps": 6, "epsilon": 10.0}
    logged = []
    for penalty in (None, KLPenalty("exact", "both")):
        trainer = make_grpo(tiny_model, tmp_path, reward, **options)
        trainer.add_callback(KLPenaltyCallback(trainer, penalty))
        trainer.train()
        logged.append([e["kl"] for e in trainer.state.log_history if "kl" in e])
    assert len(logged[0]) == 6 and logged[1] == pytest.approx(logged[0], rel=1e-3, abs=1e-7) and logged[0][5] > 0.01


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups_whose_rewards_tie_are_those_of_rewards_without_the_penalty(make_trainer, tiny_model, tmp_path, kind):
    def one_of_two_ties(completions, **kwargs):
        return [1.0] * 4 + [0.0, 1.0, 0.0, 1.0]

    if kind == "rloo":
        trainer = make_trainer(reward_funcs=one_of_two_ties, learning_rate=0.1)
    else:
        trainer = make_grpo(tiny_model, tmp_path, one_of_two_ties, learning_rate=0.1)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    trainer.train()
    assert seam_of(trainer).batch.penalty[:4].std() > 1e-3
    shares = [e["frac_reward_zero_std"] for e in trainer.state.log_history if "reward" in e]
    assert len(shares) == 3 and set(shares) == {0.5}


def test_the_share_of_the_spread_is_within_groups(make_trainer):
    def by_prompt(completions, **kwargs):
        return [100.0 + 1e-3 * (i % 2) if i < 4 else 1e-3 * (i % 2) for i in range(8)]

    trainer = make_trainer(reward_funcs=by_prompt, learning_rate=0.1)
    trainer.add_callback(KLMonitorCallback(trainer))
    found = [entry["kl/share_of_spread"] for entry in entries(trainer)]
    assert found[0] == 0 and min(found[1:]) > 0.9  # half a thousandth is what differs among a prompt's completions


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_evaluation_batch_may_be_larger_than_a_generation_batch(make_trainer):
    """Of which TRL keeps no more rewards than a generation batch has."""
    sizes = {"num_generations": 3, "per_device_train_batch_size": 6}
    trainer = make_trainer(**sizes, num_generations_eval=4, per_device_eval_batch_size=8, max_steps=1)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    trainer.add_callback(KLMonitorCallback(trainer))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = trainer.evaluate(trainer.train_dataset.select(range(8)))
    assert 0 < found["eval_kl/share_of_spread"] < 1
