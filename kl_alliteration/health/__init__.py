"""Is the KL of a run healthy? What its log and its trainer show, a line a symptom (docs/health.md).

[`KLHealthCallback`] says it as the run goes; `python -m kl_alliteration.health RUN` reads it off the log of any run.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from .. import kl
from .._trl import drops, last_completions, seam_of
from ..references import MovingAverageReferenceCallback, ResetReferenceCallback
from ..sampling_options import changes_of_sampling
from ..text import answer_of
from .log import Log, read_entries
from .symptoms import SYMPTOMS, Symptom

__all__ = ["Examined", "Finding", "KLHealthCallback", "SYMPTOMS", "Symptom", "diagnose", "examine"]
DOCS = "docs/health.md"
FILE = "health.json"  # beside a run's log: what its callback found, of which a log does not show all
SHOWN = 80  # characters of a text
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """A symptom that a run has: the step at which it was caught, and what was seen, with its number."""

    symptom: str
    step: int
    seen: str

    @property
    def alarm(self) -> bool:
        return SYMPTOMS[self.symptom].alarm

    def in_words(self) -> str:
        """One line."""
        known = SYMPTOMS[self.symptom]
        words = f"step {self.step}, {self.symptom}{'' if known.alarm else ' (a note)'}: {self.seen}; "
        return words + f"healthy is {known.healthy}. {known.cause} {known.remedy} {DOCS}#{self.symptom}"


def look(log: Log, known: set[str] = frozenset()) -> list[Finding]:
    """What a log shows so far, without the symptoms that are known already."""
    return [
        Finding(each.name, log.step, seen)
        for each in SYMPTOMS.values()
        if each.look is not None and each.name not in known and (seen := each.look(log))
    ]


def diagnose(entries: list[dict]) -> list[Finding]:
    """Each symptom of a log once, at the step where it shows first.

    Args:
        entries (`list[dict]`): As a trainer logs them: `trainer.state.log_history`, or the lines of a metrics file.
    """
    log, found = Log(), []
    for entry in entries:
        if log.add(entry):
            found += look(log, {each.symptom for each in found})
    return found


@dataclass(frozen=True)
class Examined:
    """A run that was examined: how many steps its log has, and what was found, by step."""

    steps: int
    findings: list[Finding]

    @property
    def alarmed(self) -> bool:
        return any(each.alarm for each in self.findings)

    def in_words(self) -> str:
        """One line: how many alarms, and of which symptoms."""
        alarms, notes = ([each.symptom for each in self.findings if each.alarm is alarm] for alarm in (True, False))
        count = {0: "no alarm", 1: "1 alarm"}.get(len(alarms), f"{len(alarms)} alarms")
        words = f"KL health after {self.steps} steps: {count}" + (f": {', '.join(alarms)}" if alarms else "")
        return words + (f"; to know: {', '.join(notes)}" if notes else "")


def examine(path: str | Path) -> Examined:
    """A run by its log, and by what its own callback found, which may have known earlier and has the text.

    Args:
        path (`str`): As for [`~health.log.read_entries`], which says what is not a run.
    """
    entries, folder = read_entries(path)
    found = {each.symptom: each for each in (*diagnose(entries), *read_findings(folder))}
    return Examined(Log(entries).step, sorted(found.values(), key=lambda each: each.step))


def read_findings(folder: Path) -> list[Finding]:
    """What a run's own callback found; nothing where it had none."""
    try:
        rows = json.loads(Path(folder, FILE).read_text(encoding="utf-8"))
        return [Finding(**row) for row in rows if row["symptom"] in SYMPTOMS]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def tell(line: str, alarm: bool) -> None:
    """To the logger; to the screen, above a progress bar, what it would not show, unless it has a level of its own."""
    level = logging.WARNING if alarm else logging.INFO
    shows = logger.hasHandlers() and logger.isEnabledFor(level)
    if shows or logger.level != logging.NOTSET:
        logger.log(level, line)
    else:
        tqdm.write(line, file=sys.stderr)


class KLHealthCallback(TrainerCallback):
    """Says, a line a symptom, what is wrong with the KL of a run: as it trains, at most once each, and at the end.

    It reads what the trainer logs, [`KLMonitorCallback`]'s numbers too where there are any, and looks at the trainer
    itself: the gradient of the penalty, how it samples, dropout, a reference that moves. A spike or a number that is
    not finite comes with the text that is furthest from the reference; under GRPO's own penalty, where a
    [`KLMonitorCallback`] or another has its batches scored. Lines go to the logger
    `kl_alliteration.health`, alarms as warnings, notes and the summary as information, and to the screen where the
    script's logging would not show them; a level of that logger's own makes it quiet. `findings` holds them, and
    `health.json` in the output directory.

    Args:
        trainer ([`~trl.RLOOTrainer`] or [`~trl.GRPOTrainer`]): The trainer, stock.

    Example:

    ```python
    trainer = GRPOTrainer(...)
    trainer.add_callback(KLHealthCallback(trainer))
    ```
    """

    def __init__(self, trainer):
        self.trainer, self.seam = trainer, seam_of(trainer)
        self.log, self.findings = Log(), []
        self.furthest: tuple[float, str] | None = None  # nats of the sequence, and its text, since the last log
        self.seam.after_batch.append(self.observe)

    def observe(self, rollout: kl.Rollout | None) -> None:
        if rollout is None or not self.trainer.model.training:
            return
        sums = kl.reduce_per_sequence(rollout.ref_log_ratio, rollout.completion_mask, "sum")
        sums = self.trainer.accelerator.gather(sums)  # (B of all,)
        place = sums.abs().argmax().item()  # of one that is not a number, where there is one
        value = sums[place].item()
        if self.furthest is None or not abs(value) <= abs(self.furthest[0]):
            text = answer_of(last_completions(self.trainer)[1][-len(sums) :][place])
            self.furthest = value, text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
        if not torch.isfinite(sums).all():  # the loss will not be, and then nothing is logged any more
            self.say([Finding("not_finite", self.trainer.state.global_step, f"kl of a text {value}")])
        elif self.trainer.state.global_step == 0 and self.log.step == 0:  # a log may begin when the policy has moved
            kl_per_token = self.seam.mean_per_token(rollout.ref_log_ratio, rollout.completion_mask)
            self.say(look(Log([{"step": 1, "kl": kl_per_token}])))

    @property
    def examined(self) -> Examined:
        """What it has found so far."""
        return Examined(self.trainer.state.global_step, self.findings)

    def say(self, found: list[Finding]) -> None:
        """Once a symptom, from the main process."""
        known = {each.symptom for each in self.findings}
        for each in found:
            if each.symptom in known:
                continue
            if each.symptom in ("spike", "not_finite", "explodes") and self.furthest is not None:
                seen = f"{each.seen}; furthest by k1, at {self.furthest[0]:.3g} nats: {self.furthest[1]!r}"
                each = Finding(each.symptom, each.step, seen)
            self.findings.append(each)
            if self.trainer.is_world_process_zero():
                tell(each.in_words(), each.alarm)
                self.write()

    def write(self) -> None:
        path = Path(self.trainer.args.output_dir, FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(each) for each in self.findings], indent=1) + "\n", encoding="utf-8")

    def on_train_begin(self, args, state, control, **kwargs):
        self.log, self.furthest = Log(), None
        self.findings = []
        if state.global_step:
            self.log = Log(state.log_history)
            self.findings = [each for each in read_findings(args.output_dir) if each.step <= state.global_step]
        if state.is_world_process_zero:
            self.write()  # what an earlier run in this folder had is not of this one
        self.say([Finding(name, state.global_step, seen) for name, seen in self.look_at_trainer() if seen])

    def look_at_trainer(self) -> list[tuple[str, str | None]]:
        """What no log shows: a symptom and what is seen of it, or `None`."""
        trainer, penalty = self.trainer, self.seam.penalty
        contract = getattr(penalty, "contract", None) if self.seam.beta != 0 else None
        wrong = contract is not None and contract.use_instead is not None
        changes = changes_of_sampling(trainer, self.seam.is_as_sampled)
        changes.pop("temperature", None)  # TRL scores at it too: the KL is that of the tempered policies, and unbiased
        sampled = getattr(penalty, "estimator", "k1") in kl.SAMPLED
        sampling = ", ".join(f"{name}={value}" for name, value in changes.items() if sampled)
        off = {
            name for name, module in trainer.accelerator.unwrap_model(trainer.model).named_modules() if drops(module)
        }
        moving = (MovingAverageReferenceCallback, ResetReferenceCallback)
        moves = [type(each).__name__ for each in trainer.callback_handler.callbacks if isinstance(each, moving)]
        moves += ["sync_ref_model"] if getattr(trainer.args, "sync_ref_model", False) else []
        return [
            ("no_kl", "beta 0 and no reference" if self.seam.beta == 0 and self.seam.price.asked is None else None),
            ("wrong_gradient", f"{contract.gradient} (use {contract.use_instead})" if wrong else None),
            ("truncated_sampling", sampling or None),
            ("dropout", f"in {len(off)} modules, such as {min(off)}" if off else None),
            ("reference_moves", ", ".join(moves) or None),
        ]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.log.add((logs or {}) | {"step": state.global_step}):
            self.say(look(self.log, {each.symptom for each in self.findings}))
            self.furthest = None

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write()
            tell(self.examined.in_words(), self.examined.alarmed)
