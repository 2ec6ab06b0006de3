"""Shell completion: a script for bash or zsh, with the names that exist when it is printed."""

import argparse
from typing import Any

SUPPORTED_SHELLS = ("bash", "zsh")


class PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: print the script, then end."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        print(build_completion_script(parser, values))
        parser.exit()


def build_completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What `shell`, one of `SHELLS`, sources to complete commands, flags, names and files."""
    import shtab

    functions = {}
    commands = next(
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    for command, (dest, names) in _list_completions().items():
        function = f"_raysweep_{command}"
        functions[function] = " ".join(names)
        action = next(action for action in commands[command]._actions if action.dest == dest)
        action.complete = dict.fromkeys(SUPPORTED_SHELLS, function)
    for action in (action for command in commands.values() for action in command._actions):
        if action.metavar in ("DIR", "FILE"):
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
    bash = (
        f'{name}() {{ compgen -W "{words}" -- "$1"; compgen -f -- "$1"; }}'
        for name, words in functions.items()
    )
    zsh = (f"{name}() {{ compadd -- {words}; _files }}" for name, words in functions.items())
    return str(
        shtab.complete(parser, shell, preamble={"bash": "\n".join(bash), "zsh": "\n".join(zsh)})
    )


def _list_completions() -> dict[str, tuple[str, list[str]]]:
    """For each command the argument that takes a name, and the names; files are offered beside
    them.
    """
    from raysweep.catalog import METHODS
    from raysweep.pipeline.builtin_pipelines import list_builtin_pipelines
    from raysweep.training.presets import list_presets

    methods, runs = list(METHODS), list(list_builtin_pipelines())
    return {
        "show": ("what", [*methods, *list_presets(), *runs]),
        "train": ("method", [*methods, *list_presets()]),
        "tune": ("method", methods),
        "run": ("what", runs),
    }
