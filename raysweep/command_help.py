"""What `raysweep COMMAND --help` says besides the options: what the command does, and how it is
typed.
"""

import argparse
import textwrap

# Command -> what it does, and examples.
COMMAND_HELP = {
    "list": (
        "The names that other commands take, with a line about each: methods, models, data sets, attacks, metrics, "
        "search spaces, presets (single runs of the papers) and pipelines.",
        ("raysweep list", "raysweep list --json"),
    ),
    "show": (
        "Shows every setting of a method or preset, as `path = value`, the form that --set takes; of a search space "
        "also what is searched; of a pipeline its stages; of a sweep its trials, best first; of a trial its settings, "
        "its best epoch and what stands out. With --set it shows what the settings would become.",
        (
            "raysweep show lrat",
            "raysweep show preset:lrat-table1 --set epochs=50",
            "raysweep show g1/0003",
        ),
    ),
    "train": (
        "Trains one model and validates it after each epoch. The last and the best checkpoint go to runs/NAME, numbers "
        "and figures to MLflow. After Ctrl-C or a kill the same command goes on.",
        (
            "raysweep train gairat --set epochs=10",
            "raysweep train lrat-table1 --data-dir DIR --name row",
        ),
    ),
    "tune": (
        "Searches a method's search space: Optuna proposes settings, Ray runs the trials side by side (on this machine "
        "alone, unless --address names a cluster), ASHA stops the poor ones, MLflow records them all. --resume goes on "
        "after Ctrl-C, kill -9 or a reboot; with more --trials or --set epochs= it makes a finished sweep grow.",
        (
            "raysweep tune lrat --plan",
            "raysweep tune gairat --trials 30 --name g1",
            "raysweep tune gairat --resume g1 --trials 60",
        ),
    ),
    "run": (
        "Runs the stages of a pipeline, all of them checked before the first starts. Each leaves an artifact in "
        "runs/pipelines/NAME that is named by its inputs: a second run does nothing, a run that was killed goes on, "
        "and after a change only what depends on it runs again. --set stages.STAGE.SETTING= changes a stage, any other "
        "path the training runs of all stages. If a report finds a regression, the exit code is 1.",
        ("raysweep run digits", "raysweep run nightly --set stages.tune.trials=20 --plan"),
    ),
    "doctor": (
        "Checks MLflow and, from every node, versions, storage, data, GPUs, clocks, free room and open doors. Below "
        "whatever is broken stands what mends it; then the exit code is 1.",
        (
            "raysweep doctor --address auto",
            "raysweep doctor --address auto --storage s3://lab/sweeps --data-dir DIR",
        ),
    ),
    "eval": (
        "Attacks a model on the test set, by default with AutoAttack. Finished shards are kept: after a kill the same "
        "command goes on. The card and the outcome of each example go beside the checkpoint (to runs/eval for code of "
        "your own), accuracies to the MLflow run that trained it.",
        (
            "raysweep eval g1",
            "raysweep eval g1/0003 --bundle claim",
            "raysweep eval my_models:make --eps 8/255 --n 1000",
        ),
    ),
}


def add_command_help(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Give each command its page."""
    for name, parser in subparsers.choices.items():
        about, examples = COMMAND_HELP[name]
        parser.description = textwrap.fill(about, 110)
        parser.epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
