"""The KL from another model: a teacher or an earlier release, loaded beside the policy, with an adapter or without."""

import pytest
import torch
from conftest import TINY_RUN, WORDS, reward, word_tokenizer
from datasets import Dataset
from peft import LoraConfig
from programs import run
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_alliteration import KLMonitorCallback, KLPenalty, KLPenaltyCallback, kl
from kl_alliteration._trl import reference, seam_of
from kl_alliteration._trl.scoring import Scorer
from kl_alliteration.references import use_loaded_reference

KINDS = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}


@pytest.fixture
def teacher(tiny_model, tmp_path):
    """The tiny model with other weights, its tokenizer beside it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def make(kind: str, lora: bool, tiny_model, tmp_path, **options):
    trainer_class, config_class = KINDS[kind]
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    return trainer_class(
        model=str(tiny_model),
        reward_funcs=reward,
        args=config_class(**TINY_RUN | {"output_dir": str(tmp_path), "seed": 3} | options),
        train_dataset=Dataset.from_dict({"prompt": ["once upon a time", "there was a"] * 8}),
        peft_config=adapter,
    )


def model_kl(model, teacher, rollout, prompts) -> torch.Tensor:
    """Exact KL of a batch by both models' own logits, (B,)."""
    ids = torch.cat([prompts["prompt_ids"], rollout.completion_ids], 1)
    mask = torch.cat([prompts["prompt_mask"], rollout.completion_mask], 1)
    length = rollout.completion_ids.shape[1]
    with torch.no_grad():
        log_p, log_q = (
            each(ids, attention_mask=mask, position_ids=kl.positions_of(mask))
            .logits[:, -length - 1 : -1]
            .log_softmax(-1)
            for each in (model, teacher)
        )
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * rollout.completion_mask).sum(-1)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kl_is_measured_from_it(kind, lora, tiny_model, teacher, tmp_path):
    trainer = make(kind, lora, tiny_model, tmp_path)
    use_loaded_reference(trainer, str(teacher))
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    seen, batches, generate = [], [], trainer._generate_and_score_completions
    seam_of(trainer).observers.append(seen.append)
    loaded = AutoModelForCausalLM.from_pretrained(teacher).eval()

    def spy(inputs):
        output = generate(inputs)
        batches.append(model_kl(trainer.model, loaded, seen[-1], output))
        found = (seen[-1].per_token_kl("exact") * seen[-1].completion_mask).sum(-1)
        torch.testing.assert_close(found, batches[-1], atol=1e-4, rtol=1e-4)
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()
    logs = [e for e in trainer.state.log_history if "kl/exact_per_sequence" in e]
    assert [e["kl/exact_per_sequence"] for e in logs] == pytest.approx([b.mean().item() for b in batches], rel=1e-3)
    assert batches[0].mean() > 0.1  # the policy does not begin there


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_that_stays_on_the_cpu_says_the_same(kind, lora, tiny_model, teacher, tmp_path):
    """Where the policy is there too; `tests/gpu` has it beside a policy on a card."""
    logs = []
    for on_cpu in (False, True):
        trainer = make(kind, lora, tiny_model, tmp_path)
        use_loaded_reference(trainer, str(teacher), on_cpu)
        trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
        trainer.add_callback(KLMonitorCallback(trainer, exact=True))
        trainer.train()
        logs.append([{k: v for k, v in e.items() if "kl" in k} for e in trainer.state.log_history])
    assert logs[0] == logs[1] and logs[0][0]["kl/exact_per_sequence"] > 0.1
    reference = seam_of(trainer).scorer.own_reference or trainer.ref_model
    hook = reference._hf_hook
    assert (hook.execution_device, hook.io_same_device) == ("cpu", True)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_trl_s_own_penalty_is_measured_from_it_too(kind, tiny_model, teacher, tmp_path):
    """Without an adapter TRL's reference is replaced, and its own code goes on as it is."""
    trainer = make(kind, False, tiny_model, tmp_path)
    use_loaded_reference(trainer, str(teacher))
    trainer.train()
    logs = [e for e in trainer.state.log_history if "kl" in e]
    assert logs[0]["kl"] > 0.01 and seam_of(trainer).penalty is None


def test_other_tokens_are_refused_by_name(tiny_model, teacher, tmp_path):
    words = [*WORDS[:-1], "cat"]
    word_tokenizer(words, unk_token="<unk>", pad_token="<pad>").save_pretrained(teacher)
    trainer = make("rloo", False, tiny_model, tmp_path)
    with pytest.raises(ValueError, match="2 differ, such as 'cat'; a KL needs one tokenizer"):
        use_loaded_reference(trainer, str(teacher))
    synced = make("rloo", False, tiny_model, tmp_path, sync_ref_model=True)
    with pytest.raises(ValueError, match="sync_ref_model moves the reference"):
        use_loaded_reference(synced, str(teacher))


def test_a_recipe_takes_it_by_path(tiny_model, teacher, tmp_path):
    options = "--kl_reference", teacher, "--model_name_or_path", tiny_model, "--output_dir", "out", "--max_steps", "2"
    options += (
        "--num_generations",
        "4",
        "--per_device_train_batch_size",
        "4",
        "--eval_stories",
        "4",
        "--report_to",
        "none",
    )
    options += "--max_completion_length", "8", "--logging_steps", "1", "--warmup_steps", "0"
    shown = run("rloo_tall_tree.py", *options, cwd=tmp_path).stdout
    before = [line for line in shown.splitlines() if "exact_kl_per_sequence" in line][0].split()
    assert float(before[before.index("exact_kl_per_sequence") + 2]) > 0.05  # before training, behind the column's bar


def loaded_with(monkeypatch, trainer, *path):
    """What a reference is asked for, when it is loaded."""
    asked, stock = [], reference.create_model_from_path

    def create(path, **options):
        asked.append((path, options.pop("revision", None)))
        return stock(path, **options)

    monkeypatch.setattr(reference, "create_model_from_path", create)
    use_loaded_reference(trainer, *path)
    return asked


def test_a_teacher_is_not_asked_for_the_policy_s_revision(tiny_model, teacher, tmp_path, monkeypatch):
    trainer = make("rloo", False, tiny_model, tmp_path)
    trainer.args.model_init_kwargs = {"revision": "of-the-policy"}
    assert loaded_with(monkeypatch, trainer, str(teacher)) == [(str(teacher), None)]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("options", [None, {"revision": "main"}])  # which recipes always give
def test_the_policy_s_own_path_is_asked_for_its_own_commit(tiny_model, tmp_path, monkeypatch, options, named):
    trainer = make("rloo", False, tiny_model, tmp_path)
    trainer.args.model_init_kwargs, trainer.model.config._commit_hash = options, "0123abc"
    path = [str(tiny_model)] if named else []
    assert loaded_with(monkeypatch, trainer, *path) == [(str(tiny_model), "0123abc")]


def test_a_policy_that_was_made_in_memory_has_no_path(tiny_model, tmp_path):
    trainer = make("rloo", False, tiny_model, tmp_path)
    trainer.model.config._name_or_path = ""
    with pytest.raises(ValueError, match="made in memory: save it, .*or name a reference"):
        use_loaded_reference(trainer)


def test_a_head_in_float32_is_one_of_the_reference_too(tiny_model, tmp_path):
    options = {"bf16": True, "cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make("grpo", False, tiny_model, tmp_path, beta=0.0, max_steps=1, **options)
    trainer.add_callback(KLMonitorCallback(trainer, load_reference=True))
    trainer.train()
    assert trainer.state.log_history[0]["kl/k1_per_token"] == 0  # one model


def test_positions_are_given_to_whole_texts_alone(tiny_model, tmp_path):
    """A step from a cache has a mask of all tokens and ids of one."""
    scorer = Scorer(make("rloo", False, tiny_model, tmp_path))
    mask = torch.tensor([[0, 1, 1, 1]])
    step = {"attention_mask": mask, "input_ids": torch.tensor([[5]])}
    assert "position_ids" not in scorer._place(None, (), dict(step))[1]
    step["input_ids"] = torch.tensor([[1, 5, 6, 7]])
    assert scorer._place(None, (), dict(step))[1]["position_ids"].tolist() == [[0, 0, 1, 2]]
