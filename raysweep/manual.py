"""What `raysweep COMMAND --help` says besides the options: what the command does, and how it is typed."""

import argparse
import textwrap

# Command -> what it does, and examples.
PAGES = {
    "list": (
        "The names that other commands take, with a line about each: methods, models, data sets, attacks, metrics, "
        "search spaces, presets (single runs of the papers) and pipelines.",
        ("raysweep list", "raysweep list --json"),
    ),
    "show": (
        "Of a method or preset every setting, as `path = value`: the form that --set takes. Of a search space what is "
        "searched too, of a pipeline its stages. Of a sweep its trials, best first; of a trial its settings, its best "
        "epoch and what stands out. With --set it shows what the settings would become.",
        ("raysweep show lrat", "raysweep show preset:lrat-table1 --set epochs=50", "raysweep show g1/0003"),
    ),
    "train": (
        "Trains one model, validated after each epoch. Checkpoints (the last and the best) go to runs/NAME, numbers "
        "and figures to MLflow. The same command goes on where one that was ended or killed has stopped.",
        ("raysweep train gairat --set epochs=10", "raysweep train lrat-table1 --data-dir DIR --name row"),
    ),
    "tune": (
        "Searches the settings in a method's search space: Optuna proposes, Ray runs trials side by side (on a Ray of "
        "its own without --address), ASHA ends the poor ones, MLflow records them all. After Ctrl-C, kill -9 or a "
        "reboot --resume goes on; with more --trials or --set epochs= a finished sweep grows.",
        (
            "raysweep tune lrat --plan",
            "raysweep tune gairat --trials 30 --name g1",
            "raysweep tune gairat --resume g1 --trials 60",
        ),
    ),
    "run": (
        "Runs the stages of a pipeline, checked as a whole before anything starts. Each leaves an artifact in "
        "runs/pipelines/NAME that is named by all that goes into it: a second run does nothing, a killed one goes on, "
        "a changed one does what is changed. --set stages.STAGE.SETTING= changes a stage, any other path the training "
        "runs of all stages. A regression that a report finds is exit code 1.",
        ("raysweep run digits", "raysweep run nightly --set stages.tune.trials=20 --plan"),
    ),
    "doctor": (
        "Looks, from every node, at versions, storage, data, GPUs, clocks, free room and open doors, and at MLflow. "
        "Beside what is broken stands what mends it; then the exit code is 1.",
        ("raysweep doctor --address auto", "raysweep doctor --address auto --storage s3://lab/sweeps --data-dir DIR"),
    ),
    "eval": (
        "Attacks a model on the test set, by default with AutoAttack. Shards that are finished are kept: the same "
        "command goes on after a kill. Card and outcomes of all examples go beside the checkpoint (of code of your own "
        "to runs/eval), numbers to the MLflow run that trained it.",
        (
            "raysweep eval g1",
            "raysweep eval g1/0003 --bundle claim",
            "raysweep eval my_models:make --eps 8/255 --n 1000",
        ),
    ),
}


def describe(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Give each command its page."""
    for name, parser in commands.choices.items():
        about, examples = PAGES[name]
        parser.description = textwrap.fill(about, 110)
        parser.epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
