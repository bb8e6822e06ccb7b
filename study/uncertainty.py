"""Learned weights of the loss's terms: the control that searched weights must beat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class UncertaintyWeights(nn.Module):
    """A term L counts exp(-s) L + s / 2, with an s of its own that is learned with the student.

    Kendall, Gal and Cipolla (Multi-task learning using uncertainty, CVPR 2018), where s is the log
    of a task's variance. For a given L the best s makes the term's factor 1 / (2 L).
    """

    def __init__(self, terms: Iterable[str]) -> None:
        super().__init__()
        self.log_variances = nn.ParameterDict(
            {term: nn.Parameter(torch.zeros(())) for term in terms}
        )

    def forward(self, means: Mapping[str, Tensor]) -> Tensor:
        """What the terms of these means count, in their order."""
        variances = torch.stack([self.log_variances[name] for name in means])
        return torch.exp(-variances) * torch.stack(list(means.values())) + variances / 2

    def factors(self) -> dict[str, float]:
        """exp(-s) of each term at present."""
        return {name: math.exp(-s.item()) for name, s in self.log_variances.items()}

    @torch.no_grad()
    def start_at(self, means: Mapping[str, float]) -> None:
        """Each term counts 1, and half its s, at its mean before training."""
        for name, mean in means.items():
            self.log_variances[name].fill_(math.log(mean))
