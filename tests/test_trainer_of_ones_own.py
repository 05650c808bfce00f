"""What people do with a trainer of their own that no recipe does: subclasses, instruments twice, or two that fight."""

import math

import pytest
import torch
from conftest import TINY_RUN, reward
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration import (
    CollapseGuardCallback,
    CollapseLimits,
    KLControlCallback,
    KLMonitorCallback,
    KLPenalty,
    KLPenaltyCallback,
    KLTargetCallback,
    use_kl_to_go,
    use_reward_to_go,
)
from kl_alliteration._trl import seam_of
from kl_alliteration.control import FixedBeta, LogPIRule, ProportionalRule, Schedule, StepRule
from kl_alliteration.evaluation import ask_reward
from kl_alliteration.target import price_of_target
from kl_alliteration.yardsticks import best_of_n, efficiency, least_kl, least_kl_at

KINDS = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}
ROW = {"prompt": "once upon a time"}


@pytest.fixture
def make(tiny_model, tmp_path):
    """`make(kind, methods, reward_funcs, **options)`: a trainer on the tiny model, with methods of a subclass."""

    def make(kind: str, methods: dict = {}, reward_funcs=reward, **options):  # noqa: B006
        stock, config = KINDS[kind]
        torch.manual_seed(0)
        trainer = type("Mine", (stock,), methods)(
            model=str(tiny_model),
            reward_funcs=reward_funcs,
            args=config(**TINY_RUN | {"output_dir": str(tmp_path), "seed": 3} | options),
            train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 8}),
        )
        trainer.current_gradient_accumulation_steps = 1  # as training sets it
        return trainer

    return make


def batch_of_a_moved_policy(trainer) -> dict:
    """A generation batch of a policy that is no longer its reference, the same in every call."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.sin(torch.arange(parameter.numel()) + 1.0).view_as(parameter)
    torch.manual_seed(1)
    trainer.model.train()
    return trainer._generate_and_score_completions([ROW] * 8)


def reordered(choose):
    def generate(self, inputs):
        output = type(self).__mro__[1]._generate_and_score_completions(self, inputs)
        rows = choose(len(output["completion_ids"]))
        return {n: v[rows] if torch.is_tensor(v) and v.dim() and len(v) > 1 else v for n, v in output.items()}

    return {"_generate_and_score_completions": generate}


REVERSED, HALF = (lambda n: torch.arange(n - 1, -1, -1)), (lambda n: torch.arange(n // 2, n))


@pytest.mark.parametrize("choose", [REVERSED, HALF], ids=["reversed", "half"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_a_subclass_reorders_are_refused(make, kind, choose):
    """Or a text is charged for the log-probabilities of another."""
    trainer = make(kind, reordered(choose))
    KLPenaltyCallback(trainer, KLPenalty("exact", "loss"))
    with pytest.raises(ValueError, match="Mine returns other rows of a batch than were rewarded, or another order"):
        trainer._generate_and_score_completions([ROW] * 8)
    trainer = make(kind, reordered(choose))
    KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))
    trainer._generate_and_score_completions([ROW] * 8)  # which nothing depends on
    reward.scores_prefixes = True
    try:
        use_reward_to_go(trainer)
    finally:
        del reward.scores_prefixes
    with pytest.raises(ValueError, match="credit by token"):
        trainer._generate_and_score_completions([ROW] * 8)


@pytest.mark.parametrize("scores", ["the reference", "other texts", "itself"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_that_scores_more_in_its_loss_keeps_the_penalty(make, kind, first, scores):
    def loss(self, model, inputs):
        ids, mask = (torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], dim=1) for n in ("ids", "mask"))
        asked = (
            ids if scores != "other texts" else ids.roll(1, dims=0).clamp(max=7),
            mask,
            inputs["completion_ids"].shape[1],
        )

        def score():
            with torch.set_grad_enabled(scores != "itself"):
                other = self.ref_model if scores == "the reference" else model
                self._get_per_token_logps_and_entropies(other, *asked)

        if first:
            score()
        found = type(self).__mro__[1]._compute_loss(self, model, inputs)
        if not first:
            score()
        return found

    found = []
    for methods in ({}, {"_compute_loss": loss}):
        trainer = make(kind, methods)
        KLPenaltyCallback(trainer, KLPenalty("exact", "loss"))
        batch = batch_of_a_moved_policy(trainer)
        value = trainer._compute_loss(trainer.model, batch)
        found.append([value, *torch.autograd.grad(value, list(trainer.model.parameters())[:2])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert abs(found[0][0].item()) > 1e-4  # of the penalty alone: advantages sum to 0


@pytest.mark.parametrize("kind", KINDS)
def test_credit_that_is_asked_for_twice_is_given_once(make, kind):
    found = []
    for times in (1, 2):
        trainer = make(kind)
        KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))
        for _ in range(times):
            use_kl_to_go(trainer)
        batch = batch_of_a_moved_policy(trainer)
        found.append(batch["kl_credit"] if kind == "rloo" else batch["advantages"])
    torch.testing.assert_close(*found)
    assert found[0].std() > 1e-3


def counting(word: str):
    def count(completions, **columns):
        return [float(text.split().count(word)) for text in completions]

    return count


def test_rewards_of_one_name_are_all_looked_at(make):
    """TRL's log has one column a name."""
    trainer = make("rloo", reward_funcs=[counting("tree"), counting("sky"), reward])
    trainer.add_callback(CollapseGuardCallback(trainer, "warn", smoothing=1))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "guard/reward_std" in entry]
    assert len(logged) == 3
    for entry in logged:  # TRL's has n - 1, this n
        assert entry["guard/reward_std"] == pytest.approx(entry["reward_std"] * math.sqrt(7 / 8), rel=1e-4)


@pytest.mark.parametrize("beta", [0.5, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_of_the_kl_holds_by_itself(make, kind, beta):
    trainer = make(kind, beta=beta, max_steps=4, learning_rate=0.1)
    guard = CollapseGuardCallback(trainer, "stop", CollapseLimits(kl_per_sequence=1e-4), smoothing=1)
    trainer.add_callback(guard)
    with pytest.warns(match="collapse at step .*kl_per_sequence"):
        trainer.train()
    assert "kl_per_sequence" in guard.collapse and trainer.state.global_step < 4


def test_a_limit_of_the_kl_wants_a_reference_that_is_one(make_trainer):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="with its adapter off this model is not its base"):
        trainer = make_trainer(lora=lora)
        CollapseGuardCallback(trainer, "stop", CollapseLimits(kl_per_sequence=1.0))


def cut_off(trainer):
    """Every completion reaches its longest, and none of its tokens counts."""
    trainer._generate, stock = (lambda prompts: whole(stock(prompts))), trainer._generate

    def whole(generated):
        prompt_ids, completion_ids, *rest = generated
        return prompt_ids, [[5] * trainer.max_completion_length for _ in completion_ids], *rest

    return trainer


def test_a_schedule_goes_on_over_them(make):
    trainer = cut_off(make("rloo", mask_truncated_completions=True))
    trainer.add_callback(KLControlCallback(trainer, Schedule(1.0, 0.1, 24)))
    trainer.train()
    assert trainer.beta == pytest.approx(0.1)


@pytest.mark.parametrize("rule", [StepRule(0.5, 0.05), LogPIRule(0.5, 0.05)], ids=lambda rule: type(rule).__name__)
def test_a_batch_of_which_nothing_counts_is_no_kl_of_0(make, rule):
    trainer = cut_off(make("rloo", mask_truncated_completions=True))
    trainer.add_callback(KLControlCallback(trainer, rule))
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.train()
    assert trainer.beta == 0.5 and rule == type(rule)(0.5, 0.05)
    assert not any("kl/k1_per_sequence" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("kind", KINDS)
def test_how_far_the_sampling_policy_is_counts_what_counts(make, kind):
    """One text is whole, the others are cut off."""
    trainer = make(kind, num_iterations=2)
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.model.train()
    seam, device = seam_of(trainer), trainer.accelerator.device
    mask = torch.zeros(4, 3, device=device)
    mask[1] = 1
    seam.log_rollout_kl(torch.full((4, 3), -2.0, device=device), mask, torch.tensor([9.0, -3.0, 9.0, 9.0]))
    assert seam.metrics["kl/rollout_per_sequence"] == [3.0]  # -3 less 3 times -2
    seam.log_rollout_kl(torch.full((4, 3), -2.0, device=device), 0 * mask, torch.zeros(4))
    assert seam.metrics["kl/rollout_per_sequence"] == [3.0]


REWARDS = torch.arange(200.0)


def test_beta_has_one_owner(make):
    """Of two that move it one would do nothing, whichever comes first."""
    trainer = make("rloo")
    KLTargetCallback(trainer, 1.0, REWARDS)
    with pytest.raises(
        ValueError, match="beta is moved by KLTargetCallback already: KLControlCallback wants a trainer"
    ):
        KLControlCallback(trainer, StepRule(0.5, 0.05))
    with pytest.raises(ValueError, match=r"set the penalty: hand it this one, KLTargetCallback\(penalty=...\)"):
        KLPenaltyCallback(trainer, KLPenalty("k2", "loss"))
    trainer = make("rloo")
    KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))
    KLControlCallback(trainer, StepRule(0.5, 0.05))
    with pytest.raises(ValueError, match="beta is moved by KLControlCallback already: KLTargetCallback wants"):
        KLTargetCallback(trainer, 1.0, REWARDS)
    assert seam_of(trainer).penalty == KLPenalty("k1", "reward")  # as it was
    KLPenaltyCallback(trainer, KLPenalty("exact", "both"))  # a rule moves beta alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_moves_between_the_updates_of_a_batch_is_one_in_each(make, kind):
    """Its states are those of when the batch was sampled, and so is the head behind them."""
    options = {"num_iterations": 2, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = make(kind, **options)
    KLPenaltyCallback(trainer, KLPenalty("exact", "loss"))
    trainer.model.train()
    batch = trainer._generate_and_score_completions([ROW] * 8)
    before = trainer._compute_loss(trainer.model, batch).item()
    with torch.no_grad():
        trainer.accelerator.unwrap_model(trainer.ref_model).get_output_embeddings().weight.mul_(3.0)
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(before, abs=1e-6)


def test_a_beta_that_stays_is_what_is_asked_now(make):
    callback = KLControlCallback(make("rloo"), FixedBeta(0.9))
    with pytest.warns(match="with value 0.9 in place of 0.3"):
        callback.restore({"value": 0.3}, "FixedBeta")
    assert callback.controller.value == 0.9


def test_a_proportional_rule_never_pays_for_kl():
    """0.2 of 1,024 completions is more than a horizon of 200: the factor would be negative."""
    rule = ProportionalRule(0.3, 0.15, horizon=200)
    assert rule.update(0.01, 100) == pytest.approx(0.3 * (1 - 0.2 * 100 / 200))
    with pytest.raises(ValueError, match="horizon must be > limit"):
        rule.update(0.01, 1024)


def test_yardsticks_take_the_lists_that_a_judge_gives():
    rewards, ratios = REWARDS.tolist(), [0.5] * 200
    for found, wanted in [
        (least_kl(rewards, [30.0]), least_kl(REWARDS, [30.0])),
        (least_kl_at(rewards, reward=120.0), least_kl_at(REWARDS, reward=120.0)),
        (best_of_n([rewards, rewards], 5), best_of_n(torch.stack([REWARDS] * 2), 5)),
        (price_of_target(rewards, 0.5), price_of_target(REWARDS, 0.5)),
        (efficiency(rewards, [130.0] * 200, ratios, 1.0), efficiency(REWARDS, REWARDS * 0 + 130, REWARDS * 0, 1.0)),
    ]:
        assert found == wanted and found is not None
    assert least_kl_at(rewards, reward=120.0, ref_log_ratio=ratios)["reward"] == pytest.approx(120.0)


def test_rewards_that_do_not_apply_and_none_at_all():
    assert least_kl_at([1.0, None, 2.0, 3.0], reward=2.5) == least_kl_at(torch.tensor([1.0, 2.0, 3.0]), reward=2.5)
    with pytest.raises(ValueError, match="rewards: there are none"):
        least_kl_at([], reward=1.0)


@pytest.mark.parametrize("given", [[reward], torch.nn.Linear(1, 1), None], ids=["list", "model", "none"])
def test_what_is_no_reward_function_is_said(given):
    with pytest.raises(ValueError, match="reward must be one reward function, got (list|Linear|NoneType)"):
        ask_reward(given, [ROW], ["a"], [[1]])
