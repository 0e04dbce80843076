"""Processes that are killed anywhere, told to stop, or want the same run at once: each study ends with the files of an undisturbed one, to the last bit."""
import random
import signal

from faults import FAULTS, STUDY, command, finished, kept, results, run_of


def test_killed_everywhere(forked, home, whole):
    "kill -9 before an operation of each kind that changes a file: in every run, inside checkpoints, models, codes, metrics and records. Nothing done is lost but the step that was not saved."
    done, before, lost, kills = [], {}, [], 0
    while True:
        status, output = forked(command, ["train", *STUDY], "each").wait()
        steps = (home.parent / "home-steps").read_text().splitlines()
        now, again = finished(home), [step for step in steps[len(done):] if step in done]
        assert before.items() <= now.items()                                       # what was finished is untouched
        for folder in (home / "runs").iterdir(): assert len(list(folder.glob("checkpoint-*"))) + len(list(folder.glob(".part-*"))) <= 4, folder
        if len(again) > 1: lost.append((killed_at, again))
        if status == 0: break
        assert status == -signal.SIGKILL, output
        FAULTS["SIGKILL before a change of a file"] += 1
        before, done, kills, killed_at = now, steps, kills + 1, (home.parent / "home-kinds").read_text().splitlines()[-1]
    assert kills > 50 and not lost, lost
    assert results(home) == results(whole)
