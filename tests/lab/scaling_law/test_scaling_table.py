from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.lab.scaling_law.table import (
    ColumnNames,
    keep_only_ratio,
    parse_count,
    read_csv,
)

HEADER = "params,tokens,loss\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_with_suffixes_and_the_rule_for_flops(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "38M,2.1B,3.5\n\n1e9, 2e10 ,2.9\n")
    table = read_csv(path)
    np.testing.assert_allclose(table.params_R, [38e6, 1e9])
    np.testing.assert_allclose(table.tokens_R, [2.1e9, 2e10])
    np.testing.assert_allclose(table.flops_R, [6 * 38e6 * 2.1e9, 6 * 1e9 * 2e10])
    assert table.flops_rule == "6 N D"
    # Blank lines count, so that a message's line is the file's.
    assert table.names == ("line 2", "line 4")


def test_named_columns_and_tokens_from_flops(tmp_path: Path) -> None:
    path = write(tmp_path, "n,C,val,half,x\n1e8,6e18,3.0,5e7,a\n2e8,6e18,2.9,1e8,b\n")
    table = read_csv(
        path,
        ColumnNames(params="n", loss="val", flops="C", active="half", run="x"),
        tokens_from_flops=True,
    )
    np.testing.assert_allclose(table.tokens_R, [1e10, 5e9])
    assert table.ratio_R is not None
    np.testing.assert_allclose(table.ratio_R, [0.5, 0.5])
    assert table.flops_rule == "column 'C'"


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path, "params,loss,D\n1e8,3,1e9\n")
    with pytest.raises(ValueError, match=r"no column 'tokens', only 'params', 'loss', 'D'"):
        read_csv(path)
    with pytest.raises(ValueError, match=r"no column 'flops'"):
        read_csv(path, tokens_from_flops=True)
    with pytest.raises(ValueError, match=r"no column 'C'"):
        read_csv(path, ColumnNames(tokens="D", flops="C"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1e8,1e9,3\n1e8,2e9,nan\n1e8,3e9,\n", r"'loss' .* line 3 \(nan\), line 4 \(nan\)"),
        ("1e8,1e9,inf\n", r"'loss' .* line 2 \(inf\)"),
        ("0,1e9,3\n", r"'params' .* line 2 \(0\)"),
        ("1e8,-5,3\n", r"'tokens' .* line 2 \(-5\)"),
        ("1e8,1e9,three\n", r"line 2, 'loss': 'three' is not a number"),
        ("1e8,1e9\n", r"line 2 has 2 cells under 3 column names"),
        ("1e8,1e9,3\n2e8,1e9,3\n1e8,1e9,3\n", r"line 2 and line 4 have the same params and tokens"),
        ("", r"has no rows"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(write(tmp_path, HEADER + rows))
    assert "\n" not in str(caught.value)


def test_seeds_tell_replicates_apart(tmp_path: Path) -> None:
    text = "params,tokens,loss,seed\n1e8,1e9,3.0,1\n1e8,1e9,3.1,2\n"
    assert len(read_csv(write(tmp_path, text))) == 2
    again = write(tmp_path, text + "1e8,1e9,3.2,2\n")
    with pytest.raises(ValueError, match=r"line 3 and line 4 .* are the same run"):
        read_csv(again)
    assert read_csv(again, allow_duplicates=True).points().tolist() == [0, 0, 0]


def test_keep_ratios_are_shares_and_part_of_a_point(tmp_path: Path) -> None:
    text = "params,tokens,loss,keep_ratio\n1e8,1e9,3.0,1\n1e8,1e9,3.1,0.25\n"
    table = read_csv(write(tmp_path, text))
    assert table.ratios == (0.25, 1.0)
    assert len(set(table.points().tolist())) == 2
    assert keep_only_ratio(table, 0.25).loss_R.tolist() == [3.1]
    with pytest.raises(ValueError, match=r"no row of keep ratio 0.5, only 0.25, 1"):
        keep_only_ratio(table, 0.5)
    with pytest.raises(ValueError, match=r"keep_ratio is above 1 in line 4 \(25\)"):
        read_csv(write(tmp_path, text + "1e8,1e9,3.2,25\n"))


def test_different_data_is_a_mismatch(tmp_path: Path) -> None:
    text = "params,tokens,loss,data\n1e8,1e9,3.0,dclm\n2e8,1e9,2.9,dclm\n4e8,1e9,2.8,pile\n"
    table = read_csv(write(tmp_path, text))
    assert table.mismatches == ("data: 'dclm' in line 2, 'pile' in line 4",)


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        read_csv(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="'loss' twice"):
        read_csv(write(tmp_path, "params,tokens,loss,loss\n1,1,1,1\n"))
    binary = tmp_path / "table.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a CSV table"):
        read_csv(binary)


def test_budgets_hold_runs_that_stopped_at_whole_steps(tmp_path: Path) -> None:
    text = "params,tokens,loss,flops\n" + "".join(
        f"{n},1e9,3,{c}\n" for n, c in ((1e8, 1.02e18), (2e8, 3e18), (3e8, 1e18), (4e8, 1.06e18))
    )
    budgets = read_csv(write(tmp_path, text)).budgets(0.05)
    assert [sorted(rows.tolist()) for rows in budgets] == [[0, 2], [3], [1]]


@given(st.floats(1e-3, 999), st.sampled_from([("", 1), ("k", 1e3), ("M", 1e6), ("B", 1e9)]))
def test_counts_read_back(value: float, suffix: tuple[str, float]) -> None:
    assert parse_count(f" {value!r}{suffix[0]} ") == pytest.approx(value * suffix[1])
