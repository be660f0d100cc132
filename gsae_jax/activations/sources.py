"""Where activations come from: a source gives the train program, inside its one jitted call, what the text makes.

`LanguageModel` runs a language model's forward pass there. `Stored` takes what was read from a store.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import masking, store
from gsae_jax.lms import loading
from gsae_jax.lms import sites as sites_lib


class Source(Protocol):
    """What the train program reads."""

    @property
    def widths(self) -> dict[str, int]:
        """The width of every site that it gives."""

    def tokens(self, rows: Any) -> np.ndarray | None:
        """The tokens [R, T] of rows, if there are any."""

    def place(self, rows: Any) -> Any:
        """This process's rows (`mesh.local_rows`) of a global batch, on the mesh.

        Raises:
            UserError: rows that cannot be used.
        """

    def __call__(self, params: Any, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        """(activations {site: [R, T, D]}, which of these tokens may be seen at all [R, T]); called under `jax.jit`.

        Args:
            params: what the source computes with; an argument, as the compiler would copy constants.
            batch: what `place` gave.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """Activations of a language model's forward pass over rows of tokens. Implements `Source`.

    Attributes:
        module: the language model, with no more layers than the sites need.
        mesh: of the run.
        sites: which activations it gives.
        special_tokens: ids of tokens that SAEs never see.
        rows: in a batch.
        forwards: forward passes that these rows are split into.
    """

    module: Any
    mesh: jax.sharding.Mesh
    sites: Sequence[str]
    special_tokens: tuple[int, ...]
    rows: int
    forwards: int

    @cached_property
    def widths(self) -> dict[str, int]:
        """The width of every site that it gives, in the order they are computed."""
        return {site: width for site, width in loading.site_widths(self.module).items() if site in self.sites}

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """What the language model reads."""
        return masking.tokens_of(rows)

    def place(self, rows: np.ndarray) -> jax.Array:
        """This process's rows of tokens, on the mesh; raises `UserError` for ids that the model does not have."""
        loading.check_tokens(masking.tokens_of(rows), self.module.config.d_vocab, "data")
        return mesh_lib.place_rows(self.mesh, rows, self.rows)

    def __call__(self, params: Any, batch: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """(activations {site: [R, T, D]}, which tokens SAEs may see [R, T]) of rows of tokens [R, T]."""
        forward = partial(loading.capture, self.module, params, sites=self.sites)
        allowed, batch = masking.allowed(batch, self.special_tokens), masking.tokens_of(batch)
        if self.forwards == 1:
            activations = forward(batch)
        else:
            by_forward = jnp.swapaxes(batch.reshape(-1, self.forwards, batch.shape[1]), 0, 1)
            activations = jax.lax.map(forward, by_forward)
            activations = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), activations)
        # So the compiler makes the same forward pass of it in every program, whatever follows: a run from a store of
        # these activations is the same run.
        activations = jax.lax.with_sharding_constraint(activations, mesh_lib.sharding(self.mesh, "data"))
        return jax.lax.optimization_barrier(activations), allowed


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """Activations that a store holds. Implements `Source`.

    Attributes:
        widths: of the sites that are read.
        mesh: of the run.
        special_tokens: ids of tokens that SAEs never see.
        rows: in a batch.
        dtype: of the exchange buffer.
    """

    widths: dict[str, int]
    mesh: jax.sharding.Mesh
    special_tokens: tuple[int, ...]
    rows: int
    dtype: str

    def tokens(self, rows: store.Batch) -> np.ndarray | None:
        """Those that the store has beside the activations."""
        return rows.tokens

    def place(self, rows: store.Batch) -> Any:
        """This process's rows, on the mesh: activations of each site, and which tokens may be seen."""
        allowed = rows.mask if rows.tokens is None else rows.mask & ~np.isin(rows.tokens, self.special_tokens)
        return jax.tree.map(lambda x: mesh_lib.place_rows(self.mesh, x, self.rows), (rows.activations, allowed))

    def __call__(self, params: Any, batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        """(activations {site: [R, T, D]}, which tokens may be seen [R, T]) of what `place` gave."""
        activations, allowed = batch
        return {site: activations[site].astype(self.dtype) for site in self.widths}, allowed


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModels:
    """Activations of several language models' forward passes over the same rows of tokens. Implements `Source`.

    Its parameters are a dict with those of each model.

    Attributes:
        models: by name; "" is the name of the first, whose sites have no @.
    """

    models: Mapping[str, LanguageModel]

    @cached_property
    def widths(self) -> dict[str, int]:
        """The width of every site that it gives: model by model, in the order they are computed."""
        each = self.models.items()
        return {sites_lib.at(hook, name): width for name, model in each for hook, width in model.widths.items()}

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """As of `LanguageModel`."""
        return self.models[""].tokens(rows)

    def place(self, rows: np.ndarray) -> jax.Array:
        """As `LanguageModel.place`; every model must have these ids."""
        for model in self.models.values():
            loading.check_tokens(model.tokens(rows), model.module.config.d_vocab, "data")
        return self.models[""].place(rows)

    def __call__(self, params: Mapping[str, Any], batch: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """(activations {site: [R, T, D]} of all models, which tokens are not special [R, T]) of tokens [R, T]."""
        activations: dict[str, jax.Array] = {}
        for name, model in self.models.items():
            of_model, allowed = model(params[name], batch)
            activations |= {sites_lib.at(hook, name): x for hook, x in of_model.items()}
        return activations, allowed
