"""Reads and checks a CSV table of the points of a scaling study.

Legend: R rows (runs).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mone_megatron.report.stats import FloatArray

IntArray = npt.NDArray[np.int64]

# Operations of training a token, for each parameter it uses: 2 forward and 4 backward.
FLOPS_PER_PARAM_TOKEN = 6.0

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
# Rows named in one message; the others are counted.
_MAX_NAMED = 8


@dataclass(frozen=True)
class Table:
    """Holds runs as points of a scaling law; every value is finite and positive.

    Attributes:
        source: what messages call the table.
        names: what messages call each row.
        params_R: N, the parameters of the model by the convention of the table.
        tokens_R: D, the tokens it was trained on.
        loss_R: its final loss in nats per token.
        flops_R: operations of the whole training.
        ratio_R: share of the neurons, or of the parameters, that a token keeps, in (0, 1]; None
            where the table does not say.
        flops_rule: where `flops_R` comes from, in words.
        mismatches: why the losses of the rows may not be comparable; empty when nothing says so.
    """

    source: str
    names: tuple[str, ...]
    params_R: FloatArray
    tokens_R: FloatArray
    loss_R: FloatArray
    flops_R: FloatArray
    ratio_R: FloatArray | None
    flops_rule: str
    mismatches: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: IntArray) -> Table:
        """Returns the rows with these indices, in their order; repeats are kept."""
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            params_R=self.params_R[rows],
            tokens_R=self.tokens_R[rows],
            loss_R=self.loss_R[rows],
            flops_R=self.flops_R[rows],
            ratio_R=None if self.ratio_R is None else self.ratio_R[rows],
        )

    def with_loss(self, loss_R: FloatArray) -> Table:
        """Returns the same runs with other losses."""
        return replace(self, loss_R=loss_R)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Returns the different keep ratios, ascending; empty where the table has none."""
        return () if self.ratio_R is None else tuple(np.unique(self.ratio_R).tolist())

    def points(self) -> IntArray:
        """Returns ``[R]``, the number of each row's (N, D, keep ratio): equal for replicates."""
        columns = [self.params_R, self.tokens_R]
        if self.ratio_R is not None:
            columns.append(self.ratio_R)
        _, inverse = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        return inverse.reshape(-1).astype(np.int64)

    def budgets(self, tolerance: float) -> list[IntArray]:
        """Returns the rows of each FLOP budget, budgets ascending.

        A row belongs to a budget when its FLOPs are within a factor ``1 + tolerance`` of the
        smallest of the budget: real runs stop at whole steps.
        """
        order = np.argsort(self.flops_R, kind="stable")
        groups: list[list[int]] = []
        for row in order.tolist():
            if groups and self.flops_R[row] <= self.flops_R[groups[-1][0]] * (1 + tolerance):
                groups[-1].append(row)
            else:
                groups.append([row])
        return [np.array(group, dtype=np.int64) for group in groups]


@dataclass(frozen=True)
class ColumnNames:
    """Names the columns of a CSV table.

    None for an optional column takes its usual name if it is there. The usual names are ``flops``,
    ``keep_ratio``, ``run``, ``seed``, ``data``; `active` has none.
    """

    params: str = "params"
    tokens: str = "tokens"
    loss: str = "loss"
    flops: str | None = None
    keep_ratio: str | None = None
    # Parameters that a token activates, of those in `params`: their share is the keep ratio.
    active: str | None = None
    run: str | None = None
    seed: str | None = None
    data: str | None = None


def read_csv(
    path: str | Path,
    columns: ColumnNames | None = None,
    *,
    tokens_from_flops: bool = False,
    flops_per_param_token: float = FLOPS_PER_PARAM_TOKEN,
    allow_duplicates: bool = False,
) -> Table:
    """Reads a table of runs, one a row under a line of column names.

    Numbers may end in K, M, B or T. Without a column of FLOPs they are
    ``flops_per_param_token * N * D``.

    Args:
        path: the file.
        columns: names of the columns; None takes the usual ones.
        tokens_from_flops: the table has FLOPs and no tokens: D is
            ``C / (flops_per_param_token * N)``.
        flops_per_param_token: FLOPs over N*D, for the two rules above.
        allow_duplicates: rows of the same run and seed, or of the same point where the table has
            neither column, are taken as replicates.

    Raises:
        ValueError: the file is no table, lacks a column, or has values that are not positive and
            finite, or duplicate rows; one line that names the file, the column and the rows.
    """
    columns = ColumnNames() if columns is None else columns
    source = str(path)
    header, lines, rows = _read_rows(Path(path))

    def texts(name: str) -> list[str]:
        return [row[header.index(name)].strip() for row in rows]

    def optional(given: str | None, usual: str) -> str | None:
        if given is not None:
            _require(source, header, given)
            return given
        return usual if usual in header else None

    _require(source, header, columns.params)
    _require(source, header, columns.loss)
    flops_name = optional(columns.flops, "flops")
    ratio_name = optional(columns.keep_ratio, "keep_ratio")
    if columns.active is not None:
        _require(source, header, columns.active)
        if columns.keep_ratio is not None:
            raise ValueError(
                "the keep ratio is given by two columns, "
                f"{columns.keep_ratio!r} and {columns.active!r}: choose one"
            )
        ratio_name = None
    wanted = [columns.params, columns.loss]
    if tokens_from_flops:
        if flops_name is None:
            _require(source, header, "flops")
    else:
        _require(source, header, columns.tokens, "; FLOPs can give it: --tokens-from-flops")
        wanted.append(columns.tokens)
    wanted += [name for name in (flops_name, ratio_name, columns.active) if name is not None]
    values = {name: _numbers(source, name, lines, texts(name)) for name in wanted}
    check_positive(source, lines, values)

    params_R, loss_R = values[columns.params], values[columns.loss]
    if tokens_from_flops:
        assert flops_name is not None
        tokens_R = values[flops_name] / (flops_per_param_token * params_R)
    else:
        tokens_R = values[columns.tokens]
    if flops_name is not None:
        flops_R, flops_rule = values[flops_name], f"column {flops_name!r}"
    else:
        flops_R = flops_per_param_token * params_R * tokens_R
        flops_rule = f"{flops_per_param_token:g} N D"
    ratio_R = None
    if ratio_name is not None:
        ratio_R = values[ratio_name]
        _check_ratio(source, ratio_name, lines, ratio_R)
    elif columns.active is not None:
        ratio_R = values[columns.active] / params_R
        _check_ratio(source, f"{columns.active} / {columns.params}", lines, ratio_R)

    identities = [
        texts(name)
        for name in (optional(columns.run, "run"), optional(columns.seed, "seed"))
        if name is not None
    ]
    table = Table(
        source=source,
        names=tuple(lines),
        params_R=params_R,
        tokens_R=tokens_R,
        loss_R=loss_R,
        flops_R=flops_R,
        ratio_R=ratio_R,
        flops_rule=flops_rule,
        mismatches=_data_mismatches(lines, optional(columns.data, "data"), texts),
    )
    if not allow_duplicates:
        check_duplicates(table, list(zip(*identities, strict=True)) if identities else None)
    return table


def check_positive(source: str, names: Sequence[str], values: Mapping[str, FloatArray]) -> None:
    """Refuses values that are not finite and positive.

    Raises:
        ValueError: names the column and the rows with what they hold.
    """
    for column, array in values.items():
        bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
        if len(bad):
            found = [f"{names[row]} ({array[row]:g})" for row in bad.tolist()]
            raise ValueError(
                f"{source}: {column!r} is not a finite positive number in {listed(found)}: "
                "correct or remove those rows"
            )


def check_duplicates(table: Table, identities: Sequence[object] | None) -> None:
    """Refuses rows that are the same run twice.

    Args:
        table: the rows.
        identities: run or seed of each row; None when the table does not say, and then two rows of
            one point are duplicates.

    Raises:
        ValueError: names the first rows that are the same.
    """
    points = table.points().tolist()
    seen: dict[object, int] = {}
    for row, point in enumerate(points):
        key = (point, identities[row] if identities is not None else None)
        if key not in seen:
            seen[key] = row
            continue
        first, second = table.names[seen[key]], table.names[row]
        same = "params, tokens and keep ratio" if table.ratio_R is not None else "params and tokens"
        fix = (
            "are the same run: remove one"
            if identities is not None
            else "and no run or seed to tell them apart: remove one or add a 'seed' column"
        )
        raise ValueError(
            f"{table.source}: {first} and {second} have the same {same} {fix} "
            "(--allow-duplicates keeps both)"
        )


def keep_only_ratio(table: Table, ratio: float) -> Table:
    """Returns the rows of one keep ratio.

    Raises:
        ValueError: the table has no keep ratios, or no row of this one.
    """
    if table.ratio_R is None:
        raise ValueError(f"{table.source} has no keep ratios: give a 'keep_ratio' column")
    rows = np.flatnonzero(np.isclose(table.ratio_R, ratio, rtol=1e-6))
    if not len(rows):
        known = ", ".join(f"{value:g}" for value in table.ratios)
        raise ValueError(f"{table.source} has no row of keep ratio {ratio:g}, only {known}")
    return table.take(rows)


def parse_count(text: str) -> float:
    """Parses a number that may end in K, M, B (or G) or T: ``1.7B`` is 1.7e9.

    Raises:
        ValueError: not a number.
    """
    stripped = text.strip()
    scale = _SUFFIXES.get(stripped[-1:].upper(), 1.0)
    digits = stripped[:-1] if scale != 1.0 else stripped
    try:
        return float(digits) * scale
    except ValueError:
        raise ValueError(f"{text!r} is not a number: write 1700000000, 1.7e9 or 1.7B") from None


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Returns the items in one text; of many, the first ones and a count."""
    shown = separator.join(items[:_MAX_NAMED])
    more = len(items) - _MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _read_rows(path: Path) -> tuple[list[str], list[str], list[list[str]]]:
    """Reads column names, ``line N`` of each row, and the cells."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a CSV table or folders of runs")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            found = [(f"line {reader.line_num}", row) for row in reader if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV table ({error}): save it as UTF-8 CSV") from error
    if len(found) < 2:
        raise ValueError(f"{path} has no rows: a line of column names and one line a run is needed")
    header = [name.strip() for name in found[0][1]]
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} has the column {repeated[0]!r} twice: rename one")
    for line, row in found[1:]:
        if len(row) != len(header):
            raise ValueError(
                f"{path} {line} has {len(row)} cells under {len(header)} column names: correct it"
            )
    return header, [line for line, _ in found[1:]], [row for _, row in found[1:]]


def _require(source: str, header: Sequence[str], name: str, hint: str = "") -> None:
    if name not in header:
        raise ValueError(
            f"{source} has no column {name!r}, only {', '.join(map(repr, header))}: "
            f"name it with the --*-column options{hint}"
        )


def _numbers(source: str, column: str, lines: Sequence[str], texts: Sequence[str]) -> FloatArray:
    values = []
    for line, text in zip(lines, texts, strict=True):
        # An empty cell is a value that is missing, and is refused with the other bad ones.
        try:
            values.append(parse_count(text) if text else math.nan)
        except ValueError as error:
            raise ValueError(f"{source} {line}, {column!r}: {error}") from None
    return np.array(values, dtype=np.float64)


def _check_ratio(source: str, column: str, lines: Sequence[str], ratio_R: FloatArray) -> None:
    bad = np.flatnonzero(ratio_R > 1)
    if len(bad):
        found = [f"{lines[row]} ({ratio_R[row]:g})" for row in bad.tolist()]
        raise ValueError(
            f"{source}: {column} is above 1 in {listed(found)}: a keep ratio is a share"
        )


def _data_mismatches(
    lines: Sequence[str], column: str | None, texts: Callable[[str], list[str]]
) -> tuple[str, ...]:
    if column is None:
        return ()
    values = texts(column)
    return tuple(
        f"{column}: {values[0]!r} in {lines[0]}, {value!r} in {line}"
        for line, value in zip(lines, values, strict=True)
        if value != values[0]
    )
