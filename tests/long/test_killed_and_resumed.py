"""SIGKILL at 20 random moments, resumed each time: the run ends as if nothing had happened, bit for bit."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kl_alliteration.lab.runs import last_checkpoint

RECIPE = str(Path(__file__).parents[2] / "recipes/rloo_tall_tree.py")
KILLS = 20
TINY = (
    "--max_steps 40 --max_completion_length 12 --num_generations 8 --per_device_train_batch_size 8 --eval_stories 2 "
    "--logging_steps 1 --show_stories_every 0 --save_strategy steps --save_steps 1 --save_total_limit 3 "
    "--kl_controller pi --target_kl_per_token 0.05 --kl_budget_per_token none --warmup_steps 2"
)
VARIANTS = {
    "full": (),
    "lora": "--use_peft --lora_r 4 --kl_reference moving_average --ref_model_sync_steps 3".split(),
}


def start(folder, options) -> subprocess.Popen:
    command = [sys.executable, RECIPE, "--output_dir", str(folder), *TINY.split(), *options]
    command += ["--resume_from_checkpoint", "latest"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def steps_done(folder) -> int:
    checkpoint = last_checkpoint(folder)
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


def outcome(folder: Path) -> dict:
    """Weights, state of the rule and log of a finished run; times left out."""
    (weights,) = [p for name in ("model", "adapter_model") if (p := folder / f"{name}.safetensors").exists()]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = "step_time", "train_", "seconds"
    log = [{k: v for k, v in entry.items() if not k.startswith(times)} for entry in log]
    state = json.loads(Path(last_checkpoint(folder), "trainer_state.json").read_text())
    rule = state["stateful_callbacks"]["kl_alliteration.KLControl"]
    reference = folder / "checkpoint-40/ref/adapter_model.safetensors"
    reference = reference.read_bytes() if reference.exists() else None
    return {"weights": weights.read_bytes(), "log": log, "rule": rule, "reference": reference}


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_kills_leave_no_trace(tmp_path, variant):
    options = VARIANTS[variant]
    whole = start(tmp_path / "whole", options)
    assert whole.wait(timeout=600) == 0, whole.stderr.read()[-3000:]
    expected = outcome(tmp_path / "whole")
    assert [entry["step"] for entry in expected["log"][:40]] == list(range(1, 41))
    dice, kills, chain, ended = random.Random(0), 0, 0, 0
    while kills < KILLS or not ended:
        folder, alive = tmp_path / f"chain_{chain}", None
        while alive is None:
            process, before = start(folder, options), steps_done(folder)
            while process.poll() is None and steps_done(folder) == before:
                time.sleep(0.02)
            time.sleep(dice.uniform(0, 0.6))
            if kills < KILLS and process.poll() is None:
                process.kill()
                kills += 1
            status = process.wait(timeout=600)
            if status != -9:
                assert status == 0, process.stderr.read()[-3000:]
                alive = folder
        assert outcome(folder) == expected
        chain, ended = chain + 1, ended + 1
    print(f"{variant}: {kills} kills over {chain} runs, every outcome equal")
