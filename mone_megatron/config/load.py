"""Turns YAML files and command-line overrides into a typed :class:`Config`.

With ``pretrain.py`` the only importer of Hydra and OmegaConf. Hydra composes; everything after it
is plain dataclasses. Every mistake of a user becomes one line of a :class:`ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mone_megatron.config import convert
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.schema import Config
from mone_megatron.shipped_files import shipped

# A config is saved with its run and shown by loggers, so it cannot take in the environment.
OmegaConf.clear_resolver("oc.env")
# What `schema` means in the defaults of conf/config.yaml: every key with its default.
ConfigStore.instance().store("schema", dataclasses.asdict(Config()))

CONFIG_NAME = "config"
# The group whose options sweep.
_SWEEPS = "ablation"
CONF_DIR = shipped("conf")


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Returns the config of a command line: ``["experiment=tiny_mone", "train.steps=5"]``.

    ``config_dir`` is a folder laid out like ``conf/`` (the default, beside the package).

    Raises:
        ConfigError: anything wrong with the overrides or the YAML files.
    """
    folder = _config_dir(config_dir)
    problems = check_overrides(overrides, folder)
    if problems:
        raise ConfigError(problems)
    texts = [hydra_override(text) for text in overrides]
    try:
        composed = _with_values(folder, texts)
        if composed is None:
            composed = _hydra_compose(folder, texts)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_explain(error)) from None
    return from_dictconfig(composed, typed_values(overrides))


def _hydra_compose(folder: Path, overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(CONFIG_NAME, list(overrides))


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Override:
    """Returns one override as Hydra reads it, which takes longer than setting its value."""
    return OverridesParser.create().parse_override(text)


@functools.lru_cache(maxsize=64)
def _of_choices(
    folder: Path, choices: tuple[str, ...], files: tuple[tuple[str, int, int], ...]
) -> bytes:
    """Returns what Hydra composes of the options chosen, once while the files stay as they are.

    Pickled: a tree is read from it in a sixth of the time that copying it takes.
    """
    del files
    return pickle.dumps(_hydra_compose(folder, choices))


def _with_values(folder: Path, overrides: Sequence[str]) -> DictConfig | None:
    """Returns what Hydra would compose, from what it composed of the same options before.

    Studies, searches and tests compose by the hundred what differs in values alone, and Hydra takes
    a tenth of a second for each. Setting values is the last that it does, by the same function.

    Returns:
        The composed tree, or None where an override is another than ``GROUP=OPTION`` and
        ``KEY=VALUE``, or a value cannot be set: that is Hydra's to do, or to refuse.
    """
    groups = _group_options(folder)
    choices: list[str] = []
    values: list[Override] = []
    for text in overrides:
        override = _parsed(text)
        key = override.key_or_group
        of_kind = override.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD)
        if not of_kind or override.package is not None or key.partition(".")[0] == "hydra":
            return None
        if key not in groups and "/" not in key:
            values.append(override)
        elif isinstance(override.value(), str):
            choices.append(text)
        else:
            return None
    files = [(str(file), file.stat()) for file in sorted(folder.rglob("*.yaml"))]
    stamps = tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in files)
    composed: DictConfig = pickle.loads(_of_choices(folder, tuple(choices), stamps))
    try:
        for override in values:
            forced = override.type is OverrideType.FORCE_ADD
            OmegaConf.update(
                composed, override.key_or_group, override.value(), merge=True, force_add=forced
            )
    except OmegaConfBaseException:
        return None
    return composed


def check_overrides(
    overrides: Sequence[str], config_dir: Path | None = None, *, multirun: bool = False
) -> list[str]:
    """Returns what is wrong with command-line overrides; nothing when Hydra may have them.

    Run before ``hydra.main`` this replaces Hydra's multi-line messages. ``multirun`` allows sweeps
    (``key=a,b``).
    """
    folder = _config_dir(config_dir)
    groups = _group_options(folder)
    known = list(dict.fromkeys([*convert.keys(Config), *convert.sections(Config), *groups]))
    problems: list[str] = []
    for text in overrides:
        try:
            override = _parsed(text)
        except (HydraException, OmegaConfBaseException) as error:
            name = text.split("=", 1)[0].lstrip("+~")
            problems.append(convert.forbidden_key(name) or f"{name}: {_parse_problem(text, error)}")
            continue
        key = override.key_or_group
        # Hydra builds and sets what its own sections name, so they are looked at, too.
        value = None if override.is_sweep_override() else override.value()
        if problem := _forbidden(key, value, known):
            problems.append(problem)
            continue
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            continue
        if key == _SWEEPS and not multirun:
            problems.append(
                f"{key}: an ablation is a sweep over several runs; "
                "add -m (launch/slurm.sh: --sweep)"
            )
        elif override.is_sweep_override() and not multirun:
            problems.append(
                f"{key}: several values need a sweep; "
                "add -m (launch/slurm.sh: --sweep), or give one value"
            )
        elif override.is_interval_sweep() or (
            isinstance(override.value(), Glob) and key not in groups
        ):
            # Hydra's sweeper has no use for these, and says so by a traceback or not at all.
            value_text = text.partition("=")[2]
            problems.append(f"{key}: {value_text} is not a list of values; write {key}=a,b")
        elif key in groups and not isinstance(override.value(), dict):
            problems.extend(_option_problems(override, groups[key]))
        elif not convert.is_known(key, known, Config):
            problems.append(convert.unknown_key(key, known))
    return problems


def hydra_override(text: str) -> str:
    """Returns an override as Hydra takes it: with ``++`` for a key of an open section.

    What such a section may hold (``mone.rule_options``) is not in the YAML files, and Hydra refuses
    keys that are not there unless they are added by force.
    """
    name = text.split("=", 1)[0]
    section, _, key = name.rpartition(".")
    return f"++{text}" if key and section in convert.open_sections(Config) else text


def typed_values(overrides: Sequence[str]) -> dict[str, str]:
    """Returns key -> value as it was written, of overrides such as ``optim.lr=1e-3``."""
    split = (text.partition("=") for text in overrides)
    return {key.lstrip("+~"): value for key, _, value in split}


def from_dictconfig(config: DictConfig, typed: Mapping[str, str] | None = None) -> Config:
    """Returns the typed config of an OmegaConf tree, whose interpolations are resolved.

    Args:
        config: the OmegaConf tree.
        typed: dotted key -> the value as the user wrote it, where that is known.

    Raises:
        ConfigError: unknown keys, wrong types, missing values, broken interpolations.
    """
    try:
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from None
    if not isinstance(data, dict):
        raise ConfigError("config: expected keys and values, got a list; write `key: value` lines")
    run = data.get("run")
    if isinstance(run, dict) and isinstance(name := run.get("name"), str):
        run["name"] = _in_letters(name)
    plain = {str(key): value for key, value in data.items()}
    return convert.from_dict(Config, plain, typed=typed)


def _in_letters(text: str) -> str:
    """Returns a text in letters that Python took for bytes, as it does where all is ASCII.

    Right for a path, which goes back to the system; what is shown needs letters.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def to_yaml(config: Config) -> str:
    """Returns the whole config as YAML that :func:`from_yaml` reads back to an equal one.

    Word for word what ``OmegaConf.to_yaml`` makes of it, without its tree of nodes, which takes
    four times as long: a run writes it twice.
    """
    return yaml.dump(
        _in_lists(dataclasses.asdict(config)),
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
        Dumper=get_omega_conf_dumper(),
    )


def _in_lists(value: object) -> object:
    """Returns a value with lists for its tuples, which YAML has no word for."""
    if isinstance(value, dict):
        return {key: _in_lists(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_lists(held) for held in value]
    return value


def from_yaml(path: str | Path) -> Config:
    """Returns the config saved at ``path``, where absent keys take the schema's defaults.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = OmegaConf.create(text)
        typed = dict(_scalars(yaml.compose(text), text))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a config.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8 ({error}); give a config.yaml") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML ({_first_line(error)}); fix the file") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected keys and values, got a list; give a config.yaml")
    try:
        return from_dictconfig(loaded, typed)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


def _scalars(node: yaml.Node | None, text: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields each dotted key with its value as it stands in a YAML file."""
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if isinstance(value, yaml.ScalarNode) or value.flow_style:
            yield key, text[value.start_mark.index : value.end_mark.index]
        yield from _scalars(value, text, f"{key}.")


def _config_dir(config_dir: Path | None) -> Path:
    folder = (config_dir or CONF_DIR).resolve()
    if not (folder / f"{CONFIG_NAME}.yaml").is_file():
        raise ConfigError(
            f"{folder}: no {CONFIG_NAME}.yaml in this config folder; "
            "run from a checkout of the repository or give another folder"
        )
    return folder


def _group_options(folder: Path) -> dict[str, list[str]]:
    """Returns the folders of ``conf/``, which are the groups, each with its YAML files."""
    return {
        group.name: sorted(file.name.removesuffix(".yaml") for file in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir()
    }


def _forbidden(key: str, value: object, known: Sequence[str]) -> str | None:
    """Returns why an override's key, or one in its value, may never be in a config; or None."""
    # A key of ours may look like a secret's: model.experts_per_token.
    if key not in known and (problem := convert.forbidden_key(key)):
        return problem
    inner: list[tuple[str, object]] = []
    if isinstance(value, dict):
        inner = [(f"{key}.{name}", held) for name, held in value.items()]
    elif isinstance(value, list):
        inner = [(key, held) for held in value]
    return next(filter(None, (_forbidden(*one, known) for one in inner)), None)


def _option_problems(override: Override, options: Sequence[str]) -> list[str]:
    group, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        found = value.filter(list(options))
        return [] if found else [f"{group}: no option is like {override.get_value_string()}"]
    if override.is_sweep_override():
        chosen = [str(value) for value in override.sweep_string_iterator()]
    else:
        if value is None:
            return [] if override.is_delete() else [f"{group}: null is not an option; use ~{group}"]
        chosen = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        if isinstance(value, (bool, int, float)):
            # As it was written, and not as it was read: 1e-3, 0x10, true.
            chosen = [str(override.input_line).partition("=")[2]]
    return [_unknown_option(group, name, options) for name in chosen if name not in options]


def _unknown_option(group: str, name: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, options, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else "choose one of them"
    return f"{group}: no option {name!r}; {hint} (options: {', '.join(options)})"


def _parse_problem(text: str, error: Exception) -> str:
    if "=" not in text:
        return f"{text!r} is not an override; write key=value"
    reason = error.message if isinstance(error, OverrideParseException) else _first_line(error)
    return (
        f"cannot read {text!r} ({' '.join(reason.splitlines()[0].split())}); "
        "quote special characters: 'key=\"value\"'"
    )


def _explain(error: Exception) -> str:
    """Returns one line for what Hydra or OmegaConf raised while composing."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return _unknown_option(group.lstrip("/") or "config", name, list(error.options or ()))
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(error)}; fix the value"
    return f"config: {_first_line(error)}; fix the override or the YAML file"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
