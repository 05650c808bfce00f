"""The Hub, through the real client and recipes in processes of their own, against a server on loopback."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer

from kl_alliteration.lab.options import PenaltyArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe

ROOT = Path(__file__).parent.parent
SMALL = "--max_steps 2 --max_completion_length 12 --eval_stories 6 --logging_steps 1 --show_stories_every 0".split()
REPO = "ada/tall-tree"


@pytest.fixture
def hub():
    server = HubServer(tokens={"hf_ada": "ada", "hf_eve": "eve"})
    yield server
    server.shutdown()


@pytest.fixture
def at_hub(hub, tmp_path):
    """`at_hub(*command, token=...)`: a command in a process that knows no Hub but this one."""

    def run(*command, token="hf_ada", home="home"):
        env = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token,
            "NO_PROXY": "127.0.0.1",
            "COLUMNS": "200",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        return subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def recipe(name="rloo_tall_tree.py"):
    return sys.executable, ROOT / "recipes" / name


PUSH = "--output_dir", "out", "--use_peft", "--push_to_hub", "--hub_model_id", REPO, "--learning_rate", "1e-2", *SMALL


def test_train_push_and_a_stranger_reads_it(hub, at_hub, tmp_path):
    done = at_hub(*recipe(), *PUSH, "--hub_strategy", "checkpoint", "--save_strategy", "steps", "--save_steps", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded back: log-probabilities agree (0 nats)" in done.stdout
    files = hub.files(REPO)
    promised = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "curves.png"}
    promised |= {"metrics.jsonl", "summary.json", "stories.md", "recipe.yaml"}
    assert promised <= set(files)
    assert "last-checkpoint/trainer_state.json" in files  # asked for
    top = {name for name in files if not name.startswith("last-checkpoint/")}
    assert "model.safetensors" not in top and not any(name.startswith("ref/") for name in top)
    assert not any(str(ROOT).encode() in content for name, content in files.items() if name in top)  # no path of here
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "peft" and {"trl", "rloo", "lora"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # the embedded model is on no Hub
    summary = json.loads(files["summary.json"])
    assert f"{summary['after']['reward_mean']:.3f} |" in card and "Once upon a time" in card
    assert (
        "exact in the reward and loss, beta 1 per nat of the sequence beyond a budget of 0.15 nats per token" in card
    )
    assert "- Reward: `alliteration_reward`" in card
    assert f'load_adapter("{REPO}")' in card

    told = at_hub(
        *recipe("tell_stories.py"), "--model_name_or_path", REPO, "--stories", "2", token="", home="stranger"
    )
    assert told.returncode == 0, told.stderr[-3000:]
    assert "adapter on: " in told.stdout and "adapter off: " in told.stdout and told.stdout.count("Once upon") == 4

    code = re.search(r"```python\n(.*?)```", card, re.S)[1]  # the card's own words load it
    assert at_hub(sys.executable, "-c", code, home="stranger").returncode == 0

    (tmp_path / "again.yaml").write_bytes(files["recipe.yaml"])
    defaults = ROOT / "recipes/rloo_tall_tree.yaml"
    from trl import ModelConfig, RLOOConfig

    def parsed(argv):
        return parse_recipe(RecipeParser((PenaltyArguments, RLOOConfig, ModelConfig), defaults), argv)

    expected = parsed([*PUSH, "--hub_strategy", "checkpoint", "--save_strategy", "steps", "--save_steps", "1"])
    for found, wanted in zip(parsed(["--config", str(tmp_path / "again.yaml")]), expected, strict=True):
        assert found == wanted
    assert files["recipe.yaml"].decode().startswith("# accelerate launch recipes/rloo_tall_tree.py --output_dir out")

    more = at_hub(*recipe(), "--output_dir", "more", "--adapter_name_or_path", REPO, "--kl_reference", "base", *SMALL)
    assert more.returncode == 0, more.stderr[-3000:]
    assert json.loads((tmp_path / "more/adapter_config.json").read_text())["r"] == 16


def test_a_private_repository_and_a_token_that_stays_private(hub, at_hub):
    saves = "--hub_strategy", "checkpoint", "--save_strategy", "steps", "--save_steps", "1"
    done = at_hub(*recipe(), *PUSH, *saves, "--hub_private_repo", "True", "--hub_token", "hf_ada", token="")
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.repos[REPO]["private"]
    assert "--hub_token '***'" in hub.files(REPO)["recipe.yaml"].decode()
    assert [name for name, content in hub.files(REPO).items() if b"hf_ada" in content] == []
    read = *recipe("tell_stories.py"), "--model_name_or_path", REPO, "--stories", "1"
    refused = at_hub(*read, token="hf_eve", home="eve")
    assert refused.returncode == 2 and "error: " in refused.stderr and "Traceback" not in refused.stderr
    assert at_hub(*read, home="other").returncode == 0


def test_refused_before_training(hub, at_hub, tmp_path):
    assert at_hub("hf", "repos", "create", "taken").returncode == 0
    for token, name, words in (
        ("hf_nobody", REPO, "no valid login at the Hub"),
        ("hf_ada", "a/b/c", "the Hub does not take the repository 'a/b/c'"),
        ("hf_ada", "eve/mine", "the Hub does not take the repository 'eve/mine'"),
        ("hf_eve", "ada/taken", "the token may not write to ada/taken"),
    ):
        done = at_hub(*recipe(), *PUSH, "--hub_model_id", name, token=token)
        assert done.returncode == 2 and f"error: push_to_hub: {words}" in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["/lfs/", "/commit/"])
def test_a_hub_that_dies_in_the_middle_of_a_push_loses_nothing(hub, at_hub, tmp_path, where):
    hub.die_at = where
    done = at_hub(*recipe(), *PUSH)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "error: not pushed to the Hub" in done.stdout and hub.files(REPO) == {}
    assert (tmp_path / "out/adapter_model.safetensors").exists() and (tmp_path / "out/README.md").exists()
    hub.die_at, hub.dead = None, False
    (later,) = [line for line in done.stdout.splitlines() if line.startswith("hf upload")]
    assert at_hub(*shlex.split(later)).returncode == 0
    assert "adapter_model.safetensors" in hub.files(REPO) and "training_args.bin" not in hub.files(REPO)
