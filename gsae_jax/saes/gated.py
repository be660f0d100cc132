"""The Gated SAE (Rajamanoharan et al. 2024, section 3.2), with the switches of its ablations (section 5).

With c = x - b_dec:
    pi_gate = c @ W_gate + b_gate                   which features are on
    pi_mag  = exp(r_mag) * (c @ W_gate) + b_mag     how much (equation 7: the encoders share directions)
    f       = 1[pi_gate > 0] * ReLU(pi_mag)
    x_hat   = f @ W_dec + b_dec

With the option `aligned`, the columns of `linalg.aligned(W_gate, W_dec)` take the place of W_gate. The loss is that of
gated transcoders and crosscoders as well.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.saes import linalg, penalties, selection
from gsae_jax.saes.contract import WHOLE, Batch, Parameter, Role, Shards, Statistics
from gsae_jax.saes.features import AllFeatures, Encoder, Features

PARAMETERS = {
    "W_gate": Parameter(("d_in", "width"), Role.ENCODER),
    "W_mag": Parameter(("d_in", "width"), Role.ENCODER),  # of an encoder that is not tied, which has no r_mag
    "b_gate": Parameter(("width",), Role.FEATURE),
    "r_mag": Parameter(("width",), Role.LOGARITHM),
    "b_mag": Parameter(("width",), Role.FEATURE),
    "W_dec": Parameter(("width", "d_in"), Role.DECODER, unit_rows=True),
    "b_dec": Parameter(("d_in",), Role.CENTER),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Shape and switches that transcoders and crosscoders have as well.

    Attributes:
        d_in: width of the site (the paper's n); a tuple of widths if there are several sites.
        width: features (the paper's M).
        tie_encoder: W_mag = exp(r_mag) * W_gate; False gives W_mag [D, F] of its own instead of r_mag.
        use_r_mag: False fixes r_mag at 0.
        freeze_aux_decoder: the auxiliary reconstruction does not train the decoder.
        initial_l0: about how many features are active on a token before training; 0 = half of them, by zero biases.
        auxk_coefficient: weight of a loss that opens gates of dead features, as an alternative to resampling: those of
            largest pi_gate explain the residual by 1 + ELU(pi_gate), through the frozen decoder
            (`selection.auxiliary_error`). 0 = none; TopK SAEs take 1/32.
        k_aux: dead features of a token that explain it; 0 = half of the residual's width.
        penalty: the penalty of each ReLU(pi_gate): "l1", or one that saturates, "tanh" or "log" (`penalties`).
        penalty_scale: a penalty that saturates does so where ReLU(pi_gate) is above 1 / penalty_scale, in training's
            units: a site's activations have E||x||^2 = d_in.
        dtype: of the matrix products' operands.
    """

    d_in: int | tuple[int, ...]
    width: int
    tie_encoder: bool = True
    use_r_mag: bool = True
    freeze_aux_decoder: bool = True
    initial_l0: int = linalg.INITIAL_L0
    auxk_coefficient: float = 0.0
    k_aux: int = 0
    penalty: penalties.Name = "l1"
    penalty_scale: float = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises `UserError` for a number that is out of range."""
        linalg.check_initial_l0(self.initial_l0)
        selection.check_auxk(self.auxk_coefficient, self.k_aux)
        penalties.check(self.penalty, self.penalty_scale)

    @property
    def aligned(self) -> bool:
        """Whether encoder columns are aligned with decoder rows, which must be of the same site."""
        return False

    @property
    def scales(self) -> bool:
        """Whether exp(r_mag) scales magnitudes."""
        return self.tie_encoder and self.use_r_mag and not self.aligned


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Shape and switches of an SAE.

    Attributes:
        only_magnitude: r_mag and b_mag alone are trained: rescale and shift, for a stack that starts from a baseline.
        aligned: each feature's encoder column and decoder row keep an inner product of one, which fixes r_mag at 0.
    """

    d_in: int
    only_magnitude: bool = False
    aligned: bool = False

    def __post_init__(self) -> None:
        """Raises `UserError` for a number that is out of range, and for options that exclude each other."""
        super().__post_init__()
        if self.auxk_coefficient and self.only_magnitude:
            why = "but only_magnitude=True leaves gates as they are; write 0"
            raise UserError(f"is {self.auxk_coefficient:g}, {why}", "auxk_coefficient")
        for name, excluded in (("tie_encoder", False), ("only_magnitude", True)):
            if self.aligned and getattr(self, name) is excluded:
                raise UserError(f"is True, which excludes {name}={excluded}; leave out one of the two", "aligned")


def init(key: jax.Array, config: Options) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, biases for `initial_l0`, the rest zero."""
    F, D = config.width, linalg.total(config.d_in)
    W_dec, bias = linalg.unit_rows(key, F, D), linalg.initial_bias(config.initial_l0, F)
    params = {"W_gate": W_dec.T, "b_gate": bias, "b_mag": bias, "W_dec": W_dec, "b_dec": jnp.zeros(D)}
    if not config.tie_encoder:
        return params | {"W_mag": W_dec.T}
    return params | {"r_mag": jnp.zeros(F)}


def from_relu(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a baseline's."""
    same = {name: params[name] for name in ("W_dec", "b_dec")}
    b_enc = params["b_enc"]
    return same | {"W_gate": params["W_enc"], "b_gate": b_enc, "b_mag": b_enc, "r_mag": jnp.zeros_like(b_enc)}


def from_jumprelu(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a JumpReLU SAE's."""
    same = {name: params[name] for name in ("W_dec", "b_dec")}
    b_mag = linalg.shifted(params["b_enc"], params["b_dec"], params["W_enc"])
    b_gate = b_mag - jax.nn.relu(params["threshold"])
    return same | {"W_gate": params["W_enc"], "b_gate": b_gate, "b_mag": b_mag, "r_mag": jnp.zeros_like(b_mag)}


def from_batch_topk(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a BatchTopK SAE's after training, with its running threshold."""
    start = from_relu(params, config)
    return start | {"b_gate": params["b_enc"] - jax.nn.relu(params["threshold"])}


from_matryoshka = from_batch_topk


def from_gated_batch_topk(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as that of a gated SAE whose gates BatchTopK opens, after its training."""
    kept = {name: value for name, value in params.items() if name != "threshold"}
    return kept | {"b_gate": params["b_gate"] - jax.nn.relu(params["threshold"])}


def frozen(config: Config) -> set[str]:
    """The names of parameters that training leaves as they are."""
    return set(PARAMETERS) - {"r_mag", "b_mag"} if config.only_magnitude else set()


def idle(config: Options) -> dict[str, str]:
    """Options that do nothing beside the others, and why."""
    why = selection.idle(config)
    if not config.tie_encoder or config.aligned:
        why["use_r_mag"] = f"{'aligned=True' if config.aligned else 'tie_encoder=False'} has no r_mag"
    if getattr(config, "only_magnitude", False):
        of_gates = ("freeze_aux_decoder", "penalty", "penalty_scale")
        why |= dict.fromkeys(of_gates, "only_magnitude=True trains neither gates nor the decoder")
    return why


def normal_form(params: dict[str, jax.Array], config: Options) -> dict[str, jax.Array]:
    """The same function with r_mag in use, and with the encoder that is."""
    unused = not config.scales and "r_mag" in params
    normal = params | ({"r_mag": jnp.zeros_like(params["r_mag"])} if unused else {})
    return normal | ({"W_gate": linalg.once_aligned(params["W_gate"], params["W_dec"])} if config.aligned else {})


def shifted(params: dict[str, jax.Array], shift_D: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Parameters with shift @ encoder added to the encoders' biases, and so to all pre-activations."""
    W_mag = params.get("W_mag")
    if W_mag is None:
        with np.errstate(over="ignore", invalid="ignore"):  # callers check whether it is finite
            W_mag = np.asarray(params["W_gate"]) * np.exp(np.asarray(params["r_mag"]))[None]
    return params | {
        "b_gate": linalg.shifted(params["b_gate"], shift_D, params["W_gate"]),
        "b_mag": linalg.shifted(params["b_mag"], shift_D, W_mag),
    }


def threshold(params: dict[str, jax.Array], config: Options) -> jax.Array:
    """The threshold [F] of each feature's activation in the JumpReLU form (Appendix E), in the inputs' units.

    Raises:
        UserError: the encoder is untied, so that there is no such form.
    """
    return jax.nn.relu(params["b_mag"] - magnitude_scale(params, config) * params["b_gate"])


def magnitude_scale(params: dict[str, jax.Array], config: Options) -> jax.Array:
    """The factors [F] between the gate's encoder and the magnitude's encoder.

    Raises:
        UserError: the encoder is untied, so that there are no such factors.
    """
    if not config.tie_encoder:
        raise UserError("is False; only a gated SAE with a tied encoder has a JumpReLU form", "tie_encoder")
    return jnp.exp(params["r_mag"]) if config.scales else jnp.ones_like(params["r_mag"])


def feature_facts(params: dict[str, jax.Array], config: Options) -> dict[str, jax.Array]:
    """`r_mag` and the `threshold` of the JumpReLU form, each [F]; neither if the encoder is untied."""
    return {"r_mag": params["r_mag"], "threshold": threshold(params, config)} if config.tie_encoder else {}


def encoder(params: dict[str, jax.Array], config: Options) -> Encoder | None:
    """The encoder of gates; None if AuxK needs closed gates, or an untied encoder a product of its own."""
    by_active = config.tie_encoder and not config.auxk_coefficient
    return Encoder(_W_gate(params, config), linalg.center(params), params["b_gate"]) if by_active else None


def pre_activations(params: dict[str, jax.Array], x_BxD: jax.Array, config: Options) -> tuple[jax.Array, jax.Array]:
    """(pi_gate, pi_mag), each [B, F]; one product with x when the encoder is tied."""
    # Centred in float32, before the product: with a large mean, bfloat16 has no digits left for the rest.
    c_BxD = x_BxD.astype(jnp.float32) - linalg.center(params)[None]
    features = AllFeatures(linalg.matmul(c_BxD, _W_gate(params, config), config.dtype), config.dtype)
    return _pre_activations(params, features, lambda W: linalg.matmul(c_BxD, W, config.dtype), config)


def _W_gate(params: dict[str, jax.Array], config: Options) -> jax.Array:
    """The gate's encoder that is in use."""
    return linalg.aligned(params["W_gate"], params["W_dec"]) if config.aligned else params["W_gate"]


def _pre_activations(
    params: dict[str, jax.Array], features: Features, encode_with: Callable[[jax.Array], jax.Array], config: Options
) -> tuple[jax.Array, jax.Array]:
    """(pi_gate, pi_mag); `encode_with` computes c @ W."""
    if not config.tie_encoder:
        magnitude = encode_with(params["W_mag"])
    elif config.scales:
        magnitude = features.pre * features.each(jnp.exp(params["r_mag"]))
    else:
        magnitude = features.pre
    return features.pre + features.each(params["b_gate"]), magnitude + features.each(params["b_mag"])


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Options) -> jax.Array:
    """Feature activations [B, F]."""
    pi_gate, pi_mag = pre_activations(params, x_BxD, config)
    # NaN > 0 is False, which would hide NaN as a feature that is off.
    return jnp.where(jnp.isnan(pi_gate), pi_gate, jnp.where(pi_gate > 0, jax.nn.relu(pi_mag), 0.0))


def gate(params: dict[str, jax.Array], x_BxD: jax.Array, config: Options) -> jax.Array:
    """Which features' gates [B, F] are open."""
    return pre_activations(params, x_BxD, config)[0] > 0


def decode(params: dict[str, jax.Array], f_BxF: jax.Array) -> jax.Array:
    """Reconstructions [B, D]."""
    return f_BxF @ params["W_dec"] + params["b_dec"][None]


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Options,
    shards: Shards = WHOLE,
    features: Features | None = None,
) -> tuple[jax.Array, Statistics]:
    """Equation 8, squared errors divided by D, averaged over the batch (`contract.Trainable.loss`).

    Its second term is l1_coefficient times the sum over features of the `penalty` of ReLU(pi_gate).
    """
    x_BxD, offset = batch.inputs, linalg.offset(params, batch.inputs, config.dtype)
    encode_with = partial(linalg.centred_product, x_BxD, linalg.center(params), dtype=config.dtype)
    features = features or AllFeatures(encode_with(_W_gate(params, config)), config.dtype)
    pi_gate, pi_mag = _pre_activations(params, features, encode_with, config)
    f_gate = jax.nn.relu(pi_gate)
    f = jnp.where(pi_gate > 0, jax.nn.relu(pi_mag), 0.0)
    trains_aux = not config.freeze_aux_decoder
    B = x_BxD.shape[0]
    decoded, penalty, l0 = shards.sum(
        (
            features.decode((f, f_gate), params["W_dec"], (True, trains_aux)),
            penalties.of(config.penalty, config.penalty_scale, f_gate).sum() / B,
            jnp.sum(f > 0, dtype=jnp.float32) / B,
        )
    )
    x_hat = decoded[0] + offset
    x_hat_gate = decoded[1] + (offset if trains_aux else jax.lax.stop_gradient(offset))
    means = linalg.error_statistics(batch.targets, x_hat)
    auxiliary = jnp.square(batch.targets - x_hat_gate).mean()
    total = means["mse"] + coefficients["l1_coefficient"] * penalty + auxiliary
    if config.auxk_coefficient:
        # A dead feature's gate is closed, so that ReLU(pi_gate) would have no gradient. This is positive and has one.
        almost_BxF = 1 + jax.nn.elu(pi_gate)
        W_dec = jax.lax.stop_gradient(params["W_dec"])
        means["auxk"] = selection.auxiliary_error(
            almost_BxF, batch.targets - x_hat, W_dec, batch.dead(), config, shards
        )
        total += config.auxk_coefficient * means["auxk"]
    name = "l1" if config.penalty == "l1" else "penalty"
    means |= {"loss": total, name: penalty, "auxiliary": auxiliary, "l0": l0}
    return total, Statistics(means, features.any(f > 0), {})
