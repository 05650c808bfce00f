"""Any KLPenalty on a stock GRPOTrainer: its gradient by enumeration through TRL's own loss, and what stays TRL's."""

import math

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
    kl_reverse,
    move,
    parameters,
    per_state,
)
from peft import LoraConfig
from test_contract import FORWARD_ROWS, NOTHING, ROWS, OpeningTables, ending_terms
from test_grpo import TIMES, make_grpo  # noqa: F401  (a fixture)
from trl import GRPOConfig, GRPOTrainer

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, kl, penalty, use_fast_sampling
from kl_alliteration._trl import seam_of
from kl_alliteration._trl.grpo import GRPOSeam
from kl_alliteration._trl.loss_types import LOSS_TYPES, divisor_of_completions, scale_of_advantages
from kl_alliteration._trl.seam import check_trainer
from kl_alliteration.references import use_loaded_reference

BETA = 0.7
PLAIN = {"scale_rewards": "none", "use_bias_correction_kl": False}
EXTRA = {"cispo": {"epsilon_high": 5.0}}  # which cuts the ratio off there: 0.2 would cut off 1
# What each loss type makes of one completion of two tokens by itself, the 25 of them being the generation batch.
FACTOR = {"grpo": 1 / 2, "sapo": 1 / 2, "bnpo": 1 / 2, "dr_grpo": 1 / 2, "luspo": 1, "dapo": 1 / 50, "cispo": 1 / 50}


@pytest.fixture
def enumerated(enumerated_model, tmp_path, monkeypatch):
    """A stock trainer whose generation batch is all completions there are, with rewards of nothing."""

    def make(completions=FIXED, lora=False, tool_mask=None, reward_funcs=None, **options):
        monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Float64Head)
        options = EXTRA.get(options.get("loss_type"), {}) | PLAIN | options
        trainer = GRPOTrainer(
            model=str(enumerated_model),
            reward_funcs=reward_funcs or (lambda completions, **kwargs: [0.0] * len(completions)),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                beta=BETA,
                per_device_train_batch_size=len(completions),
                num_generations=len(completions),
                max_completion_length=STEPS,
                model_init_kwargs={"dtype": torch.float64},
                gradient_checkpointing=False,
                report_to="none",
                use_cpu=True,
                bf16=False,
                **options,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["b c"] * len(completions)}),
            peft_config=LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM") if lora else None,
        )
        texts = ["" for _ in completions]
        fixed = [PROMPT] * len(completions), completions, tool_mask, texts, None, {}, None, None
        trainer._generate = lambda prompts: fixed
        trainer.current_gradient_accumulation_steps = 1
        move(trainer)
        return trainer

    return make


def trained_gradient(trainer, completions=FIXED) -> torch.Tensor:
    """E[gradient of the loss] / beta over all completions: with no reward but the penalty, that of E[penalty]."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(completions))
    t, total = Tables(trainer), 0
    for i, ids in enumerate(completions):
        row = {name: value if value.dim() == 0 else value[i : i + 1] for name, value in batch.items()}
        loss = trainer._compute_loss(trainer.model, row)
        found = torch.autograd.grad(loss, parameters(trainer), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters(trainer), strict=True)]
        log_p = t.p1[ids[0]] + (t.p2[ids[0], ids[1]] if len(ids) > 1 else 0)
        total = total + log_p.exp().detach() * flat(found)
    return total / BETA


def assert_row(trainer, objective, scale: float, atol: float = 1e-10) -> None:
    found, t = trained_gradient(trainer), Tables(trainer)
    wanted = torch.zeros_like(found) if objective is NOTHING else scale * t.gradient(objective(t))
    assert objective is NOTHING or wanted.abs().max() > 1e-5
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


@pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")
@pytest.mark.parametrize("row", ROWS, ids="-".join)
@pytest.mark.parametrize("loss_type", FACTOR)
def test_row(enumerated, row, loss_type):
    trainer = enumerated(loss_type=loss_type)
    KLPenaltyCallback(trainer, KLPenalty(*row, top_k=2))
    assert_row(trainer, ROWS[row], FACTOR[loss_type])


@pytest.mark.parametrize("row", [("k2", "loss"), ("exact", "loss")], ids="-".join)
def test_row_in_the_loss_of_vespo(enumerated, row):
    """Whose weights of advantages are its own: what a penalty in the reward is worth there depends on its sign."""
    trainer = enumerated(loss_type="vespo")
    KLPenaltyCallback(trainer, KLPenalty(*row))
    assert_row(trainer, ROWS[row], 1 / 50)


@pytest.mark.filterwarnings("ignore::kl_alliteration.kl.KLWarning")
@pytest.mark.parametrize("placement", penalty.PLACEMENTS)
def test_row_of_the_forward_kl(enumerated, placement):
    trainer = enumerated()
    KLPenaltyCallback(trainer, KLPenalty("exact", placement, direction="forward"))
    assert_row(trainer, FORWARD_ROWS[placement], FACTOR["dapo"])


@pytest.mark.parametrize("row", [("k1", "reward"), ("k2", "loss"), ("exact", "both"), ("top_k", "both")], ids="-".join)
def test_row_with_lora(enumerated, row):
    trainer = enumerated(lora=True, loss_type="grpo")
    KLPenaltyCallback(trainer, KLPenalty(*row, top_k=2))
    assert_row(trainer, ROWS[row], 1 / 2)


@pytest.mark.parametrize("row", [("k1", "reward"), ("exact", "both")], ids="-".join)
def test_a_price_on_the_opening(enumerated, row):
    trainer = enumerated(loss_type="grpo")
    KLPenaltyCallback(trainer, KLPenalty(*row, opening_tokens=1, opening_price=3.0))
    assert_row(trainer, lambda t: ROWS[row](t) + 3.0 * ROWS[row](OpeningTables(t)), 1 / 2)


def test_k3_with_a_price_on_the_opening_is_not_trl_s_own(enumerated):
    trainer = enumerated(loss_type="grpo")
    KLPenaltyCallback(trainer, KLPenalty("k3", "loss", opening_tokens=1, opening_price=3.0))
    assert not seam_of(trainer).is_stock
    assert_row(trainer, lambda t: ROWS["k3", "loss"](t) + 3.0 * ROWS["k3", "loss"](OpeningTables(t)), 1 / 2)


@pytest.mark.parametrize("ratio", [False, True])
def test_row_of_trl_s_own_k3(enumerated, ratio):
    """The forward KL's partial gradient; times the ratio, the reverse KL's: exact in the loss, sampled."""
    trainer = enumerated(loss_type="grpo", use_bias_correction_kl=ratio)
    KLPenaltyCallback(trainer, KLPenalty("k3", "loss"))
    assert seam_of(trainer).is_stock
    assert_row(trainer, ROWS["exact", "loss"] if ratio else ROWS["k3", "loss"], 1 / 2)


@pytest.mark.parametrize("within", [0, 0.3])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("row", [("k1", "reward"), ("exact", "both")], ids="-".join)
def test_budget_where_lengths_vary(enumerated, row, loss_type, within):
    """Each completion's share by its own KL, weighted as the loss type weights its tokens."""
    trainer = enumerated(ENDING, loss_type=loss_type)
    KLPenaltyCallback(trainer, KLPenalty(*row, budget_per_token=1.6, within_budget=within))
    t, objective = Tables(trainer), 0
    values = []
    for log_p, ratio, exact, n in ending_terms(t):
        value = ratio if row[0] == "k1" else exact
        excess = within * value + (1 - within) * (value - 1.6 * n).clamp(min=0)
        values.append((log_p, excess.detach() if row[1] == "reward" else excess, n))
    weights = {"grpo": lambda n: 1 / n, "dr_grpo": lambda n: 1 / STEPS, "luspo": lambda n: 1}[loss_type]
    mean = sum(excess.item() for _, excess, _ in values) / len(values)
    for log_p, excess, n in values:  # the group's mean does not vanish where completions of one length weigh more
        objective = objective + weights(n) * log_p.exp() * (excess - mean)
    torch.testing.assert_close(trained_gradient(trainer, ENDING), t.gradient(objective), atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("row", [("k1", "reward"), ("exact", "both"), ("exact", "loss")], ids="-".join)
def test_what_scaling_by_the_spread_does_to_the_price(enumerated, row, scale):
    """In the reward, and in both halves of both, it divides; in the loss alone it does not, as with TRL's own k3."""
    trainer = enumerated(loss_type="luspo", scale_rewards=scale)
    KLPenaltyCallback(trainer, KLPenalty(*row))
    t = Tables(trainer)
    if row[0] == "k1":
        spent = [t.p1[a] - t.q1[a] + t.p2[a, b] - t.q2[a, b] for a, b in FIXED]
    else:
        spent = [kl_reverse(t.p1, t.q1) + kl_reverse(t.p2[a], t.q2[a]) for a, b in FIXED]
    spread = BETA * torch.stack(spent).std().item() + 1e-4
    # TRL's spread has the accuracy of float32, whatever the rewards have.
    assert_row(trainer, ROWS[row], 1.0 if row[1] == "loss" else 1 / spread, atol=1e-10 if row[1] == "loss" else 1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_are_those_by_which_trl_s_own_k3_is_summed(make_grpo, loss_type):  # noqa: F811
    """TRL's loss at beta less that at 0, of completions of several lengths, two micro-batches a step."""
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "beta": 0.3}
    options["use_bias_correction_kl"] = False
    trainer = make_grpo(**options)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    inputs = [{"prompt": text} for text in ["once upon a time", "there was a"] for _ in range(16)]
    batch = trainer._generate_and_score_completions(inputs)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rows = {name: value if value.dim() == 0 else value[:8] for name, value in batch.items()}
    rows["completion_mask"][:4, 3:] = 0
    with torch.no_grad():
        charged = trainer._compute_loss(trainer.model, rows)
        trainer.beta = 0.0
        plain = trainer._compute_loss(trainer.model, rows)
        ids, mask = (torch.cat([rows[f"prompt_{n}"], rows[f"completion_{n}"]], 1) for n in ("ids", "mask"))
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, rows["completion_ids"].shape[1])
    own = rows["completion_mask"]
    k3 = (kl.k3(logps[0] - rows["ref_per_token_logps"]) * own).sum(-1)
    expected = 0.3 * (k3 / divisor_of_completions(trainer, rows, own)).sum()
    assert charged - plain == pytest.approx(expected.item(), rel=1e-4) and expected > 1e-4


CASES = {
    "full": {},
    "lora": {"lora": True},
    "off-policy": {"num_iterations": 2},
    "lora off-policy": {"lora": True, "num_iterations": 2},
}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("case", CASES)
def test_trl_s_own_penalty_is_trl_s_bit_for_bit(make_grpo, case, loss_type):  # noqa: F811
    logs, weights = [], []
    for chosen in (None, KLPenalty("k3", "loss")):
        trainer = make_grpo(loss_type=loss_type, **CASES[case])
        if chosen is not None:
            trainer.add_callback(KLPenaltyCallback(trainer, chosen))
        trainer.train()
        logs.append([{k: v for k, v in e.items() if not k.startswith(TIMES)} for e in trainer.state.log_history])
        weights.append([p.clone() for p in trainer.model.parameters()])
    assert logs[0] == logs[1] and all(map(torch.equal, *weights))
    assert KLPenaltyCallback(make_grpo()).penalty == KLPenalty("k3", "loss")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("choice", [KLPenalty("k1", "reward"), KLPenalty("exact", "both", budget_per_token=0.01)])
def test_a_run_logs_what_trl_s_does_and_the_reward_without_the_penalty(make_grpo, case, choice):  # noqa: F811
    trainer, told = make_grpo(beta=0.5, **CASES[case]), []
    own = trainer.reward_funcs[0]
    trainer.reward_funcs[0] = lambda completions, **kwargs: told.append(own(completions)) or told[-1]
    trainer.add_callback(KLPenaltyCallback(trainer, choice))
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    trainer.train()
    logs = [e for e in trainer.state.log_history if "reward" in e]
    batches = [torch.tensor(each) for each in told]
    assert [e["reward"] for e in logs] == pytest.approx([b.mean().item() for b in batches], rel=1e-4)
    assert [e["reward_std"] for e in logs] == pytest.approx([b.std().item() for b in batches], rel=1e-3)
    assert all("kl" in e and math.isfinite(e["loss"]) for e in logs)
    if case == "full":  # TRL's `kl` is k3, and so is the monitor's of the same policy; the adapters have dropout
        assert [e["kl"] for e in logs] == pytest.approx([e["kl/k3_per_token"] for e in logs], rel=1e-4, abs=1e-8)
    assert len(trainer.reward_weights) == 1 and trainer.beta == 0.5 and logs[-1]["kl/exact_per_token"] > 0


@pytest.mark.parametrize("lora", [False, True])
def test_one_forward_is_the_same_as_two(make_grpo, lora):  # noqa: F811
    weights = []
    for one in (False, True):
        plain = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")  # without dropout
        trainer = make_grpo(lora=plain if lora else False)
        trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
        seam = seam_of(trainer)
        if one:
            assert seam.use_one_forward()
        calls, score = [], seam.scorer.score
        seam.scorer.score = lambda *args, score=score, calls=calls, **kwargs: calls.append(1) or score(*args, **kwargs)
        trainer.train()
        assert len(calls) == (2 if one else 3) * trainer.state.global_step
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-4)


def test_fast_sampling_takes_one_forward(make_grpo):  # noqa: F811
    trainer = make_grpo()
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    use_fast_sampling(trainer)
    assert seam_of(trainer).one_forward
    trainer.train()
    assert all(math.isfinite(e["loss"]) for e in trainer.state.log_history if "loss" in e)


@pytest.mark.parametrize("size", [2, 4])
def test_an_evaluation_is_charged_by_its_own_groups(make_grpo, size):  # noqa: F811
    trainer = make_grpo(max_steps=2, num_generations_eval=size, per_device_eval_batch_size=4)
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 2})
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    trainer.train()
    found = trainer.evaluate()
    charged = seam_of(trainer).batch.rewards[:, 0] - trainer.beta * seam_of(trainer).last_penalty
    spread = charged.view(-1, size).std(dim=1).repeat_interleave(size) + 1e-4
    advantages = (charged - charged.view(-1, size).mean(1).repeat_interleave(size)) / spread
    assert list(trainer._logs["advantages"])[-4:] == pytest.approx(advantages.tolist(), abs=1e-4)
    assert math.isfinite(found["eval_loss"]) and found["eval_kl"] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_evaluation_with_groups_of_one_has_a_loss(make_grpo, scale):  # noqa: F811
    trainer = make_grpo(max_steps=1, num_generations_eval=1, per_device_eval_batch_size=4, scale_rewards=scale)
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 2})
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


# Two groups of four: what has no reward, and what then gets no advantage from TRL that divides by a group's spread.
WITHOUT = {
    "one": ([1], [1]),
    "a group": ([0, 1, 2, 3], [0, 1, 2, 3]),
    "all but one of a group": ([1, 2, 3], [0, 1, 2, 3]),
    "all": (range(8), range(8)),
}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("case", WITHOUT)
def test_what_has_no_reward_has_no_penalty_in_either_half(make_grpo, case, scale):  # noqa: F811
    trainer, (without, nothing) = make_grpo(max_steps=2, scale_rewards=scale), WITHOUT[case]
    trainer.reward_funcs[0] = lambda completions, **kwargs: [None if i in without else float(i) for i in range(8)]
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    seam, batches = seam_of(trainer), []
    make = seam.stock.generate_and_score
    seam.stock.generate_and_score = lambda inputs: batches.append(make(inputs)) or batches[-1]
    trainer.train()
    for batch in batches:
        unscaled = [i for i, share in enumerate(batch["kl_scale"].tolist()) if share == 0]
        assert unscaled == list(nothing if scale == "group" else without)
        assert not batch["advantages"][unscaled].any()
    assert len(batches) == 2 and all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_penalty_that_is_no_number_stops_the_run(make_grpo, monkeypatch):  # noqa: F811
    monkeypatch.setitem(kl.SAMPLED, "broken", lambda ref_log_ratio: ref_log_ratio * torch.nan)
    trainer = make_grpo()
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("broken", "loss")))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        trainer.train()


def test_tokens_of_tools_cost_nothing(enumerated):
    """The first of two tokens is a tool's: what is left is the KL at the second, in the reward and in the loss."""
    trainer = enumerated(tool_mask=[[0, 1]] * len(FIXED), loss_type="luspo")
    KLPenaltyCallback(trainer, KLPenalty("exact", "loss"))
    found, t = trained_gradient(trainer), Tables(trainer)
    wanted = t.gradient(per_state(t, kl_reverse) - kl_reverse(t.p1, t.q1))
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    charged = enumerated(tool_mask=[[0, 1]] * len(FIXED))
    KLPenaltyCallback(charged, KLPenalty("k1", "reward"))
    trained_gradient(charged)
    second = torch.stack([t.p2[a, b] - t.q2[a, b] for a, b in FIXED])
    torch.testing.assert_close(seam_of(charged).last_penalty, second.detach(), atol=1e-10, rtol=0)


def test_a_completion_without_a_reward_has_no_advantage_and_no_penalty(enumerated):
    rewards = [None] + [0.0] * (len(FIXED) - 1)
    trainer = enumerated(reward_funcs=lambda completions, **kwargs: rewards)
    KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "b c"}] * len(FIXED))
    charged = BETA * seam_of(trainer).last_penalty[1:]
    assert batch["advantages"][0] == 0
    torch.testing.assert_close(batch["advantages"][1:].double(), charged.mean() - charged, atol=1e-6, rtol=0)


def test_a_loaded_reference_needs_a_penalty_that_takes_it(make_grpo):  # noqa: F811
    trainer = make_grpo(lora=True)
    use_loaded_reference(trainer)
    with pytest.raises(ValueError, match="with a loaded reference it needs KLPenaltyCallback"):
        trainer.train()
    trainer = make_grpo(lora=True)
    use_loaded_reference(trainer)
    trainer.add_callback(KLPenaltyCallback(trainer))
    assert not seam_of(trainer).is_stock  # k3 in the loss, to the reference that was loaded
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.train()
    last = [e for e in trainer.state.log_history if "kl" in e][-1]
    assert last["kl/k3_per_token"] > 0 and math.isfinite(last["loss"])


@pytest.mark.parametrize("name", GRPOSeam.NEEDS)
def test_a_trainer_without_a_name_that_is_leaned_on_is_refused_by_it(name):
    class Renamed:
        def __getattr__(self, asked):
            if asked == name:
                raise AttributeError(asked)
            return 0

    with pytest.raises(RuntimeError, match=f"has no {name}; .* trl 1.16.0"):
        check_trainer(Renamed(), GRPOSeam.NEEDS)


def test_what_has_no_price_or_no_place_is_refused(make_grpo):  # noqa: F811
    trainer = make_grpo(multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ValueError, match="must be 'sum_then_normalize' with a KL penalty in the reward"):
        KLPenaltyCallback(trainer, KLPenalty("k1", "reward"))
    KLPenaltyCallback(trainer, KLPenalty("k2", "loss"))
    trainer.loss_type = "new"
    with pytest.raises(RuntimeError, match="loss_type 'new' .* take one of grpo, sapo"):
        KLPenaltyCallback(trainer, KLPenalty("k2", "loss"))


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_a_group_without_spread_pays_beta_and_no_ten_thousand_times_it(make_grpo, spread):  # noqa: F811
    """By hand: eight rewards of two groups, and no penalty. [0, 0, 4, 4] has the standard deviation 4 / sqrt 3."""
    trainer = make_grpo()
    trainer.model.train()
    rewards = torch.tensor([7.0] * 4 + [0.0, 0.0, 2 * spread, 2 * spread])
    found = scale_of_advantages(trainer, rewards)
    assert found[:4].tolist() == [1.0] * 4
    wanted = 1.0 if spread == 0 else 1 / (4 / math.sqrt(3) + 1e-4)
    assert found[4:].tolist() == pytest.approx([wanted] * 4)


def test_rloo_stops_where_only_the_penalty_is_not_finite(make_trainer):
    trainer = make_trainer(beta=0.5)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("k2", "loss")))
    seam = seam_of(trainer)
    seam._penalty_of_loss = lambda *args: torch.full((8,), math.nan, requires_grad=True)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        trainer.train()
