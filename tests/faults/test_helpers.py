"""A thread or process that fails is told of in one line, soon, by the one that started it."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from faults_helpers import PATIENCE, QUIET, end, launch, records, wait_until
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from mone_megatron import helpers
from mone_megatron.checkpoint import CheckpointWriteError
from mone_megatron.data import loader as loading
from mone_megatron.data.loader import MicrobatchSampler, build_loader
from mone_megatron.data.preprocess import TokenizerSettings, write_corpus
from mone_megatron.data.records import Document
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from mone_megatron.helpers import HelperError, HelperThread, ending, starting
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.processes import Processes, RankFailedError
from mone_megatron.testing.warm_start import WarmProcess
from mone_megatron.train.health.signals import StopRequest, exit_code
from mone_megatron.train.health.watchdog import Watchdog
from mone_megatron.train.resume import writing
from mone_megatron.train.resume.writing import BackgroundSave

RUN = (
    "experiment=tiny_moe", "device=cpu", *QUIET, "data.max_megabytes=0.2", "train.steps=4000",
    "model.num_layers=2",
)  # fmt: skip
KILLED = "was killed by SIGKILL, which a machine that runs out of memory sends"


@contextlib.contextmanager
def open_files(free: int) -> Iterator[None]:
    """Leaves this process room for so many more open files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # New files take the lowest free numbers, and there are gaps between those that are taken. The
    # last one listed is that of the list itself.
    taken = sorted(map(int, os.listdir("/proc/self/fd")))
    taken = [number for number in taken if os.path.exists(f"/proc/self/fd/{number}")]
    limit = 0
    while free or limit in taken:
        free -= limit not in taken
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def children() -> list[psutil.Process]:
    """The processes that the test running now has started: others' are kept for the session."""
    return [
        child for child in psutil.Process().children(recursive=True) if child.pid not in _EARLIER
    ]


def workers_started() -> list[BaseProcess]:
    """Those of multiprocessing that the test running now has started."""
    return [child for child in multiprocessing.active_children() if child.pid not in _EARLIER]


_EARLIER: set[int] = set()


@pytest.fixture(autouse=True)
def _earlier_processes() -> Iterator[None]:
    _EARLIER.update(child.pid for child in psutil.Process().children(recursive=True))
    yield
    _EARLIER.clear()


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all of them end. They are not waited for: that is for the one that started them."""
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, processes))


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(process.name())
    return "(ended)"


def check_one_line(error: BaseException, *told: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    assert all(words in text for words in told), text


# What they share


def test_endings_are_told_in_words() -> None:
    assert ending(3) == "ended with code 3"
    assert ending(-signal.SIGKILL) == KILLED
    assert ending(-signal.SIGTERM) == "was killed by SIGTERM"
    assert ending(-63) == "was killed by signal 63"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("AF_UNIX path too long"), "TMPDIR=/long is too long for a socket"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(28, "No space left on device"), "make room in /dev/shm"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (OSError(12, "Cannot allocate memory"), "no memory left"),
    ],
)
def test_what_does_not_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    monkeypatch.setenv("TMPDIR", "/long")
    with pytest.raises(HelperError) as refused, starting("2 helpers", "use none"):
        raise error
    check_one_line(refused.value, "cannot start 2 helpers: ", told, "; use none")


def test_what_is_no_failure_to_start_stays() -> None:
    with pytest.raises(RuntimeError, match="mine"), starting("2 helpers"):
        raise RuntimeError("mine")


@pytest.mark.parametrize("error", [ValueError("two\nlines"), SystemExit(3), MemoryError()])
def test_a_failing_thread_tells_who_started_it(error: BaseException) -> None:
    def fail() -> None:
        raise error

    told: list[str] = []
    thread = HelperThread(fail, name="worker", on_failure=told.append)
    thread.start()
    thread.join()
    (line,) = told
    assert line.startswith(f"the thread 'worker' has failed: {type(error).__name__}")
    assert "\n" not in line


def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", refuse)
    with pytest.raises(HelperError, match="cannot start the thread 'worker': can't start new"):
        HelperThread(lambda: None, name="worker").start()


# Data loader processes


class Samples:
    """Sample i holds i everywhere; ``do`` is called for each, in the process that loads it."""

    def __init__(self, do: Callable[[int], object] = lambda index: None, width: int = 3) -> None:
        self.do = do
        self.width = width

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.do(index)
        row = torch.full((self.width,), index)
        return {"tokens": row, "labels": row, "loss_mask": torch.ones(3), "position_ids": row}


def load(samples: Samples, workers: int = 2) -> Iterator[dict[str, torch.Tensor]]:
    sampler = MicrobatchSampler(
        global_batch_size=4,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        start_step=0,
        end_step=100,
    )
    return build_loader(samples, sampler, num_workers=workers)


def kill_itself_at(last: int) -> Callable[[int], None]:
    def do(index: int) -> None:
        if index == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return do


def raise_at(last: int) -> Callable[[int], None]:
    def do(index: int) -> None:
        if index == last:
            raise OSError(5, "Input/output error", "corpus.bin")

    return do


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("do", "told"),
    [
        (kill_itself_at(40), KILLED),
        (raise_at(40), "failed: OSError: [Errno 5] Input/output error: 'corpus.bin'"),
        (lambda index: index == 40 and os._exit(7), "ended with code 7"),
    ],
)
def test_a_loader_process_that_fails(workers: int, do: Callable[[int], object], told: str) -> None:
    batches = load(Samples(do), workers)
    processes = children()
    assert len(processes) == workers
    with pytest.raises(HelperError) as failed:
        list(batches)
    check_one_line(failed.value, f"a data loader process (data.num_workers={workers}) {told}")
    # A zombie of theirs would end the next loader's wait.
    assert not any(psutil.pid_exists(process.pid) for process in processes)


def test_a_loader_process_killed_while_a_batch_is_on_its_way() -> None:
    # Larger than a pipe holds: the process waits in the middle of it.
    batches = load(Samples(width=1 << 20), workers=1)
    (worker,) = children()
    time.sleep(1)
    # Meanwhile the training process does something else, which is not disturbed.
    worker.kill()
    assert gone([worker])
    time.sleep(0.1)
    with pytest.raises(HelperError) as failed:
        list(batches)
    check_one_line(failed.value, KILLED)


def test_a_loader_process_killed_while_it_is_waited_for() -> None:
    batches = load(Samples(lambda index: time.sleep(3600 if index else 0)), workers=1)
    (worker,) = children()
    killer = threading.Timer(1, worker.kill)
    killer.start()
    with pytest.raises(HelperError, match="was killed by SIGKILL"):
        list(batches)
    killer.join()


def test_a_batch_that_cannot_be_sent(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "_collate_arrays", lambda samples: {"tokens": lambda: None})
    with pytest.raises(HelperError) as failed:
        list(load(Samples()))
    check_one_line(failed.value, "ended with code 1")
    assert "a batch cannot be sent: " in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loader_processes_that_cannot_start() -> None:
    before = children()
    with open_files(8), pytest.raises(HelperError) as refused:
        load(Samples(), workers=8)
    check_one_line(
        refused.value,
        "cannot start 8 data loader processes (data.num_workers): Too many open files",
        "ulimit -n",
        "data.num_workers=0",
    )
    left = [child for child in children() if child not in before]
    assert gone(left)


# Runs


def start_run(folder: Path, *overrides: str, **environment: str) -> WarmProcess:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        (run,) = launch(folder, *RUN, f"data.cache_dir={folder.parent / 'cache'}", *overrides)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return run


def test_a_run_with_a_long_tmpdir_trains_saves_and_stops(tmp_path: Path) -> None:
    temporary = tmp_path / "/".join(["a_scratch_folder_with_a_long_name"] * 4)
    temporary.mkdir(parents=True)
    assert len(str(temporary)) > 130
    folder = tmp_path / "run"
    run = start_run(
        folder,
        "data.num_workers=2",
        "checkpoint=auto",
        "checkpoint.async_save=true",
        "checkpoint.interval=3",
        TMPDIR=str(temporary),
    )
    wait_until(lambda: len(records(folder)) > 4, [run])
    os.kill(run.pid, signal.SIGTERM)
    (code,), said = end([run])
    assert code == 130, said
    assert "Traceback" not in said
    saved = max(int(path.name.split("_")[-1]) for path in folder.glob("checkpoints/step_*"))
    assert saved == len(records(folder))


def test_a_run_whose_loader_process_is_killed_ends_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start_run(folder, "data.num_workers=1")
    wait_until(lambda: len(records(folder)) > 1, [run])
    (worker,) = psutil.Process(run.pid).children()
    worker.kill()
    (code,), said = end([run])
    assert code == 1, said
    assert f"error: a data loader process (data.num_workers=1) {KILLED}\n" in said
    assert "Traceback" not in said


def test_a_run_whose_wandb_service_is_killed_trains_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = ("train.steps=300", "train.global_batch_size=2")
    run = start_run(folder, *steps, "logging.wandb.mode=offline")

    def services() -> list[psutil.Process]:
        found = psutil.Process(run.pid).children(recursive=True)
        return [process for process in found if "wandb-core" in name_of(process)]

    wait_until(lambda: services() and list(folder.glob("wandb/offline-run-*/*.wandb")), [run])
    for process in services():
        process.kill()
    (code,), said = end([run])
    assert code == 0, said
    assert len(records(folder)) == 300
    assert said.count("WARNING: W&B: ") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_run_whose_watchdog_fails_saves_and_stops(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = str(Path(__file__).with_name("failing_watchdog.py"))
    overrides = (*RUN, "checkpoint=auto", f"data.cache_dir={tmp_path / 'cache'}")
    run = launch(folder, *overrides, command=(script,))
    (code,), said = end(run)
    assert code == 75, said
    why = "the thread 'watchdog' has failed: MemoryError: no memory for a look"
    assert f"error: {why}; the run stops and saves after this step\n" in said
    assert f"stopped by {why} after step {len(records(folder))}" in said
    assert list(folder.glob("checkpoints/step_*"))


def hang(folder: Path) -> None:
    """What a rank does whose main thread waits for ever, and whose run.json is a folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    with Watchdog(folder, 0.5, computes_on_cpu=False):
        time.sleep(3600)


def test_a_hang_ends_even_when_the_watchdog_cannot_tell_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").mkdir()
    process = multiprocessing.get_context("fork").Process(target=hang, args=(tmp_path,))
    process.start()
    process.join(PATIENCE)
    said = capfd.readouterr().err
    assert process.exitcode == 76, said
    assert "error: hang: there is no other rank" in said
    assert "error: the watchdog failed: IsADirectoryError" in said


def test_a_failed_thread_asks_the_run_to_stop_and_go_on_later(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stop = StopRequest()
    thread = HelperThread(lambda: [][0], name="heartbeat", on_failure=stop.helper_failed)
    thread.start()
    thread.join()
    why = "the thread 'heartbeat' has failed: IndexError: list index out of range"
    assert stop.reason == why
    assert exit_code(stop.read(torch.device("cpu"))) == 75
    assert capfd.readouterr().err == f"error: {why}; the run stops and saves after this step\n"


# Processes that write checkpoints


def save_into(folder: Path) -> AsyncRequest:
    """What megatron-core hands over to write one file."""
    bucket = (str(folder / "file"), "file", ([], []))
    work: Any = functools.partial(lambda: None, [])
    return AsyncRequest(work, ([], [bucket], queue.SimpleQueue()), [])


def outcome(save: BackgroundSave) -> CheckpointWriteError:
    save.wait()
    assert save.ended
    error = save.error()
    assert error is not None
    return error


def test_a_checkpoint_writer_that_writes(tmp_path: Path) -> None:
    save = BackgroundSave(save_into(tmp_path))
    save.wait()
    assert save.error() is None
    assert list(save.digests()) == ["file"]


def test_a_checkpoint_writer_that_cannot_start(tmp_path: Path) -> None:
    request = save_into(tmp_path)
    with open_files(0):
        error = outcome(BackgroundSave(request))
    check_one_line(error, "cannot start the process that writes", "Too many open files", "ulimit")


def raise_memory_error(transforms: object, bucket: object) -> None:
    raise MemoryError("no memory to write with")


def kill_writer(transforms: object, bucket: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_writer(transforms: object, bucket: object) -> None:
    os._exit(9)


@pytest.mark.parametrize(
    ("do", "told"),
    [
        (raise_memory_error, "MemoryError: no memory to write with"),
        (kill_writer, f"the process writing it {KILLED}"),
        (leave_writer, "the process writing it ended with code 9"),
    ],
)
def test_a_checkpoint_writer_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, do: Callable[..., None], told: str
) -> None:
    monkeypatch.setattr(writing, "_write_file", do)
    check_one_line(outcome(BackgroundSave(save_into(tmp_path))), f"{tmp_path}/file", told)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"\x00\x00\x10\x00half of it", "ended with code 0"),
        (b"\x00\x00\x00\x04nope", "its writer's answer cannot be read: UnpicklingError"),
    ],
)
def test_a_checkpoint_writer_that_sends_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: bytes, told: str
) -> None:
    def write(transforms: object, buckets: object, parent: Any) -> None:
        os.write(parent.fileno(), sent)

    monkeypatch.setattr(writing, "_write", write)
    check_one_line(outcome(BackgroundSave(save_into(tmp_path))), told)


# Tokenizing processes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    save_tokenizer(train_tokenizer(["one two three"], 260), folder)
    return folder


def tokenize(folder: Path, tokenizer: Path, do: Callable[[int], object]) -> None:
    """``do`` is called between the documents of a corpus, once the processes run."""

    def documents() -> Iterator[Document]:
        for number in range(12 * 1024):
            if number > 1024:
                do(number)
            yield Document("one two three", 1)

    settings = TokenizerSettings(folder=tokenizer)
    write_corpus(documents, folder / "corpus", settings, total_bytes=1, workers=2)


def kill_one(number: int) -> None:
    if number == 2000:
        workers_started()[0].kill()


def test_a_tokenizing_process_that_is_killed(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(HelperError) as failed:
        tokenize(tmp_path, tokenizer, kill_one)
    check_one_line(failed.value, f"a tokenizing process (--workers) {KILLED}", "--workers 1")
    assert list(tmp_path.iterdir()) == []
    assert workers_started() == []


def test_a_tokenizing_process_that_fails(tmp_path: Path, tokenizer: Path) -> None:
    # Gone when the first process loads it.
    def remove(number: int) -> None:
        for path in tmp_path.glob(".corpus.building-*/corpus.tokenizer/tokenizer.json"):
            path.unlink()

    def documents() -> Iterator[Document]:
        for number in range(4 * 1024):
            remove(number)
            yield Document("one two three", 1)

    settings = TokenizerSettings(folder=tokenizer)
    with pytest.raises(ValueError, match="holds no") as failed:
        write_corpus(documents, tmp_path / "corpus", settings, total_bytes=1, workers=2)
    check_one_line(failed.value, "holds no tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_tokenizing_processes_that_cannot_start(tmp_path: Path, tokenizer: Path) -> None:
    with open_files(4), pytest.raises(HelperError) as refused:
        tokenize(tmp_path, tokenizer, lambda number: None)
    check_one_line(refused.value, "cannot start 2 tokenizing processes (--workers): Too many open")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_tokenizing_tool_that_is_stopped_leaves_no_process(
    tmp_path: Path, tokenizer: Path, number: signal.Signals
) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text('{"text": "one two three one two three"}\n' * 400_000, encoding="utf-8")
    output = tmp_path / "out"
    tool = subprocess.Popen(
        [
            *(sys.executable, "tools/preprocess_data.py", str(source)),
            *("--output", str(output / "c"), "--tokenizer", str(tokenizer), "--workers", "2"),
        ],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # multiprocessing's resource tracker, and two.
    wait_until(lambda: len(psutil.Process(tool.pid).children()) == 3, [tool])
    processes = psutil.Process(tool.pid).children()
    os.kill(tool.pid, number)
    assert tool.wait(PATIENCE) == (143 if number == signal.SIGTERM else -9)
    tool.communicate()
    assert gone(processes)
    if number == signal.SIGTERM:
        assert not output.exists() or list(output.iterdir()) == []


# Processes of benchmarks and tests


def wait_or_die(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def test_a_rank_of_a_benchmark_that_is_killed() -> None:
    with Processes(1) as processes, pytest.raises(RankFailedError) as failed:
        processes.run(wait_or_die, 0)
    check_one_line(failed.value, f"rank 0 of 1 failed: it {KILLED}")


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "import sys; from mone_megatron.testing.processes import Processes;"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_helpers import wait_or_die;"
        "Processes(1).run(wait_or_die, 5)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while len(psutil.Process(starter.pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = psutil.Process(starter.pid).children()
    starter.kill()
    starter.communicate()
    assert gone(ranks)


def test_the_module_starts_nothing_and_imports_little() -> None:
    code = "import sys, mone_megatron.helpers; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY) == b"False\n"
    assert helpers.__doc__ is not None
