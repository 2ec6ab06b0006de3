"""The chosen checkpoint's run from inside: the papers' figures of its training, and maps of its examples."""

import torch
from matplotlib.figure import Figure

from raysweep.attacks import PGD
from raysweep.evaluation.instances import instances
from raysweep.pipeline.document import Picture, Section, Text
from raysweep.plots import all_figures, maps
from raysweep.training.checkpoint import Run
from raysweep.training.diagnostics import read_histograms
from raysweep.training.load import Subject

# Enough for a map; a large network without a GPU takes minutes for as many.
_EXAMPLES, _EXAMPLES_ON_CPU = 2000, 300
_CAPTIONS = {
    "errors": "Errors over epochs (GAIRAT fig. 4, above)",
    "flatness": "Steepness of the loss (GAIRAT fig. 4, below)",
    "kappa": "Geometry value κ over epochs (GAIRAT fig. 4, below)",
    "kappa_histogram": "Geometry values of the training data",
    "weight_histogram": "Weights, as multiples of their mean (LRAT fig. 1a)",
    "V_histogram": "Vulnerability (LRAT fig. 4)",
    "logits_map": "Logits of the two classes that are confused most; lighter: more attackable (GAIRAT fig. 7)",
    "vulnerable_map": "The most vulnerable fifth under one attack; red: under the other too (LRAT fig. 2)",
}


def drawn(subject: Subject) -> dict[str, Figure]:
    """Every figure that a checkpoint's run allows, by name."""
    assert subject.checkpoint is not None and subject.data is not None
    path = subject.checkpoint.path.parent
    last = Run(path).last()
    figures = all_figures(last.history, read_histograms(path)) if last else {}
    validation = subject.checkpoint.config.at(subject.checkpoint.epoch - 1).validation
    attacks = {name: attack for name, attack in validation.attacks.items() if isinstance(attack, PGD)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = _EXAMPLES if device.type == "cuda" else _EXAMPLES_ON_CPU
    return figures | maps(instances(subject.model.to(device), subject.data.train.to(device), attacks, count))


def inside(title: str, figures: dict[str, Figure]) -> Section:
    pictures = [Picture(_caption(name), figure) for name, figure in figures.items()]
    return Section("Inside the chosen run", [Text(f"{title}; histograms and maps are of training data."), *pictures])


def _caption(name: str) -> str:
    """kappa_pgd_histogram is a kappa_histogram, of pgd."""
    if name in _CAPTIONS:
        return _CAPTIONS[name]
    kind, _, rest = name.partition("_")
    of, histogram, _ = rest.partition("_histogram")
    return f"{_CAPTIONS[kind + histogram]}: {of}"
