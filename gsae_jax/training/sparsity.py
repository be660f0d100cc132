"""Whether a stack is trained by dense products or by active features only, from shapes and the kind of device."""

from typing import Any

from gsae_jax import config as config_lib
from gsae_jax.errors import UserError
from gsae_jax.saes import contract, features
from gsae_jax.saes.features import Sparsity


def of_stack(
    step: str, config: config_lib.Stack, architecture: contract.Trainable, sae: Any, latent: int, platform: str
) -> Sparsity | None:
    """How the stack's loss is computed; None stands for dense products.

    Args:
        step: `train.step`.
        config: of the stack.
        architecture: its module.
        sae: its Config.
        latent: shards of the dictionary.
        platform: "cpu", "gpu" or "tpu".

    Raises:
        UserError: "sparse" for a stack that has no sparse step.
    """
    if step == "dense":
        return None
    able = contract.has_encoder(architecture, sae)
    capacities = features.capacities(sae.width // latent, features.TRAINED_PER_SLOT)
    if step == "sparse":
        if not able:
            variant = contract.variant(config.architecture, sae)
            raise UserError(f"is 'sparse', but {variant!r} has no sparse step; write 'auto' or 'dense'", "train.step")
        capacities = capacities or (min(features.CAPACITIES[0], max(1, sae.width // latent - 1)),)
    elif not able or not contract.trains_features(architecture, sae) or platform != "cpu":
        return None
    return Sparsity(capacities, features.block(platform)) if capacities else None
