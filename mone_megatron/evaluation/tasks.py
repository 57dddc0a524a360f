"""Finds and loads tasks: names of lm-evaluation-harness, its YAML files, and our lists.

Everything that can be wrong with them is told before a model is loaded. A task's YAML file is code
as far as lm-evaluation-harness goes (``!function``): use those you trust.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

_SHIPPED = Path(lm_eval.__file__).parent / "tasks"
_LISTS = Path(__file__).resolve().parent / "task_lists"
# Every shipped task states its name like this; group and tag names need the whole index.
_TASK_LINE = re.compile(rb"^task:[ \t]*[\"']?([\w.\-]+)[\"']?[ \t]*\r?$", re.MULTILINE)
# Builders of the datasets package that read files.
_FILE_BUILDERS = ("json", "csv", "text", "parquet", "arrow")
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class TaskRequest:
    """Describes one task as the user asked for it."""

    # A name, or the path of a YAML file.
    spec: str
    # Examples before the question; None for the task's own number.
    num_fewshot: int | None = None


@dataclass(frozen=True)
class LoadedTasks:
    """Holds tasks with their data, ready to run."""

    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]

    def as_dict(self) -> dict[str, Any]:
        """Returns the tasks as ``lm_eval.evaluate`` takes them."""
        children = {name: group.child_names for name, group in self.groups.items()}
        return {"tasks": dict(self.tasks), "groups": dict(self.groups), "group_map": children}


def task_lists() -> dict[str, Path]:
    """Returns the lists in the folder ``task_lists``, by name."""
    return {path.stem: path for path in sorted(_LISTS.glob("*.yaml"))}


def expand(specs: Sequence[str]) -> list[TaskRequest]:
    """Turns names of lists into their tasks; everything else stays.

    Raises:
        ValueError: a list is damaged, or a task is named twice.
    """
    lists = task_lists()
    requests = [
        request
        for spec in specs
        for request in (_read_list(lists[spec]) if spec in lists else [TaskRequest(spec)])
    ]
    for position, request in enumerate(requests):
        if request.spec in [before.spec for before in requests[:position]]:
            raise ValueError(f"{request.spec}: named twice among the tasks; name it once")
    return requests


def load_tasks(
    requests: Sequence[TaskRequest],
    *,
    include_paths: Sequence[Path] = (),
    num_fewshot: int | None = None,
) -> LoadedTasks:
    """Finds the tasks and loads their data.

    Args:
        requests: from :func:`expand`.
        include_paths: folders of YAML files whose tasks go by their names.
        num_fewshot: examples before each question of every task, in place of what the requests
            say; None leaves those.

    Raises:
        ValueError: an unknown task, a task file that does not work, data that cannot be had: one
            line that names the task.
    """
    for folder in include_paths:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of task files")
    ours = _included(include_paths)
    requests = [
        replace(request, spec=str(ours.get(request.spec, request.spec))) for request in requests
    ]
    manager = _manager([request.spec for request in requests], include_paths)
    loaded = LoadedTasks({}, {})
    for request in requests:
        loaded = _add(loaded, _load(manager, request), request, num_fewshot)
    return loaded


def _read_list(path: Path) -> Iterator[TaskRequest]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        for entry in content["tasks"]:
            yield TaskRequest(str(entry["task"]), int(entry["num_fewshot"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: needs `tasks:` with entries {{task: NAME, num_fewshot: N}} ({error})"
        ) from error


def _included(folders: Sequence[Path]) -> dict[str, Path]:
    """Returns the files of the tasks in the user's folders by name; the last of equals counts."""
    return {
        name: path
        for folder in folders
        for path in sorted(folder.glob("**/*.yaml"))
        for name in _task_names(path)
    }


def _task_names(path: Path) -> list[str]:
    return [found.decode() for found in _TASK_LINE.findall(path.read_bytes())]


def _is_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def _manager(specs: Sequence[str], include_paths: Sequence[Path]) -> TaskManager:
    """Returns a manager that knows the named tasks, from as few files as will do.

    lm-evaluation-harness has some 14,000 files; reading all as YAML takes half a minute.
    """
    names = {spec for spec in specs if not _is_file(spec)}
    if not names:
        return TaskManager(include_defaults=False)
    folders: dict[str, Path] = {}
    known: set[str] = set()
    for path in _SHIPPED.glob("**/*.yaml"):
        for name in _task_names(path):
            known.add(name)
            if name in names:
                folders[name] = path.parent
    if set(folders) == names:
        return TaskManager(include_path=sorted(set(folders.values())), include_defaults=False)
    manager = TaskManager(include_path=list(include_paths) or None)
    for name in names - set(folders):
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*manager.all_tasks, *task_lists()], n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `lm-eval ls tasks`"
            raise ValueError(f"{name}: no such task or list; {hint}")
    return manager


def _load(manager: TaskManager, request: TaskRequest) -> Mapping[str, Any]:
    spec: str | dict[str, Any] = request.spec
    if _is_file(request.spec):
        spec = _read_task_file(Path(request.spec))
    try:
        return manager.load([spec])
    except ConnectionError as error:
        raise ValueError(
            f"{request.spec}: its data comes from the network, which is not there ({_line(error)})"
        ) from error
    # A task is code, its own and that of the datasets package: it may raise anything.
    except Exception as error:
        raise ValueError(
            f"{request.spec}: cannot be loaded ({type(error).__name__}: {_line(error)})"
        ) from error


def _read_task_file(path: Path) -> dict[str, Any]:
    """Reads a task's settings; relative paths of its data files are those in its own folder."""
    if not path.is_file():
        raise ValueError(f"{path}: no such task file")
    try:
        settings = load_yaml(path)
    except (OSError, ValueError, yaml.YAMLError, ImportError, AttributeError) as error:
        raise ValueError(f"{path}: not a task file ({_line(error)})") from error
    if not isinstance(settings.get("task"), str):
        raise ValueError(f"{path}: not a task file: it has no `task: NAME`")
    arguments = settings.get("dataset_kwargs")
    if settings.get("dataset_path") in _FILE_BUILDERS and isinstance(arguments, dict):
        files = _resolved(arguments.get("data_files"), path.parent)
        for file in _all_files(files):
            if not any(sign in file for sign in ("://", "*", "?", "[")):
                _check_data_file(path, Path(file))
        settings["dataset_kwargs"] = {**arguments, "data_files": files}
    return settings


def _check_data_file(task_file: Path, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{task_file}: its data file {file} is not there")
    if file.stat().st_size == 0:
        raise ValueError(f"{task_file}: its data file {file} is empty")


def _resolved(files: Any, folder: Path) -> Any:
    if isinstance(files, str):
        return files if "://" in files else str((folder / files).resolve())
    if isinstance(files, list):
        return [_resolved(file, folder) for file in files]
    if isinstance(files, dict):
        return {split: _resolved(file, folder) for split, file in files.items()}
    return files


def _all_files(files: Any) -> list[str]:
    if isinstance(files, dict):
        files = list(files.values())
    if isinstance(files, list):
        return [name for file in files for name in _all_files(file)]
    return [files] if isinstance(files, str) else []


def _add(
    loaded: LoadedTasks,
    found: Mapping[str, Any],
    request: TaskRequest,
    num_fewshot: int | None,
) -> LoadedTasks:
    wanted = request.num_fewshot if num_fewshot is None else num_fewshot
    for name, task in found["tasks"].items():
        if name in loaded.tasks:
            raise ValueError(f"{name}: named twice among the tasks; name it once")
        if not len(task.eval_docs):
            raise ValueError(f"{name}: its data holds no questions")
        own = task.get_config("num_fewshot")
        # As lm-evaluation-harness: a task that says 0 has its examples in its text.
        shots = own if own == 0 or wanted is None else wanted
        task.set_config(key="num_fewshot", value=shots or 0)
        _try_question(name, task)
    return LoadedTasks({**loaded.tasks, **found["tasks"]}, {**loaded.groups, **found["groups"]})


def _try_question(name: str, task: Task) -> None:
    """Writes the first question out: templates and examples work, or fail, here."""
    task.set_fewshot_seed(FEWSHOT_SEED)
    shots = task.get_config("num_fewshot")
    try:
        question = task.eval_docs[0]
        context = task.fewshot_context(question, num_fewshot=shots)
        task.construct_requests(doc=question, ctx=context)
    except Exception as error:  # as in _load
        raise ValueError(
            f"{name}: its first question cannot be written with {shots} examples before it "
            f"({type(error).__name__}: {_line(error)})"
        ) from error


def _line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
