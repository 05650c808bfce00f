"""Plots of texts: counts by hand, the chain rule by enumeration, labels of the story model's own skeletons, a log."""

import math
import random

import pytest
import torch

from kl_alliteration import KLPenalty, KLPenaltyCallback
from kl_alliteration._trl import seam_of
from kl_alliteration.kl import KLWarning
from kl_alliteration.lab.story_model import corpus
from kl_alliteration.plots import PlotCount, PlotMonitorCallback, PlotPenalty, Plots

pytest.importorskip("sklearn")


def test_counts_by_hand():
    """Shares 1/2, 1/4, 1/4: an entropy of 1.5 log 2, and (3 - 1) / (2 * 4) for what four texts did not show."""
    found = PlotCount.of([0, 0, 1, 2], ref_labels=[0, 1, 1, 3], plots=4)
    entropy = 1.5 * math.log(2) + 1 / 4
    assert found.effective_plots == pytest.approx(math.exp(entropy)) and found.most_told_share == 0.5
    # The reference's counts 1, 2, 0, 1 and half a text each, of six.
    cross = -(0.5 * math.log(1.5 / 6) + 0.25 * math.log(2.5 / 6) + 0.25 * math.log(0.5 / 6))
    assert found.kl_of_plots == pytest.approx(cross - entropy)
    assert PlotCount.of([7]) == PlotCount(1, 1.0, 1.0, None)
    with pytest.raises(ValueError, match="there are none"):
        PlotCount.of([])


def test_the_kl_of_texts_is_that_of_plots_and_the_rest():
    """Twelve texts of three plots, enumerated; what is drawn from both shows the part of the plots."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(2, 12, generator=generator, dtype=torch.float64) + 0.1).unbind()
    p, q, plot = p / p.sum(), q / q.sum(), torch.arange(12) % 3
    plots_p, plots_q = (torch.zeros(3, dtype=torch.float64).index_add(0, plot, each) for each in (p, q))
    of_plots = (plots_p * (plots_p / plots_q).log()).sum()
    within = sum(
        plots_p[k]
        * (p[plot == k] / plots_p[k] * (p[plot == k] / plots_p[k] / (q[plot == k] / plots_q[k])).log()).sum()
        for k in range(3)
    )
    assert (p * (p / q).log()).sum() == pytest.approx((of_plots + within).item())
    drawn = [plot[torch.multinomial(each, 200_000, True, generator=generator)].tolist() for each in (p, q)]
    assert PlotCount.of(*drawn, plots=3).kl_of_plots == pytest.approx(of_plots.item(), abs=2e-3)


def test_many_plots_of_few_texts_are_less_biased_than_the_counts():
    """400 texts of 100 equal plots: the counts alone say 88 on average, with Miller and Madow 99."""
    rng = random.Random(0)
    corrected, plain = [], []
    for _ in range(50):
        labels = [rng.randrange(100) for _ in range(400)]
        corrected.append(PlotCount.of(labels).effective_plots)
        shares = [labels.count(k) / 400 for k in set(labels)]
        plain.append(math.exp(-sum(share * math.log(share) for share in shares)))
    assert sum(corrected) / 50 == pytest.approx(100, abs=2) and sum(plain) / 50 < 92


def some_stories(seed: int, each: int, skeletons) -> tuple[list[str], list[str]]:
    rng, texts, labels = random.Random(seed), [], []
    for skeleton in skeletons:
        texts += list(corpus.stories(rng.randrange(10**9), each, skeletons=[skeleton]))
        labels += [skeleton.slug] * each
    return texts, labels


def test_labels_and_clusters_of_stories_whose_plot_is_known():
    skeletons = corpus.load_skeletons()[:30]
    texts, labels = some_stories(0, 8, skeletons)
    fresh, known = some_stories(1, 8, skeletons)
    named, names = Plots.of_labels(texts, labels), sorted(set(labels))
    assert named.plots == 30 and [names[found] for found in named.label(fresh)] == known
    starts = [" ".join(text.split()[:40]) for text in fresh]  # completions are cut off
    assert sum(names[a] == b for a, b in zip(named.label(starts), known, strict=True)) > 0.97 * len(known)
    # As many clusters as there are plots: the same plot is the same cluster, nearly always.
    found = Plots.of_clusters(texts, 30).label(fresh)
    agree = [(found[i] == found[j]) == (known[i] == known[j]) for i in range(240) for j in range(i)]
    assert sum(agree) / len(agree) > 0.97
    assert Plots.of_clusters(texts[:2] * 50, 30).plots == 1  # of two different ones
    for none in (["once upon a time"] * 50, [""] * 50, ["a story"]):
        with pytest.raises(ValueError, match=f"plots: {len(none)} texts have no words by .* leave plots out"):
            Plots.of_clusters(none)
    assert Plots.of_clusters(texts[:20], 30).plots == 5 and named.label([]) == []


class ByLength(Plots):
    """A plot for each number of words."""

    def __init__(self):
        self.plots = 10

    def label(self, texts):
        return [len(text.split()) for text in texts]


def test_the_log_splits_the_kl_of_the_last_completions(make_trainer):
    told, spent = [], []
    trainer = make_trainer(max_steps=3, reward_funcs=lambda completions, **_: told.append(completions) or [0.0] * 8)
    trainer.add_callback(KLPenaltyCallback(trainer, KLPenalty("exact", "both")))
    seam = seam_of(trainer)
    seam.observers.append(
        lambda rollout: spent.extend((rollout.per_token_kl("exact") * rollout.completion_mask).sum(-1).tolist())
    )
    reference = ["tree", "tall tree", "tall tall tree"] * 20
    trainer.add_callback(PlotMonitorCallback(trainer, ByLength(), reference, window=16))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "plots/effective" in log]
    for step, log in enumerate(logs, start=1):
        last = [len(text.split()) for batch in told[:step] for text in batch][-16:]
        expected = PlotCount.of(last, [1, 2, 3] * 20, 10)
        assert log["plots/effective"] == pytest.approx(expected.effective_plots, rel=1e-3)
        assert log["plots/most_told_share"] == pytest.approx(expected.most_told_share, rel=1e-3)
        some = spent[: 8 * step][-16:]
        whole = log["plots/kl_per_sequence"] + log["plots/kl_within_per_sequence"]
        assert whole == pytest.approx(sum(some) / len(some), abs=2e-3)
    assert len(logs) == 3


def test_without_a_reference_it_counts_alone(make_trainer):
    trainer = make_trainer(beta=0.0, max_steps=1)
    trainer.add_callback(PlotMonitorCallback(trainer, ByLength()))
    trainer.train()
    assert (
        "plots/effective" in trainer.state.log_history[0]
        and "plots/kl_per_sequence" not in trainer.state.log_history[0]
    )


def test_what_a_plot_costs_by_hand(make_trainer):
    """Plot 1 and 2 of ten; the reference told 1 three times of four, the policy one of two."""
    penalty = PlotPenalty(2.0)
    trainer = make_trainer(reward_funcs=[lambda completions, **_: [0.0] * len(completions), penalty])
    assert penalty(["tree", "tall tree"]) == [None, None]  # attached to nothing
    monitor = PlotMonitorCallback(trainer, ByLength(), ["tree", "sky", "fox", "tall tree"], window=3)
    penalty.attach(monitor)
    trainer.model.eval()
    assert penalty(["tree", "tall tree"]) == [None, None]
    trainer.model.train()
    one, two = math.log((1.5 / 7) / (3.5 / 9)), math.log((1.5 / 7) / (1.5 / 9))
    assert penalty(["tree", "tall tree"]) == pytest.approx([-2 * one, -2 * two])
    monitor.labels.extend([2, 2, 1])  # batches before; the window holds the last three, of which one is left
    only = math.log((3.5 / 8) / (3.5 / 9))
    assert penalty(["tree", "sky"]) == pytest.approx([-2 * only] * 2)
    trainer.train()
    assert "rewards/plot_penalty/mean" in trainer.state.log_history[0]
    with pytest.raises(ValueError, match="price must be > 0 and finite, got 0"):
        PlotPenalty(0)
    with pytest.raises(ValueError, match="monitor: it has no ref_texts"):
        penalty.attach(PlotMonitorCallback(trainer, ByLength()))


def test_a_penalty_that_nobody_attached_says_so(make_trainer):
    penalty = PlotPenalty(2.0)
    trainer = make_trainer(reward_funcs=[lambda completions, **_: [0.0] * len(completions), penalty])
    with pytest.warns(KLWarning, match=r"charges nothing before penalty.attach\(monitor\)"):
        trainer.train()


def test_interrupted_and_resumed_counts_the_same_plots_at_the_same_price(make_trainer, tmp_path):
    def make(**options):
        penalty = PlotPenalty(2.0)
        rewards = [lambda completions, **_: [float(len(text)) for text in completions], penalty]
        trainer = make_trainer(max_steps=4, reward_funcs=rewards, **options)
        monitor = PlotMonitorCallback(trainer, ByLength(), ["tree", "tall tree"] * 20)
        trainer.add_callback(monitor)
        penalty.attach(monitor)
        return trainer

    whole = make(save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make(output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    logs = [trainer.state.log_history[:4] for trainer in (whole, resumed)]
    names = [name for name in logs[0][0] if name.startswith(("plots/", "rewards/", "kl"))]
    assert "rewards/plot_penalty/mean" in names and "plots/kl_within_per_sequence" in names
    assert [[log[name] for name in names] for log in logs[0]] == [[log[name] for name in names] for log in logs[1]]
    # The trainer that went on to its end goes back, as after a collapse: what it told since then is forgotten.
    whole.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again = whole.state.log_history[:4]
    assert [[log[name] for name in names] for log in logs[0]] == [[log[name] for name in names] for log in again]


def test_its_gradient_is_that_of_the_kl_of_plots():
    """Enumerated: E[grad log p(text) * log(p(plot) / q(plot))] against autograd through the KL of plots."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    q, plot = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.arange(12) % 3
    log_p = logits.log_softmax(0)
    shares = torch.zeros(3, dtype=torch.float64).index_add(0, plot, log_p.exp())
    (expected,) = torch.autograd.grad((shares * (shares / q).log()).sum(), logits, retain_graph=True)
    charged = (shares / q).log()[plot].detach()  # price 1, of shares that are known
    (found,) = torch.autograd.grad((log_p.exp().detach() * charged * log_p).sum(), logits)
    assert torch.allclose(found, expected, atol=1e-12)


def test_the_reference_s_shares_cost_nothing_and_one_plot_costs_its_kl(make_trainer):
    penalty = PlotPenalty(1.0)
    trainer = make_trainer(reward_funcs=[penalty])
    trainer.model.train()
    reference = ["tree", "tall tree", "tall tall tree", "once upon a time"] * 5000
    penalty.attach(PlotMonitorCallback(trainer, ByLength(), reference, window=100_000))
    assert penalty(reference) == pytest.approx([0.0] * 20_000, abs=1e-9)
    assert PlotPenalty.__name__ == "PlotPenalty" and penalty.__name__ == "plot_penalty"
    assert penalty(["tree"] * 20_000)[0] == pytest.approx(-math.log(4), abs=2e-3)
