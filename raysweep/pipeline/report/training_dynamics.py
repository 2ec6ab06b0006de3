"""The chosen checkpoint's run from inside: the papers' figures of its training, and maps of its
examples.
"""

import torch
from matplotlib.figure import Figure

from raysweep.attacks import PGD
from raysweep.pipeline.report.document import CaptionedFigure, Paragraph, Section
from raysweep.plots import plot_instance_maps, plot_run_figures
from raysweep.training.checkpoint import RunDirectory
from raysweep.training.diagnostics import read_histograms
from raysweep.training.instance_metrics import compute_instance_metrics
from raysweep.training.model_loading import EvaluationTarget

# Enough for a map; a large network without a GPU takes minutes for as many.
_MAP_EXAMPLES, _MAP_EXAMPLES_ON_CPU = 2000, 300
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


def draw_training_figures(target: EvaluationTarget) -> dict[str, Figure]:
    """Every figure that a checkpoint's run allows, by name."""
    assert target.checkpoint is not None and target.data is not None
    path = target.checkpoint.path.parent
    last = RunDirectory(path).read_last_checkpoint()
    figures = plot_run_figures(last.history, read_histograms(path)) if last else {}
    validation = target.checkpoint.config.resolve_at(target.checkpoint.epoch - 1).validation
    attacks = {
        name: attack for name, attack in validation.attacks.items() if isinstance(attack, PGD)
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = _MAP_EXAMPLES if device.type == "cuda" else _MAP_EXAMPLES_ON_CPU
    return figures | plot_instance_maps(
        compute_instance_metrics(
            target.model.to(device), target.data.train.to(device), attacks, count
        )
    )


def build_training_dynamics_section(title: str, figures: dict[str, Figure]) -> Section:
    pictures = [CaptionedFigure(_find_caption(name), figure) for name, figure in figures.items()]
    return Section(
        "Inside the chosen run",
        [Paragraph(f"{title}; histograms and maps are of training data."), *pictures],
    )


def _find_caption(figure_name: str) -> str:
    """kappa_pgd_histogram is a kappa_histogram, of pgd."""
    if figure_name in _CAPTIONS:
        return _CAPTIONS[figure_name]
    kind, _, rest = figure_name.partition("_")
    of, histogram, _ = rest.partition("_histogram")
    return f"{_CAPTIONS[kind + histogram]}: {of}"
