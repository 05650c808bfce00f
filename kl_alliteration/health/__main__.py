"""Is the KL of a run healthy? Symptoms that its log shows, each with its number, the healthy range, cause and remedy.

    python -m kl_alliteration.health runs/tall_tree
    python -m kl_alliteration.health outputs/checkpoint-500/trainer_state.json

Reads any run of a TRL trainer, also one that knew nothing of this package: a folder with `metrics.jsonl` or with
checkpoints, a `trainer_state.json`, or a file of one JSON object a line. Exit status 1 where something is wrong, 2
where there is nothing to read. What each symptom means: docs/health.md.
"""

import argparse
import sys

from . import examine


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kl_alliteration.health",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="folders of runs, trainer_state.json, or files of metrics")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a text may hold what the terminal cannot show
            stream.reconfigure(errors="replace")
    alarmed = unread = False
    for run in parser.parse_args().runs:
        try:
            examined = examine(run)
        except (ValueError, OSError) as error:
            print(f"{run}: {error}", file=sys.stderr)
            unread = True
            continue
        print(f"{run}: {examined.in_words()}")
        for each in examined.findings:
            print(f"  {each.in_words()}")
        alarmed |= examined.alarmed
    sys.exit(2 if unread else int(alarmed))


if __name__ == "__main__":
    main()
