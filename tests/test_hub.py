"""The Hub, through the real client, against a server on loopback.

One push and the stranger who reads it are processes that know no other Hub. The other recipes run in this process,
where the client's constants, which it reads as it is imported, are set by hand.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from gguf_files import tiny_llama, write_gguf
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import _http
from programs import ROOT, run
from trl import ModelConfig, RLOOConfig

from kl_alliteration.adapters import load_adapter
from kl_alliteration.lab.gguf import as_folder
from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe

SMALL = "--max_steps 2 --max_completion_length 12 --eval_stories 6 --logging_steps 1 --show_stories_every 0".split()
REPO, RECIPE = "ada/tall-tree", "rloo_tall_tree.py"


@pytest.fixture
def hub():
    server = HubServer(tokens={"hf_ada": "ada", "hf_eve": "eve"})
    yield server
    server.shutdown()


@pytest.fixture
def environment(hub, tmp_path):
    """`environment(token, home)`: of a program that knows no Hub but this one."""
    return lambda token, home: {
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


@pytest.fixture
def at_hub(environment, tmp_path):
    """`at_hub(*command, token=...)`: a command in a process of its own."""

    def run(*command, token="hf_ada", home="home"):
        env = os.environ | environment(token, home)
        return subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


@pytest.fixture
def here(hub, environment, tmp_path, monkeypatch):
    """`here(recipe, *words, token=...)`: a recipe in this process."""

    def run_here(name, *words, token="hf_ada", home="home"):
        with monkeypatch.context() as patched:
            cache = tmp_path / home / "hub"
            for constant, value in {
                "ENDPOINT": hub.url,
                "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_OFFLINE": False,
                "HF_HUB_DISABLE_XET": True,
                "HF_HOME": str(cache.parent),
                "HF_HUB_CACHE": str(cache),
                "HF_TOKEN_PATH": str(cache.parent / "token"),
            }.items():
                patched.setattr(constants, constant, value)
            patched.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # its methods are the client's functions
            patched.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
            # It waits longer before each new attempt.
            patched.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
            huggingface_hub.close_session()
            try:
                return run(name, *words, cwd=tmp_path, check=False, env=environment(token, home))
            finally:
                huggingface_hub.close_session()

    return run_here


PUSH = "--output_dir", "out", "--use_peft", "--push_to_hub", "--hub_model_id", REPO, "--learning_rate", "1e-2", *SMALL


def test_train_push_and_a_stranger_reads_it(hub, at_hub, here, tmp_path):
    saves = "--hub_strategy", "checkpoint", "--save_strategy", "steps", "--save_steps", "1"
    done = at_hub(sys.executable, ROOT / "recipes" / RECIPE, *PUSH, *saves)
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
    assert "0.5 times beta per nat of the first 12 tokens; reward by token, discount 0.8" in card
    assert "- Reward: `alliteration_reward`" in card
    assert f'load_adapter("{REPO}")' in card

    told = here("tell_stories.py", "--model_name_or_path", REPO, "--stories", "2", token="", home="stranger")
    assert told.returncode == 0, told.stderr[-3000:]
    assert "adapter on: " in told.stdout and "adapter off: " in told.stdout and told.stdout.count("Once upon") == 4

    code = re.search(r"```python\n(.*?)```", card, re.S)[1]  # the card's own words load it
    assert at_hub(sys.executable, "-c", code, home="stranger").returncode == 0

    (tmp_path / "again.yaml").write_bytes(files["recipe.yaml"])
    defaults = ROOT / "recipes/rloo_tall_tree.yaml"

    def parsed(argv):
        return parse_recipe(RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), defaults), argv)

    expected = parsed([*PUSH, *saves])
    for found, wanted in zip(parsed(["--config", str(tmp_path / "again.yaml")]), expected, strict=True):
        assert found == wanted
    assert files["recipe.yaml"].decode().startswith("# accelerate launch recipes/rloo_tall_tree.py --output_dir out")

    more = here(RECIPE, "--output_dir", "more", "--adapter_name_or_path", REPO, "--kl_reference", "base", *SMALL)
    assert more.returncode == 0, more.stderr[-3000:]
    assert json.loads((tmp_path / "more/adapter_config.json").read_text())["r"] == 16


def test_a_private_repository_and_a_token_that_stays_private(hub, here):
    saves = "--hub_strategy", "checkpoint", "--save_strategy", "steps", "--save_steps", "1"
    done = here(RECIPE, *PUSH, *saves, "--hub_private_repo", "True", "--hub_token", "hf_ada", token="")
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.repos[REPO]["private"]
    assert "--hub_token ***" in hub.files(REPO)["recipe.yaml"].decode()
    assert [name for name, content in hub.files(REPO).items() if b"hf_ada" in content] == []
    read = "tell_stories.py", "--model_name_or_path", REPO, "--stories", "1"
    refused = here(*read, token="hf_eve", home="eve")
    assert refused.returncode == 2 and "error: " in refused.stderr and "Traceback" not in refused.stderr
    assert here(*read, home="other").returncode == 0


def test_refused_before_training(hub, at_hub, here, tmp_path):
    assert at_hub("hf", "repos", "create", "taken").returncode == 0
    for token, name, words in (
        ("hf_nobody", REPO, "no valid login at the Hub"),
        ("hf_ada", "a/b/c", "the Hub does not take the repository 'a/b/c'"),
        ("hf_ada", "eve/mine", "the Hub does not take the repository 'eve/mine'"),
        ("hf_eve", "ada/taken", "the token may not write to ada/taken"),
    ):
        done = here(RECIPE, *PUSH, "--hub_model_id", name, token=token)
        assert done.returncode == 2 and f"error: push_to_hub: {words}" in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["/lfs/", "/commit/"])
def test_a_hub_that_dies_in_the_middle_of_a_push_loses_nothing(hub, at_hub, here, tmp_path, where):
    hub.die_at = where
    done = here(RECIPE, *PUSH, "--hub_revision", "dev")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert f"POST /api/models/{REPO}/branch/dev" in hub.requests  # made before training
    assert "error: not pushed to the Hub" in done.stdout and hub.files(REPO) == {}
    assert (tmp_path / "out/adapter_model.safetensors").exists() and (tmp_path / "out/README.md").exists()
    hub.die_at, hub.dead = None, False
    (later,) = [line for line in done.stdout.splitlines() if line.startswith("hf upload")]
    assert at_hub(*shlex.split(later)).returncode == 0 and later.endswith("--revision dev")
    assert "adapter_model.safetensors" in hub.files(REPO) and "training_args.bin" not in hub.files(REPO)


def test_an_adapter_on_a_gguf_file_loads_on_the_model_at_the_hub(hub, at_hub, here, tmp_path):
    """By someone who has PEFT and not this package. The file is a copy of what is at the Hub, here an exact one."""
    file, base = write_gguf(tiny_llama(), tmp_path / "tiny.gguf"), "ada/tiny-chat"
    folder = as_folder(str(file), hub_id=base)
    assert at_hub("hf", "repos", "create", base).returncode == 0
    assert at_hub("hf", "upload", base, folder, ".").returncode == 0
    prompts = [{"prompt": [{"role": "user", "content": word}]} for word in ("the cat", "a bat", "a fox")]
    for name, rows in (("train", prompts[:2]), ("held_out", prompts[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "--dataset_name train.jsonl --eval_dataset_name held_out.jsonl --learning_rate 0.1".split()
    done = here(RECIPE, "--model_name_or_path", str(file), *PUSH, *data)
    assert done.returncode == 0 and "log-probabilities agree" in done.stdout, done.stderr[-3000:]
    files = hub.files(REPO)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == base
    card = files["README.md"].decode()
    assert f"base_model: {base}" in card and f"A LoRA adapter for {base}, as the weights of `tiny.gguf`" in card
    assert "user: a fox assistant:" in card and "the cat" not in card  # the topics that it was not trained on
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    alone = f"import sys; sys.modules['kl_alliteration'] = None\n{code}\n"
    alone += "import torch; print(model(torch.tensor([[5, 9, 12]])).logits.log_softmax(-1).flatten().tolist())"
    theirs = at_hub(sys.executable, "-c", alone, home="stranger", token="")
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    ours = load_adapter(str(tmp_path / "out"), folder)
    expected = ours(torch.tensor([[5, 9, 12]])).logits.log_softmax(-1).flatten()
    assert torch.allclose(torch.tensor(json.loads(theirs.stdout.splitlines()[-1])), expected, atol=1e-5)
    with ours.disable_adapter():  # and it is an adapter that does something
        assert not torch.allclose(
            ours(torch.tensor([[5, 9, 12]])).logits.log_softmax(-1).flatten(), expected, atol=0.01
        )
