"""Rewards run on the main thread, and what they may take is kept nevertheless."""

import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from programs import ROOT, run
from test_recipes import RECIPE, SMALL

from kl_alliteration.lab import watchdog
from kl_alliteration.lab.checked_rewards import CheckedReward, load_rewards, sum_rewards
from kl_alliteration.lab.survival import TrainingStopped
from kl_alliteration.lab.watchdog import TimeIsUp, limited


def test_a_verifier_with_an_alarm_and_one_with_an_event_loop(tmp_path):
    """Both need the thread that they are called on to be the main one."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            import asyncio, signal, threading

            def alarmed(completions, **kwargs):
                def late(number, frame):
                    raise TimeoutError
                signal.signal(signal.SIGALRM, late)
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                try:
                    while True:
                        pass
                except TimeoutError:
                    return [1.0] * len(completions)

            def looped(completions, **kwargs):
                async def check():
                    await asyncio.sleep(0)
                    return 2.0
                loop = asyncio.new_event_loop()
                asyncio.set_event_loop(loop)
                assert threading.current_thread() is threading.main_thread()
                return [asyncio.get_event_loop().run_until_complete(check()) for _ in completions]
        """)
    )
    rewards = "--reward_funcs", "mine.alarmed", "mine.looped"
    done = run(RECIPE, "--output_dir", "out", *rewards, *SMALL, "--report_to", "none", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out/summary.json").exists()


def hang(kind: str):
    def function(**kwargs):
        if kind == "sleep":
            time.sleep(100)
        while kind == "loop":
            pass
        if kind == "regex":  # holds the interpreter's lock for years
            __import__("re").match(r"(a+)+$", "a" * 60 + "b")
        while kind == "excepts":
            try:
                time.sleep(100)
            except Exception:
                pass
        if kind == "lock":
            threading.Lock().acquire() or threading.Event().wait()
            threading.Event().wait(100)

    return function


@pytest.mark.parametrize("kind", ["sleep", "loop", "regex", "excepts", "lock"])
def test_what_hangs_is_interrupted(kind):
    mine = signal.signal(signal.SIGURG, signal.SIG_IGN), *map(signal.getsignal, (signal.SIGVTALRM, signal.SIGALRM))
    started = time.monotonic()
    try:
        with pytest.raises(TimeIsUp):
            limited(hang(kind), 0.3, "")
        assert signal.getsignal(signal.SIGURG) is signal.SIG_IGN  # the user's again
        assert signal.getsignal(signal.SIGVTALRM) is mine[1] and signal.getsignal(signal.SIGALRM) is mine[2]
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    finally:
        signal.signal(signal.SIGURG, mine[0])
    assert 0.3 <= time.monotonic() - started < watchdog.GRACE


def test_what_comes_back_is_what_it_gave_and_nothing_is_left():
    before = threading.active_count()
    assert limited(lambda x: x + 1, 60, "", x=1) == 2 == limited(lambda x: x + 1, None, "", x=1)
    assert limited(lambda x: x + 1, float("inf"), "", x=1) == 2
    assert threading.active_count() == before
    with pytest.raises(KeyError):
        limited(lambda: {}["a"], 60, "")
    for _ in range(200):  # as short as the function itself: one or the other, and never anything later
        try:
            limited(lambda: None, 1e-4, "")
        except TimeIsUp:
            pass
    time.sleep(0.01)


def test_one_that_swallows_everything_and_comes_back_is_late_all_the_same():
    def swallows(prompts, completions):
        try:
            time.sleep(100)
        except BaseException:
            return [1.0]

    with pytest.raises(TrainingStopped, match=r"^reward_funcs: m.f has not answered for 0.2 s \(reward_timeout\)$"):
        CheckedReward(swallows, "m.f", 0.2)(prompts=["a"], completions=["b"])


@pytest.mark.parametrize(
    "body",
    [
        "while True:\n        try:\n            time.sleep(1)\n        except BaseException:\n            pass",
        "mutex = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]",
    ],
    ids=["takes every exception", "C code"],
)
def test_one_that_cannot_be_interrupted_ends_the_process(tmp_path, body):
    code = f"""
import ctypes, threading, time
from kl_alliteration.lab import watchdog
from kl_alliteration.lab.checked_rewards import CheckedReward
watchdog.GRACE = 0.5
def reward(prompts, completions):
    {body}
CheckedReward(reward, "m.f", 0.2)(prompts=["a"], completions=["b"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == [
        "error: reward_funcs: m.f has not answered for 0.2 s (reward_timeout), nor came back when it was interrupted"
    ]
    assert done.returncode == 3


def test_on_another_thread_it_works_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(CheckedReward(lambda **k: [1.0], "m.f", 5)("a", ["b"])))
    thread.start()
    thread.join()
    assert found == [[1.0]]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return {}['word']", r"m.f raised KeyError: 'word' \("),
        ("raise SystemExit('bye')", r"m.f raised SystemExit: bye \("),
    ],
)
def test_what_raises_is_named(body, says):
    space = {}
    exec(f"def f(prompts, completions):\n    {body}", space)
    with pytest.raises(TrainingStopped, match=says):
        CheckedReward(space["f"], "m.f", 5)(prompts=["a"], completions=["b"])


def test_one_that_does_not_take_what_trl_hands_over():
    with pytest.raises(TrainingStopped, match=r"unexpected keyword argument 'target'$"):
        CheckedReward(lambda prompts, completions: [1.0], "m.f", 5)(prompts=["a"], completions=["b"], target=["c"])


def test_a_file_of_rewards_that_is_broken_is_refused(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("def reward(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^reward_funcs: cannot import 'broken_rewards.reward': SyntaxError"):
        load_rewards(["broken_rewards.reward"])


def test_none_is_does_not_apply_in_a_sum_too():
    total = sum_rewards([lambda **k: [1.0, None, None], lambda **k: [2.0, 3.0, None]], [1.0, 10.0])
    assert total(prompts=[""] * 3, completions=[""] * 3) == [21.0, 30.0, None]
