"""What the KL of a run with an adapter is measured from: its start, its base, a moving average, resets."""

import pytest
import torch
from test_adapters import randomized
from transformers import set_seed

from kl_alliteration import KLMonitorCallback
from kl_alliteration.adapters import default_lora_config
from kl_alliteration.references import MovingAverageReferenceCallback, ReferenceCallback, ResetReferenceCallback


def parameters(model, adapter: str) -> dict[str, torch.Tensor]:
    return {n.replace(f".{adapter}.", "."): p.clone() for n, p in model.named_parameters() if f".{adapter}." in n}


def test_start_is_a_frozen_copy_and_the_base_stays_in_view(make_trainer):
    trainer = make_trainer(lora=default_lora_config(), max_steps=3)
    randomized(trainer.model)
    start = parameters(trainer.model, "default")
    ReferenceCallback(trainer)
    trainer.train()
    assert all(torch.equal(p, start[n]) for n, p in parameters(trainer.model, "ref").items())
    assert any(not torch.equal(p, start[n]) for n, p in parameters(trainer.model, "default").items())
    first, *_, last = [e for e in trainer.state.log_history if "kl" in e]
    assert first["kl"] == 0 and last["kl"] != 0  # to the start
    assert abs(first["kl/base_per_token"]) > 1e-3  # to the base, from which the start is away


def test_base_kl_is_that_of_a_run_with_the_base_as_its_reference(make_trainer):
    """Two runs with the same policy: at beta 0 the reference only watches."""
    runs = {}
    for mode in ("start", "base"):
        trainer = make_trainer(lora=default_lora_config(), max_steps=3, beta=0.0)
        randomized(trainer.model)
        trainer.add_callback(KLMonitorCallback(trainer))
        trainer.add_callback(ReferenceCallback(trainer, mode))
        set_seed(3)  # making a reference adapter draws numbers
        trainer.train()
        runs[mode] = [e for e in trainer.state.log_history if "kl/k1_per_token" in e]
    for start, base in zip(runs["start"], runs["base"], strict=True):
        for unit in ("per_token", "per_sequence"):
            assert start[f"kl/base_{unit}"] == pytest.approx(base[f"kl/k1_{unit}"], rel=1e-5)
    assert runs["start"][-1]["kl/k1_per_token"] != runs["base"][-1]["kl/k1_per_token"]


def test_moving_average_by_hand(make_trainer):
    trainer = make_trainer(lora=default_lora_config(), max_steps=1)
    callback = MovingAverageReferenceCallback(trainer, alpha=0.25, steps=2)
    for name, parameter in trainer.model.named_parameters():
        if ".default." in name:
            parameter.data.fill_(8.0)
        elif ".ref." in name:
            parameter.data.fill_(4.0)
    for step, expected in ((1, 4.0), (2, 5.0), (3, 5.0), (4, 5.75)):  # 0.25 * 8 + 0.75 * 4, then 0.25 * 8 + 0.75 * 5
        trainer.state.global_step = step
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
        assert all((p == expected).all() for p in parameters(trainer.model, "ref").values())


def test_reset_at_steps_and_at_a_bound(make_trainer):
    trainer = make_trainer(lora=default_lora_config(), max_steps=6)
    trainer.add_callback(ResetReferenceCallback(trainer, steps=3))
    trainer.train()
    entries = [e for e in trainer.state.log_history if "kl" in e]
    assert [e["kl/reference_resets"] for e in entries] == [0, 0, 1, 0, 0, 1]
    assert [e["kl"] == 0 for e in entries] == [True, False, False, True, False, False]
    assert entries[3]["kl/base_per_token"] != 0

    trainer = make_trainer(lora=default_lora_config(), max_steps=6)
    trainer.add_callback(KLMonitorCallback(trainer))
    trainer.add_callback(ResetReferenceCallback(trainer, kl_per_sequence=0.01))
    trainer.train()
    for entry in (e for e in trainer.state.log_history if "kl" in e):
        assert entry["kl/reference_resets"] == (entry["kl/k1_per_sequence"] > 0.01)
    assert any(e.get("kl/reference_resets") for e in trainer.state.log_history)


def test_no_evaluation_resets_the_reference(make_trainer):
    trainer = make_trainer(lora=default_lora_config(), max_steps=4, num_iterations=2, learning_rate=0.1)
    reset = ResetReferenceCallback(trainer, kl_per_sequence=1e-4)
    trainer.add_callback(reset)
    trainer.train()
    seen = reset.last_kl = 5.0
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert reset.last_kl == seen


def test_reset_forgets_the_optimizer_only_when_asked(make_trainer):
    for asked in (False, True):
        trainer = make_trainer(lora=default_lora_config(), max_steps=2)
        trainer.add_callback(ResetReferenceCallback(trainer, steps=2, reset_optimizer=asked))
        trainer.train()
        assert (len(trainer.optimizer.state) == 0) == asked


@pytest.mark.parametrize("mode", ["start", "moving_average", "reset"])
def test_a_resumed_run_goes_on_with_the_same_reference(make_trainer, mode, tmp_path):
    def made(folder):
        trainer = make_trainer(
            lora=default_lora_config(), max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(folder)
        )
        randomized(trainer.model)  # so that a reference made anew would not be the saved one
        callback = {
            "start": lambda: ReferenceCallback(trainer),
            "moving_average": lambda: MovingAverageReferenceCallback(trainer, 0.5, steps=1),
            "reset": lambda: ResetReferenceCallback(trainer, steps=1),
        }[mode]()
        trainer.add_callback(callback)
        return trainer

    whole = made(tmp_path / "whole")
    whole.train()
    half = made(tmp_path / "half")
    with torch.no_grad():
        for parameter in half.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)  # the new process's adapter is another one
    half.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    expected = [e for e in whole.state.log_history if e.get("step", 0) > 2 and "kl" in e]
    found = [e for e in half.state.log_history if e.get("step", 0) > 2 and "kl" in e]
    for name in ("kl", "kl/base_per_token", "reward"):
        assert [e[name] for e in found] == [e[name] for e in expected]
    for name, parameter in parameters(half.model, "ref").items():
        assert torch.equal(parameter, parameters(whole.model, "ref")[name])


def test_references_refuse_what_they_cannot_do(make_trainer):
    with pytest.raises(ValueError, match="needs a model with an adapter"):
        ReferenceCallback(make_trainer())
    trainer = make_trainer(lora=True)
    with pytest.raises(ValueError, match="reference must be one of"):
        ReferenceCallback(trainer, "policy")
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\], got 0"):
        MovingAverageReferenceCallback(trainer, alpha=0)
    with pytest.raises(ValueError, match="a reset needs steps, or kl_per_sequence"):
        ResetReferenceCallback(trainer)
