"""ZeRO-2, ZeRO-3 and FSDP2, two processes on CPUs, against one process with the same batches: numbers and weights.

Needs `make engines`. Prints the largest differences, which docs/scale.md quotes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kl_alliteration.story_lm import MODEL_PATH

pytest.importorskip("deepspeed", reason="needs make engines")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "sharded_run.py"
BOUND = 1e-5  # of every number and weight; penalties differ by a hundred times that

CASES = {
    "k1 in reward, full": {"penalty": ("k1", "reward")},
    "exact in reward, full": {"penalty": ("exact", "reward")},
    "exact in both, full": {"penalty": ("exact", "both")},
    "k1 in reward, LoRA": {"penalty": ("k1", "reward"), "lora": True},
    "exact in reward, LoRA": {"penalty": ("exact", "reward"), "lora": True},
    "exact in both, LoRA": {"penalty": ("exact", "both"), "lora": True},
    "watched at beta 0": {},
    "a loaded reference": {"penalty": ("exact", "reward"), "lora": True, "reference": "loaded"},
    "the start as reference": {"penalty": ("k1", "reward"), "lora": True, "reference": "start"},
    "a reference that follows": {"penalty": ("k1", "reward"), "lora": True, "reference": "average"},
    "a reference that is reset": {"penalty": ("k1", "reward"), "lora": True, "reference": "reset"},
}
# The second ZeRO-3 keeps no weight whole, however small: as it comes, DeepSpeed keeps those below 100,000 numbers.
NOTHING_WHOLE = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    ),
}
STRATEGIES = {  # Accelerate's name, the stage, the share of the LM head that process 0 holds when it is done
    "zero2": ("DEEPSPEED", 2, 1.0),
    "zero3": ("DEEPSPEED", 3, 1.0),
    "zero3, nothing whole": ("DEEPSPEED", 3, 0.0),
    "fsdp2": ("FSDP", None, 11 / 21),
}
MOVES = ("a reference that follows", "a reference that is reset")
REFUSED = {
    **{("zero3", name): "moving reference.*ZeRO-3: use stage 2" for name in MOVES},
    **{("fsdp2", name): "moving reference.*FSDP: use DDP or ZeRO-2" for name in MOVES},
    ("zero3", "exact in both, full"): "ZeRO-3 shards the LM head.*: put it into the reward, or use LoRA, ZeRO-2",
}


def launcher(strategy: str, folder: Path) -> list[str]:
    """Of the configuration in `accelerate_configs/`, on two processes and CPUs."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{strategy.split(',')[0]}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2}
    if strategy == "zero3, nothing whole":
        (folder / "deepspeed.json").write_text(json.dumps(NOTHING_WHOLE))
        config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": True}
        del config["mixed_precision"]  # which Accelerate then wants in that file alone
    (folder / "launch.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "accelerate.commands.launch", "--config_file", folder / "launch.yaml"]
    return [*words, "--main_process_port", port, "--num_cpu_threads_per_process", 1]


def start(*words) -> subprocess.CompletedProcess:
    # What DeepSpeed compiles, once, stays with the environment.
    compiled = {"TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions")}
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | compiled
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600, env=environment
    )


def run(folder: Path, model: Path, cases: dict, launch: list, killed: bool = False) -> dict:
    """What `sharded_run.py` found, case by case."""
    plain = {"penalty": None, "lora": False, "reference": None, "resume": None, "killed": killed}
    asked = {name: plain | {"output_dir": str(folder / name)} | options for name, options in cases.items()}
    done = start(*launch, SCRIPT, model, folder / "found.pt", json.dumps(asked))
    assert killed == (done.returncode != 0), done.stderr[-4000:]
    return {} if killed else torch.load(folder / "found.pt")


@pytest.fixture(scope="session")
def alone(tiny_model, tmp_path_factory):
    """One process, no launcher."""
    return run(tmp_path_factory.mktemp("alone"), tiny_model, CASES, [])


@pytest.fixture(scope="session", params=STRATEGIES)
def sharded(request, tiny_model, tmp_path_factory):
    """`(strategy, what it found)`, with a run that goes on from the checkpoint of one that was killed."""
    strategy, folder = request.param, tmp_path_factory.mktemp("sharded")
    launch, k1 = launcher(strategy, folder), {"penalty": ("k1", "reward")}
    run(folder, tiny_model, {"killed": k1}, launch, killed=True)
    resumed = k1 | {"resume": str(folder / "killed" / "checkpoint-2")}
    return strategy, run(folder, tiny_model, CASES | {"resumed": resumed}, launch)


def differences(one: dict, other: dict) -> dict[str, float]:
    """The largest of each number over three steps, and of the weights."""
    assert len(one["log"]) == len(other["log"]) == 3
    assert one["log"][0].keys() == other["log"][0].keys() and one["weights"].keys() == other["weights"].keys()
    found = {
        name: max(abs(a[name] - b[name]) for a, b in zip(one["log"], other["log"], strict=True))
        for name in one["log"][0]
    }
    off = [(weight - other["weights"][name]).abs().max().item() for name, weight in one["weights"].items()]
    return found | {"weights": max(off)}


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_weights_are_those_of_one_process(sharded, alone, case):
    strategy, found = sharded
    if wanted := REFUSED.get((strategy.split(",")[0], case)):
        with pytest.raises(ValueError, match=wanted):
            raise ValueError(found[case].get("refused"))
        return
    kind, stage, share = STRATEGIES[strategy]
    assert "refused" not in found[case], found[case]
    assert [found[case][name] for name in ("kind", "stage", "processes")] == [kind, stage, 2]
    assert found[case]["share_of_head"] == pytest.approx(share)
    assert max(entry["kl/exact_per_token"] for entry in found[case]["log"]) > 1e-6
    worst = differences(alone[case], found[case])
    assert max(worst.values()) < BOUND, worst


def test_a_run_that_was_killed_goes_on_as_one_that_was_not(sharded, alone):
    strategy, found = sharded
    worst = differences(alone["k1 in reward, full"], found["resumed"])
    print(f"\n{strategy}, killed in step 3, resumed from step 2: weights {worst['weights']:.1e}", end="")
    assert max(worst.values()) < BOUND, worst


def test_the_largest_difference_of_each_number(sharded, alone):
    strategy, found = sharded
    each = [differences(alone[case], found[case]) for case in CASES if "refused" not in found[case]]
    names = ("reward", "kl", "kl/exact_per_token", "kl/beta", "loss", "grad_norm", "weights")
    worst = {name: max(one[name] for one in each if name in one) for name in names}
    print(f"\n{strategy}, {len(each)} runs: " + ", ".join(f"{name} {off:.1e}" for name, off in worst.items()))
    assert max(worst.values()) < BOUND


def test_the_bound_tells_penalties_apart(alone):
    """And one process is one."""
    assert {(each["kind"], each["processes"]) for each in alone.values()} == {("NO", 1)}
    for lora in ("full", "LoRA"):
        worst = differences(alone[f"k1 in reward, {lora}"], alone[f"exact in reward, {lora}"])
        assert worst["weights"] > 100 * BOUND and worst["kl"] > BOUND


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("zero2", "--report_to none"),
        ("zero3", "--use_peft --plots true --base_samples 100"),
        ("zero3", "--kl_placement reward"),
    ],
)
def test_the_recipe_trains_and_saves_what_loads(strategy, options, tmp_path):
    """Half a group on each process; the folder holds the whole model or adapter, and it has moved."""
    out = tmp_path / "out"
    small = "--max_steps 2 --max_completion_length 12 --eval_stories 6 --logging_steps 1 --learning_rate 1e-2".split()
    half = "--num_generations 8 --per_device_train_batch_size 4 --warmup_steps 0 --report_to none --use_cpu".split()
    recipe = ROOT / "recipes/rloo_tall_tree.py"
    done = start(*launcher(strategy, tmp_path), recipe, "--output_dir", out, *small, *half, *options.split())
    assert done.returncode == 0, done.stderr[-4000:]
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["generations"] for entry in entries[:2]] == [8, 16]
    base = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    trained = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        off = (trained(ids).logits - base(ids).logits).abs().max()
    assert 1e-3 < off < 100
    summary = json.loads((out / "summary.json").read_text())  # judged with whole weights: no KL before, one after
    before, after = (summary[when]["exact_kl_per_sequence"] for when in ("before", "after"))
    assert before == pytest.approx(0, abs=1e-4) and after > 1e-2
