"""Any options, YAML files and rewards: what is refused is one clear line, what is accepted is what was asked for."""

import contextlib
import io
import json
import math
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from trl import ModelConfig, RLOOConfig

from kl_alliteration.lab.checked_rewards import CheckedReward
from kl_alliteration.lab.checks import check_options
from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.lab.parser import RecipeParser, parse_recipe, write_recipe
from kl_alliteration.lab.survival import TrainingStopped, one_line_errors

DEFAULTS = Path(__file__).parents[2] / "recipes/rloo_tall_tree.yaml"
CASES = settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
OURS = sorted(OnlineArguments.__dataclass_fields__)
THEIRS = [
    *("beta", "learning_rate", "num_generations", "per_device_train_batch_size", "max_completion_length", "max_steps"),
    *("temperature", "top_k", "top_p", "reward_weights", "save_strategy", "save_steps", "seed", "num_iterations"),
    *("lr_scheduler_type", "warmup_steps", "logging_steps", "epsilon", "lora_r", "lora_target_modules", "use_peft"),
    *("model_name_or_path", "dtype", "normalize_advantages", "ref_model_mixup_alpha", "ref_model_sync_steps"),
]
NAMES = st.sampled_from(OURS + THEIRS) | st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)
WORDS = st.one_of(
    st.integers(-10, 200).map(str),
    st.floats(width=32).map(str),
    st.sampled_from(["true", "false", "none", "", "exact", "k1", "both", "sum", "mean", "reset", "pi", "./x", "a/b"]),
    st.text(max_size=8),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 200) | st.floats(width=32) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def attempt(argv: list[str]):
    """What a recipe does before it loads a model: the parsed options, or the one line that refuses them."""

    @one_line_errors
    def main():
        parsed = parse_recipe(RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), DEFAULTS), argv)
        parsed[1].push_to_hub = False  # no network here
        check_options(*parsed)
        return parsed

    stdout, stderr = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                return main(), None
        except SystemExit as exit:
            if exit.code == 0:  # --help
                return None, None
            assert exit.code == 2
            lines = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and len(lines[0]) > len("error: ") + 3
            assert "Traceback" not in stderr.getvalue()
            return None, lines[0]
        finally:
            assert os.listdir(folder) == []


def value_of(parsed, name: str):
    return next(getattr(arguments, name) for arguments in parsed if hasattr(arguments, name))


@pytest.mark.long
@CASES
@given(st.dictionaries(NAMES, WORDS, min_size=1, max_size=4))
def test_options(options):
    parsed, _ = attempt([word for name, value in options.items() for word in (f"--{name}", value)])
    for name, word in options.items() if parsed else ():
        value = value_of(parsed, name)  # an unknown name is not accepted
        if isinstance(value, float) and word != "none" and name != "beta":
            assert value == float(word) or math.isnan(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            assert value == float(word)  # `--logging_steps 2.0` is 2
    event("accepted" if parsed else "refused")


PLAUSIBLE = {
    "beta": st.floats(0, 50),
    "learning_rate": st.floats(1e-9, 1),
    "num_generations": st.sampled_from([2, 4, 5, 8, 10, 20, 40]),
    "max_steps": st.integers(1, 10_000),
    "max_completion_length": st.integers(1, 2_000),
    "temperature": st.floats(0.1, 3),
    "seed": st.integers(0, 2**31),
    "num_iterations": st.integers(1, 4),
    "logging_steps": st.integers(1, 100),
    "kl_estimator": st.sampled_from(["k1", "k2", "k3", "abs", "exact", "top_k"]),
    "kl_placement": st.sampled_from(["reward", "loss", "both"]),
    "kl_reduction": st.sampled_from(["sum", "mean"]),
    "kl_direction": st.sampled_from(["reverse", "forward"]),
    "kl_budget_per_token": st.floats(0, 2) | st.just("none"),
    "kl_controller": st.sampled_from(["fixed", "pi", "step"]),
    "target_kl_per_token": st.floats(0, 1),
    "baseline": st.sampled_from(["leave_one_out", "none"]),
    "collapse_guard": st.sampled_from(["off", "warn", "stop", "rollback"]),
    "use_peft": st.booleans(),
    "lora_r": st.integers(1, 64),
    "kl_reference": st.sampled_from(["start", "base", "moving_average", "reset"]),
    "reset_at_kl": st.floats(0, 10),
    "kl_limit": st.floats(0, 100),
    "eval_stories": st.integers(0, 1_000),
}


@pytest.mark.long
@pytest.mark.parametrize("way", ["words", "yaml"])
@CASES
@given(options=st.fixed_dictionaries({}, optional=PLAUSIBLE))
def test_plausible_options(way, options):
    """Often accepted, and then each has the value that was asked for, by either way."""
    if way == "words":
        parsed, _ = attempt([word for name, value in options.items() for word in (f"--{name}", str(value))])
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(options, file)
            file.flush()
            parsed, _ = attempt(["--config", file.name])
    for name, value in options.items() if parsed else ():
        assert value_of(parsed, name) == (None if value == "none" and name == "kl_budget_per_token" else value), name
    event("accepted" if parsed else "refused")


SECRET = "hf_planted0123456789"


@pytest.mark.long
@CASES
@given(
    options=st.fixed_dictionaries({}, optional=PLAUSIBLE),
    spelling=st.sampled_from(["--hub_token", "--hub-token", "--hub_token=", "--hub-token=", "yaml", "mapping"]),
    dashes=st.booleans(),
    place=st.integers(0, 5),
)
def test_a_token_is_nowhere_and_dashes_are_underscores(options, spelling, dashes, place):
    """Whatever is asked besides, in both spellings: accepted or refused, no file, option or line has the token."""
    words = [[f"--{name.replace('_', '-') if dashes else name}", str(value)] for name, value in options.items()]
    before = os.environ.get("HF_TOKEN")
    with tempfile.TemporaryDirectory() as folder:
        if spelling == "yaml":
            Path(folder, "mine.yaml").write_text(yaml.safe_dump({"hub_token": SECRET}))
            words.insert(0, ["--config", str(Path(folder, "mine.yaml"))])
        elif spelling == "mapping":
            words.insert(min(place, len(words)), ["--model_init_kwargs", json.dumps({"token": SECRET})])
        else:
            told = [f"{spelling}{SECRET}"] if spelling.endswith("=") else [spelling, SECRET]
            words.insert(min(place, len(words)), told)
        parser = RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), DEFAULTS)

        @one_line_errors
        def main():
            parsed = parse_recipe(parser, [word for pair in words for word in pair])
            check_options(*parsed)
            return parsed

        said, parsed = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                parsed = main()
        except SystemExit as exit:
            assert exit.code == 2 and "Traceback" not in said.getvalue()
        finally:
            os.environ.pop("HF_TOKEN", None)
            os.environ.update({} if before is None else {"HF_TOKEN": before})
        if parsed:
            write_recipe(Path(folder, "recipe.yaml"), parser)
            assert SECRET not in Path(folder, "recipe.yaml").read_text() + repr(parsed)
            assert SECRET.encode() not in pickle.dumps(parsed[1])
            for name, value in options.items():
                if name != "learning_rate" or not parsed[2].use_peft:
                    wanted = None if value == "none" and name == "kl_budget_per_token" else value
                    assert value_of(parsed, name) == wanted, name
    assert SECRET not in said.getvalue()
    event("accepted" if parsed else "refused")


@pytest.mark.long
@CASES
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=4) | VALUES)
def test_yaml_files(content):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        parsed, line = attempt(["--config", file.name])
    assert (parsed is None) == (line is not None)
    assert isinstance(content, dict) or parsed is None
    for name, value in content.items() if parsed else ():
        found = value_of(parsed, name)  # an unknown name is not accepted
        if isinstance(value, bool) and isinstance(found, bool):
            assert found is value
    event("accepted" if parsed else "refused")


@pytest.mark.long
@CASES
@given(st.data())
def test_yaml_text(data):
    text = data.draw(st.text(max_size=40) | st.binary(max_size=40))
    with tempfile.NamedTemporaryFile("w+b", suffix=".yaml") as file:
        file.write(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        file.flush()
        parsed, line = attempt(["--config", file.name])
        assert (parsed is None) == (line is not None)
        file.seek(0)
        assert parsed is None or isinstance(yaml.safe_load(file.read()), dict)


@pytest.mark.long
@CASES
@given(VALUES | st.lists(st.floats() | st.none() | st.text(max_size=3) | st.booleans(), max_size=4), st.integers(0, 3))
def test_rewards(returned, completions):
    reward = CheckedReward(lambda prompts, completions: returned, "mine.reward", timeout=10)
    try:
        found = reward(["a"] * completions, ["b"] * completions)
    except TrainingStopped as error:
        assert str(error).startswith("reward_funcs: mine.reward ") and "\n" not in str(error)
    else:
        assert list(found) == list(returned) and all(r is None or math.isfinite(r) for r in found)
