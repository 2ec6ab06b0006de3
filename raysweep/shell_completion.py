"""Completion scripts for bash and zsh.

A script contains the names of the methods, presets and pipelines that exist when it is printed.
"""

import argparse
from typing import Any

SUPPORTED_SHELLS = ("bash", "zsh")


class PrintCompletion(argparse.Action):
    """Action of `--print-completion SHELL`: print the script and exit."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        print(build_completion_script(parser, values))
        parser.exit()


def build_completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Build a script that completes commands, flags, names and files.

    Args:
        parser: The parser of `raysweep`; its actions get shtab's `complete` attribute.
        shell: One of `SUPPORTED_SHELLS`.

    Returns:
        The script, for the shell to source.
    """
    import shtab

    commands = next(
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    file_completions = {"DIR": shtab.DIRECTORY, "FILE": shtab.FILE}
    for command in commands.values():
        for action in command._actions:
            if action.metavar in file_completions:
                action.complete = file_completions[action.metavar]
    bash, zsh = [], []
    for name, (dest, words) in _collect_names_by_command().items():
        function = f"_raysweep_{name}"
        choices = " ".join(words)
        bash.append(f'{function}() {{ compgen -W "{choices}" -- "$1"; compgen -f -- "$1"; }}')
        zsh.append(f"{function}() {{ compadd -- {choices}; _files }}")
        action = next(action for action in commands[name]._actions if action.dest == dest)
        action.complete = dict.fromkeys(SUPPORTED_SHELLS, function)
    # Sweeps and training runs come and go: the shell lists them when it completes.
    runs, files = '"$(ls runs 2>/dev/null)" -- "$1"', 'compgen -f -- "$1"'
    bash.append(f"_raysweep_runs() {{ compgen -W {runs}; {files}; }}")
    zsh.append("_raysweep_runs() { compadd -- $(ls runs 2>/dev/null); _files }")
    (compared,) = (action for action in commands["compare"]._actions if action.dest == "names")
    compared.complete = dict.fromkeys(SUPPORTED_SHELLS, "_raysweep_runs")
    preamble = {"bash": "\n".join(bash), "zsh": "\n".join(zsh)}
    return str(shtab.complete(parser, shell, preamble=preamble))


def _collect_names_by_command() -> dict[str, tuple[str, list[str]]]:
    """Return command -> (argument that takes a name, the names to complete it with)."""
    from raysweep.catalog import METHODS
    from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
    from raysweep.training.presets import list_presets

    methods, pipelines = list(METHODS), list_builtin_pipelines()
    return {
        "show": ("what", [*methods, *list_presets(), *pipelines]),
        "train": ("method", [*methods, *list_presets()]),
        "tune": ("method", methods),
        "run": ("what", pipelines),
    }
