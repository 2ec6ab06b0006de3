"""Report section about the training of the chosen checkpoint.

It has the papers' figures of a training run, and maps of training examples.
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

# Number of training examples in a map. Without a GPU, a large network takes minutes for 2000.
_MAP_EXAMPLES, _MAP_EXAMPLES_ON_CPU = 2000, 300
_CAPTIONS = {
    "errors": "Errors over epochs (GAIRAT fig. 4, above)",
    "flatness": "Steepness of the loss (GAIRAT fig. 4, below)",
    "kappa": "Geometry value κ over epochs (GAIRAT fig. 4, below)",
    "kappa_histogram": "Geometry values of the training data",
    "weight_histogram": "Weights, as multiples of their mean (LRAT fig. 1a)",
    "V_histogram": "Vulnerability (LRAT fig. 4)",
    "logits_map": (
        "Logits of the two classes that are confused most; lighter: more attackable (GAIRAT fig. 7)"
    ),
    "vulnerable_map": (
        "The most vulnerable fifth under one attack; red: under the other too (LRAT fig. 2)"
    ),
}


def draw_training_figures(target: EvaluationTarget) -> dict[str, Figure]:
    """Draw all figures for which the run of a checkpoint has data.

    Args:
        target: A checkpoint of a training run, with its data.

    Returns:
        Figures by name, such as `errors`, `kappa_pgd_histogram` or `logits_map`.
    """
    assert target.checkpoint is not None and target.data is not None
    run_folder = target.checkpoint.path.parent
    last = RunDirectory(run_folder).read_last_checkpoint()
    figures = plot_run_figures(last.history, read_histograms(run_folder)) if last else {}
    validation = target.checkpoint.config.resolve_at(target.checkpoint.epoch - 1).validation
    attacks = {
        name: attack for name, attack in validation.attacks.items() if isinstance(attack, PGD)
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n_examples = _MAP_EXAMPLES if device.type == "cuda" else _MAP_EXAMPLES_ON_CPU
    metrics = compute_instance_metrics(
        target.model.to(device), target.data.train.to(device), attacks, n_examples
    )
    return figures | plot_instance_maps(metrics)


def build_training_dynamics_section(title: str, figures: dict[str, Figure]) -> Section:
    """Build the section with the figures of a checkpoint's training.

    Args:
        title: Title of the checkpoint.
        figures: Result of `draw_training_figures`.
    """
    pictures = [CaptionedFigure(_find_caption(name), figure) for name, figure in figures.items()]
    return Section(
        "Training of the chosen checkpoint",
        [Paragraph(f"{title}; histograms and maps are of training data."), *pictures],
    )


def _find_caption(figure_name: str) -> str:
    """Return the caption of a figure; `kappa_pgd_histogram` is the `kappa_histogram` of `pgd`."""
    if figure_name in _CAPTIONS:
        return _CAPTIONS[figure_name]
    quantity, _, rest = figure_name.partition("_")
    attack, histogram, _ = rest.partition("_histogram")
    return f"{_CAPTIONS[quantity + histogram]}: {attack}"
