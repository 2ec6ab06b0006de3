"""Write docs/settings.md, the reference of all settings, from the classes that declare them.

Run `python docs/generate_settings.py` after a change of a setting or of its docstring.
`tests/test_settings_page.py` fails when the page is out of date.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

from raysweep.attacks import AnyAttack
from raysweep.attacks.step_size import EpsMultiple
from raysweep.data import DataSpec
from raysweep.instance_weights import AnyWeight
from raysweep.method import Method, Term
from raysweep.models import ModelSpec
from raysweep.pipeline.pipeline import AnyStage, Pipeline
from raysweep.pipeline.published_results import PaperProtocol, PaperTable, PaperValue
from raysweep.pipeline.report.paper_figures import PaperFigure
from raysweep.pipeline.train import TrainingRow
from raysweep.schedules import Schedule
from raysweep.settings_reference import FieldDescription, describe_fields
from raysweep.spec import EpochSchedule, Spec
from raysweep.sweep.search_space import Distribution, Sampler, Scheduler, SearchSpace
from raysweep.training.config import OptimizerSpec, TrainingConfig
from raysweep.training.speed_settings import ComputeSpec
from raysweep.training.validation import Validation

PIPE = "\\|"
PAGE = Path(__file__).parent / "settings.md"
INTRODUCTION = """\
# Settings

<!-- Written by `python docs/generate_settings.py`: change the docstrings of the fields instead. -->

Every setting with its type, its default and what it does. The name of a setting on the command
line and in files is a dotted path: `--set optim.lr=0.05` sets `lr` of the part `optim`. `NAME`
stands for a name that you choose. [The tutorial](tutorial.md) shows settings in use, and
`raysweep show lrat` prints those of one method with their values and descriptions.

Some defaults depend on the data set (network, epsilon, epochs): see
[`training/dataset_defaults.py`](../raysweep/training/dataset_defaults.py). A number may be written
as a fraction (`8/255`). Where the type says *schedule*, the setting may change with the epoch.
"""


class Section(NamedTuple):
    """A group of settings under one heading.

    Attributes:
        title: Heading, which also names the group in the types of other settings.
        path: Where these settings stand, in words and Markdown.
        classes: Their spec classes; more than one where `kind` chooses among them.
    """

    title: str
    path: str
    classes: tuple[type[Spec], ...]


class Chapter(NamedTuple):
    """Sections about one kind of file."""

    title: str
    about: str
    sections: tuple[Section, ...]


def find_spec_classes(union: Any) -> tuple[type[Spec], ...]:
    """Return the spec classes of a union such as `AnyAttack`, in its order."""
    if isinstance(union, type):
        return (union,) if issubclass(union, Spec) else ()
    nested = [find_spec_classes(part) for part in get_args(union)]
    return tuple(dict.fromkeys(spec_class for classes in nested for spec_class in classes))


CHAPTERS = (
    Chapter(
        "A training run",
        "For `raysweep train`, and below `base` in a search space.",
        (
            Section("Run", "at the top of the file", (TrainingConfig,)),
            Section("Data", "`data`", (DataSpec,)),
            Section("Model", "`model`", (ModelSpec,)),
            Section("Optimiser", "`optim`", (OptimizerSpec,)),
            Section("Validation", "`validation`", (Validation,)),
            Section("Compute", "`compute`", (ComputeSpec,)),
            Section("Method", "`method`", (Method,)),
            Section("Term", "`method.terms.NAME`", (Term,)),
            Section(
                "Weight",
                "`method.terms.NAME.weight`; `kind` selects one",
                find_spec_classes(AnyWeight),
            ),
            Section(
                "Attack",
                "`method.attacks.NAME`, `validation.attacks.NAME` and `validation.finish.NAME`; "
                "`kind` selects one",
                find_spec_classes(AnyAttack),
            ),
            Section("Step size", "`step_size` of an attack, instead of a number", (EpsMultiple,)),
            Section(
                "Schedule",
                "any setting that may change with the epoch; `kind` selects one",
                find_spec_classes(Schedule),
            ),
        ),
    ),
    Chapter(
        "A search space",
        "For `raysweep tune --space FILE`; examples are in [`search_spaces/`](../search_spaces).",
        (
            Section("Space", "at the top of the file", (SearchSpace,)),
            Section("Distribution", "`space.PATH`", (Distribution,)),
            Section("Sampler", "`sampler`", (Sampler,)),
            Section("Scheduler", "`scheduler`", (Scheduler,)),
        ),
    ),
    Chapter(
        "A pipeline",
        "For `raysweep run FILE`; examples are in [`pipelines/`](../pipelines).",
        (
            Section("Pipeline", "at the top of the file", (Pipeline,)),
            Section("Stage", "`stages`; `kind` selects one", find_spec_classes(AnyStage)),
            Section("Row", "`runs.NAME` of a stage `train`", (TrainingRow,)),
            Section(
                "Figure",
                "`figures.NAME` of the stage `report`; `kind` selects one",
                find_spec_classes(PaperFigure),
            ),
        ),
    ),
    Chapter(
        "A table of a paper",
        "The files in [`pipelines/paper/`](../pipelines/paper), which the stage `report` reads.",
        (
            Section("Paper table", "at the top of the file", (PaperTable,)),
            Section("Protocol", "`protocol`", (PaperProtocol,)),
            Section("Paper value", "`rows.ROW.CHECKPOINT.METRIC`", (PaperValue,)),
        ),
    ),
)


def name_spec_classes() -> dict[type, str]:
    """Map each spec class of this page to a link to its section."""
    names: dict[type, str] = {EpochSchedule: "[schedule](#schedule)"}
    for chapter in CHAPTERS:
        for section in chapter.sections:
            anchor = section.title.lower().replace(" ", "-")
            link = f"[{section.title.lower()}](#{anchor})"
            names.update(dict.fromkeys(section.classes, link))
    return names


def render_page() -> str:
    """Return the text of docs/settings.md."""
    names = name_spec_classes()
    lines = [INTRODUCTION]
    for chapter in CHAPTERS:
        lines += [f"## {chapter.title}", "", chapter.about, ""]
        for section in chapter.sections:
            lines += [f"### {section.title}", "", f"Where: {section.path}.", ""]
            for spec_class in section.classes:
                lines += render_class(spec_class, names, has_heading=len(section.classes) > 1)
    return "\n".join(lines).rstrip() + "\n"


def render_class(spec_class: type[Spec], names: dict[type, str], has_heading: bool) -> list[str]:
    """Return the lines about one spec class: its docstring and a table of its settings."""
    kind = spec_class.model_fields.get("kind")
    lines = [f"#### kind: {kind.get_default()}", ""] if has_heading and kind else []
    lines += [*iter_docstring_lines(spec_class), ""]
    fields = describe_fields(spec_class, names)
    return [*lines, *iter_table_lines(fields), ""] if fields else lines


def iter_docstring_lines(spec_class: type[Spec]) -> Iterable[str]:
    """Yield the lines of a class docstring up to its first section such as `Raises:`."""
    for line in inspect.getdoc(spec_class).splitlines():
        if line in ("Args:", "Attributes:", "Returns:", "Raises:"):
            break
        yield line if "`" in line else line.replace("*", "\\*")


def iter_table_lines(fields: Iterable[FieldDescription]) -> Iterable[str]:
    """Yield a Markdown table with a row for each setting."""
    yield "| setting | type | default | what it does |"
    yield "|---|---|---|---|"
    for field in fields:
        default = show_default(field)
        cells = (f"`{field.name}`", field.type, default, field.description)
        yield f"| {' | '.join(cell.replace('|', PIPE) for cell in cells)} |"


def show_default(field: FieldDescription) -> str:
    """Return the default as Markdown; a part whose settings all have defaults needs no value."""
    if not field.default:
        return "must be set"
    is_part = field.default == "{}" and field.type.startswith("[")
    return "its defaults" if is_part else f"`{field.default}`"


if __name__ == "__main__":
    PAGE.write_text(render_page())
