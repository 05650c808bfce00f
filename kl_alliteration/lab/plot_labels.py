"""Which plots a run's texts tell: by the story model's own skeletons, or by clusters of what the base writes."""

from pathlib import Path

from ..plots import Plots
from ..story_lm import MODEL_PATH
from .story_model.corpus import load_lexicon, load_skeletons, stories

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
