"""tools/plan.py: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mone_megatron.config.load import CONF_DIR, compose
from mone_megatron.config.schema import Config
from mone_megatron.planning import flops_per_step
from mone_megatron.planning.activations import Numerics
from mone_megatron.planning.communication import stage_traffic
from mone_megatron.planning.hardware import GPUS, Assumptions, find_gpu
from mone_megatron.planning.match import match, value_of
from mone_megatron.planning.plan import (
    Machine,
    Plan,
    default_gpus,
    make_plan,
    problems,
    vocabulary_of,
)
from mone_megatron.planning.prediction import Work, layer_work, output_work
from mone_megatron.planning.search import search
from mone_megatron.planning.shards import layer_kinds
from mone_megatron.testing.tools import Main, load_tool

TOOL = CONF_DIR.parent / "tools" / "plan.py"
EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def main() -> Main:
    return load_tool("plan")


def plan_of(overrides: Sequence[str], gpus: int | None = None, gpu: str = "H100") -> Plan:
    config = compose(overrides)
    return make_plan(config, Machine(find_gpu(gpu), gpus or default_gpus(config)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_fits_its_documented_layout(experiment: str) -> None:
    # docs/planning.md: the fewest GPUs that the experiment's `parallel` takes, of 80 GB.
    config = compose([f"experiment={experiment}"])
    for gpu in GPUS.values():
        plan = make_plan(config, Machine(gpu, default_gpus(config)))
        assert plan.fits, problems(plan)
        assert plan.time.total > 0
        assert 0 < plan.mfu(plan.flops.ideal) <= plan.mfu(plan.flops.realised) < 1


@pytest.mark.parametrize(
    "experiment",
    ["olmoe_1b_7b_mone", "qwen3_30b_a3b_mone", "deepseek_v2_lite_mone", "mixtral_8x7b_mone"],
)
def test_large_experiments_need_not_recompute(experiment: str) -> None:
    """Not even where a rank gets twice the rows of the others; and it would take longer."""
    config = compose([f"experiment={experiment}"])
    assert config.train.recompute == "none"
    gpus, gpu = default_gpus(config), find_gpu("A100")
    uneven = Machine(gpu, gpus, assumed=Assumptions(imbalance=2.0))
    assert make_plan(config, uneven, rough=True).fits
    again = compose([f"experiment={experiment}", "train.recompute=selective"])
    times = [make_plan(one, Machine(gpu, gpus), rough=True).time.total for one in (config, again)]
    assert times[1] > 1.2 * times[0]


def test_it_runs_without_torch_and_prints_everything(tmp_path: Path) -> None:
    # Importing torch takes longer than all of it, and a login node may have none.
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['megatron'] = None\n"
        f"sys.argv = ['plan.py', *sys.argv[1:]]\nrunpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    file = tmp_path / "plan.json"
    overrides = ["experiment=qwen3_30b_a3b_mone", "mone.keep_ratio=0.5"]
    run = subprocess.run(
        [sys.executable, "-c", code, *overrides, "--gpus", "32", "--gpu", "h200",
         "--price", "2.5", "--sbatch", "--hours", "30", "--json", str(file)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for words in (
        "30,532,122,624", "gate counted", "neurons only", "worst rank", "gradients, fp32",
        "fp32 masters", "optimizer moments", "expert: all-to-all", "ideal", "realised",
        "not validated on GPUs", "MFU", "GPU-hours", "cost", "fits",
        "launch/slurm.sh --nodes 4 --gpus-per-node 8 --time 30:00:00 "
        "experiment=qwen3_30b_a3b_mone mone.keep_ratio=0.5",
    ):  # fmt: skip
        assert words in run.stdout, words
    written = json.loads(file.read_text())
    plan = plan_of(overrides, 32, "H200")
    assert written["parameters"]["total"] == plan.parameters.total
    assert written["memory"]["total"] == plan.worst.total
    assert written["predicted"]["validated_on_gpus"] is False
    assert written["predicted"]["cost"] == pytest.approx(2.5 * plan.gpu_hours)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "V100"], "--gpu: 'V100' is not in the table; use one of A100, H100, H200, B200"),
        (["--gpus", "0"], "--gpus: 0 is too few"),
        (["--gpus", "12"], "--gpus: 12 does not fill nodes of --gpus-per-node 8; use 8 or 16"),
        (["--matmul", "1.5"], "--matmul: 1.5 is outside (0, 1]"),
        (["--imbalance", "0.5"], "--imbalance: 0.5 is below 1"),
        (["--reserve-gib", "-1"], "--reserve-gib: "),
        (["--memory-gb", "0"], "--memory-gb: 0 is not positive"),
        (["--price", "-1"], "--price: -1 is negative"),
        # 0 is a value, too.
        (["--tolerance", "0"], "--tolerance: means nothing without --match"),
        (["--match", "flops", "--price", "0"], "--price: not with --match"),
        (["--write", "somewhere"], "--write: means nothing without --match"),
        (["--measured", "a_run"], "--measured: means nothing without --match"),
        (["--match", "flops", "--measured", "a_run"], "--measured: the rule and the router fix"),
        (["mone.rule=mass", "--match", "flops", "--measured", "no"], "no is not a folder"),
        (["--top", "3"], "--top: means nothing without --search"),
        (["--hours", "3"], "--hours: means nothing without --sbatch or --render"),
        (["--match", "flops", "--search"], "--search: not with --match"),
        # Also with the value that it has anyway.
        (["--match", "flops", "--gpus-per-node", "8"], "--gpus-per-node: not with --match"),
        (["--match", "flops", "--gpus", "8"], "--gpus: not with --match"),
        (["--match", "total", "--reserve-gib", "2"], "--reserve-gib: not with --match"),
        (["--match", "total", "--installed", "deep_ep"], "--installed: not with --match"),
        (["--match", "total", "--memory-gb", "80"], "--memory-gb: not with --match"),
        (["--json", "/proc/none/plan.json"], "--json: cannot use '/proc/none/plan.json'"),
        (["--render", "job", "--site", "/no/site.env"], "--site: /no/site.env is no file"),
        (["train.micro_batch_size=4", "train.seq_length=2048000", "--render", "job"], "--render: "),
        (["parallel.tensor=3"], "parallel.tensor: 3 does not divide"),
        (["parallel.expert=3"], "parallel.expert: 3 does not divide model.num_experts=8"),
        (["train.global_batch_size=7"], "train.global_batch_size: 7 is not a multiple"),
        (["device=cpu"], "device.kind: cpu has no GPU to plan for"),
        (["model.num_experts=0", "mone=disabled", "--match", "flops"], "--match: "),
        (["--match", "flops", "--tolerance", "2"], "--tolerance: 2 is outside"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line_that_names_it(
    main: Main, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(["experiment=tiny_mone", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"error: {told}") for line in lines), lines
    assert all(line.startswith("error: ") and "; use" in line for line in lines if "--gpu:" in line)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "many"], "--gpus: invalid int value: 'many'"),
        (["--price", "nan"], "--price: nan is not a finite number"),
        (["--memory-gb", "inf"], "--memory-gb: inf is not a finite number"),
        (["--match", "everything"], "--match: invalid choice: 'everything'"),
        (["--installed"], "--installed: expected at least one argument"),
        (["-m"], "unrecognized arguments: -m"),
    ],
    ids=str,
)
def test_a_flag_that_cannot_be_read_is_one_line(
    main: Main, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["experiment=tiny_mone", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")


def test_the_job_that_is_submitted(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    site, job = tmp_path / "site.env", tmp_path / "jobs" / "a job.sbatch"
    site.write_text("SITE_PARTITION=gpu\n", encoding="utf-8")
    arguments = ["experiment=mone_0.9b", "train.seed=3", f"run.dir={tmp_path}/run"]
    options = ["--gpus", "16", "--hours", "30", "--site", str(site), "--render", str(job)]
    assert main([*arguments, *options]) == 0
    lines = job.read_text(encoding="utf-8").splitlines()
    for line in ("--nodes=2", "--gpus-per-node=8", "--time=30:00:00", "--partition=gpu"):
        assert f"#SBATCH {line}" in lines
    assert "        train.seed=3" in lines
    # sbatch ends jobs whose log has no folder, without a word.
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"mkdir -p {tmp_path}/run/logs && sbatch '{job}'"


def test_fp32_is_noted(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=tiny_mone", "device.dtype=fp32"]) == 0
    assert "note: device.dtype: fp32" in capsys.readouterr().out


def test_a_pair_is_not_written_over_another(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["experiment=tiny_mone", "--match", "activated", "--write", str(tmp_path)]
    assert main(arguments) == main(arguments) == 0
    written = {path: path.read_text() for path in tmp_path.iterdir()}
    assert main([*arguments, "--side", "moe"]) == 2
    assert "tiny_equal_activated_moe.yaml is there and differs" in capsys.readouterr().err
    assert {path: path.read_text() for path in tmp_path.iterdir()} == written


def test_what_does_not_fit_names_a_change_that_does(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment=flame_1_7b_mone", "train.micro_batch_size=16"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    (told,) = [line for line in printed.splitlines() if line.startswith("problem: memory: rank")]
    change = told.rsplit("; use ", 1)[1].split()
    assert "train.recompute" in change[0]
    assert main([*arguments, *change]) == 0


def test_no_change_of_the_batch_mends_weights_that_do_not_fit(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment=mixtral_8x7b_moe", "parallel=data", "--gpus", "8"]) == 1
    assert "use more parallel.expert" in capsys.readouterr().out


def test_a_search_ranks_what_fits_by_time() -> None:
    config = compose(["experiment=mixtral_8x7b_mone"])
    machine = Machine(find_gpu("A100"), 32)
    found = search(config, machine)
    order = [(not item.plan.fits, item.plan.time.total) for item in found]
    assert order == sorted(order)
    assert len({item.overrides for item in found}) == len(found) > 50
    documented = make_plan(config, machine, rough=True).time.total
    assert found[0].plan.time.total <= documented
    # What it found is what a plan of those overrides says.
    again = plan_of(["experiment=mixtral_8x7b_mone", *found[0].overrides], 32, "A100")
    assert again.fits
    assert again.time.total == pytest.approx(found[0].plan.time.total, rel=0.1)
    assert again.worst.total == pytest.approx(found[0].plan.worst.total, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "search", "said"),
    [
        (["parallel.expert=8"], False, "note: parallel.tensor=1 "),
        (["parallel.expert=8"], True, "less time than the layout that was given"),
        (["parallel.expert=1"], False, None),
        (["parallel.tensor=5"], True, "the layout that was given is none of them"),
    ],
)
def test_a_layout_that_is_a_tenth_faster_is_told(
    main: Main,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    search: bool,
    said: str | None,
) -> None:
    flags = ["--search", "--top", "1"] if search else []
    main(["experiment=mone_0.9b", *overrides, "--gpus", "8", *flags])
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "less time" in line or "was given" in line]
    if said is None:
        assert told == []
    else:
        (line,) = told
        assert said in line
        if not search:
            assert re.search(r"takes [1-9]\d% less time \(--search tries more\)$", line)
            assert lines[-1] == "fits"


def test_a_search_without_a_layout_says_why(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment=tiny_mone", "train.global_batch_size=7"]
    assert main([*arguments, "--gpus", "16", "--search"]) == 2
    assert "train.global_batch_size: 7 is not a multiple" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["activated", "flops", "total"])
def test_a_pair_is_equal_and_its_files_are_experiments(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path, count: str
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF_DIR, conf)
    arguments = ["experiment=mone_2.8b", "train.steps=1000", "--match", count]
    assert main([*arguments, "--write", str(conf / "experiment")]) == 0
    assert "exactly equal" in capsys.readouterr().out
    moe, mone = (
        compose([f"experiment=2.8b_equal_{count}_{kind}"], conf) for kind in ("moe", "mone")
    )
    assert not moe.mone.enabled
    assert mone.mone.enabled
    assert moe.train.steps == mone.train.steps == 1000
    assert moe.run.dir != mone.run.dir
    assert independent_count(moe, count) == independent_count(mone, count)
    assert replace(moe, run=mone.run, mone=mone.mone, model=mone.model) == mone


def independent_count(config: Config, count: str) -> int:
    """The part of a count in which the two of a pair may differ, from the definition."""
    model, mone = config.model, config.mone
    width = model.expert_ffn_hidden_size
    kept = round(mone.keep_ratio * width) if mone.enabled else width
    if count == "total":
        return model.num_experts * (3 * width + 1)
    # Gate in full, up and down of the kept neurons; FLOPs are proportional to it.
    return model.experts_per_token * (width + 2 * kept) + model.num_experts


def test_near_misses_are_refused_with_the_nearest(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment=mixtral_8x7b_mone", "mone.keep_ratio=0.3", "--match", "activated"]
    assert main([*arguments, "--dimension", "experts_per_token"]) == 2
    told = capsys.readouterr().err
    assert "error: --match activated: no model.experts_per_token of the mone side" in told
    assert "the nearest is model.experts_per_token=4 (mone)" in told
    assert main([*arguments, "--dimension", "experts_per_token", "--tolerance", "0.1"]) == 0
    assert "apart" in capsys.readouterr().out


def test_the_nearest_value_is_the_nearest() -> None:
    config = compose(["experiment=mone_2.8b", "mone.keep_ratio=0.3"])
    pair = match(config, "flops", dimension="experts_per_token", side="mone", tolerance=0.5)
    off = {}
    for chosen in range(1, 65):
        changed = replace(config, model=replace(config.model, experts_per_token=chosen))
        off[chosen] = abs(value_of(changed, "flops") - pair.moe_value)
    assert pair.mone.model.experts_per_token == min(off, key=lambda chosen: off[chosen])


LAYOUTS = [
    ([], 8),
    (["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"], 16),
    (["parallel.tensor=4", "parallel.expert_tensor=4", "parallel.expert=2"], 8),
    (["parallel.pipeline=3", "parallel.virtual_pipeline=2", "parallel.expert=4"], 24),
]


@pytest.mark.parametrize(("layout", "gpus"), LAYOUTS, ids=str)
def test_the_work_of_all_ranks_is_the_work_of_the_model(layout: list[str], gpus: int) -> None:
    overrides = ["experiment=flame_98m_mone", "model.num_layers=12", "parallel=data", *layout]
    overrides += ["train.global_batch_size=1536"]
    plan = plan_of(overrides, gpus)
    config = plan.config
    total = 0.0
    for stage in range(config.parallel.pipeline):
        work = Work()
        for chunk in range(config.parallel.virtual_pipeline):
            for moe, count in layer_kinds(config, stage, chunk).items():
                work += layer_work(config, moe=moe)[0] * count
        if stage == config.parallel.pipeline - 1:
            work += output_work(config, vocabulary_of(config))
        total += 3 * work.total * plan.layout.num_microbatches * gpus / config.parallel.pipeline
    assert total == pytest.approx(flops_per_step(config, vocabulary_of(config)).realised, rel=1e-9)


def test_communication_by_hand() -> None:
    overrides = ["experiment=qwen3_30b_a3b_mone", "train.recompute=none"]
    plan = plan_of(overrides, 32)
    numerics = Numerics("cuda", 2)
    sent = {
        (item.group.name, item.operation): item.of_step(plan.layout)
        for item in stage_traffic(plan.config, plan.layout, plan.stages[0].stage.state, 0, numerics)
    }
    microbatches, layers, tokens, hidden = plan.layout.num_microbatches, 24, 4096, 2048
    assert microbatches == 512 // 4
    # Twice there and back, to 7 of 8 ranks; a probability travels with each row.
    rows = tokens // 4 * 8
    expected = microbatches * layers * 2 * rows * (2 * 2 * hidden + 4) * 7 / 8
    assert sent["expert", "all-to-all"] == pytest.approx(expected)
    # Attention only (the MoE layer works on the split sequence), and the embedding.
    gathered = microbatches * (3 * layers + 1) * 2 * tokens * hidden * 3 / 4
    assert sent["tensor", "all-gather"] == pytest.approx(gathered)
    assert sent["pipeline", "send"] == microbatches * tokens // 4 * hidden * 2
    state = plan.stages[0].stage.state
    assert sent["data", "gradient reduce-scatter"] == 4 * state.dense_elements * 3 / 4
    assert sent["expert_data", "parameter all-gather"] == 2 * state.expert_elements / 2
    assert ("context", "ring of keys and values") not in sent


def test_what_a_plan_assumes_moves_its_time() -> None:
    config = compose(["experiment=olmoe_1b_7b_mone"])
    times = {}
    for name, assumed in {
        "as it is": Assumptions(),
        "slow": Assumptions(matmul=0.3),
        "uneven": Assumptions(imbalance=2.0),
    }.items():
        times[name] = make_plan(config, Machine(find_gpu("H100"), 8, assumed=assumed)).time.total
    assert times["as it is"] < min(times["slow"], times["uneven"])
    faster = make_plan(config, Machine(find_gpu("B200"), 8)).time.total
    assert faster < times["as it is"]


def test_groups_over_several_nodes_are_noted_and_slower(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment=qwen3_30b_a3b_mone", "--gpus", "32"]
    assert main(arguments) == 0
    assert "parallel.expert: 8 ranks lie on several nodes" not in capsys.readouterr().out
    assert main([*arguments, "--gpus-per-node", "4"]) == 0
    assert "parallel.expert: 8 ranks lie on several nodes of 4" in capsys.readouterr().out
    config = compose(arguments[:1])
    inside = make_plan(config, Machine(find_gpu("H100"), 32)).time
    across = make_plan(config, Machine(find_gpu("H100"), 32, gpus_per_node=4)).time
    assert across.expert_communication > 2 * inside.expert_communication
