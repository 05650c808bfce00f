"""Reward against KL on the way from the base to a trained run, and the point of it that you pick, saved.

    python recipes/go_back.py --run runs/tall_tree                                      # the curve
    python recipes/go_back.py --run runs/tall_tree --keep 0.8 --output_dir runs/nearer  # the model at 0.8 of the way

Part of the way often has more reward for its KL than training had when it passed that KL. A whole model's weights are
interpolated, a LoRA adapter is scaled. Into the run's folder go `way.json` and `way.png`. With `--keep` nothing is
judged: that point is saved as an ordinary model or adapter.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import track
from transformers import AutoTokenizer, HfArgumentParser

from kl_alliteration.adapters import check_fraction
from kl_alliteration.lab.figures import plot_frontier, read_run
from kl_alliteration.lab.judging import judge_run, load_run
from kl_alliteration.lab.runs import read_yardsticks
from kl_alliteration.lab.survival import one_line_errors

COLUMNS = {
    "exact_kl_per_sequence": "KL (nats per sequence)",
    "reward_mean": "reward",
    "distinct_2": "distinct-2",
    "entropy_per_token": "entropy per token",
}


@dataclass
class Arguments:
    run: str = field(metadata={"help": "Folder of a finished run."})
    fractions: list[float] = field(
        default_factory=lambda: [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        metadata={"help": "Points of the way to judge, from 0, the base, to 1, the run."},
    )
    stories: int = field(default=400, metadata={"help": "Fresh stories a point."})
    seed: int = field(default=1, metadata={"help": "Seed of the sampling."})
    frontier: str | None = field(
        default=None, metadata={"help": "frontier.json of best_of_n.py, to draw its yardsticks behind the way."}
    )
    keep: float | None = field(default=None, metadata={"help": "The point to save, in place of judging."})
    output_dir: str | None = field(default=None, metadata={"help": "Where --keep saves it: an empty or new folder."})


def save(args: Arguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir: {args.output_dir!r} is not empty")
    model, _ = load_run(args.run, args.keep)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.run).save_pretrained(folder)
    print(f"{args.keep:g} of the way from the base to {args.run}: {folder}")


@one_line_errors
def main():
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    if not Path(args.run, "recipe.yaml").is_file():
        raise ValueError(f"run: {args.run!r} has no recipe.yaml; name the folder of a run that has ended")
    if (args.keep is None) != (args.output_dir is None):
        raise ValueError("keep and output_dir go together: --keep 0.8 --output_dir runs/nearer")
    for fraction in args.fractions if args.keep is None else [args.keep]:
        check_fraction(fraction)
    if args.keep is not None:
        return save(args)
    best, least = read_yardsticks(args.frontier, [Path(args.run)])
    try:
        trained = [read_run(args.run) | {"name": "the run"}]
    except ValueError:  # DPO's log has no reward, and that of a run without a monitor no KL
        trained = []
    points = []
    for fraction in track(sorted(args.fractions), description="points"):
        judged = judge_run(args.run, args.stories, args.seed, fraction=fraction).numbers()
        points.append({"fraction": fraction} | {name: judged[name] for name in COLUMNS})
    folder = Path(args.run)
    (folder / "way.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    places = [(point["exact_kl_per_sequence"], point["reward_mean"]) for point in points]
    way = {"name": "the way", "points": places, "labels": [f"{point['fraction']:g}" for point in points]}
    plot_frontier(best, [way, *trained], folder / "way.png", least)
    print(f"| of the way | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for point in points:
        print(f"| {point['fraction']:g} | {' | '.join(f'{point[name]:.2f}' for name in COLUMNS)} |")
    print(f"way.json, way.png: {folder}")


if __name__ == "__main__":
    main()
