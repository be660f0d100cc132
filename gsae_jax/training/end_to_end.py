"""The KL divergence of the language model's predictions with an SAE spliced in, as a part of the loss (2503.17272).

In updates with the KL divergence, the loss of an architecture changes to

    loss - w * mse + w * (mse / KL) * KL(clean || spliced)

where w is `kl_weight`, and the factor mse / KL counts as a number: it has no gradient. The two parts of the
reconstruction's error have the magnitude of `mse` together, whatever the units of KL, so that the sparsity penalty
keeps its weight. The paper, too, scales the two parts to the same magnitude in every update; so does w = 0.5.

The first two terms are of the batch that the exchange buffer serves, as ever. The last is of rows of text that have
just been read, because predictions need whole rows; its factor is computed from the same rows. Special tokens, and
activations above the site's norm limit, keep the language model's own values, as they do when SAEs are measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import masking, scaling
from gsae_jax.lms import sites as sites_lib
from gsae_jax.lms.loss import divergence
from gsae_jax.saes import contract, inference
from gsae_jax.training.stacks import Stack, StackState

SMALLEST = 1e-6  # nats; a smaller KL divergence counts as this one in the factor


class Rows(NamedTuple):
    """Rows of text, and what the untouched forward pass made of them.

    Attributes:
        tokens: [R, T], as `activations.masking` reads them.
        allowed: [R, T], which tokens SAEs may see.
        activations: {site: [R, T, D]}, of `EndToEnd.sites`.
    """

    tokens: jax.Array
    allowed: jax.Array
    activations: dict[str, jax.Array]

    def split(self, parts: int) -> "Rows":
        """Rows [parts, R / parts, ...]. Rows of each device are in every part."""

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

        return jax.tree.map(split, self)


@dataclasses.dataclass(frozen=True, eq=False)
class EndToEnd:
    """Gradients of the KL divergence. The compiler places all of it, the SAEs too: nothing here is mapped by hand.

    Attributes:
        module: the whole language model.
        mesh: of the run; None: one device.
        parts: in which the rows of an update are computed, one after the other.
        model: the language model's name, "" of the first. Stacks write its sites.
    """

    module: Any
    mesh: jax.sharding.Mesh | None
    parts: int
    model: str = ""

    def sites(self, stacks: Sequence[Stack]) -> set[str]:
        """What `Rows.activations` must have for these stacks."""
        targets = [stack.config.targets[0] for stack in stacks]
        read = {site for stack in stacks for site in stack.config.sites}
        return read | {*targets, self._last} | {sites_lib.stream_before(site) for site in targets}

    @property
    def _last(self) -> str:
        return sites_lib.at(f"blocks.{self.module.config.n_layers - 1}.hook_resid_post", self.model)

    def gradients(
        self,
        stack: Stack,
        state: StackState,
        rows: Rows,
        lm_params: Any,
        units: tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]],
        norm_limits: Mapping[str, jax.Array],
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """(Gradients [N, ...] of the last term of the loss, KL [N] in nats per prediction) of every SAE of a stack.

        Features that an architecture's `encode` switches off have no gradient, and neither has a threshold.

        Args:
            stack: its architecture, sites and `kl_weight`.
            state: of the stack.
            rows: of the update.
            lm_params: of the whole language model.
            units: scales and means of the sites.
            norm_limits: of the sites.
        """
        parts = rows.split(self.parts)
        predictions = rows.tokens.shape[0] * (rows.tokens.shape[1] - 1)

        def of_one(params: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
            trained, own = stack.split(params)

            def sums(trained: dict[str, jax.Array], rows: Rows) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                params = self._gathered(stack, trained | own)
                return self._sums(stack, params, rows, lm_params, units, norm_limits)

            def add_part(total: Any, rows: Rows) -> tuple[Any, None]:
                (kl, (error, count)), grads = jax.value_and_grad(sums, has_aux=True)(trained, rows)
                return jax.tree.map(jnp.add, total, (kl, error, count, self._spread(stack, grads))), None

            zero = jnp.zeros(())
            start = zero, zero, zero, jax.tree.map(jnp.zeros_like, trained)
            (kl, error, count, grads), _ = jax.lax.scan(add_part, start, parts)
            kl, mse = kl / predictions, error / jnp.maximum(count, 1)
            factor = stack.config.kl_weight * mse / jnp.maximum(kl, SMALLEST) / predictions
            return jax.tree.map(lambda grad: factor * grad, grads), kl

        # One by one, compiled once: beside an SAE there are all activations of the blocks after its site.
        return jax.lax.map(of_one, state.params)

    def _sums(
        self,
        stack: Stack,
        params: dict[str, jax.Array],
        rows: Rows,
        lm_params: Any,
        units: tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]],
        norm_limits: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """(Sum of KL over predictions, (sum of squared errors over D, number of tokens that it is of)) of one SAE."""
        (target,) = stack.config.targets
        x, (scales, means) = rows.activations[target], units
        read = {site: rows.activations[site] for site in {*stack.config.sites, target}}
        valid = masking.valid(rows.allowed, read, norm_limits)
        inputs, wanted = stack.batch(inference.flat(scaling.all_inputs(read, scales, means)))
        f_BxF = stack.architecture.encode(params, inputs, stack.sae)
        decoded = stack.architecture.decode(params, f_BxF)
        # A tuple of one where an architecture may write several.
        x_hat_BxD, wanted_BxD = (
            value[0] if isinstance(value, tuple) else value
            for value in (contract.with_skip(stack.architecture, params, inputs, decoded), wanted)
        )
        errors = jnp.square(x_hat_BxD - wanted_BxD).mean(-1).reshape(valid.shape)
        x_hat = scaling.outputs(x_hat_BxD.reshape(x.shape), scales[target], means.get(target))
        spliced = jnp.where(valid[..., None], x_hat, x.astype(x_hat.dtype)).astype(x.dtype)
        before = sites_lib.stream_before(target)
        before_hook, hook = (sites_lib.parts(site)[0] for site in (before, target))
        tap = sites_lib.splice({before_hook: lambda _: rows.activations[before], hook: lambda _: spliced})
        tokens = masking.tokens_of(rows.tokens)
        hidden = self.module.apply({"params": lm_params}, tokens, tap, method="hidden")
        kl = divergence(self.module, lm_params, hidden, rows.activations[self._last], tokens)
        return kl.sum(), (jnp.where(valid, errors, 0).sum(), valid.sum().astype(jnp.float32))

    def _gathered(self, stack: Stack, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Parameters as they are used: features along `latent` alone, as rows of text lie along `data`."""
        frozen = contract.frozen(stack.architecture, stack.sae)

        def gathered(name: str, value: jax.Array) -> jax.Array:
            axis = stack.architecture.PARAMETERS[name].axis
            value = jax.lax.stop_gradient(value) if name in frozen else value
            if axis is None or self.mesh is None:
                return value
            return jax.lax.with_sharding_constraint(value, mesh_lib.sharding(self.mesh, *[None] * axis, "latent"))

        return {name: gathered(name, value) for name, value in params.items()}

    def _spread(self, stack: Stack, grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Gradients as the state has parameters: features over all devices."""
        if self.mesh is None:
            return grads
        table = stack.architecture.PARAMETERS
        return {
            name: jax.lax.with_sharding_constraint(
                value, jax.sharding.NamedSharding(self.mesh, mesh_lib.over_features(table[name].axis))
            )
            for name, value in grads.items()
        }
