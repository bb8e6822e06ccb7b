"""Weights of loss terms: learned by uncertainty, and diagnosed by each term's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from study.workers import Workers

DIAGNOSED_STEPS = 4
"""The first steps of an epoch, which are looked at."""


class GradientDiagnosis:
    """The gradients of the terms, step by step; all of them are those of the global batch.

    It reads the graph that a training step is about to go through: no second forward, no random
    number, and nothing is written to ``.grad``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], workers: Workers) -> None:
        self.parameters = list(parameters)
        self.workers = workers
        self.shares: list[dict[str, float]] = []
        self.cosines: list[dict[str, float]] = []

    def add(self, losses: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
        """Takes in a step.

        Args:
            losses: the unweighted terms, ``truth`` among them; the mean over workers of each is
                its mean over the global batch.
            factors: what each term is multiplied by in the loss.
        """
        truth = self._gradient(losses["truth"])
        norms: dict[str, float] = {}
        cosines: dict[str, float] = {}
        for name, loss in losses.items():
            gradient = truth if name == "truth" else self._gradient(loss)
            norms[name] = abs(factors[name]) * float(gradient.norm())
            cosines[name] = _cosine(gradient, truth)
        total = sum(norms.values())
        self.shares.append({name: norm / total if total else 0.0 for name, norm in norms.items()})
        self.cosines.append(cosines)

    def row(self) -> dict[str, float]:
        """Means over the steps: ``gradient_share.<term>`` and ``gradient_cosine.<term>``."""
        return {
            f"gradient_{figure}.{name}": sum(step[name] for step in steps) / len(steps)
            for figure, steps in (("share", self.shares), ("cosine", self.cosines))
            for name in (steps[0] if steps else ())
        }

    def _gradient(self, loss: Tensor) -> Tensor:
        """Over all parameters as one vector, the same on every worker."""
        parts = torch.autograd.grad(
            loss, self.parameters, retain_graph=True, materialize_grads=True
        )
        mine = torch.cat([part.flatten() for part in parts])
        return self.workers.total(mine) / self.workers.world


def _cosine(first: Tensor, second: Tensor) -> float:
    lengths = float(first.norm()) * float(second.norm())
    return float(first @ second) / lengths if lengths else 0.0


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
