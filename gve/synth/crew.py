"""One command, several worker processes: started together, watched, and ended together."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
import uuid
from multiprocessing.connection import Connection, wait
from typing import Any

from gve.items import InputError
from gve.synth.card import write_card
from gve.synth.folder import StepFolder
from gve.synth.output import SHARDS
from gve.synth.pipeline import RUN, Plan, work, write_reports, write_run
from gve.synth.status import Watch


class WorkError(RuntimeError):
    """The work failed; what was done is kept, and the same command goes on from it."""


def run(plan: Plan, until: str = "", task: int = 0, tasks: int = 1) -> dict[str, Any]:
    """Runs the steps with the workers of this command, beside those of other commands on the same folder.

    Args:
        plan: the run.
        until: last step; all when empty.
        task, tasks: which of how many commands this is, from 0 (a SLURM array): each begins elsewhere.

    Returns:
        The funnel.

    Raises:
        InputError: the input, the configuration or the folder cannot be used.
        WorkError: a worker failed, and the others did not come to the end.
    """
    if not 0 <= task < tasks:
        raise InputError(f"task {task} of {tasks}: the index counts from 0")
    names = [step.name for step in plan.until(until)]
    write_run(plan)
    try:
        _work(plan, until, [(task + worker / plan.run.workers) / tasks for worker in range(plan.run.workers)])
    finally:
        numbers = write_reports(plan)  # also of work that failed: they say what became of the rows
    if names[-1] == "output":
        write_card(plan, numbers)
    return numbers


def _work(plan: Plan, until: str, shares: list[float]) -> None:
    """Works with a process for each share, the only one being this one."""
    if len(shares) == 1:
        try:
            work(plan, until, shares[0])
        except (OSError, RuntimeError) as error:
            raise WorkError(_said(error)) from error
        return
    failures = _crew(plan, until, shares)
    if StepFolder(plan.out, plan.until(until)[-1].name).done() is None:
        raise WorkError(failures[0] if failures else "no worker came to the end")
    for failure in failures:
        print(f"gve synth run: a worker failed, the others did its work: {failure}", file=sys.stderr)


def redo(plan: Plan, name: str) -> None:
    """Throws away the results of a step and of those after it, so that they can be made with other options.

    Raises:
        InputError: there is no such step, or somebody works on the run.
    """
    if name not in plan.names:
        raise InputError(f"no step {name!r}: use one of {', '.join(plan.names)}")
    if (plan.out / RUN).exists() and (workers := Watch(plan.out).look()["workers"]):
        raise InputError(f"{len(workers)} worker(s) work on {plan.out}: stop them before a step is done again")
    # The shards come from the last step: of a task or prefix that is no longer made, nothing would replace them.
    for folder in (*plan.names[plan.names.index(name) :], SHARDS):
        if (path := plan.out / folder).exists():
            # Renamed first: a kill in the middle leaves no half of a step.
            trash = path.with_name(f".{folder}.{uuid.uuid4().hex[:12]}.trash")
            path.rename(trash)
            shutil.rmtree(trash)


def _said(error: Exception) -> str:
    """Full disk, a folder that went away, a server that is gone, a device out of memory: in the error's own words."""
    return f"{error}; what was done is kept: mend it, and the same command goes on"


def _crew(plan: Plan, until: str, shares: list[float]) -> list[str]:
    """Starts a process for each share and waits for all; returns what went wrong in them."""
    context = multiprocessing.get_context("spawn")  # a fork would copy threads and decoding children
    members = {}
    for share in shares:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_member, args=(plan, until, share, theirs), name=f"synth-{share:.2f}")
        process.start()
        theirs.close()
        members[process] = ours
    failures: list[str] = []
    try:
        running = set(members)
        while running:
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                running.remove(process)
                kind, message = _last_words(members[process])
                if kind == "input":
                    raise InputError(message)
                if process.exitcode:
                    code = process.exitcode
                    died = f"it died by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
                    failures.append(message or died)
    finally:
        for process in members:
            if process.is_alive():
                process.terminate()
        for process in members:
            process.join()
    return failures


def _last_words(pipe: Connection) -> tuple[str, str]:
    try:
        return pipe.recv() if pipe.poll() else ("", "")
    except EOFError:
        return "", ""


def _member(plan: Plan, until: str, share: float, pipe: Connection) -> None:
    """The life of one worker process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=_follow_parent, daemon=True).start()
    words: tuple[str, str] | None = None
    try:
        work(plan, until, share)
    except InputError as error:
        words = ("input", str(error))
    except (OSError, RuntimeError) as error:
        words = ("failed", _said(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the boundary of a process: said here in full, and in one line by the command
        traceback.print_exc()
        words = ("failed", f"{type(error).__name__}: {error}")
    if words:
        pipe.send(words)
        sys.exit(1)


def _follow_parent() -> None:
    """Ends this worker when the command that started it is killed: nobody would watch it any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
