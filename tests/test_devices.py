"""Devices and dtypes without a GPU: every tensor is made on the device of its inputs, and low precision is bounded.

A card is played by a tensor that says it is elsewhere and computes on the CPU; with a tensor of the CPU it raises. Its
device type is `meta`: a torch built without CUDA has no guard for `cuda`, so that even under `FakeTensorMode` a tensor
there cannot be indexed, and shapes that depend on data have no value there.
"""

import ast
import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    set_seed,
)

import kl_alliteration
from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, kl
from kl_alliteration._trl import seam_of
from kl_alliteration._trl.baseline import weighted
from kl_alliteration._trl.heads import OwnHead, choose_head
from kl_alliteration.sampling.decoder import read_decoder
from kl_alliteration.sampling.generate import check_decoder, probabilities, sample

PACKAGE = Path(kl_alliteration.__file__).parent
FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "from_numpy", "full", "linspace", "logspace", "normal",
    "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
ON_THE_CPU = {  # function of a module, and why what it makes has no input on a device
    "rewards/reward_model.__init__": "parameters and buffers, which move with their module",
    "rewards/reward_model.from_tokenizer": "of strings, copied into a buffer",
    "rewards/reward_model.character_tables": "the CPU's table, of which every device gets a copy",
    "target.__init__": "rewards of the reference's samples, of which one number is made",
    "target.price_of_target": "the same",
    "yardsticks._rows": "to the CPU: rewards and sums of log-ratios, of which numbers are made",
    "yardsticks._log_binomial": "a table of numbers",
    "yardsticks.best_of_n": "a table of numbers, from rewards that went to the CPU",
    "yardsticks.least_kl": "the same",
}


def factory_calls(path: Path):
    """`(place, line, whether it names a device)` of every call of a factory of torch in a module."""
    room = path.relative_to(PACKAGE).with_suffix("").as_posix()

    def walk(node, name):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else name
            if isinstance(child, ast.Call) and isinstance(called := child.func, ast.Attribute):
                if called.attr in FACTORIES and getattr(called.value, "id", None) == "torch":
                    yield f"{room}.{name}", child.lineno, any(k.arg == "device" for k in child.keywords)
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), "")


def test_every_factory_call_names_a_device():
    calls = [c for path in sorted(PACKAGE.rglob("*.py")) if "lab" not in path.parts for c in factory_calls(path)]
    without = {f"{place} line {line}" for place, line, device in calls if not device and place not in ON_THE_CPU}
    assert len(calls) > 20 and not without
    assert set(ON_THE_CPU) <= {place for place, _, device in calls if not device}, "an exception that is none"


class OnCard(torch.Tensor):
    """A tensor of the card; `values` are on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        like = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, device="meta", requires_grad=values.requires_grad, **like
        )
        made.values = values.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        raise RuntimeError(f"{operator} of a tensor on the card, where there is no card")


class _FromNumbers(TorchFunctionMode):
    """Between Python's numbers and the card, where torch asks no dispatcher: of `meta` it would keep no values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.tolist:
            return function(args[0].cpu())
        if function not in (torch.tensor, torch.as_tensor) or "device" not in kwargs:
            return function(*args, **kwargs)
        device = kwargs.pop("device")
        return function(*args, **kwargs).to(device)


class Card(TorchDispatchMode):
    """Runs what is asked of tensors on the card; with one of the CPU among them it raises, as CUDA does.

    CUDA takes numbers, copies, and indices of the CPU into its own tensors.
    """

    def __enter__(self):
        self.numbers = _FromNumbers()
        self.numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.numbers.__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, aten = dict(kwargs or {}), torch.ops.aten
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = {id(t.values): t for t in tensors if isinstance(t, OnCard)}
        moves = aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default
        if here and not (operator in moves and isinstance(args[0], OnCard) or operator in moves[:2]):
            if elsewhere := [t for t in tensors if not isinstance(t, OnCard) and t.ndim]:
                raise RuntimeError(f"{operator}: a tensor {tuple(elsewhere[0].shape)} of the CPU among the card's")
        stays = bool(here)
        if operator is aten.copy_.default:
            stays = isinstance(args[0], OnCard)
        elif kwargs.get("device") is not None:
            stays, kwargs["device"] = torch.device(kwargs["device"]).type == "meta", torch.device("cpu")
        elif operator is aten._fused_sdp_choice.default:
            return 0  # attention as plain products: the fused kernels are those of a device
        args, kwargs = tree_map(lambda t: t.values if isinstance(t, OnCard) else t, (args, kwargs))
        found = operator(*args, **kwargs)
        if not stays:
            return found
        return tree_map(lambda t: here.get(id(t), OnCard(t)) if isinstance(t, torch.Tensor) else t, found)


@pytest.fixture
def card():
    with Card():
        yield torch.device("meta")


def values(found):
    """What is on the card, looked at from here."""
    return tree_map(lambda t: t.detach().values if isinstance(t, OnCard) else t, found)


def test_the_card_is_another_device(card):
    x, w = torch.randn(3, 4, device=card), torch.nn.Parameter(torch.randn(5, 4, device=card))
    for mixed in (lambda: x + torch.ones(4), lambda: torch.ones(3)[x[:, 0] > 0], lambda: x.cpu() @ w.T):
        with pytest.raises(RuntimeError, match="of the CPU among the card's"):
            mixed()
    (x @ w.T).square().sum().backward()
    assert isinstance(w.grad, OnCard) and isinstance(x[x[:, 0] > 0], OnCard) and not isinstance(x.cpu(), OnCard)
    torch.testing.assert_close(values(w.grad), 2 * (values(x) @ values(w).T).T @ values(x))


V, B, T = len(WORDS), 4, 5
SIZES = {"vocab_size": V, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1}
GPT2 = SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "mpt": lambda: MptForCausalLM(
        MptConfig(**SIZES, d_model=16, n_heads=2, n_layers=2, max_seq_len=32, logit_scale=2.0)
    ),
}


def model_of(family: str):
    set_seed(0)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def scored(device=None, dtype=torch.float32):
    """Hidden states of two policies, heads, tokens and a mask, from one seed, on a device."""
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(B, T, 16), torch.randn(B, T, 16)
    weights = torch.randn(V, 16), torch.randn(V, 16)
    ids, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, 2:], mask[2, 4:] = 0, 0
    moved = [t.to(device, dtype) for t in (hidden, ref_hidden, *weights)]
    return *moved, ids.to(device), mask.to(device)


def rollout_of(hidden, ref_hidden, weight, ref_weight, ids, mask) -> kl.Rollout:
    heads = kl.LMHead(weight, None, 0.8, 1.5, 30.0), kl.LMHead(ref_weight)
    logps, ref_logps = (
        head.log_probs(states.flatten(0, 1)).view(B, T, V).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        for head, states in zip(heads, (hidden, ref_hidden), strict=True)
    )
    return kl.Rollout(logps, ref_logps, ids, mask, kl.HiddenStates(hidden, ref_hidden, *heads))


@pytest.mark.parametrize("reduction", kl.REDUCTIONS)
@pytest.mark.parametrize("estimator", kl.estimators())
def test_a_penalty_stays_on_the_card(card, estimator, reduction):
    penalty = KLPenalty(estimator, "reward", reduction, budget_per_token=0.1, top_k=4)
    with torch.no_grad():
        found = penalty(rollout_of(*scored(card)))
    assert isinstance(found, OnCard)
    torch.testing.assert_close(values(found), penalty(rollout_of(*scored())))


def test_the_exact_penalty_s_gradient_stays_on_the_card(card):
    gradients = []
    for device in (card, None):
        hidden, ref_hidden, weight, ref_weight, ids, mask = scored(device)
        parts = hidden.requires_grad_(), weight.requires_grad_()
        rollout = rollout_of(hidden, ref_hidden, weight, ref_weight, ids, mask)
        KLPenalty("exact", "loss")(rollout).sum().backward()
        gradients.append([part.grad for part in parts])
    assert all(isinstance(g, OnCard) for g in gradients[0])
    torch.testing.assert_close(values(gradients[0]), gradients[1])


@pytest.mark.parametrize("estimator", ["exact", "top_k"])
@pytest.mark.parametrize("split", [(0, 1), (2, 3), (0, 1, 2, 3), (3,), (1, 2)])
def test_a_model_that_is_split_over_devices(card, estimator, split):
    """TRL's `device_map="auto"` on several GPUs: hidden states and heads (`split`) are not where the tokens are."""
    parts = [part.to(card) if i in split else part for i, part in enumerate(scored())]
    ids, mask = parts[4:]
    estimate = kl.full_vocabulary_estimate(estimator, k=4)

    def per_token(hidden, ref_hidden, weight, ref_weight):
        heads = kl.LMHead(weight, None, 0.8, 1.5, 30.0), kl.LMHead(ref_weight)
        return kl.from_hidden_states(estimate, hidden, ref_hidden, *heads, ids, mask)

    hidden = parts[0].requires_grad_()
    found = per_token(hidden, *parts[1:4])
    assert not isinstance(found, OnCard)
    found.sum().backward()
    assert isinstance(hidden.grad, OnCard) == (0 in split)
    torch.testing.assert_close(found, per_token(*scored()[:4]))


def test_penalties_of_two_devices_raise(card):
    rollout, elsewhere = rollout_of(*scored(card)), rollout_of(*scored())
    with pytest.raises(RuntimeError, match="of the CPU among the card's"):
        KLPenalty("k1")(replace(rollout, ref_logps=elsewhere.ref_logps))


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_the_head_that_is_chosen_stays_on_the_card(card, family):
    """MPT's is the model's own code."""
    model = model_of(family).to(card)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kl.KLWarning)
        head = choose_head(model, 0.8)(model, 0.8)
    assert isinstance(head, OwnHead) == (family == "mpt")
    output = model.base_model(torch.arange(6, device=card)[None])
    found = head.log_probs(output.last_hidden_state[0])
    assert isinstance(found, OnCard)
    expected = model_of(family)(torch.arange(6)[None]).logits[0] / 0.8
    torch.testing.assert_close(values(found), expected.log_softmax(-1), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_decoder_stays_on_the_card(card, family):
    """Ragged prompts, rows that end early and are dropped, the check against the model; greedy and sampled."""
    model, ids = model_of(family).to(card), torch.randint(3, V, (B, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[2, :1] = 0, 0
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=[0, 7, 9, 11], pad_token_id=1)
    expected = sample(read_decoder(model_of(family)), ids, mask, greedy)
    here = ids.to(card), mask.to(card)
    logps = torch.zeros(2, 8, device=card)
    found = sample(read_decoder(model), *here, greedy, logps)
    assert isinstance(found, OnCard) and torch.equal(values(found), expected)
    check_decoder(model, found, here[1], greedy.eos_token_id, logps)
    warped = GenerationConfig(
        max_new_tokens=8, do_sample=True, eos_token_id=[0, 7], pad_token_id=1, temperature=0.7, top_k=9, top_p=0.9,
        min_p=0.01,
    )  # fmt: skip
    assert isinstance(sample(read_decoder(model), *here, warped), OnCard)
    assert isinstance(probabilities(torch.randn(B, V, device=card), warped), OnCard)
    with pytest.raises(RuntimeError, match="of the CPU among the card's"):
        sample(read_decoder(model), ids, here[1], greedy)


@torch.no_grad()
def test_the_monitor_counts_what_is_on_the_card(card, make_trainer):
    """The callback of a real trainer observes a rollout of the card and logs what it logs of the CPU's."""
    trainer = make_trainer()
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both", budget_per_token=0.1)))
    monitor, seam = KLMonitorCallback(trainer, exact=True), seam_of(trainer)
    logged = []
    for device in (card, None):
        trainer.accelerator = SimpleNamespace(reduce=lambda t, *_: t, gather=lambda t: t)
        rewards = torch.arange(float(B), device=device).view(B, 1)
        seam.batch = SimpleNamespace(penalty=torch.ones(B, device=device), rewards=rewards)
        trainer.num_generations = B
        trainer._metrics["train"].clear()
        monitor.observe(rollout_of(*scored(device)))
        logged.append({name: numbers[-1] for name, numbers in seam.metrics.items()})
    assert logged[0] == pytest.approx(logged[1]) and len(logged[0]) == 13


def test_weighted_rewards_stay_on_the_card(card):
    trainer = SimpleNamespace(reward_weights=torch.tensor([1.0, 2.0]), reward_clip_range=(0, 4))
    found = weighted(trainer, torch.tensor([[1.0, 2.0], [math.nan, math.nan], [0.5, math.nan]]).to(card))
    assert isinstance(found, OnCard)
    torch.testing.assert_close(values(found), torch.tensor([4.0, math.nan, 0.5]), equal_nan=True)


LOW = {  # dtype, autocast; the mean's and a token's largest error: nats, and share of the truth
    "bfloat16": (torch.bfloat16, False, (3e-4, 0.01), (1e-2, 0.1)),
    "float16": (torch.float16, False, (3e-5, 0.001), (1e-3, 0.02)),
    "autocast": (torch.float32, True, (3e-4, 0.01), (1e-2, 0.1)),
}


@pytest.mark.parametrize("distance", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("precision", LOW)
def test_the_exact_kl_in_low_precision(precision, distance):
    """Logits of standard deviation 4, as a trained model's: 500 tokens, 256 positions, policies from near to far.

    The head's rounding is the same in both models where they are equal. Where they are near, it adds up to 3e-4 nats a
    token in bfloat16, half of a KL of 6e-4: below that a bfloat16 run cannot see.
    """
    dtype, autocast, *bounds = LOW[precision]
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 32, 64), torch.randn(500, 64) / 2
    parts = [t.to(dtype) for t in (hidden, hidden + distance * torch.randn(8, 32, 64), weight)]

    def exact(hidden, ref_hidden, weight):
        head, ids, mask = kl.LMHead(weight), torch.zeros(8, 32, dtype=torch.long), torch.ones(8, 32)
        return kl.from_hidden_states(kl.exact, hidden, ref_hidden, head, head, ids, mask)

    truth = exact(*(t.double() for t in parts))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = exact(*parts)
    assert found.dtype == torch.float32
    for off, size, (nats, share) in (
        ((found - truth).mean().abs(), truth.mean(), bounds[0]),
        ((found - truth).abs(), truth, bounds[1]),
    ):
        assert (off <= (nats + share * size if distance else 0)).all(), (off.max(), truth.mean())


@pytest.mark.parametrize(
    "options",
    [{"model_init_kwargs": {"dtype": "bfloat16"}}, {"model_init_kwargs": {"dtype": "float16"}}, {"bf16": True}],
    ids=["bfloat16", "float16", "autocast"],
)
def test_a_run_in_low_precision(make_trainer, options):
    """One step with the exact KL in reward and loss: what is logged is that of both models in float64, within 5 %."""
    trainer = make_trainer(max_steps=1, **options)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    truth, stock = [], trainer._generate_and_score_completions

    def generate(inputs):
        output = stock(inputs)
        ids, mask = (torch.cat([output[f"prompt_{n}"], output[f"completion_{n}"]], dim=1) for n in ("ids", "mask"))
        counted = output["completion_mask"]
        with torch.no_grad():
            log_p, log_q = (
                copy.deepcopy(model).double()(input_ids=ids, attention_mask=mask).logits[:, -counted.shape[1] - 1 : -1]
                for model in (trainer.model, trainer.ref_model)
            )
        per_token = kl.exact(log_p.log_softmax(-1), log_q.log_softmax(-1))
        truth.append(((per_token * counted).sum() / counted.sum()).item())
        return output

    trainer._generate_and_score_completions = generate
    trainer.train()
    found = next(log["kl/exact_per_token"] for log in trainer.state.log_history if "kl/exact_per_token" in log)
    assert truth[0] > 0.01 and found == pytest.approx(truth[0], rel=0.05)
    assert math.isfinite(trainer.state.log_history[0]["loss"])
