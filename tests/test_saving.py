"""Adapters whose saving is cut off: the one before is whole, and a run goes on from it."""

import os
import shutil
import signal
import sys

import pytest
from test_adapters import randomized
from transformers import TrainerCallback

from kl_alliteration.adapters import default_lora_config
from kl_alliteration.lab.run import save_final
from kl_alliteration.lab.runs import last_checkpoint
from kl_alliteration.references import ReferenceCallback


class Killer:
    """Kills its process at the n-th time that it opens or makes something under a folder."""

    def __init__(self, folder: str, n: int):
        self.folder, self.left = folder, n

    def __call__(self, event, args):
        if event in ("open", "os.mkdir", "os.rename") and self.folder in str(args[0]):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_of_saving(make_trainer, tmp_path):
    """The checkpoint before loads and goes on; a half-written one is never taken."""

    def made(folder, steps=3):
        trainer = make_trainer(
            lora=default_lora_config(r=2), max_steps=steps, save_strategy="steps", save_steps=1, output_dir=str(folder)
        )
        trainer.add_callback(ReferenceCallback(trainer))
        return trainer

    taken = []

    class Children(TrainerCallback):
        """At the end of step 2: a child a moment, each with a folder of its own, goes on to save and is killed."""

        child = None

        def on_step_end(self, args, state, control, **kwargs):
            for n in range(1, 40 if state.global_step == 2 else 1):
                folder = tmp_path / str(n)
                shutil.copytree(tmp_path / "whole", folder)
                self.child = os.fork()
                if self.child == 0:
                    args.output_dir = str(folder)
                    sys.addaudithook(Killer(f"{folder}/checkpoint-2", n))
                    return
                _, status = os.waitpid(self.child, 0)
                taken.append((folder, last_checkpoint(folder), status))
                if not os.WIFSIGNALED(status):
                    break

        def on_train_end(self, args, state, control, **kwargs):
            if self.child == 0:
                os._exit(0)

    whole = made(tmp_path / "whole", steps=2)
    whole.add_callback(Children())
    whole.train()
    for n, (folder, checkpoint, status) in enumerate(taken, start=1):
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
        if n % 4 == 1 or not os.WIFSIGNALED(status):
            trainer = made(folder)
            trainer.train(resume_from_checkpoint=checkpoint)
            assert trainer.state.global_step == 3
    steps = [int(checkpoint.rpartition("-")[2]) for _, checkpoint, _ in taken]
    assert n > 6 and steps[:-1].count(1) >= n - 3 and steps[-1] == 2


def test_a_final_save_that_is_cut_off_leaves_the_old_adapter(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(lora=default_lora_config(r=2))
    save_final(trainer)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    randomized(trainer.model)

    def half(folder, **kwargs):
        os.makedirs(folder)
        with open(f"{folder}/adapter_model.safetensors", "wb") as file:
            file.write(before[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer, "save_model", half)
        save_final(trainer)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    save_final(trainer)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != before and not list(tmp_path.glob("_unfinished*"))
