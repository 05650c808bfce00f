"""What trackers are given: groups with units on TensorBoard's own page; nothing from a judge."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from trl.extras import profiling

from kl_alliteration import KLMonitorCallback
from kl_alliteration._trl import asking
from kl_alliteration.lab.trackers import LAYOUT, TensorBoardLayoutCallback, layout


def test_a_run_writes_its_groups_once(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(report_to="tensorboard")
    trainer.add_callback(KLMonitorCallback(trainer, exact=True))
    trainer.add_callback(TensorBoardLayoutCallback(trainer))
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.glob("events/**/events*")).parent), {"tensors": 0, "scalars": 0})
    events.Reload()
    (written,) = events.Tensors("custom_scalars__config__")
    found = Layout.FromString(written.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for group in found.category for chart in group.chart}
    assert [group.title for group in found.category] == [name for name in LAYOUT if name != "4 The sampler"]
    assert charts["KL, nats per sequence"][0] == "^train/kl/(k1|k2|k3|exact)_per_sequence$"
    assert "plots told (number)" not in charts  # nothing of it in this run
    assert "train/kl/exact_per_sequence" in events.Tags()["scalars"]


def test_each_name_has_one_chart_and_a_chart_without_a_name_is_left_out():
    names = ["kl", "kl/k1_per_token", "kl/sampler_k3_per_token", "kl/beta", "entropy", "plots/kl_within_per_sequence"]
    for name in names:
        assert sum(len(charts) for charts in layout([name]).values()) == 1, name
    assert layout(["kl"]) == {
        "2 KL to the reference": {
            "KL, nats per token": [
                "Multiline",
                [
                    "^train/kl/(k1|k2|k3|exact)_per_token$",
                    "^train/kl$",
                    "^train/kl/base_per_token$",
                    "^train/kl/target_per_token$",
                ],
            ]
        }
    }
    assert layout(["train_runtime"]) == {}


def test_a_judge_before_training_tells_trackio_nothing(make_trainer, monkeypatch):
    """TRL times each reward function into trackio, which raises before its `init`, at the start of training."""

    def log(*args, **kwargs):
        raise RuntimeError("Call trackio.init() before trackio.log().")

    monkeypatch.setattr(profiling, "is_trackio_available", lambda: True)
    monkeypatch.setattr(profiling, "trackio", SimpleNamespace(log=log), raising=False)
    trainer = make_trainer()
    trainer.args.report_to = ["trackio"]
    row, ids = {"prompt": "once"}, trainer.processing_class(" tall tree")["input_ids"]
    with pytest.raises(RuntimeError, match="trackio"):  # else this shows nothing
        trainer._calculate_rewards([row] * 4, ["once"] * 4, [" tall tree"] * 4, [ids] * 4)
    found = asking.total_rewards(trainer, [row] * 4, [" tall tree"] * 4, [ids] * 4)
    assert found == [pytest.approx(1.2)] * 4  # one tree, two words
    assert trainer.args.report_to == ["trackio"]
    assert "trackio" not in sys.modules
