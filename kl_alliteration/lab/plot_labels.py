"""Which plots a run's texts tell: by the story model's own skeletons, or by clusters of what the base writes.

    python -m kl_alliteration.lab.plot_labels runs/tall_tree ...    # of finished runs

Prints a line a run: how many plots its judged stories tell before and after, the share of the most told one, and what
of the KL per sequence they cost. The base's shares are those of the run's `base_samples.jsonl`, and where it has none
of its stories before training. Of a model other than the embedded one clusters of the same texts are the plots.
"""

import argparse
import json
from pathlib import Path

from ..plots import PlotCount, Plots
from ..story_lm import MODEL_PATH
from .base_samples import FILE
from .judging import read_options
from .runs import STORIES, read_summary
from .story_model.corpus import load_lexicon, load_skeletons, stories
from .survival import one_line_errors

EACH = 10  # stories of a skeleton that its label is learnt from


def plots_of(model_name_or_path: str, base_texts: list[str]) -> Plots:
    """Labels of the embedded model's 150 skeletons; of any other model's texts a hundred clusters."""
    if Path(model_name_or_path) != MODEL_PATH:
        return Plots.of_clusters(base_texts)
    texts, labels, lexicon = [], [], load_lexicon()
    for seed, skeleton in enumerate(load_skeletons()):
        texts += stories(seed, EACH, [skeleton], lexicon)
        labels += [skeleton.slug] * EACH
    return Plots.of_labels(texts, labels)


def completions(path: Path, when: str | None = None) -> list[str]:
    """Those of a file of stories, or of base samples."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["completion"] for row in rows if when is None or row["when"] == when]


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    args = parser.parse_args()
    print("| run | KL, nats per sequence | of plots | given the plot | plots | before | most told | reward |")
    print("|---|---|---|---|---|---|---|---|")
    known: dict[str, Plots] = {}
    for run in args.runs:
        summary = read_summary(run)
        if summary is None or not (run / STORIES).is_file():
            raise ValueError(f"runs: {run} is no folder of a finished run: it has no summary.json with {STORIES}")
        base = completions(run / FILE) if (run / FILE).is_file() else completions(run / STORIES, "before")
        model = read_options(run).get("model_name_or_path", str(MODEL_PATH))
        plots = known.get(model) or plots_of(model, base)
        if Path(model) == MODEL_PATH:
            known[model] = plots  # of any run the same
        ref = plots.label(base)
        before = PlotCount.of(plots.label(completions(run / STORIES, "before")))
        after = PlotCount.of(plots.label(completions(run / STORIES, "after")), ref, plots.plots)
        spent = summary["after"]["exact_kl_per_sequence"]
        cells = "-", f"{after.kl_of_plots:.2f}", "-"
        if spent is not None:
            cells = f"{spent:.2f}", f"{after.kl_of_plots:.2f}", f"{spent - after.kl_of_plots:.2f}"
        cells += f"{after.effective_plots:.1f}", f"{before.effective_plots:.1f}", f"{after.most_told_share:.2f}"
        print(f"| {run.name} | {' | '.join(cells)} | {summary['after']['reward_mean']:.2f} |")


if __name__ == "__main__":
    main()
