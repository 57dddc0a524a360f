"""Completes ``mone`` in a shell: the shell asks ``mone``, so nothing is written down twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mone_megatron.command_line import USAGE_EXIT_CODE, print_error
from mone_megatron.shipped_files import shipped

# What a shell calls; not for people.
ASK = "__complete"
# Commands that take key=value.
_WITH_OVERRIDES = ("train", "plan")
# "=" ends a word of bash: what stands before it is taken off the candidates again.
_SHELLS = {
    "bash": f"""\
_mone() {{
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        [ -n "$line" ] && COMPREPLY+=("$line")
    done < <(mone {ASK} --line "${{COMP_LINE:0:COMP_POINT}}" 2>/dev/null)
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
}}
complete -o default -F _mone mone
""",
    "zsh": f"""\
_mone() {{
    local -a found
    found=("${{(@f)$(mone {ASK} --whole --line "${{BUFFER[1,CURSOR]}}" 2>/dev/null)}}")
    compadd -S '' -a found || _files
}}
compdef _mone mone
""",
    "fish": f"""\
complete -c mone -f -a '(mone {ASK} --whole --line (commandline -cp) 2>/dev/null)'
""",
}


def main(arguments: Sequence[str]) -> int:
    """Prints what a shell is to evaluate and returns the exit status."""
    if len(arguments) != 1 or arguments[0] not in _SHELLS:
        print_error(f"completion: name a shell: {', '.join(_SHELLS)}")
        return USAGE_EXIT_CODE
    print(_SHELLS[arguments[0]], end="")
    return 0


def candidates(asked: Sequence[str], commands: Iterable[str]) -> list[str]:
    """Returns the ways to go on with a line.

    Args:
        asked: ``--line`` and the line up to the cursor; ``--whole`` for words with the part before
            an equals sign, which bash leaves out.
        commands: their names.
    """
    line = asked[-1] if asked else ""
    words = line.split()[1:]
    word = "" if not words or line.endswith((" ", "\t")) else words.pop()
    if not words:
        return [name for name in [*commands, "completion"] if name.startswith(word)]
    if words[0] == "completion":
        return [shell for shell in _SHELLS if shell.startswith(word)]
    if words[0] not in _WITH_OVERRIDES:
        return []
    found = [name for name in _overrides(word) if name.startswith(word)]
    if "--whole" in asked:
        return found
    before = word.rpartition("=")[0]
    return [name[len(before) + 1 :] if before else name for name in found]


def _overrides(word: str) -> list[str]:
    """Returns the keys, each with its equals sign, or the options of the group that is begun."""
    conf = shipped("conf")
    group, equals, _ = word.partition("=")
    if equals:
        return [f"{group}={path.stem}" for path in sorted(conf.glob(f"{group}/*.yaml"))]
    from mone_megatron.config import convert
    from mone_megatron.config.schema import Config

    groups = [path.name for path in sorted(conf.iterdir()) if path.is_dir()]
    return [f"{name}=" for name in [*groups, *convert.keys(Config)]]
