"""The task: inputs, a fixed representation of them, and labels linear in it, new in every prompt.

Shapes: a prompt has ``example`` pairs of an input ``d_x`` (what Phi reads has ``d_in`` numbers) and
a target ``d_y``. Random numbers come from a generator of the caller's seed alone.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from spade_lens.checks import check_fields, check_number, checked

_SLOPE = 0.01
_NOISE = 1e-6, 1e6
_DRAWS = 1 << 16
"""Inputs from which the scale of the weights is estimated."""


@dataclass(frozen=True)
class InContextTask:
    """Regression in context: y = <w, Phi(x)> + noise, with a new w in every prompt.

    Phi is a network of leaky ReLUs (slope .01) with random orthogonal matrices, fixed by ``seed``.
    Inputs are standard normal, and w is normal with the variance that gives y without noise the
    variance 1; that scale is ours. Source: Guo et al. (arXiv 2310.10616); the
    sizes are ours, for a CPU.

    In the dynamical form a prompt is a trajectory: x_{i+1} = W Phi(x_{i-recent+1}, ..., x_i) +
    noise, with a new matrix W in every prompt. Phi then scales what it reads to the length of the
    root of ``d_in``, or trajectories grow without bound; that is ours too. Of several
    representations, every prompt has one.

    Example:
        >>> task = InContextTask(examples=6, seed=1)
        >>> drawn = task.draw(8, seed=0)
        >>> drawn.inputs.shape, drawn.targets.shape, task.tokens(drawn).shape
        (torch.Size([8, 6, 4]), torch.Size([8, 6, 1]), torch.Size([8, 12, 6]))

    Args:
        d_x: The dimension of inputs.
        d_phi: That of the representation.
        examples: How many pairs a prompt has.
        depth: How many layers Phi has; 0 is the identity, a linear task.
        noise: The standard deviation of the noise.
        representations: How many Phi there are.
        form: ``"supervised"`` or ``"dynamical"``.
        recent: How many inputs Phi reads, in the dynamical form.
        seed: The seed of Phi.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If one is out of range, or dimensions do not fit.
    """

    d_x: int = 4
    d_phi: int = 4
    examples: int = 12
    depth: int = 1
    noise: float = 0.1
    representations: int = 1
    form: Literal["supervised", "dynamical"] = "supervised"
    recent: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("d_x", "d_phi", "examples", "representations", "recent"):
            check_number(name, getattr(self, name), least=1)
        check_number("depth", self.depth, least=0)
        if self.noise != 0 and not _NOISE[0] <= self.noise <= _NOISE[1]:
            raise ValueError(
                f"noise={self.noise} was given; expected 0, or a number from {_NOISE[0]:g} to "
                f"{_NOISE[1]:g}, for which the Bayes formula is exact."
            )
        if self.recent > 1 and self.form == "supervised":
            raise ValueError(
                f"recent={self.recent} was given for the supervised form, in which Phi reads one "
                "input; expected recent=1, or form='dynamical'."
            )
        if self.depth == 0 and self.d_phi != self.d_in:
            raise ValueError(
                f"depth=0 was given with d_phi={self.d_phi}; expected d_phi={self.d_in}, since Phi "
                "is then the identity."
            )
        if self.depth == 0 and self.representations > 1:
            raise ValueError(
                f"depth=0 was given with representations={self.representations}; expected 1, since "
                "all would be the identity."
            )

    @property
    def d_in(self) -> int:
        """How many numbers Phi reads."""
        return self.d_x * self.recent

    @property
    def d_y(self) -> int:
        """The dimension of what is predicted."""
        return self.d_x if self.form == "dynamical" else 1

    @property
    def d_token(self) -> int:
        """The dimension of a token."""
        return self.d_x if self.form == "dynamical" else self.d_x + 2

    @property
    def n_tokens(self) -> int:
        """How many tokens a prompt has."""
        return self.examples * (1 if self.form == "dynamical" else 2)

    @property
    def x_positions(self) -> range:
        """Where inputs stand, at which predictions are read."""
        return range(0, self.n_tokens, 1 if self.form == "dynamical" else 2)

    @property
    def y_positions(self) -> range:
        """Where labels stand; nowhere in the dynamical form."""
        return range(0) if self.form == "dynamical" else range(1, self.n_tokens, 2)

    @property
    def prior_variance(self) -> float:
        """The variance of every weight: one over the mean squared length of Phi of an input."""
        return self._scale

    @property
    def penalty(self) -> float:
        """The penalty of the Bayes ridge regression: variance of the noise over that of a weight.

        Raises:
            ValueError: If there is no noise.
        """
        if self.noise == 0:
            raise ValueError(
                "noise=0 was given, with which the penalty of the Bayes formula is 0 and its "
                "matrices cannot be inverted. Give some noise, or compare with least squares."
            )
        return self.noise**2 / self.prior_variance

    def phi(
        self, inputs: Float[Tensor, "*batch d_in"], which: int = 0
    ) -> Float[Tensor, "*batch d_phi"]:
        """Return a representation of inputs.

        Args:
            inputs: What Phi reads.
            which: Which of the representations.

        Raises:
            ValueError: If inputs are of another dimension, or there is no such representation.
        """
        if inputs.shape[-1] != self.d_in or not 0 <= which < self.representations:
            raise ValueError(
                f"Inputs of {inputs.shape[-1]} numbers and representation {which} were given; "
                f"expected {self.d_in} numbers, and one of {self.representations} from 0 on."
            )
        out = inputs
        if self.form == "dynamical":
            out = F.normalize(inputs, dim=-1) * self.d_in**0.5
        for matrix in self._matrices[which]:
            out = F.leaky_relu(out @ matrix.to(out).T, _SLOPE)
        return out

    @checked
    def draw(self, n: int, *, seed: int | None = None) -> "Drawn":
        """Draw prompts.

        Args:
            n: How many.
            seed: Of what is drawn; None for torch's own generator, as in training.

        Raises:
            TypeError: If a number is no whole number.
            ValueError: If none shall be drawn, or the seed is out of range.
        """
        check_number("n", n, least=1)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        which = torch.randint(self.representations, (n,), generator=generator)
        weights = torch.randn(n, self.d_y, self.d_phi, generator=generator)
        weights = weights * math.sqrt(self.prior_variance)
        shape = (n, self.examples, self.d_y)
        noise = self.noise * torch.randn(shape, generator=generator)
        if self.form == "dynamical":
            return self._trajectories(which, weights, noise, generator)
        inputs = torch.randn(n, self.examples, self.d_x, generator=generator)
        features = self._chosen(inputs, which)
        clean = torch.einsum("bnf,byf->bny", features, weights)
        return Drawn(inputs, clean + noise, weights, which)

    def tokens(self, drawn: "Drawn") -> Float[Tensor, "prompt pos d_token"]:
        """Return prompts as tokens: (x, 0, 0) and (0, y, 1) in turn; x alone if dynamical.

        Raises:
            ValueError: If prompts are of other dimensions, or have more examples than positions.
        """
        n, examples = drawn.inputs.shape[:2]
        if examples > self.examples:
            raise ValueError(
                f"Prompts of {examples} examples were given; expected at most {self.examples}, "
                "for which there are positions."
            )
        if drawn.inputs.shape[-1] != self.d_in or drawn.targets.shape[-1] != self.d_y:
            raise ValueError(
                f"Inputs of {drawn.inputs.shape[-1]} numbers and targets of "
                f"{drawn.targets.shape[-1]} were given; expected {self.d_in} and {self.d_y}."
            )
        if self.form == "dynamical":
            return drawn.inputs[..., -self.d_x :]
        inputs = F.pad(drawn.inputs, (0, 2))
        labels = F.pad(drawn.targets, (self.d_x, 1))
        labels[..., -1] = 1.0
        return rearrange([inputs, labels], "kind b example token -> b (example kind) token")

    def features(self, drawn: "Drawn") -> Float[Tensor, "prompt example d_phi"]:
        """Return the true representation of every input."""
        return self._chosen(drawn.inputs, drawn.which)

    def _chosen(self, inputs: Tensor, which: Tensor) -> Tensor:
        every = torch.stack([self.phi(inputs, k) for k in range(self.representations)])
        return every[which, torch.arange(len(which))]

    def _trajectories(
        self, which: Tensor, weights: Tensor, noise: Tensor, generator: torch.Generator | None
    ) -> "Drawn":
        first = torch.randn(len(which), self.recent, self.d_x, generator=generator)
        stream, inputs, targets = list(first.unbind(dim=1)), [], []
        for i in range(self.examples):
            seen = torch.cat(stream[-self.recent :], dim=-1)
            feature = self._chosen(seen, which)
            after = torch.einsum("bf,byf->by", feature, weights) + noise[:, i]
            inputs.append(seen)
            targets.append(after)
            stream.append(after)
        return Drawn(torch.stack(inputs, dim=1), torch.stack(targets, dim=1), weights, which)

    @cached_property
    def _matrices(self) -> list[list[Tensor]]:
        """Return the matrices of every representation, layer by layer."""
        generator = torch.Generator().manual_seed(self.seed)
        several = []
        for _ in range(self.representations):
            sizes = [self.d_in, *[self.d_phi] * self.depth]
            layers = []
            for rows, columns in zip(sizes[1:], sizes, strict=False):
                matrix = torch.empty(rows, columns)
                torch.nn.init.orthogonal_(matrix, generator=generator)
                layers.append(matrix)
            several.append(layers)
        return several

    @cached_property
    def _scale(self) -> float:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(_DRAWS, self.d_in, generator=generator)
        squares = [self.phi(inputs, k).square().sum(dim=-1).mean() for k in self._numbers]
        return 1 / float(torch.stack(squares).mean())

    @property
    def _numbers(self) -> range:
        return range(self.representations)

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments: the rest is made of them."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, eq=False)
class Drawn:
    """Prompts that were drawn, and what is hidden in them.

    Args:
        inputs: What Phi reads.
        targets: What is predicted.
        weights: The linear part of every prompt.
        which: The representation of every prompt.
    """

    inputs: Float[Tensor, "prompt example d_in"]
    targets: Float[Tensor, "prompt example d_y"]
    weights: Float[Tensor, "prompt d_y d_phi"]
    which: Int[Tensor, " prompt"]

    def __len__(self) -> int:
        return len(self.inputs)

    def of(self, rows: Int[Tensor, " some"] | slice) -> "Drawn":
        """Return some of the prompts."""
        return Drawn(self.inputs[rows], self.targets[rows], self.weights[rows], self.which[rows])
