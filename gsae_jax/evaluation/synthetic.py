"""Activations that are made of a known dictionary, and how well an SAE recovers this dictionary.

An activation is a sum of atoms, x = sum_i m_i a_i. The atoms a_i are unit vectors of random directions, and few of the
magnitudes m_i are above 0. Everything that an SAE should find is known: the directions, which atoms are active on a
token, and how strongly. Computed in float64 with NumPy.

In shapes, B is the number of tokens, D the dimension, A the number of atoms, and F the features of the SAE.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, special

from gsae_jax.errors import UserError
from gsae_jax.saes.trained import SAE

RECOVERED = 0.9  # cosine from which on a feature has an atom's direction
ABSORBED = 0.5  # share of a parent's magnitude that its child's feature has to carry


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a dictionary is like.

    Atoms that have no parent come first, the most frequent one at the beginning. The children of the first parent
    follow, then those of the second, and so on.

    Attributes:
        dimension: of the activations (D).
        atoms: in the dictionary (A). If there are more than `dimension`, they are in superposition.
        active: mean number of active atoms on a token, which is the true L0.
        exponent: atoms without a parent fire at rates proportional to rank^-exponent. Among the children of a parent,
            the same power law holds. 0 = all equally often.
        parents: how many atoms have children: the most frequent ones.
        children: of each parent. A child is active only if its parent is, and if none of its siblings is.
        with_child: fraction of a parent's tokens on which one of its children is active.
        groups: atoms without a parent are dealt out to so many groups. Atoms of one group fire together more often.
        correlation: of the Gaussian variables that decide whether atoms of one group fire; 0 = independent.
        spread: standard deviation of the logarithm of magnitudes. They are log-normal with mean 1.
    """

    dimension: int = 64
    atoms: int = 128
    active: float = 4.0
    exponent: float = 0.5
    parents: int = 8
    children: int = 3
    with_child: float = 0.6
    groups: int = 8
    correlation: float = 0.2
    spread: float = 0.25

    def __post_init__(self) -> None:
        """Raises `UserError` for a value or a combination that is impossible."""
        for field in ("dimension", "atoms", "groups"):
            if getattr(self, field) < 1:
                raise UserError(f"is {getattr(self, field)}; write 1 or more", field)
        for field in ("parents", "children", "exponent", "spread"):
            if not getattr(self, field) >= 0:
                raise UserError(f"is {getattr(self, field):g}; write 0 or more", field)
        if self.parents and not self.children:
            raise UserError("is 0, but there are parents; write 1 or more, or parents=0", "children")
        if self.parents * (self.children + 1) > self.atoms:
            needed = self.parents * (self.children + 1)
            raise UserError(f"is {self.atoms}; write {needed} or more, for parents with their children", "atoms")
        if not 0 < self.with_child <= 1:
            raise UserError(f"is {self.with_child:g}; write a fraction above 0, up to 1", "with_child")
        if not 0 <= self.correlation < 1:
            raise UserError(f"is {self.correlation:g}; write a number from 0 to below 1", "correlation")
        most = 1 / self._shares()[0]
        if not 0 < self.active < most:
            raise UserError(
                f"is {self.active:g}; write a number above 0 and below {most:.4g}, at which the most frequent atom "
                "would fire on every token, or a smaller exponent",
                "active",
            )

    @property
    def roots(self) -> int:
        """The number of atoms without a parent."""
        return self.atoms - self.parents * self.children

    @property
    def rates(self) -> np.ndarray:
        """The fraction of tokens [A] on which each atom is active."""
        return self.active * self._shares()

    @property
    def parent_of(self) -> np.ndarray:
        """The number [A] of each atom's parent; -1 for atoms without one."""
        return np.concatenate([np.full(self.roots, -1), np.repeat(np.arange(self.parents), self.children)])

    @property
    def child_shares(self) -> np.ndarray:
        """The fractions [children] of a parent's tokens on which each of its children is active."""
        weights = np.arange(1, self.children + 1) ** -float(self.exponent)
        return self.with_child * weights / weights.sum()

    def _shares(self) -> np.ndarray:
        """The rates [A] divided by their sum."""
        roots = np.arange(1, self.roots + 1) ** -float(self.exponent)
        rates = np.concatenate([roots, np.outer(roots[: self.parents], self.child_shares).ravel()])
        return rates / rates.sum()


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """A dictionary.

    Attributes:
        settings: which say everything but the directions.
        atoms: unit vectors [A, D].
    """

    settings: Settings
    atoms: np.ndarray

    @classmethod
    def make(cls, settings: Settings, seed: int) -> "Truth":
        """A dictionary with directions drawn uniformly from the sphere."""
        directions = np.random.default_rng(seed).standard_normal((settings.atoms, settings.dimension))
        return cls(settings, directions / np.linalg.norm(directions, axis=1, keepdims=True))


def sample(truth: Truth, seed: int | Sequence[int], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations of a dictionary. The same arguments give the same activations.

    Atoms without a parent fire by a Gaussian copula: each has a normal variable with a part in common with its group,
    and fires if the variable lies in the tail that has the atom's rate.

    Args:
        truth: the dictionary.
        seed: of the draw; several numbers count as one seed.
        tokens: how many to draw (B).

    Returns:
        The activations [B, D] and the magnitudes [B, A], which are 0 for atoms that are not active.
    """
    settings, rng = truth.settings, np.random.default_rng(seed)
    roots, group = settings.roots, np.arange(settings.roots) % settings.groups
    in_common = rng.standard_normal((tokens, settings.groups))[:, group]
    own = rng.standard_normal((tokens, roots))
    normal = math.sqrt(settings.correlation) * in_common + math.sqrt(1 - settings.correlation) * own
    fires = np.zeros((tokens, settings.atoms), bool)
    fires[:, :roots] = normal < special.ndtri(settings.rates[:roots])
    if settings.parents:
        # One number for each parent says which child is active, if any.
        which = rng.random((tokens, settings.parents, 1))
        ends = np.cumsum(settings.child_shares)
        chosen = (which < ends) & (which >= ends - settings.child_shares)
        fires[:, roots:] = (chosen & fires[:, : settings.parents, None]).reshape(tokens, -1)
    magnitudes = np.zeros(fires.shape)
    magnitudes[fires] = rng.lognormal(-(settings.spread**2) / 2, settings.spread, fires.sum())
    return magnitudes @ truth.atoms, magnitudes


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How well an SAE recovers a dictionary.

    A feature contributes f_j w_j to reconstructions. Its strength is f_j ||w_j||, and its direction w_j / ||w_j||.
    Features that are dead count in `dead` only. If features may be negative, each counts as two, with the directions
    of w_j and -w_j. Atoms and features are matched one to one, so that the sum of the cosines is largest.

    Attributes:
        cosine: mean over atoms of the cosine with the most similar feature.
        feature_cosine: mean over features of the cosine with the most similar atom.
        recovered: fraction of atoms with a feature whose cosine is at least `RECOVERED`.
        f1: mean over atoms of the F1 of "the matched feature is active" as a prediction of "the atom is active"; 0 for
            an atom that has no match. Atoms that are never active on these tokens are left out.
        gamma: slope of the regression, through 0, of the matched feature's strength on the atom's magnitude, over the
            tokens on which both are active; the mean over atoms whose match has a cosine of `RECOVERED` or more. Below
            1, features are too small. NaN if there is no such atom.
        absorption: the fraction of the tokens with a parent and one of its children on which the parent is absorbed;
            the mean over parents, and NaN if there are none. A parent is absorbed if its matched feature is off, and
            the feature that is matched to the child carries the parent instead: the parent's part of the feature is at
            least `ABSORBED` times the parent's magnitude. This part is the parent's coefficient in the least-squares
            approximation of f_j w_j by the two atoms, so that similar atoms are not taken for absorption.
        dead: fraction of the SAE's features that are active on none of the tokens.
        l0: mean number of active features on a token.
        true_l0: mean number of active atoms on a token.
        fvu: fraction of the variance of the activations that the reconstructions leave unexplained.
    """

    cosine: float
    feature_cosine: float
    recovered: float
    f1: float
    gamma: float
    absorption: float
    dead: float
    l0: float
    true_l0: float
    fvu: float


def recovery(sae: SAE, truth: Truth, x: np.ndarray, magnitudes: np.ndarray) -> Recovery:
    """Measure an SAE on tokens on which it was not trained.

    Args:
        sae: reads and writes one site.
        truth: the dictionary.
        x: activations [B, D], as `sample` gives them.
        magnitudes: of the atoms [B, A].

    Raises:
        UserError: the SAE's site has another width.
    """
    encoded = sae.encode(x.astype(np.float32))
    x_hat, f = (np.asarray(array, np.float64) for array in (sae.decode(encoded), encoded))
    whole = {
        "dead": 1 - (f != 0).any(0).mean(),
        "l0": (f != 0).sum(1).mean(),
        "true_l0": (magnitudes > 0).sum(1).mean(),
        "fvu": np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum(),
    }
    strengths, directions = _features(f, np.asarray(sae.W_dec, np.float64))
    cosines = truth.atoms @ directions.T
    best = cosines.max(1, initial=0)  # 0 where every feature is dead
    matched = np.full(len(truth.atoms), -1)
    atoms, features = optimize.linear_sum_assignment(cosines, maximize=True)
    matched[atoms] = features
    of_atoms = np.zeros_like(magnitudes)  # strength of each atom's feature; 0 without one
    of_atoms[:, atoms] = strengths[:, features]
    is_recovered = np.zeros(len(matched), bool)
    is_recovered[atoms] = cosines[atoms, features] >= RECOVERED
    measures = whole | {
        "cosine": best.mean(),
        "feature_cosine": cosines.max(0).mean() if len(directions) else math.nan,
        "recovered": (best >= RECOVERED).mean(),
        "f1": _f1(of_atoms, magnitudes),
        "gamma": _gamma(of_atoms[:, is_recovered], magnitudes[:, is_recovered]),
        "absorption": _absorption(truth, of_atoms, directions, matched, magnitudes),
    }
    return Recovery(**{name: float(value) for name, value in measures.items()})


def _features(f: np.ndarray, W_dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths [B, F] and directions [F, D] of the features that are active on some token."""
    if (f < 0).any():
        f, W_dec = np.concatenate([f.clip(min=0), (-f).clip(min=0)], 1), np.concatenate([W_dec, -W_dec])
    norms = np.linalg.norm(W_dec, axis=1)
    alive = (f > 0).any(0) & (norms > 0)
    return f[:, alive] * norms[alive], W_dec[alive] / norms[alive, None]


def _f1(of_atoms: np.ndarray, magnitudes: np.ndarray) -> Any:
    on, true = of_atoms > 0, magnitudes > 0
    seen = true.any(0)
    return np.mean(2 * (on & true).sum(0)[seen] / (on.sum(0) + true.sum(0))[seen])


def _gamma(of_atoms: np.ndarray, magnitudes: np.ndarray) -> float:
    both = (of_atoms > 0) & (magnitudes > 0)
    products, squares = (of_atoms * magnitudes * both).sum(0), (np.square(magnitudes) * both).sum(0)
    slopes = products[squares > 0] / squares[squares > 0]
    return float(slopes.mean()) if len(slopes) else math.nan


def _absorption(
    truth: Truth, of_atoms: np.ndarray, directions: np.ndarray, matched: np.ndarray, magnitudes: np.ndarray
) -> float:
    """`matched`: the row of `directions` that each atom [A] is matched to, or -1; the rest is as in `recovery`."""
    rates, parent_of = [], truth.settings.parent_of
    for parent in range(truth.settings.parents):
        absorbed, tokens = 0, 0
        for child in np.flatnonzero(parent_of == parent):
            both = (magnitudes[:, parent] > 0) & (magnitudes[:, child] > 0)
            tokens += both.sum()
            if matched[child] >= 0:
                pair, feature = truth.atoms[[parent, child]].T, directions[matched[child]]
                share = np.linalg.lstsq(pair, feature, rcond=None)[0][0]
                carried = of_atoms[:, child] * share >= ABSORBED * magnitudes[:, parent]
                absorbed += (both & (of_atoms[:, parent] == 0) & carried).sum()
        if tokens:
            rates.append(absorbed / tokens)
    return float(np.mean(rates)) if rates else math.nan
