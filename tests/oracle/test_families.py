"""Every causal language model that transformers registers: one step of RLOO, held against the model's own logits.

`make long` goes over the whole registry; `KL_ALLITERATION_ORACLE=table.md` writes what became of each family.
"""

import os
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from families import EOS, FAMILIES, PAD, VOCAB, NotBuilt, build, in_a_line, model_class, move
from peft import LoraConfig
from runs import save, stock_trainer, time_limit
from transformers import GenerationConfig
from truth import Oracle

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, share_prompts
from kl_alliteration._trl import UnknownTRLError
from kl_alliteration.kl import KLWarning
from kl_alliteration.sampling.decoder import READERS, read_decoder
from kl_alliteration.sampling.generate import sample

PENALTY = KLPenalty("exact", "both")
OFF, GRADIENT_OFF = 1e-3, 1e-3  # largest difference of a number, and of a gradient in relation to its norm
SECONDS = 120  # a family
KINDS = ("right", "refused by name", "wrong", "not built")


@dataclass
class Found:
    """What became of a family."""

    family: str
    kind: str
    words: str = ""
    worst: dict = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def row(self) -> str:
        numbers = ", ".join(f"{name} {off:.1g}" for name, off in self.worst.items() if off > 1e-5)
        return f"| {self.family} | {self.kind} | {self.words} | {numbers} | {self.seconds:.1f} |"


def refusal(error: BaseException) -> bool:
    """Whether an error is this package's word on a model."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = isinstance(error, ValueError) and "kl_alliteration" in Path(last).parts
    return ours or isinstance(error, UnknownTRLError)


def one_step(folder: Path, shared: bool = False, **options) -> tuple[dict, str]:
    """The largest differences of one step, and what the package said in warnings. `shared`: prompts are."""
    trainer = stock_trainer(folder, **options)
    move(trainer.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KLWarning)
        trainer.add_callback(KLPenaltyCallback(trainer, PENALTY))
        trainer.add_callback(KLMonitorCallback(trainer, exact=True))
        if shared:
            share_prompts(trainer)
        oracle = Oracle(trainer, PENALTY)
        trainer.train()
    assert oracle.counts == {"batches": 1, "losses": 1} and oracle.exact_per_token > 1e-3, oracle.exact_per_token
    said = [str(w.message) for w in caught if w.category is KLWarning and "temperature=0.8" not in str(w.message)]
    return oracle.worst, " ".join(dict.fromkeys(said))


def stock_step(folder: Path, **options) -> str | None:
    """Why TRL alone cannot take a step."""
    try:
        stock_trainer(folder, **options).train()
    except Exception as error:
        return in_a_line(error)
    return None


def tried(family: str, folder: Path, shared: bool = False, **options) -> Found:
    """A family, from its registry entry to its numbers."""
    start, worst = time.perf_counter(), {}

    def found(kind: str, words: str) -> Found:
        return Found(family, kind, words, worst, time.perf_counter() - start)

    try:
        with time_limit(SECONDS):
            try:
                model = build(family, **options)
                save(model, folder)
            except NotBuilt as reason:
                return found("not built", str(reason))
            alone = ""
            for run in ({}, {"router_aux_loss_coef": 0.0}):
                try:
                    worst, said = one_step(folder, shared, **run)
                    break
                except TimeoutError:
                    raise
                except Exception as error:
                    if (reason := stock_step(folder, **run)) is None:
                        return found("refused by name" if refusal(error) else "wrong", in_a_line(error))
                    alone = alone or reason
            else:
                return found("refused by name", f"TRL cannot train it: {alone}")
            if alone:
                said = f"with router_aux_loss_coef=0, since TRL alone fails otherwise: {alone}. {said}"
            off = [name for name, v in worst.items() if not v <= (GRADIENT_OFF if name == "gradient" else OFF)]
            if off:
                return found("wrong", f"{', '.join(off)}. {said}")
            return found("right", said)
    except TimeoutError as error:
        return found("wrong", str(error))


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    """(B, P) left-padded prompts and their mask."""
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, gap in enumerate((0, 3, 8, 1)):
        ids[row, :gap], mask[row, :gap] = PAD, 0
    return ids, mask


FEW = {
    "llama": {}, "qwen2": {}, "gpt2": {}, "gpt_neo": {}, "opt": {"word_embed_proj_dim": 16}, "bloom": {},
    "mpt": {"logit_scale": 0.5}, "bert": {}, "roberta": {}, "cohere": {}, "gemma2": {"final_logit_softcapping": 2.0},
    "mixtral": {}, "mamba": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FEW)
def test_a_family_is_right(family, tmp_path):
    found = tried(family, tmp_path, **FEW[family])
    assert found.kind == "right", found.row
    if family in ("mpt", "bert", "roberta"):
        assert "more than a linear head" in found.words


@pytest.mark.parametrize("family", [family for family in FAMILIES if model_class(family).__name__ in READERS])
@torch.no_grad()
def test_the_decoder_is_the_model(family):
    """Greedy tokens are those of `generate`, logits those of a forward pass; ragged prompts, several ends of text."""
    model, (ids, mask) = build(family).eval(), ragged()
    config = GenerationConfig(max_new_tokens=20, do_sample=False, pad_token_id=PAD, eos_token_id=[EOS, 17, 40])
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert torch.equal(sample(read_decoder(model), ids, mask, config), expected)
    mask = torch.cat([mask, torch.ones_like(expected[:, ids.shape[1] :])], dim=1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=expected, attention_mask=mask, position_ids=places).logits
    decoder = read_decoder(model)
    found = decoder.start(ids, mask[:, : ids.shape[1]], expected.shape[1])
    torch.testing.assert_close(found, logits[:, ids.shape[1] - 1], atol=1e-4, rtol=1e-4)
    for place in range(ids.shape[1], expected.shape[1]):
        found = decoder.step(expected[:, place])
        torch.testing.assert_close(found, logits[:, place], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*more than a linear head")
def test_an_adapter_on_a_head_that_is_more_than_linear_is_refused(tmp_path):
    """`all-linear` puts one on BERT's transform, behind the backbone: policy and reference would share it."""
    save(build("bert"), tmp_path)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = stock_trainer(tmp_path, peft_config=lora, temperature=1.0)
    with pytest.raises(ValueError, match="an adapter is on the head of BertLMHeadModel"):
        KLPenaltyCallback(trainer, PENALTY)


def test_what_is_not_built_says_why():
    with pytest.raises(NotBuilt, match="million parameters after shrinking"):
        build("llama", hidden_size=1024)


@pytest.mark.long
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared prompts"])
def test_the_whole_registry(subtests, tmp_path, shared):
    everything = []
    for family in FAMILIES:
        with subtests.test(family):
            found = tried(family, tmp_path / family, shared)
            everything.append(found)
            print(found.row, flush=True)
            assert found.kind != "wrong", found.row
    counts = {kind: sum(found.kind == kind for found in everything) for kind in KINDS}
    summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(summary)
    if path := os.environ.get("KL_ALLITERATION_ORACLE"):
        head = ["| family | | words | differences above 1e-5 | seconds |", "|---|---|---|---|---|"]
        rows = [found.row for kind in KINDS for found in everything if found.kind == kind]
        Path(path).write_text("\n".join([summary, "", *head, *rows]) + "\n")
