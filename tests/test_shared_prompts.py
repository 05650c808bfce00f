"""`share_prompts`: each distinct prompt of a call once, numbers as before, and one line where it cannot be."""

import copy
import logging

import pytest
import torch
from conftest import TINY_RUN, reward
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MambaConfig, Phi3Config, set_seed
from transformers.cache_utils import DynamicLayer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, share_prompts, use_fast_sampling
from kl_alliteration._trl import seam_of
from kl_alliteration.kl import distinct_prompts

LONG, SHORT = "once upon a time there was a tall tree that", "there was a cat who"
EXACT = KLPenalty("exact", "both")


def make(folder, trainer=RLOOTrainer, config=RLOOConfig, prompts=(LONG, SHORT), lora=False, **options):
    defaults = TINY_RUN | {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "beta": 0.1,
        "seed": 1,
        "disable_dropout": True,
    }
    return trainer(
        model=str(folder),
        reward_funcs=reward,
        args=config(**defaults | options),
        train_dataset=Dataset.from_dict({"prompt": list(prompts) * 24}),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )


def trained(trainer) -> tuple[list[dict], torch.Tensor]:
    """What it logged, but times, and its weights."""
    trainer.train()
    times = ("step_time", "train_", "epoch")
    logged = [{k: v for k, v in entry.items() if not k.startswith(times)} for entry in trainer.state.log_history]
    return logged, torch.cat(
        [p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
    )


def assert_same(found, expected):
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    torch.testing.assert_close(found[1], expected[1], atol=2e-4, rtol=2e-3)


def sharing(trainer) -> list:
    return list(seam_of(trainer).scorer._shared.values())


class Tokens:
    """How many tokens go through a model's backbone, padding included, call by call of its first layer."""

    def __init__(self, causal_lm):
        self.calls = []
        causal_lm.base_model.layers[0].register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.calls.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))


def test_distinct_prompts_are_those_of_the_hand_worked_batch():
    """Rows 0 and 2 are one prompt, row 3 has the ids of row 1 with another padding, row 4 is of its own."""
    ids = torch.tensor([[5, 6, 7], [1, 6, 7], [5, 6, 7], [1, 6, 7], [7, 7, 7]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    row, first = distinct_prompts(ids, mask)
    assert row.tolist() == [0, 1, 0, 2, 3] and first.tolist() == [0, 1, 3, 4]


def test_what_a_padded_row_has_under_its_padding_does_not_matter():
    row, first = distinct_prompts(torch.tensor([[1, 6], [9, 6]]), torch.tensor([[0, 1], [0, 1]]))
    assert row.tolist() == [0, 0] and first.tolist() == [0]


CASES = {
    "one update a batch": {},
    "groups cut by micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "two updates a batch": {"num_iterations": 2},
    "two batches of updates": {"steps_per_generation": 2, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_run(tiny_model, case, lora):
    """Ragged prompts, exact KL in reward and loss with a budget, monitor: three steps, full and LoRA."""
    runs = {}
    for shared in (False, True):
        trainer = make(tiny_model, lora=lora, **CASES[case])
        KLPenaltyCallback(trainer, KLPenalty("exact", "both", budget_per_token=0.001))
        trainer.add_callback(KLMonitorCallback(trainer, exact=True))
        if shared:
            share_prompts(trainer)
        runs[shared] = trained(trainer)
        if shared:
            assert all(each.off is None and each.proven for each in sharing(trainer))
    assert_same(runs[True], runs[False])


def test_with_one_forward_pass_and_fast_sampling_too(tiny_model):
    runs = {}
    for shared in (False, True):
        trainer = make(tiny_model, lora=True, max_steps=1)
        trainer.add_callback(KLPenaltyCallback(trainer, EXACT))
        if shared:
            share_prompts(trainer)
        use_fast_sampling(trainer)
        assert seam_of(trainer).one_forward
        runs[shared] = trained(trainer)
    assert_same(runs[True], runs[False])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_grpo_is_the_same_run(tiny_model, lora):
    runs = {}
    for shared in (False, True):
        trainer = make(tiny_model, GRPOTrainer, GRPOConfig, lora=lora, num_iterations=2)
        trainer.add_callback(KLMonitorCallback(trainer))
        if shared:
            share_prompts(trainer)
        runs[shared] = trained(trainer)
    assert all(each.off is None and each.proven for each in sharing(trainer))
    assert_same(runs[True], runs[False])


def test_each_distinct_prompt_goes_through_the_model_once(tiny_model):
    """Two prompts of four completions: (2, P) and (8, T) in every pass, where TRL has (8, P + T)."""
    trainer = make(tiny_model, max_steps=2, shuffle_dataset=False)
    share_prompts(trainer)
    policy, reference = (Tokens(model) for model in (trainer.model, trainer.ref_model))
    scored = []
    stock = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: scored.append(inputs["prompt_ids"].shape[1]) or stock(model, inputs)
    trainer.train()
    prompt = scored[-1]
    assert reference.calls[-2:] == [(2, prompt), (8, 6)]
    assert policy.calls[-2:] == [(2, prompt), (8, 6)]


def test_the_head_sees_no_prompt_and_no_padding(tiny_model):
    trainer = make(tiny_model, max_steps=1)
    share_prompts(trainer)
    model, seen = trainer.model, []
    ids = torch.randint(3, 20, (4, 9))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    shapes = model.base_model.register_forward_hook(lambda m, a, output: seen.append(output.last_hidden_state.shape))
    logps = trainer._get_per_token_logps_and_entropies(model, ids, mask, 4, compute_entropy=True)
    assert seen[0][:2] == (1, 14)  # 4 x 4 completion tokens, two of them padding
    shapes.remove()
    expected = model(ids, attention_mask=mask).logits[:, 4:-1].log_softmax(-1)
    sampled = expected.gather(-1, ids[:, 5:, None]).squeeze(-1) * mask[:, 5:]
    torch.testing.assert_close(logps[0], sampled, atol=1e-5, rtol=1e-4)
    entropy = -(expected.exp() * expected).sum(-1) * mask[:, 5:]
    torch.testing.assert_close(logps[1], entropy, atol=1e-5, rtol=1e-4)


def test_prompts_that_are_all_different_are_not_split(tiny_model):
    trainer = make(tiny_model)
    share_prompts(trainer)
    tokens = Tokens(trainer.model)
    ids = torch.arange(20).view(2, 10)
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 4)
    assert tokens.calls == [(2, 10)]


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if "prompts" in r.getMessage()]

    with caplog.at_level("WARNING"):
        yield lines


def score(trainer):
    """Two rows of one prompt, as TRL asks, with a gradient; and the same by logits alone."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 10, 13, 14]])
    mask = torch.ones_like(ids)
    found = trainer._get_per_token_logps_and_entropies(model, ids, mask, 2)[0]
    truth = model(ids, attention_mask=mask).logits[:, 5:-1].log_softmax(-1).gather(-1, ids[:, 6:, None]).squeeze(-1)
    return found, truth


def test_dropout_turns_it_off_with_the_remedy(tiny_model, said, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.attention_dropout = 0.1
    folder = with_tokenizer(model, tiny_model, tmp_path)
    trainer = make(folder, disable_dropout=False, output_dir=str(tmp_path / "out"))
    share_prompts(trainer)
    with torch.no_grad():
        trainer.model.eval()
        score(trainer)
        assert not said()  # an evaluation before training drops nothing
        trainer.model.train()
        score(trainer)
    assert len(said()) == 1 and "disable_dropout=True" in said()[0]
    score(trainer)
    assert len(said()) == 1


def test_gradient_checkpointing_turns_it_off_in_the_loss_with_the_remedy(tiny_model, said):
    runs = {}
    for shared in (False, True):
        trainer = make(tiny_model, gradient_checkpointing=True)
        if shared:
            share_prompts(trainer)
        runs[shared] = trained(trainer)
    assert len(said()) == 1 and "gradient_checkpointing=False" in said()[0]
    policy, reference = sharing(trainer)
    assert policy.off is None and {graded for _, graded, _ in policy.proven} == {False} and reference.proven
    assert_same(runs[True], runs[False])


ROPES = {
    LlamaConfig: {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    Phi3Config: {
        "original_max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 6.0, 12.0]},
    },
}


@pytest.mark.parametrize("config", ROPES)
def test_positions_that_change_with_the_length_turn_it_off_before_a_long_text_comes(
    tiny_model, said, tmp_path, config
):
    shape = {"vocab_size": len(AutoTokenizer.from_pretrained(tiny_model)), "hidden_size": 16, "num_attention_heads": 2}
    shape |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "intermediate_size": 16, "pad_token_id": 1}
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config(**shape | ROPES[config]))
    trainer = make(with_tokenizer(model, tiny_model, tmp_path), output_dir=str(tmp_path / "out"))
    share_prompts(trainer)
    for length in (5, 12):  # within and beyond
        ids = torch.arange(3, 3 + length).expand(2, -1)
        mask, model = torch.ones_like(ids), trainer.accelerator.unwrap_model(trainer.model)
        found = trainer._get_per_token_logps_and_entropies(model, ids, mask, 2)[0]
        truth = model(ids, attention_mask=mask).logits[:, length - 3 : -1].log_softmax(-1)
        torch.testing.assert_close(found, truth.gather(-1, ids[:, -2:, None])[..., 0], atol=1e-4, rtol=1e-4)
    assert len(said()) == 1 and "change with the length of a text" in said()[0]


def test_a_recurrent_state_turns_it_off(tiny_model, said, tmp_path):
    vocab_size = len(AutoTokenizer.from_pretrained(tiny_model))
    set_seed(0)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    trainer = make(with_tokenizer(model, tiny_model, tmp_path), output_dir=str(tmp_path / "out"))
    share_prompts(trainer)
    torch.testing.assert_close(*score(trainer), atol=1e-4, rtol=1e-4)
    assert len(said()) == 1 and "no cache" in said()[0]


def test_a_cache_that_forgets_turns_it_off(tiny_model, said, monkeypatch):
    stock = DynamicLayer.update

    def forgetful(self, keys, values, *args, **kwargs):
        keys, values = stock(self, keys, values, *args, **kwargs)
        return keys, values * (keys.shape[-2] == values.shape[-2]) * (1 + 0.01 * (keys.shape[0] == 2))

    trainer = make(tiny_model)
    share_prompts(trainer)
    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    torch.testing.assert_close(*score(trainer), atol=1e-5, rtol=1e-4)
    assert len(said()) == 1 and "states are" in said()[0]


def test_a_cache_without_gradients_turns_it_off(tiny_model, said, monkeypatch):
    stock = DynamicLayer.batch_select_indices

    def detached(self, indices):
        stock(self, indices)
        self.keys, self.values = self.keys.detach(), self.values.detach()

    trainer = make(tiny_model)
    share_prompts(trainer)
    monkeypatch.setattr(DynamicLayer, "batch_select_indices", detached)
    with torch.no_grad():
        score(trainer)
    assert not said()
    found, truth = score(trainer)
    assert len(said()) == 1 and "gradients are" in said()[0]
    parameters = list(trainer.model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(each.sum(), parameters) for each in (found, truth)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_an_argument_that_it_does_not_know_turns_it_off(tiny_model, said):
    trainer = make(tiny_model)
    share_prompts(trainer)
    ids = torch.tensor([[5, 6, 7, 8, 9]] * 2)
    labels = ids.masked_fill(torch.arange(5) < 3, -100)
    mask = torch.ones_like(ids)
    trainer.model(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    trainer.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, output_attentions=True)
    assert len(said()) == 1 and "output_attentions" in said()[0]


def test_a_sliding_window_shorter_than_the_prompt_is_right_or_off(tiny_model, said, tmp_path):
    """The embedded model's window of two tokens, with a prompt of six."""
    from kl_alliteration.story_lm import MODEL_PATH

    trainer = make(MODEL_PATH, output_dir=str(tmp_path / "out"))
    share_prompts(trainer)
    torch.testing.assert_close(*score(trainer), atol=1e-4, rtol=1e-4)


def test_a_model_can_be_saved_and_copied_after_it(tiny_model, tmp_path):
    trainer = make(tiny_model, max_steps=1)
    share_prompts(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for ours, theirs in zip(saved.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    copy.deepcopy(trainer.model)


def with_tokenizer(model, tiny_model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder
