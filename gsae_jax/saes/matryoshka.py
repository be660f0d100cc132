"""The Matryoshka BatchTopK SAE (Bussmann et al. 2025, 2503.17547): each prefix of the dictionary reconstructs, too.

f       = as of `batch_topk`, of the whole dictionary
x_hat_m = f[:m] @ W_dec[:m] + b_dec
loss    = sum over prefixes m of ||x - x_hat_m||^2 / D + auxk_coefficient * AuxK        (`selection.auxiliary_error`)

So the first features stay general ones. The last prefix is the whole dictionary: its error is what AuxK explains, and
what `mse` reports.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.kernels import active
from gsae_jax.saes import batch_topk, linalg, topk
from gsae_jax.saes.contract import WHOLE, Batch, Shards, Statistics
from gsae_jax.saes.features import AllFeatures

PARAMETERS, SPARSITY, RECIPE = batch_topk.PARAMETERS, batch_topk.SPARSITY, batch_topk.RECIPE
learning_rate = batch_topk.learning_rate
init, shifted, encode, decode = batch_topk.init, batch_topk.shifted, batch_topk.encode, batch_topk.decode
from_jumprelu, from_batch_topk = batch_topk.from_jumprelu, batch_topk.from_matryoshka


@dataclasses.dataclass(frozen=True)
class Config(batch_topk.Config):
    """As of `batch_topk`, and one option more.

    Attributes:
        prefixes: fractions of the dictionary, ascending; the paper's by default.
    """

    prefixes: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        ascend = all(first < second for first, second in itertools.pairwise((0.0, *self.prefixes)))
        if not ascend or not self.prefixes or self.prefixes[-1] != 1:
            raise UserError(
                f"is {self.prefixes}; write fractions that ascend from above 0 to 1, such as (0.25, 1.0)", "prefixes"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features of each prefix; one at least. Prefixes of one size are one."""
        return tuple(sorted({max(1, round(fraction * self.width)) for fraction in self.prefixes}))


def idle(config: Config) -> dict[str, str]:
    """As of `topk`, and prefixes of which several are one."""
    same = len(config.sizes) < len(config.prefixes)
    why = {"prefixes": f"of {config.width} features these are prefixes of {config.sizes}"} if same else {}
    return topk.idle(config) | why


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
) -> tuple[jax.Array, Statistics]:
    """The prefixes' squared errors over D plus AuxK (`contract.Trainable.loss`)."""
    features = AllFeatures.of(batch.inputs, topk.encoder(params, config), config.dtype)
    pi_BxF = jax.nn.relu(features.pre + params["b_enc"][None])
    f_BxF, state = batch_topk.selected(pi_BxF, state, coefficients, config, shards)
    parts_GxBxD = shards.sum(_decode_groups(f_BxF, params["W_dec"], config, shards))
    x_hats = [part + params["b_dec"][None] for part in jnp.cumsum(parts_GxBxD, 0)]
    total, statistics = topk.with_auxiliary(params, batch, pi_BxF, f_BxF, x_hats, config, shards, features)
    return total, statistics._replace(state=state)


def _decode_groups(f_BxF: jax.Array, W_dec_FxD: jax.Array, config: Config, shards: Shards) -> jax.Array:
    """What the features between one prefix and the next add to the reconstruction [G, B, D]: those of this shard."""
    here = f_BxF.shape[1]

    def of_shard(number: int, f_BxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
        ends = [min(max(size - number * here, 0), here) for size in (0, *config.sizes)]
        # An empty product is zero.
        return jnp.stack(
            [
                linalg.matmul(f_BxF[:, start:end], W_dec_FxD[start:end], config.dtype)
                for start, end in itertools.pairwise(ends)
            ]
        )

    if shards.axis is None:
        return of_shard(0, f_BxF, W_dec_FxD)
    # Slices have sizes that are known before; so there is a program for each shard, and a device runs its own.
    programs = [partial(of_shard, number) for number in range(shards.count)]
    return jax.lax.switch(jax.lax.axis_index(shards.axis), programs, *active.varying((f_BxF, W_dec_FxD), f_BxF))
