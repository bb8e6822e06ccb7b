"""Weights of loss terms: learned by uncertainty, and diagnosed by each term's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from study.workers import Workers

DIAGNOSED_STEPS = 4
"""Steps at the start of an epoch whose gradients are measured."""


class GradientDiagnosis:
    """Gradients of the loss terms on the global batch, step by step.

    They are computed from the graph of the training step itself: there is no second forward pass,
    no random draw, and ``.grad`` stays untouched.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], workers: Workers) -> None:
        self.parameters = list(parameters)
        self.workers = workers
        self.shares: list[dict[str, float]] = []
        self.cosines: list[dict[str, float]] = []

    def add(self, losses: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
        """Measure the gradients of one step.

        Args:
            losses: the unweighted terms, ``truth`` among them; the mean over workers of each is
                its mean over the global batch.
            factors: each term's factor in the loss.
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
        """Return means over the steps: ``gradient_share.<term>``, ``gradient_cosine.<term>``.

        A cosine is that between the term's gradient and the gradient of ``truth``.
        """
        return {
            f"gradient_{figure}.{name}": sum(step[name] for step in steps) / len(steps)
            for figure, steps in (("share", self.shares), ("cosine", self.cosines))
            for name in (steps[0] if steps else ())
        }

    def _gradient(self, loss: Tensor) -> Tensor:
        """Gradient by all parameters as one vector, the same on every worker."""
        parts = torch.autograd.grad(
            loss, self.parameters, retain_graph=True, materialize_grads=True
        )
        mine = torch.cat([part.flatten() for part in parts])
        return self.workers.total(mine) / self.workers.world


def _cosine(first: Tensor, second: Tensor) -> float:
    lengths = float(first.norm()) * float(second.norm())
    return float(first @ second) / lengths if lengths else 0.0


class UncertaintyWeights(nn.Module):
    """Learned weights: a term L enters the loss as exp(-s) L + s / 2, with one s per term.

    Kendall, Gal and Cipolla (Multi-task learning using uncertainty, CVPR 2018), where s is the log
    of a task's variance. For a given L, the best s makes the term's factor 1 / (2 L).
    """

    def __init__(self, terms: Iterable[str]) -> None:
        super().__init__()
        self.log_variances = nn.ParameterDict(
            {term: nn.Parameter(torch.zeros(())) for term in terms}
        )

    def forward(self, means: Mapping[str, Tensor]) -> Tensor:
        """Return exp(-s) L + s / 2 of each term, in the order of ``means``."""
        variances = torch.stack([self.log_variances[name] for name in means])
        return torch.exp(-variances) * torch.stack(list(means.values())) + variances / 2

    def factors(self) -> dict[str, float]:
        """Return the present factor exp(-s) of each term."""
        return {name: math.exp(-s.item()) for name, s in self.log_variances.items()}

    @torch.no_grad()
    def start_at(self, means: Mapping[str, float]) -> None:
        """Scale each term to 1 at its mean before training: s is the log of that mean."""
        for name, mean in means.items():
            self.log_variances[name].fill_(math.log(mean))
