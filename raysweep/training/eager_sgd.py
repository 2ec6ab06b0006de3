"""PyTorch's SGD without `torch.compile`.

PyTorch wraps methods of its optimizers so that they can be compiled. The first call of a wrapper
imports the compiler, which takes more than a second of a processor and 90 MiB of memory in every
process that trains. raysweep compiles networks only, never an optimizer.
"""

import inspect

import torch


class EagerSGD(torch.optim.SGD):
    """`torch.optim.SGD`, whose methods run as they are; the results are the same."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
