"""Plots of texts: which one a text tells, how many are told, and how much of a KL is spent on them.

A plot is a class of texts. Since it is a function of the text, the KL of texts is the KL of plots plus the mean KL of
the text given its plot (the chain rule; Cover and Thomas, Elements of Information Theory, theorem 2.5.3). Needs
scikit-learn: `pip install 'kl_alliteration[plots]'`.
"""

import math
import warnings
from collections import Counter, deque
from dataclasses import dataclass

from transformers import TrainerCallback

from . import kl
from ._trl import last_completions, seam_of
from .text import answer_of

CLUSTERS = 100
TEXTS_OF_A_CLUSTER = 4  # different ones, at least in the mean
UNSEEN = 0.5  # samples that a plot of the reference is taken to have had beside those that it had (Jeffreys)


class Plots:
    """Says which plot a text tells. Made by [`Plots.of_labels`] where texts with labels are at hand, or by
    [`Plots.of_clusters`] of any texts, best the reference's own.

    Attributes:
        plots (`int`): How many there are, K.
    """

    def __init__(self, vectorizer, classifier, plots: int):
        self.vectorizer, self.classifier, self.plots = vectorizer, classifier, plots

    @classmethod
    def of_labels(cls, texts: list[str], labels: list) -> "Plots":
        """By naive Bayes of the words and the pairs of neighbouring words of texts whose plot is known.

        Complement naive Bayes (Rennie et al. 2003), since plots may have few texts each.
        """
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.naive_bayes import ComplementNB

        vectorizer = CountVectorizer(ngram_range=(1, 2))
        places = {name: place for place, name in enumerate(sorted(set(labels)))}
        classifier = ComplementNB().fit(vectorizer.fit_transform(texts), [places[label] for label in labels])
        return cls(vectorizer, classifier, len(places))

    @classmethod
    def of_clusters(cls, texts: list[str], clusters: int = CLUSTERS, seed: int = 0) -> "Plots":
        """By k-means of the texts' words, weighted by tf-idf: what tells the same story in other words is one plot.

        At most `clusters`, and one for every four different texts.

        Raises:
            `ValueError`: for texts that no word tells apart.
        """
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.5)
        try:
            words = vectorizer.fit_transform(texts)
        except ValueError as error:  # which no user can know what to do about
            raise ValueError(
                f"plots: {len(texts)} texts have no words by which some of them could be told from others "
                f"({str(error).rstrip('.')}); leave plots out"
            ) from None
        # Of fewer texts than that each would be a plot of its own.
        clusters = max(1, min(clusters, len(set(texts)) // TEXTS_OF_A_CLUSTER))
        found = KMeans(clusters, n_init=3, random_state=seed).fit(words)
        return cls(vectorizer, found, found.n_clusters)

    def label(self, texts: list[str]) -> list[int]:
        """A plot each, from 0 to K - 1."""
        return self.classifier.predict(self.vectorizer.transform(texts)).tolist() if texts else []


@dataclass(frozen=True)
class PlotCount:
    """What N labels show.

    `effective_plots` is exp of the entropy of the shares, by Miller's and Madow's estimate, which adds (plots seen -
    1) / 2 N to that of the counts (Miller 1955): the number of equally told plots that would be as varied.
    `most_told_share` is that of the plot that is told most. `kl_of_plots`, in nats, is that of the shares to the
    reference's, of which half a sample is added to every plot; `None` without a reference.
    """

    texts: int
    effective_plots: float
    most_told_share: float
    kl_of_plots: float | None

    @classmethod
    def of(cls, labels: list[int], ref_labels: list[int] | None = None, plots: int | None = None) -> "PlotCount":
        """Of N labels and, for the KL, the reference's labels, of `plots` that there are."""
        counts, n = Counter(labels), len(labels)
        if not n:
            raise ValueError("labels: there are none")
        shares = {label: count / n for label, count in counts.items()}
        entropy = -sum(share * math.log(share) for share in shares.values()) + (len(counts) - 1) / (2 * n)
        spent = None
        if ref_labels is not None:
            ref, total = Counter(ref_labels), len(ref_labels) + UNSEEN * plots
            cross = -sum(share * math.log((ref[label] + UNSEEN) / total) for label, share in shares.items())
            spent = cross - entropy
        return cls(n, math.exp(entropy), max(shares.values()), spent)


class PlotPenalty:
    """The KL of plots at a price, as one more reward of a stock trainer: `-price * log(share / reference's share)`.

    It is the log-ratio of the plot that a completion tells, k1 of the plots, in the reward: on average the gradient of
    `price` times the KL of plots. The share is that in the window of a [`PlotMonitorCallback`], with those of the
    batch under way that this process has; half a sample is added to every plot of both. What is charged beside it, the
    KL of the texts, stays as it is. The window is in every checkpoint.

    ```python
    penalty = PlotPenalty(2.0)
    trainer = RLOOTrainer(reward_funcs=[reward, penalty], ...)
    monitor = PlotMonitorCallback(trainer, Plots.of_clusters(ref_texts), ref_texts)
    trainer.add_callback(monitor)
    penalty.attach(monitor)
    ```

    Args:
        price (`float`): Reward per nat of plots.
    """

    __name__ = "plot_penalty"  # of the trainer's log

    def __init__(self, price: float):
        if not 0 < price < math.inf:
            raise ValueError(f"price must be > 0 and finite, got {price}")
        self.price, self.monitor = price, None

    def attach(self, monitor: "PlotMonitorCallback") -> None:
        """Charge it in the training that this monitor watches; where the trainer evaluates, it does not apply."""
        if monitor.ref_labels is None:
            raise ValueError("monitor: it has no ref_texts, from whose shares the price is charged")
        plots, counts, texts = monitor.plots.plots, Counter(monitor.ref_labels), len(monitor.ref_labels)
        self.ref_shares = [(counts[k] + UNSEEN) / (texts + UNSEEN * plots) for k in range(plots)]
        self.monitor = monitor

    def __call__(self, completions: list, trainer_state=None, **columns) -> list[float | None]:
        """(B,) rewards of completions; `None` in evaluation and before it is attached."""
        if (monitor := self.monitor) is None and trainer_state is not None and trainer_state.global_step:
            warnings.warn("a PlotPenalty charges nothing before penalty.attach(monitor)", kl.KLWarning, stacklevel=2)
        if monitor is None or not monitor.trainer.model.training:
            return [None] * len(completions)
        labels = monitor.plots.label([answer_of(completion) for completion in completions])
        told = deque([*monitor.labels, *labels], maxlen=monitor.labels.maxlen)
        counts, total = Counter(told), len(told) + UNSEEN * monitor.plots.plots
        return [-self.price * math.log((counts[k] + UNSEEN) / total / self.ref_shares[k]) for k in labels]


class PlotMonitorCallback(TrainerCallback):
    """Logs how varied the plots of the last completions are, and, with the reference's, what of the KL they cost.

    Of the last `window` completions of all processes, under `plots/`: `effective` and `most_told_share`, as
    [`PlotCount`] says them; with `ref_texts` also `kl_per_sequence`, in nats, and `kl_within_per_sequence`, what is
    left of the KL of the texts, which is that given the plot. The split is for runs with one prompt. Checkpoints hold
    the window.

    Args:
        trainer ([`~trl.RLOOTrainer`]): The trainer, stock.
        plots ([`Plots`]): What labels a text.
        ref_texts (`list[str]`, *optional*): Completions of the reference; some thousands.
        window (`int`, *optional*, defaults to 400): Completions that are counted together.
    """

    STATE = "kl_alliteration.Plots"  # its place among the trainer's stateful callbacks

    def __init__(self, trainer, plots: Plots, ref_texts: list[str] | None = None, window: int = 400):
        self.trainer, self.seam, self.plots, self.ref_texts = trainer, seam_of(trainer), plots, ref_texts
        self.ref_labels = None if ref_texts is None else plots.label(ref_texts)
        self.labels, self.spent = deque(maxlen=window), deque(maxlen=window)
        self.seam.after_batch.append(self.count)

    def count_plots(self, texts: list[str]) -> PlotCount:
        """What such texts show, whoever wrote them."""
        return PlotCount.of(self.plots.label(texts), self.ref_labels, self.plots.plots)

    def count(self, rollout: kl.Rollout | None) -> None:
        if not self.trainer.model.training:
            return
        batch = self.trainer.args.generation_batch_size
        texts = [answer_of(completion) for completion in last_completions(self.trainer)[1][-batch:]]
        self.labels.extend(self.plots.label(texts))
        found, metrics = PlotCount.of(list(self.labels), self.ref_labels, self.plots.plots), self.seam.metrics
        metrics["plots/effective"].append(found.effective_plots)
        metrics["plots/most_told_share"].append(found.most_told_share)
        if self.ref_labels is not None and rollout is not None:
            best = "exact" if rollout.hidden is not None else "k1"
            per_token, mask = rollout.per_token_kl(best), rollout.completion_mask
            self.spent.extend(self.seam.of_texts(per_token, mask).tolist())
            metrics["plots/kl_per_sequence"].append(found.kl_of_plots)
            spent = sum(self.spent) / max(1, len(self.spent))
            metrics["plots/kl_within_per_sequence"].append(spent - found.kl_of_plots)

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(self.STATE)
        if saved and state.global_step:
            window = self.labels.maxlen
            self.labels, self.spent = (deque(saved["attributes"][name], window) for name in ("labels", "spent"))

    def on_step_end(self, args, state, control, **kwargs):
        own = {"labels": list(self.labels), "spent": list(self.spent)}
        state.stateful_callbacks[self.STATE] = {"args": {}, "attributes": own}
