"""Jobs side by side in worker processes, with progress on the terminal; one failure stops what has not begun.

Ctrl-C reaches the parent alone, which ends the workers. Finished jobs stay finished.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opd_bench import device
from opd_bench.allocator import keep_freed_memory
from opd_bench.config import Config
from opd_bench.errors import RunError, UserError
from opd_bench.plan import Job

_messages: multiprocessing.SimpleQueue | None = None  # in a worker: where progress goes


def _start_worker(messages: multiprocessing.SimpleQueue, places: multiprocessing.SimpleQueue, threads: int) -> None:
    global _messages
    _messages = messages
    if place := places.get():
        os.environ[device.VISIBLE] = place
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    _die_with_parent()
    keep_freed_memory()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, which an ended worker would leak


def _die_with_parent() -> None:
    """Leave as soon as the parent is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _carry_out(config: Config, job: Job, out: Path) -> None:
    from opd_bench import arm

    last = 0.0

    def report(stage: str, share: float) -> None:
        nonlocal last
        if _messages and (share >= 1 or time.monotonic() - last > 0.2):
            last = time.monotonic()
            _messages.put((job.label, stage, share))

    report("loading models", 0.0)
    arm.run(config, job, out, report)


def carry_out(config: Config, jobs: list[Job], out: Path, workers: int, console: Console, finished: Callable[[Job], str]) -> None:
    """Run ``jobs`` in ``workers`` processes; ``finished`` words a line per job done.

    UserError or RunError from the first job that fails, after those that were running have ended.
    """
    from opd_bench import arm

    context = multiprocessing.get_context("spawn")
    messages, places = context.SimpleQueue(), context.SimpleQueue()
    for place in device.places(config.device, workers):
        places.put(place)
    arm.forget()  # this process needs its models no longer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with Board(console, len(jobs)) as (progress, total):
        listener = threading.Thread(target=_listen, args=(messages, progress), daemon=True)
        listener.start()
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(messages, places, config.threads))
        try:
            with _interrupts_held():
                futures = {pool.submit(_carry_out, config, job, out): job for job in jobs}
            failure = _collect(futures, pool, progress, total, finished)
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        pool.shutdown()
        if failure:  # a killed worker may have left the queue locked, so the listener is not waited for
            raise failure
        messages.put(None)
        listener.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started here never see Ctrl-C, from their first instruction on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _collect(
    futures: dict[Future, Job], pool: ProcessPoolExecutor, progress: Progress, total: TaskID, finished: Callable[[Job], str]
) -> Exception | None:
    """The first failure, worded, or None; jobs that were running when it happened are waited for."""
    for future in as_completed(futures):
        error = future.exception()
        if error is not None:
            pool.shutdown(cancel_futures=True)
            return _worded(futures[future], error)
        progress.advance(total)
        progress.console.print(finished(futures[future]), markup=False, highlight=False)
    return None


def _worded(job: Job, error: BaseException) -> Exception:
    if isinstance(error, BrokenProcessPool):
        return RunError("a worker process was killed (out of memory?); finished arms are kept, run the same command again to resume")
    if isinstance(error, UserError | RunError):
        return type(error)(f"{job.label}: {error}")
    return RunError(f"{job.label}: {type(error).__name__}: {error}")


class Board:
    """A bar for the whole comparison and one for every job that is running."""

    def __init__(self, console: Console, jobs: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[stage]}"), TimeElapsedColumn())
        self.progress = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console, transient=True)
        self.total = self.progress.add_task("comparison", total=jobs, stage=f"{jobs} jobs")

    def __enter__(self) -> tuple[Progress, TaskID]:
        self.progress.start()
        return self.progress, self.total

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _listen(messages: multiprocessing.SimpleQueue, progress: Progress) -> None:
    bars: dict[str, TaskID] = {}
    while (message := messages.get()) is not None:
        label, stage, share = message
        if label not in bars:
            bars[label] = progress.add_task(label, total=1.0, stage=stage)
        progress.update(bars[label], completed=share, stage=stage)
        if stage == "done":
            progress.remove_task(bars.pop(label))
        elif share == 0:
            progress.reset(bars[label], total=1.0, stage=stage)
