"""Models as other people write them, each beside a plain one that computes the same.

`STRANGERS` maps a name to a function that returns the pair. Both have the same weights.
"""

import copy
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

Pair = tuple[nn.Module, nn.Module]


class Plain(nn.Module):
    """Convolution, batch norm, ReLU, convolution, batch norm, ReLU, linear layer; 8 x 8 grey."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 10)
        for norm in (self.norm, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.norm2(self.conv2(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.head(self.features(x).flatten(1))


def like_plain(model_type: type[Plain]) -> Pair:
    """A model of the type and a plain one."""
    return model_type(), Plain()


class FlattensByView(Plain):
    """LeNet, and the SmallCNN of TRADES, GAIRAT and FAT."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return 4 * self.head(features.view(features.size(0), -1))


class ChangesItsInput(Plain):
    """Normalises the images in place."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(2.0)
        return super().forward(x)


class Normalised(Plain):
    """What `ChangesItsInput` computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) * 2)


class TrainReturnsNothing(Plain):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class KeepsBatchNormsInTrainMode(Plain):
    """Batch statistics whatever the mode is: an image's answer depends on its batch."""

    def train(self, mode: bool = True) -> "KeepsBatchNormsInTrainMode":
        super().train(mode)
        self.norm.train()
        self.norm2.train()
        return self


class CachesInEvalMode(Plain):
    """A tensor that autograd computed, as the attention biases of LeViT and TinyViT."""

    def train(self, mode: bool = True) -> "CachesInEvalMode":
        super().train(mode)
        if mode:
            self.__dict__.pop("cache", None)
        else:
            self.cache = self.head.weight * 1.0
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.head.weight if self.training else self.cache
        return 4 * F.linear(self.features(x).flatten(1), weight, self.head.bias)


class HoldsALock(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


class AutocastsInside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class MasksClasses(Plain):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.cat([logits, torch.full_like(logits[:, :3], -1e9)], 1)


class AddsAnOffset(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 4096.0


class CountsItsBatches(Plain):
    """A buffer changes in eval mode, and one is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros(1))
        self.register_buffer("images", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        self.images = self.images + len(x)
        return super().forward(x)


class RemembersItsImages(Plain):
    """What it answers depends on what it saw before, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x) + self.shift * torch.arange(10)
        self.shift += 0.2
        return logits


class TakesKeywords(Plain):
    def forward(self, pixel_values: Tensor | None = None, **others: object) -> Tensor:
        assert pixel_values is not None and not others
        return super().forward(pixel_values)


class HoldsALambda(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda logits: 4 * logits

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.head(self.features(x).flatten(1)))


class NeedsContiguousImages(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous():
            raise ValueError("images are not contiguous")
        return super().forward(x)


class HasNoAnswerForOddBatches(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) % 2:
            raise ValueError("an odd batch")
        return super().forward(x)


class OfBatchesOfEight(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(8, 1, 8, 8))


class ComputesInDouble(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def with_computed_weights(change: Callable[[nn.Module], object]) -> Pair:
    """A model whose convolutions' weights something computes, and one with these weights."""
    model, plain = Plain(), Plain()
    for conv in (model.conv, model.conv2):
        change(conv)
    model(torch.rand(4, 1, 8, 8)), model.eval(), model(torch.rand(4, 1, 8, 8))
    model.norm, model.norm2 = plain.norm, plain.norm2
    for name in ("conv", "conv2"):
        getattr(plain, name).weight = nn.Parameter(getattr(model, name).weight.detach().clone())
    model.norm, model.norm2 = copy.deepcopy(plain.norm), copy.deepcopy(plain.norm2)
    return model, plain


def scripted() -> Pair:
    return torch.jit.script(nn.Sequential(*as_sequence())), Plain()


def traced() -> Pair:
    return torch.jit.trace(Plain().eval(), torch.rand(16, 1, 8, 8)), Plain()


def exported() -> Pair:
    rows = torch.export.Dim("rows", min=2, max=4096)
    example = (torch.rand(16, 1, 8, 8),)
    program = torch.export.export(Plain().eval(), example, dynamic_shapes=({0: rows},))
    return program.module(), Plain()


def as_sequence() -> list[nn.Module]:
    plain = Plain()
    with torch.no_grad():
        plain.head.weight.mul_(4), plain.head.bias.mul_(4)
    layers = [plain.conv, plain.norm, nn.ReLU(), plain.conv2, plain.norm2, nn.ReLU()]
    return [*layers, nn.Flatten(), plain.head]


STRANGERS: dict[str, Callable[[], Pair]] = {
    "view": lambda: like_plain(FlattensByView),
    "in place": lambda: (ChangesItsInput(), Normalised()),
    "train returns nothing": lambda: like_plain(TrainReturnsNothing),
    "cache in eval mode": lambda: like_plain(CachesInEvalMode),
    "lock": lambda: like_plain(HoldsALock),
    "masked classes": lambda: like_plain(MasksClasses),
    "weight norm": lambda: with_computed_weights(weight_norm),
    "weight norm by parametrization": lambda: with_computed_weights(parametrizations.weight_norm),
    "spectral norm": lambda: with_computed_weights(spectral_norm),
    "spectral norm by parametrization": lambda: with_computed_weights(
        parametrizations.spectral_norm
    ),
    "orthogonal": lambda: with_computed_weights(parametrizations.orthogonal),
    "pruned": lambda: with_computed_weights(
        lambda conv: prune.random_unstructured(conv, "weight", amount=0.3)
    ),
    "counts in eval mode": lambda: like_plain(CountsItsBatches),
    "keywords": lambda: like_plain(TakesKeywords),
    "lambda": lambda: like_plain(HoldsALambda),
    "contiguous images": lambda: like_plain(NeedsContiguousImages),
    "data parallel": lambda: (nn.DataParallel(Plain()), Plain()),
    "double precision": lambda: like_plain(ComputesInDouble),
    "TorchScript": scripted,
    "traced": traced,
    "exported": exported,
}
