"""Prepares the server of one model: the folder that it reads, its command, what is said of it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone_megatron.serving.engine import Engine
from mone_megatron.serving.misread import VLLM, Misreading, misreadings

_DTYPES = {"saved": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# vLLM for CPUs would take 92% of the memory, and refuses to start when as much is not free.
_CACHE_GIGABYTES = 4


@dataclass(frozen=True)
class Server:
    """Describes a server that can be started.

    Attributes:
        command: to execute.
        environment: to execute it in.
        address: where clients find it.
        name: the model's, for clients.
        notes: what was chosen and why.
    """

    command: list[str]
    environment: Mapping[str, str]
    address: str
    name: str
    notes: Sequence[str]

    def describe(self) -> list[str]:
        """Returns lines for people: what was chosen, and how to try it."""
        body = json.dumps({"model": self.name, "prompt": "import ", "max_tokens": 32})
        return [
            *self.notes,
            f"starting: {shlex.join(self.command)}",
            "when it says that startup is complete, try it:",
            f"  curl {self.address}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
            "  or in Python, after `pip install openai`:",
            f'  OpenAI(base_url="{self.address}/v1", api_key="none").completions.create('
            f'model="{self.name}", prompt="import ", max_tokens=32)',
        ]


@dataclass(frozen=True)
class Served:
    """Describes the model that is to be served.

    Attributes:
        given: the run, checkpoint or export that the user named.
        folder: the export that the engine reads; it may not be written yet.
        model_type: as in the export's ``config.json``.
        write: writes the export; None where it is there.
    """

    given: Path
    folder: Path
    model_type: str
    write: Callable[[], None] | None = None


def check_address(port: int) -> None:
    """Checks where the server is to listen.

    Raises:
        ValueError: the port is no port.
    """
    if not 0 < port < 65536:
        raise ValueError(f"--port: {port} is not in 1..65535")


def find_model(where: Path, *, say: Callable[[str], None]) -> Served:
    """Returns what is to be served; nothing is written, and no engine is looked for.

    Args:
        where: a run, a checkpoint, or an export.
        say: is told what was chosen.

    Raises:
        ValueError: it is none of them, cannot be exported, or vLLM would read it otherwise.
    """
    if not where.is_dir():
        raise ValueError(f"{where}: there is no such folder; give a run, a checkpoint or an export")
    if (where / "config.json").is_file():
        config = _config(where)
        if wrong := _misread(config):
            raise ValueError(
                f"{where}: {wrong[0]}; export it with --architecture mone, which the plugin reads"
            )
        return Served(where, where, config.get("model_type", ""))
    from mone_megatron.extras import calm_bars, require

    require("hf", "transformers", "safetensors")
    calm_bars()
    # Only now: these take seconds to import.
    from mone_megatron.hf import export
    from mone_megatron.hf.checks import check_export
    from mone_megatron.hf.source import is_ours, open_source

    if not is_ours(where):
        raise ValueError(
            f"{where}: holds neither checkpoints nor config.json; give a run or an export"
        )

    source = open_source(where, say=say)
    checkpoint = source.checkpoint.path
    folder = checkpoint.parents[1] / "exports" / checkpoint.name
    architecture = export.choose_architecture(source, "auto")
    if wrong := _misread(export.hf_config(source, architecture, None).to_dict()):
        say(f"as MoneForCausalLM, since {wrong[0]}")
        architecture = export.choose_architecture(source, "mone")

    def check(written: Path) -> str:
        found = check_export(source, written, dtype=None)
        if not found.holds:
            raise ValueError(f"{folder}: not written: {found.describe()}")
        return found.describe()

    def write() -> None:
        say(f"exporting {checkpoint} to {folder} as {architecture.class_name}")
        export.export(
            source,
            folder,
            architecture=architecture,
            dtype=None,
            shard_bytes=5 * 10**9,
            check=check,
            progress=say,
        )

    there = (folder / "config.json").is_file()
    return Served(where, folder, architecture.model_type, None if there else write)


def check_plugin(engine: Engine, model: Served) -> None:
    """Refuses an engine that cannot serve a model.

    Raises:
        ValueError: with the line that installs what is missing.
    """
    if model.model_type == "mone" and engine.plugin is None:
        raise ValueError(
            f"{model.given}: MoneForCausalLM needs the plugin beside vLLM; install it from a "
            f"checkout: {engine.python} -m pip install ./serving/vllm"
        )


def ready_folder(
    model: Served, engine: Engine, *, dry_run: bool, say: Callable[[str], None]
) -> Path:
    """Returns the export to serve, written now where it is not there.

    Args:
        model: from :func:`find_model`.
        engine: what is to serve it.
        dry_run: whether to export nothing.
        say: is told what is done.

    Raises:
        ValueError: the engine cannot serve it, or the export is not the model.
    """
    check_plugin(engine, model)
    if model.write is None:
        if model.folder != model.given:
            say(f"{model.folder}: exported before")
    elif dry_run:
        say(f"{model.given} would be exported to {model.folder}")
    else:
        model.write()
    return model.folder


def server_of(
    folder: Path,
    engine: Engine,
    *,
    host: str,
    port: int,
    name: str | None,
    dtype: str,
    options: Sequence[str],
) -> Server:
    """Returns the server of an export.

    Args:
        folder: the export, which may not be written yet.
        engine: what serves it.
        host: address to listen at.
        port: to listen at.
        name: the model's for clients; None for the folder's.
        dtype: as ``export_hf`` names it; ``saved`` for the export's own.
        options: of vLLM.
    """
    name = name or folder.resolve().name
    environment = dict(os.environ)
    plugin = "" if engine.plugin is None else f", mone-vllm {engine.plugin}"
    notes = [f"{engine.distribution} {engine.version}{plugin} of {engine.python}"]
    if (folder / "config.json").is_file():
        # Models of others may name it otherwise.
        positions = _config(folder).get("max_position_embeddings")
        if positions is not None:
            notes.append(
                f"contexts up to {positions} tokens (max_position_embeddings of the export: what "
                "the model was trained on)"
            )
    if engine.on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in environment:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(_CACHE_GIGABYTES)
        notes.append(
            f"VLLM_CPU_KVCACHE_SPACE={_CACHE_GIGABYTES}: gigabytes for keys and values; vLLM would "
            "take 92% of the memory"
        )
    command = [
        str(engine.python),
        # The command `vllm` of the distribution for CPUs does not find its own metadata.
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder)),
        *("--served-model-name", name),
        *("--host", host),
        *("--port", str(port)),
        *("--dtype", _DTYPES[dtype]),
        *options,
    ]
    return Server(command, environment, f"http://{host}:{port}", name, notes)


def _misread(config: Mapping[str, Any]) -> list[Misreading]:
    """Returns what vLLM would compute otherwise without a word."""
    return [wrong for wrong in misreadings(config) if wrong.program == VLLM]


def _config(folder: Path) -> dict[str, Any]:
    """Returns what ``config.json`` says.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no text, too
        raise ValueError(f"{path}: is not JSON ({error}); write the export again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no JSON object; write the export again")
    return config
