import io
import json

import pytest
from rich.console import Console

from kl_alliteration.lab.progress import MetricsFileCallback, StoryTableCallback


def test_metrics_file_has_one_line_a_log_with_generations_and_beta(make_trainer, tmp_path):
    trainer = make_trainer(beta=0.25, max_steps=3, gradient_accumulation_steps=2)
    path = tmp_path / "sub" / "metrics.jsonl"
    trainer.add_callback(MetricsFileCallback(trainer, path))
    trainer.train()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # 8 completions a device, 2 accumulation steps: 16 generations a step
    assert [line["generations"] for line in lines[:3]] == [16, 32, 48]
    assert {line["beta"] for line in lines} == {0.25}
    assert lines == json.loads(json.dumps(trainer.state.log_history))


def test_a_restart_keeps_the_lines_it_knows_and_drops_the_rest(make_trainer, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 99, "from": "a run that was cut off"}\n')
    trainer = make_trainer(max_steps=1)
    trainer.add_callback(MetricsFileCallback(trainer, path))
    trainer.train()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1]


def test_story_table_shows_stories_as_text_not_as_markup(make_trainer):
    trainer = make_trainer(max_steps=2)
    out = io.StringIO()
    callback = StoryTableCallback(trainer, every_steps=2, stories=2, console=Console(file=out, width=120))
    trainer.add_callback(callback)
    shown = {}

    def last_completions(trainer):
        shown["asked"] = trainer.state.global_step
        return ["[bold]Once"] * 8, [" [red]tall tree[/nope]\x1b[31m\x9b2J\x07"] * 8, {"reward": [3.0] * 8}

    import kl_alliteration.lab.progress as module

    original, module.last_completions = module.last_completions, last_completions
    try:
        trainer.train()
    finally:
        module.last_completions = original
    assert shown["asked"] == 2  # not at step 1
    assert "[bold]Once [red]tall tree[/nope]\ufffd[31m\ufffd2J\ufffd" in out.getvalue() and "3.0" in out.getvalue()
    assert not {"\x1b", "\x9b", "\x07"} & set(out.getvalue())
    assert out.getvalue().count("Once") == 2


def test_story_table_refuses_a_cadence_below_one(make_trainer):
    with pytest.raises(ValueError, match="every_steps must be >= 1, got 0"):
        StoryTableCallback(make_trainer(), every_steps=0)
