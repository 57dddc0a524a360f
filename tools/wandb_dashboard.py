"""Make docs/dashboard.yaml a saved view of a W&B project."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mone_megatron.command_line import USAGE_EXIT_CODE, Parser, print_error, told
from mone_megatron.display import harmless

_SPECIFICATION = Path(__file__).resolve().parents[1] / "docs" / "dashboard.yaml"
_EPILOG = """\
needs the wandb-workspaces package (pip install 'mone_megatron[dashboard]') and a W&B login

exit status: 0, or 2 when the specification, the package or W&B says no

examples:
  python tools/wandb_dashboard.py --entity my-team
  python tools/wandb_dashboard.py --print"""


def read_sections(path: Path) -> list[dict[str, Any]]:
    """The sections of a dashboard file.

    Raises:
        ValueError: naming the file and the section or plot that is wrong.
    """
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(sections, list):
        raise ValueError(f"{path}: expected a list of sections")
    for section in sections:
        if not isinstance(section, dict) or set(section) != {"section", "plots"}:
            raise ValueError(f"{path}: {section!r} is no section; give it `section` and `plots`")
        for plot in section["plots"]:
            if not {"title", "metrics"} <= set(plot) <= {"title", "metrics", "smoothing"}:
                raise ValueError(
                    f"{path}: {plot!r} in {section['section']!r} needs `title` and `metrics`, and "
                    "may have `smoothing`"
                )
    return sections


def build_workspace(sections: Sequence[dict[str, Any]], *, entity: str, project: str) -> Any:
    """The wandb-workspaces object; nothing is sent."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def plot(wanted: dict[str, Any]) -> Any:
        smoothing = wanted.get("smoothing")
        return reports.LinePlot(
            title=wanted["title"],
            x="step",
            y=list(wanted["metrics"]),
            smoothing_type="exponential" if smoothing else "none",
            smoothing_factor=smoothing or 0.0,
        )

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="mone_megatron",
        sections=[
            workspaces.Section(
                name=section["section"],
                panels=[plot(one) for one in section["plots"]],
                is_open=True,
            )
            for section in sections
        ],
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")]),
    )


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = Parser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", default="", help="W&B user or team")
    parser.add_argument("--project", default="mone_megatron", help="default mone_megatron")
    parser.add_argument("--file", type=Path, default=_SPECIFICATION, help="another specification")
    parser.add_argument("--print", action="store_true", help="show the plots and send nothing")
    options = parser.parse_args(arguments)
    try:
        sections = read_sections(options.file)
        if options.print:
            for section in sections:
                print(section["section"])
                for plot in section["plots"]:
                    print(f"  {plot['title']}: {', '.join(plot['metrics'])}")
            return 0
        if not options.entity:
            raise ValueError("--entity: name the W&B user or team, or use --print")
        print(build_workspace(sections, entity=options.entity, project=options.project).save().url)
    except ImportError as error:
        print_error(f"{error}; pip install 'mone_megatron[dashboard]'")
        return USAGE_EXIT_CODE
    except (OSError, ValueError) as error:
        print_error(" ".join(told(error).split()))
        return USAGE_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
