"""Instructions are counted as often as a warp comes by them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from mone_megatron.lab.benchmarks import sass

SOURCE = """def kernel():
    body


def search():
    passes


def rare():
    seldom
"""
# The kernel's loop holds a search, a branch to rare code behind the exit, and a division.
DISASSEMBLY = """
.text.kernel:
	//## File "{file}", line 2
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   MUFU.RCP R1, R1 ;
        /*0020*/                   BSSY B0, `(.L_x_4) ;
        /*0030*/               @P0 BRA `(.L_x_3) ;
        /*0040*/                   CALL.REL.NOINC `($__internal_0_$slowpath) ;
.L_x_3:
        /*0050*/                   BSYNC B0 ;
.L_x_4:
	//## File "{file}", line 6
.L_x_1:
        /*0060*/                   ISETP.GE.AND P1, PT, R1, R2, PT ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/              @!P1 BRA `(.L_x_1) ;
	//## File "{file}", line 2
        /*0090*/               @P2 BRA `(.L_x_5) ;
.L_x_6:
        /*00a0*/                   BRA.DIV UR4, `(.L_x_7) ;
        /*00b0*/              @!P1 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_5:
	//## File "{file}", line 10
        /*00d0*/                   FADD R1, R1, R1 ;
        /*00e0*/                   BRA `(.L_x_6) ;
.L_x_7:
        /*00f0*/                   WARPSYNC.COLLECTIVE R0, `(.L_x_6) ;
        /*0100*/                   BRA `(.L_x_6) ;
$__internal_0_$slowpath:
        /*0110*/                   FADD R1, R1, R1 ;
        /*0120*/                   RET.REL.NODEC R10 `(kernel) ;
"""


def counted(tmp_path: Path, **settings: object) -> sass.Counts:
    file = tmp_path / "kernel.py"
    file.write_text(SOURCE)
    given = {
        "warps": 2,
        "rows": 4,
        "turns": {"kernel": 4, "search": 10},
        "shares": {"rare": 0.25},
        "shares_of_turns": {},
    }
    return sass.counted(DISASSEMBLY.format(file=file), **given | settings)


def test_loops_and_rare_code_count_as_often_as_they_run(tmp_path: Path) -> None:
    # By turn of the kernel: MUFU, BSSY, BRA, BSYNC; 10 x 3; BRA; BRA.DIV, BRA; 2 at times. Around
    # them S2R and EXIT. A slow path is entered by a call, whose block counts nothing.
    turn = 4 + 30 + 1 + 2 + 0.25 * 2
    counts = counted(tmp_path)
    assert counts.instructions == pytest.approx(2 * (4 * turn + 2) / 4)
    assert counts.barriers == pytest.approx(10)
    assert counted(tmp_path, warps=1).instructions == counts.instructions / 2


def test_the_busiest_unit_is_slower_than_the_scheduler(tmp_path: Path) -> None:
    counts = counted(tmp_path, turns={"kernel": 4, "search": 1})
    assert counts.busiest == pytest.approx(max(counts.instructions, 2 * 8))


def test_code_that_is_rare_in_a_loop_only(tmp_path: Path) -> None:
    rare = counted(tmp_path, shares={}, shares_of_turns={"rare": 0.0})
    often = counted(tmp_path, shares={})
    assert often.instructions - rare.instructions == pytest.approx(2 * 2)


def test_a_loop_of_which_nobody_tells_how_often_it_turns_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nobody told"):
        counted(tmp_path, turns={"other": 1})


def test_a_file_that_is_no_kernel_is_an_error_with_the_tools_words() -> None:
    from mone_megatron.helpers import HelperError

    with pytest.raises(HelperError, match="cuobjdump"):
        sass.tool("cuobjdump", ["--dump-resource-usage"], b"no cubin")
