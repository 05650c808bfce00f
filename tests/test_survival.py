"""Each fault provoked for real: the message, the status, and what is left on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import ROOT, fork, run
from test_recipes import RECIPE, lines
from transformers import AutoModelForCausalLM, TrainerCallback

from kl_alliteration.lab.checked_rewards import CheckedReward
from kl_alliteration.lab.runs import is_complete, last_checkpoint
from kl_alliteration.lab.survival import Terminated, TrainingStopped, stop_beyond, train_or_say_why

TINY = (
    "--max_completion_length 8 --num_generations 8 --per_device_train_batch_size 8 --eval_stories 2 --logging_steps 1"
)
OPTIONS = *TINY.split(), "--show_stories_every", "0", "--save_strategy", "steps", "--save_steps", "1"
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(cwd, *options, launcher) -> subprocess.Popen:
    command = [*launcher, str(ROOT / "recipes" / RECIPE), "--output_dir", "out", *OPTIONS, *map(str, options)]
    return subprocess.Popen(command, cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def error_of(returncode: int, stderr: str, status: int) -> str:
    assert returncode == status, stderr[-3000:]
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    return line


def stopped(cwd, *options) -> str:
    """The line of a run in this process that is stopped."""
    done = run(RECIPE, "--output_dir", "out", *OPTIONS, *options, cwd=cwd, check=False)
    return error_of(done.returncode, done.stderr, status=3)


def reward_file(tmp_path, body: str) -> tuple[str, str]:
    """`--reward_funcs` of a function whose calls are counted: `n` is the batch, from 1, judging included."""
    head = "import math, os, time\nn = 0\n\ndef reward(completions, **kwargs):\n    global n\n    n += 1\n"
    (tmp_path / "faulty.py").write_text(f"{head}    {body}\n    return [float(len(c)) for c in completions]\n")
    return "--reward_funcs", "faulty.reward"


# Judging before training is one call, so that step 7 is the eighth.
@pytest.mark.parametrize(
    ("body", "options", "cause"),
    [
        ("if n == 8: return [math.nan] * len(completions)", (), "faulty.reward returned nan for "),
        ("if n == 8: raise KeyError('word')", (), "faulty.reward raised KeyError: 'word' ("),
        ("if n == 8: time.sleep(100)", ("--reward_timeout", 2), "faulty.reward has not answered for 2 s"),
        ("if n == 8: return [1.0]", (), "faulty.reward returned 1 rewards for 8 completions"),
    ],
)
def test_a_faulty_reward_at_step_7(tmp_path, body, options, cause):
    line = stopped(tmp_path, *reward_file(tmp_path, body), *options, "--max_steps", 9)
    assert line.startswith("error: stopped at step 6: reward_funcs: ") and cause in line
    assert "the last good checkpoint is out/checkpoint-6: go on with --resume_from_checkpoint latest" in line
    assert is_complete(tmp_path / "out/checkpoint-6") and "faulty" in (tmp_path / "out/error.txt").read_text()
    assert not (tmp_path / "out/summary.json").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    reward = reward_file(tmp_path, "open('step', 'w').write(str(n)); time.sleep(0.3)")
    options = *reward, "--max_steps", 6, "--save_steps", 100
    log = tmp_path / "log.txt"
    child = fork(RECIPE, "--output_dir", "out", *OPTIONS, *options, cwd=tmp_path, log=log)
    while not (tmp_path / "step").exists() or (tmp_path / "step").read_text() not in "3456":
        ended, _ = os.waitpid(child, os.WNOHANG)
        assert not ended, log.read_text()[-2000:]
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    line = error_of(os.waitstatus_to_exitcode(status), log.read_text(), status=75)
    step = int(last_checkpoint(tmp_path / "out").rpartition("-")[2])
    assert 2 <= step < 6 and f"SIGTERM at step {step}; the last good checkpoint is out/checkpoint-{step}" in line
    again = "--output_dir", "out", *OPTIONS, *options, "--resume_from_checkpoint", "latest"
    assert f"Resuming from out/checkpoint-{step}" in run(RECIPE, *again, cwd=tmp_path).stdout
    assert [line.get("step") for line in lines(tmp_path / "out/metrics.jsonl")][:6] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(tmp_path):
    disk = tmp_path / "out"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        line = stopped(tmp_path, "--max_steps", 9)  # a checkpoint is some 21 MB
        good = last_checkpoint(disk)
        assert f"stopped at step {int(good.rpartition('-')[2]) + 1}: " in line and Path(good).name in line
        assert "the disk of out is full" in line
        assert all(is_complete(checkpoint) for checkpoint in disk.glob("checkpoint-*"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_rank_that_dies_takes_the_other_with_it(tmp_path):
    reward = reward_file(tmp_path, "if n == 4 and os.environ['RANK'] == '1': os.kill(os.getpid(), 9)")
    launcher = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    process = start(tmp_path, *reward, "--max_steps", 9, "--use_cpu", launcher=launcher)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode != 0 and "exitcode  : -9" in stderr, stderr[-3000:]
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out/checkpoint-2")
    assert all(is_complete(checkpoint) for checkpoint in (tmp_path / "out").glob("checkpoint-*"))


def test_a_kl_beyond_the_limit(make_trainer):
    trainer = make_trainer(max_steps=50, learning_rate=0.1, beta=1e-3)
    stop_beyond(trainer, 0.5)
    with pytest.raises(
        TrainingStopped, match=r"stopped at step \d+: the KL is \S+ nats per sequence, beyond kl_limit"
    ):
        train_or_say_why(trainer, trainer.train)
    assert 0 < trainer.state.global_step < 50


def test_a_kl_beyond_the_limit_at_beta_zero_too(make_trainer):
    """Where no reference is scored, nor loaded, unless somebody asks."""
    trainer = make_trainer(max_steps=50, learning_rate=0.1, beta=0.0)
    stop_beyond(trainer, 0.5)
    with pytest.raises(TrainingStopped, match="nats per sequence, beyond kl_limit"):
        train_or_say_why(trainer, trainer.train)


def test_an_evaluation_beyond_the_limit_stops_nothing(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    stop_beyond(trainer, 1e-3)
    found = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert found["eval_kl"] > 1e-3  # nats per token, and so beyond it


def test_a_loss_that_is_no_number(make_trainer):
    trainer = make_trainer(max_steps=5, save_strategy="steps", save_steps=1)
    stop_beyond(trainer, 1e9)  # any instrument looks at the loss
    compute = trainer._compute_loss.__self__.stock.compute_loss

    def poisoned(model, inputs):
        return compute(model, inputs) * (float("nan") if trainer.state.global_step == 2 else 1)

    trainer._compute_loss.__self__.stock.compute_loss = poisoned
    with pytest.raises(
        TrainingStopped, match="stopped at step 2: FloatingPointError: the loss is nan; .*checkpoint-2"
    ):
        train_or_say_why(trainer, trainer.train)


def test_ctrl_c(make_trainer):
    class Person(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=1)
    trainer.add_callback(Person())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match="stopped at step 2: interrupted; the last good .*checkpoint-2") as e:
        train_or_say_why(trainer, trainer.train)
    assert e.value.status == 130 and signal.getsignal(signal.SIGTERM) is before


class Cluster(TrainerCallback):
    """Sends SIGTERM in the step after so many."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_only_caught_while_training(make_trainer):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(max_steps=4)
    trainer.add_callback(Cluster(1))
    with pytest.raises(Terminated, match="SIGTERM at step 2; the last good checkpoint is .*checkpoint-2"):
        train_or_say_why(trainer, trainer.train)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("max_steps", "saved"), [(6, 4), (3, 3)])  # the second's last batch is never used up
def test_a_signal_waits_for_the_last_update_of_a_batch(make_trainer, max_steps, saved):
    trainer = make_trainer(max_steps=max_steps, num_iterations=2)
    trainer.add_callback(Cluster(2))
    with pytest.raises(Terminated, match=f"SIGTERM at step {saved}; the last good checkpoint is .*checkpoint-{saved}"):
        train_or_say_why(trainer, trainer.train)


def test_where_all_steps_were_made_the_best_is_loaded_as_the_trainer_would(make_trainer, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**options).train()
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    state["best_model_checkpoint"] = str(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-2/trainer_state.json").write_text(json.dumps(state))
    again = make_trainer(**options)
    again.args.load_best_model_at_end = True  # which TRL's configuration ties to evaluations
    train_or_say_why(again, lambda: again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    for ours, theirs in zip(again.model.parameters(), best.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_where_all_steps_were_made_none_is_added(make_trainer, tmp_path, capsys):
    """Two steps of an epoch of four; whatever else a run restores at its start is restored."""

    class Ends(TrainerCallback):
        ended = 0

        def on_train_end(self, args, state, control, **kwargs):
            self.ended += 1

    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    first = make_trainer(**options)
    first.train()
    again = make_trainer(**options)
    again.add_callback(ends := Ends())
    train_or_say_why(again, lambda: again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert "All 2 steps were made: nothing is left to train" in capsys.readouterr().out and ends.ended == 1
    for ours, theirs in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [e["step"] for e in again.state.log_history if "reward" in e] == [1, 2]
    assert not again.is_in_train
    more = make_trainer(**options | {"max_steps": 3})
    train_or_say_why(more, lambda: more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert more.state.global_step == 3


def test_a_reward_may_take_its_time():
    slow = CheckedReward(lambda prompts, completions: time.sleep(0.1) or [1.0], "slow", timeout=5)
    assert slow(["a"], ["b"]) == [1.0]
    of_tensor = CheckedReward(lambda prompts, completions: torch.tensor([1.5, 2.0]), "tensor", timeout=5)
    assert of_tensor(["a"] * 2, ["b"] * 2) == [1.5, 2.0]
    with pytest.raises(TrainingStopped, match="raised TimeoutError: mine"):
        CheckedReward(_own_timeout, "own", timeout=5)(["a"], ["b"])


def _own_timeout(prompts, completions):
    raise TimeoutError("mine")
