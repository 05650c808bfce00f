"""What has to be run where a card is at hand: `python -m pytest tests/gpu -q -s`, under five minutes, one GPU.

Figures go to `KL_ALLITERATION_GPU_FIGURES`, or `figures.json` beside this file. `KL_ALLITERATION_REHEARSE=1` runs the
same on a CPU, to see that the tests themselves work; its figures say nothing.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product: the same bits twice

import json
import runpy
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, WORDS, reward
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, kl, use_fast_sampling
from kl_alliteration._trl import seam_of
from kl_alliteration.references import use_loaded_reference
from kl_alliteration.sampling import use_fast_generate
from kl_alliteration.sampling.decoder import read_decoder
from kl_alliteration.sampling.generate import sample
from kl_alliteration.story_lm import MODEL_PATH, PROMPT

REHEARSAL = bool(os.environ.get("KL_ALLITERATION_REHEARSE"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not REHEARSAL, reason="no GPU: torch.cuda.is_available() is False")
FIGURES = Path(os.environ.get("KL_ALLITERATION_GPU_FIGURES") or Path(__file__).parent / "figures.json")
PRECISIONS = {"float32": {}, "bfloat16": {"model_init_kwargs": {"dtype": "bfloat16"}}, "autocast": {"bf16": True}}


@pytest.fixture(scope="module")
def figures():
    """What was measured, written when all is done."""
    measured = {"torch": torch.__version__, "device": DEVICE}
    if DEVICE == "cuda":
        measured |= {"card": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    yield measured
    FIGURES.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"\n{json.dumps(measured, indent=1)}\nwritten to {FIGURES}")


@pytest.fixture
def same_bits():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture
def run(tiny_model, tmp_path):
    """`run(*instruments, **options)`: a trainer after three steps; an instrument is called with it before."""

    def trained(*instruments, kind=(RLOOTrainer, RLOOConfig), lora=False, **options):
        trainer_class, config = kind
        torch.manual_seed(0)
        args = TINY_RUN | {"output_dir": str(tmp_path), "seed": 3, "use_cpu": DEVICE == "cpu"} | options
        trainer = trainer_class(
            model=str(tiny_model),
            reward_funcs=reward,
            args=config(**args),
            train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 8}),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
        )
        for instrument in instruments:
            instrument(trainer)
        trainer.train()
        assert next(trainer.model.parameters()).device.type == DEVICE
        return trainer

    return trained


def penalised(penalty: KLPenalty):
    return lambda trainer: trainer.add_callback(KLPenaltyCallback(trainer, penalty))


def watched(trainer) -> None:
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))


def logged(trainer, names=("loss", "reward", "kl")) -> list[tuple]:
    return [tuple(log[name] for name in names) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_default_penalty_is_trl_s_bit_for_bit(run, same_bits, precision, lora):
    """k1, reward, sum, and a monitor that looks on: losses, rewards, KL and weights are those of the stock trainer."""
    stock = run(lora=lora, **PRECISIONS[precision])
    ours = run(penalised(KLPenalty()), watched, lora=lora, **PRECISIONS[precision])
    assert logged(ours) == logged(stock)
    for (name, found), expected in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_grpo_is_watched_and_not_changed(run, same_bits):
    kind = GRPOTrainer, GRPOConfig
    stock, ours = run(kind=kind, bf16=True), run(watched, kind=kind, bf16=True)
    assert logged(ours, ("loss", "reward")) == logged(stock, ("loss", "reward"))
    assert "kl/exact_per_token" in ours.state.log_history[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_exact_penalty_trains(run, precision, lora):
    """In reward and loss, sampled by the decoder, one forward pass: finite, and made where the model is."""
    seen = []
    options = PRECISIONS[precision] | {"max_steps": 5}
    instruments = penalised(KLPenalty("exact", "both")), watched, use_fast_sampling
    trainer = run(*instruments, lambda t: seam_of(t).observers.append(seen.append), lora=lora, **options)
    assert len(seen) == 5 and all(r.per_token_kl("exact").device.type == DEVICE for r in seen)
    assert all(torch.tensor(row).isfinite().all() for row in logged(trainer))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_reference_on_the_cpu_says_what_one_on_the_card_says(run, tiny_model, lora):
    """Its weights stay there, the KL is made where the policy is, and its numbers differ by rounding."""
    found, seen = [], []
    for on_cpu in (False, True):
        refer = partial(use_loaded_reference, model_name_or_path=str(tiny_model), on_cpu=on_cpu)
        instruments = refer, penalised(KLPenalty("exact", "both")), watched
        trainer = run(*instruments, lambda t: seam_of(t).observers.append(seen.append), lora=lora)
        found.append(logged(trainer, ("reward", "kl", "kl/exact_per_sequence")))
    reference = seam_of(trainer).scorer.own_reference or trainer.ref_model
    assert {parameter.device.type for parameter in reference.parameters()} == {"cpu"}
    assert {r.per_token_kl("exact").device.type for r in seen} == {DEVICE}
    for on_card, on_cpu in zip(*found, strict=True):
        assert on_cpu == pytest.approx(on_card, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "autocast", "nats", "share"),
    [(torch.float32, False, 1e-6, 1e-5), (torch.bfloat16, False, 5e-4, 0.01), (torch.float32, True, 5e-4, 0.01)],
    ids=PRECISIONS,
)
def test_the_exact_kl_against_float64(figures, dtype, autocast, nats, share):
    """The mean over 2,048 positions and 5,000 tokens, policies from near to far."""
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    hidden, noise = (torch.randn(16, 128, 64, generator=generator) for _ in range(2))
    weight = torch.randn(5000, 64, generator=generator) / 2

    def exact(hidden, ref_hidden, weight):
        head = kl.LMHead(weight)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=DEVICE)
        return kl.from_hidden_states(kl.exact, hidden, ref_hidden, head, head, ids, torch.ones_like(ids)).mean()

    for distance in (0.0, 0.01, 0.1, 1.0):
        parts = [t.to(DEVICE, dtype) for t in (hidden, hidden + distance * noise, weight)]
        truth = exact(*(t.double() for t in parts)).item()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            off = abs(exact(*parts).item() - truth)
        kind = "autocast" if autocast else str(dtype).removeprefix("torch.")
        figures[f"exact, {kind}, KL {truth:.2g}: off by"] = off
        assert off <= (nats + share * truth if distance else 0)


def chi_square_is_likely(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether counts are a sample of what is expected, by Wilson and Hilferty's normal; 4 standard deviations."""
    few = expected < 5
    counts, expected = (torch.cat([t[~few], t[few].sum()[None]]) for t in (counts, expected))
    freedom = len(counts) - 1
    statistic = ((counts - expected).square() / expected.clamp(min=1e-9)).sum().item()
    share = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - share)) / share**0.5 < 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_decoder_samples_the_model_s_distribution(tiny_model, dtype):
    """20,000 texts of two tokens against the probabilities of all pairs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).to(DEVICE).eval()
    for parameter in model.parameters():
        parameter.mul_(3)
    vocabulary, prompt, texts = len(WORDS), torch.tensor([[3, 4, 5]], device=DEVICE), 20_000
    config = GenerationConfig(max_new_tokens=2, do_sample=True, temperature=0.9, pad_token_id=1)
    ids = prompt.repeat(texts, 1)
    found = sample(read_decoder(model), ids, torch.ones_like(ids), config)[:, 3:]
    counts = torch.bincount(found[:, 0] * vocabulary + found[:, 1], minlength=vocabulary**2).double()
    firsts = torch.cat([prompt.repeat(vocabulary, 1), torch.arange(vocabulary, device=DEVICE)[:, None]], dim=1)
    probabilities = (model(firsts).logits[:, 2:].float() / 0.9).softmax(-1).double()  # (V, 2, V)
    expected = (probabilities[0, 0, :, None] * probabilities[:, 1]).flatten() * texts
    assert chi_square_is_likely(counts, expected)
    assert not chi_square_is_likely(counts.roll(1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_decoder_passes_its_own_check(dtype):
    """The first batch, even and padded, is held against the model; nothing goes to transformers' `generate`."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=dtype).to(DEVICE)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(model, "generate", lambda **_: pytest.fail("transformers' generate was called"), raising=False)
    use_fast_generate(model)
    config = GenerationConfig(max_new_tokens=40, do_sample=True, pad_token_id=0)
    ids = AutoTokenizer.from_pretrained(MODEL_PATH)([PROMPT] * 8, return_tensors="pt").input_ids.to(DEVICE)
    mask = torch.ones_like(ids)
    for padding in (0, 2):
        mask[::2, :padding] = 0
        assert model.generate(input_ids=ids, attention_mask=mask, generation_config=config).device.type == DEVICE


def test_generations_per_second(figures):
    """The embedded model, 100 tokens, in turns: figures, and no promise about a card that nobody has seen."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=dtype).to(DEVICE).eval()
        stock = model.generate
        use_fast_generate(model)
        for texts in (40,) if REHEARSAL else (40, 512):
            inputs = tokenizer([PROMPT] * texts, return_tensors="pt").to(DEVICE)
            config = GenerationConfig(max_new_tokens=10 if REHEARSAL else 100, do_sample=True, pad_token_id=0)
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            best = {}
            for _ in range(1 if REHEARSAL else 3):  # the first is a warm-up
                for name, generate in (("stock", stock), ("fast", model.generate)):
                    start = clock()
                    assert len(generate(**given, generation_config=config)) == texts
                    best[name] = min(best.get(name, float("inf")), clock() - start)
            for name, seconds in best.items():
                figures[f"generations per second, {dtype}, {texts} texts, {name}"] = round(texts / seconds, 1)


@pytest.mark.skipif(DEVICE == "cpu", reason="minutes on a CPU, where `make tall-tree` does the same")
def test_a_recipe_runs(figures, tmp_path, monkeypatch):
    """`recipes/minimal.py`, 60 steps of 40 texts: the reward rises under the penalty."""
    recipe = Path(__file__).parents[2] / "recipes" / "minimal.py"
    monkeypatch.chdir(tmp_path)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    trainer = runpy.run_path(str(recipe))["trainer"]
    seconds = clock() - start
    logs = [log for log in trainer.state.log_history if "reward" in log]
    figures["recipe, seconds"] = round(seconds, 1)
    figures["recipe, generations per second"] = round(trainer.args.max_steps * 40 / seconds, 1)
    if DEVICE == "cuda":
        figures["recipe, peak memory in MB"] = torch.cuda.max_memory_allocated() >> 20
    figures["recipe, reward, first and last"] = [logs[0]["reward"], logs[-1]["reward"]]
    figures["recipe, KL per sequence"] = logs[-1]["kl/exact_per_sequence"]
    assert logs[-1]["reward"] > logs[0]["reward"] + 0.5 and 0 < logs[-1]["kl/exact_per_sequence"] < 60
