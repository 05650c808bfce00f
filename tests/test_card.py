"""What a run pushes: the card of each kind of model, a README of the user's own, and what is loaded back."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch
import yaml
from conftest import TINY_RUN, reward
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import ModelConfig, RLOOConfig, RLOOTrainer

from kl_alliteration import Judgement
from kl_alliteration.adapters import name_base
from kl_alliteration.lab import hub, judging, run
from kl_alliteration.lab.options import OnlineArguments
from kl_alliteration.lab.parser import RecipeParser, write_recipe
from kl_alliteration.lab.runs import begin_record, is_theirs
from kl_alliteration.story_lm import MODEL_PATH


def judged(text: str) -> Judgement:
    return SimpleNamespace(**dict.fromkeys(Judgement.__dataclass_fields__, 0.5) | {"texts": [text] * 3, "stories": 9})


def card(trainer, folder: Path, **options) -> str:
    trainer.hub_model_id = "ada/tall"
    hub.write_card(folder, trainer, "k1", ["mine"], judged("before"), judged("after"), **options)
    return (folder / "README.md").read_text()


def test_the_card_of_a_whole_model_speaks_of_no_adapter(make_trainer, tmp_path):
    found = card(make_trainer(), tmp_path)
    assert "adapter" not in found and 'AutoModelForCausalLM.from_pretrained("ada/tall")' in found
    assert "`python recipes/tell_stories.py --model_name_or_path ada/tall` writes stories.\n" in found


def test_the_card_of_an_adapter_on_a_folder_says_where_the_base_goes(make_trainer, tiny_model, tmp_path):
    trainer = make_trainer(lora=True)
    name_base(trainer.model)
    found = card(trainer, tmp_path, temperature=0.7)
    base = f"path/to/{Path(tiny_model).name}"
    assert f'model = load_adapter("ada/tall", base="{base}")' in found
    asked = f"--model_name_or_path ada/tall --base_model_name_or_path {base} --temperature 0.7"
    assert f"`python recipes/tell_stories.py {asked}` writes stories, adapter on and off side by side.\n" in found
    trainer.model.peft_config[
        "default"
    ].base_model_name_or_path = "/gone/models/base"  # no folder here, nor at the Hub
    found = card(trainer, tmp_path)
    assert "base_model" not in yaml.safe_load(found.split("---")[1]) and 'base="path/to/base"' in found


def test_the_card_of_a_chat_model_asks_it_as_one(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train_dataset = [{"prompt": [{"role": "user", "content": "a"}]}]
    assert "--model_name_or_path ada/tall --chat` writes" in card(trainer, tmp_path)


def test_a_readme_of_the_user_s_own_stays_and_a_run_s_is_written_anew(make_trainer, tmp_path, monkeypatch, capsys):
    trainer, args = make_trainer(), OnlineArguments()
    trainer.hub_model_id = "ada/tall"
    monkeypatch.setattr(run, "push", lambda *asked: True)
    (tmp_path / "README.md").write_text("mine")
    begin_record(tmp_path, anew=True)
    run.push_run(trainer, args, judged("before"), judged("after"))
    assert (tmp_path / "README.md").read_text() == "mine" and "no card is written" in capsys.readouterr().out
    (tmp_path / "README.md").unlink()
    for text in ("once", "again"):
        run.push_run(trainer, args, judged("before"), judged(text))
        assert text in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("lora", [(), ("--use_peft",)], ids=["whole", "adapter"])
def test_checkpoints_write_no_card_over_the_user_s(tmp_path, lora):
    """TRL writes one at each."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    words = "--max_steps 2 --max_completion_length 12 --eval_stories 4 --show_stories_every 0 --report_to none"
    words += " --output_dir out --save_strategy steps --save_steps 1"
    programs.run("rloo_tall_tree.py", *words.split(), *lora, cwd=tmp_path)
    assert (tmp_path / "out/checkpoint-1").is_dir() and (tmp_path / "out/README.md").read_text() == "mine"


@pytest.mark.parametrize("tag", ["generated_from_trainer", "kl_alliteration"])
def test_a_card_of_trl_s_or_of_an_earlier_version_is_written_anew(tmp_path, tag):
    (tmp_path / "README.md").write_text(f"---\ntags:\n- {tag}\n---\n")
    assert not is_theirs(tmp_path / "README.md")


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """`pushed(**options)`: a trainer of an adapter that has trained, and the Hub a folder here."""

    def upload(self, folder_path, **others):
        shutil.copytree(folder_path, tmp_path / "hub", dirs_exist_ok=True)
        return SimpleNamespace(oid="a" * 40, repo_url="hub")

    def make(**options):
        given = TINY_RUN | {"max_steps": 1, "learning_rate": 0.0, "output_dir": str(tmp_path)} | options
        trainer = RLOOTrainer(
            model=str(MODEL_PATH),  # whose logits are large enough for a precision to show
            reward_funcs=reward,
            args=RLOOConfig(**given),
            train_dataset=Dataset.from_dict({"prompt": ["Once upon a time"] * 8}),
            peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
        )
        trainer.train()
        trainer.hub_model_id, trainer.push_in_progress = str(tmp_path / "hub"), None
        name_base(trainer.accelerator.unwrap_model(trainer.model))
        run.save_final(trainer)
        return trainer

    monkeypatch.setattr(hub, "HfApi", type("Api", (), {"upload_folder": upload}))
    return make


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_loaded_back_is_compared_without_the_precision_of_training(pushed, tmp_path, capsys, bf16):
    """Accelerate's autocast stays on the model that was trained."""
    trainer = pushed(bf16=bf16)
    assert hub.push(trainer, Path(trainer.args.output_dir)), capsys.readouterr().out
    assert "log-probabilities agree" in capsys.readouterr().out


def test_another_model_at_the_hub_is_an_error_and_the_upload_is_said(pushed, capsys):
    trainer = pushed()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    assert not hub.push(trainer, Path(trainer.args.output_dir))
    assert "error: pushed to hub, and what was loaded back is not it: the model at" in capsys.readouterr().out


def test_a_run_is_judged_at_its_own_length_and_revision(tiny_model, tmp_path, monkeypatch):
    """TRL's default for the length is what a recipe's own YAML may not have."""
    stock = RLOOConfig.__dataclass_fields__["max_completion_length"].default
    parser = RecipeParser((OnlineArguments, RLOOConfig, ModelConfig), defaults=Path("none.yaml"))
    (tmp_path / "few.yaml").write_text("model_name_or_path: user/model\nmodel_revision: v2\nprompt: once upon a\n")
    parser.parse(["--config", str(tmp_path / "few.yaml"), "--use_cpu", "--output_dir", str(tmp_path / "out")])
    shutil.copytree(tiny_model, tmp_path / "out")
    write_recipe(tmp_path / "out/recipe.yaml", parser)
    loaded, asked = [], {}

    def load(name, **options):
        loaded.append((str(name), options.get("revision")))
        return AutoModelForCausalLM.from_pretrained(tiny_model)

    monkeypatch.setattr(judging, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=load))
    monkeypatch.setattr(judging, "judge", lambda *given, **options: asked.update(options))
    judging.judge_run(tmp_path / "out", stories=2)
    assert loaded == [(str(tmp_path / "out"), None), ("user/model", "v2")]
    assert asked["max_new_tokens"] == stock and asked["temperature"] == 1.0
    loaded.clear()
    judging.judge_run(tmp_path / "out", stories=2, untrained=True)
    assert loaded == [("user/model", "v2")]
