"""A trained SAE as a small frozen object, in the language model's own units.

An SAE is a pytree. Its parameters are the leaves, and its other fields are static. Therefore `jax.jit(f)(sae, x)` and
`jax.grad` with respect to an SAE work. Two SAEs of a stack have different names, and therefore different tree
structures. To use `jax.vmap`, stack their parameters and put them into one: `dataclasses.replace(sae, params=stacked)`.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import batching, errors, plugins
from gsae_jax.config import Sites
from gsae_jax.errors import UserError
from gsae_jax.saes import contract, inference

ROWS_AT_ONCE = 2**15  # more activations than this are encoded in several batches
SLOTS = 128  # for the active features of a token, at first


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SAE(Sites):
    """A trained SAE. Its inputs are activations [..., D] in the language model's own units.

    Every parameter is also an attribute: `sae.W_dec` [F, D], `sae.b_dec` [D], and the others of the architecture.
    Of gated SAEs with a tied encoder and of JumpReLU SAEs, `sae.threshold` [F] is that of the JumpReLU form: a feature
    is active if its magnitude exceeds it; if features may be negative, |f| must exceed it.

    Attributes:
        name: the name in reports and files, `{stack}_{index}`.
        architecture: the name of a file of `gsae_jax/saes/`.
        config: the architecture's Config.
        site: the site that it reads, or a tuple of several; "" if the file of an imported SAE names no site.
        params: the architecture's parameters. The sites' means and scales are folded into them.
        l1_coefficient, learning_rate, seed: settings of its training; NaN and None if an imported SAE has none.
        scale: the factor by which training multiplied activations of the target (minus their mean, if they were
            centred). A tuple of factors if the SAE writes several sites.
        norm_limit: activations of the target with a larger norm were not used for training. A tuple of limits if the
            SAE writes several sites.
        input_norm_limit: the same for the site that a transcoder reads. It is infinite if the SAE writes what it reads.
        metadata: facts about its model and text, under SAELens' names. An imported SAE has all metadata of its file.
        target: the site that it reconstructs; by default the site that it reads. Of a transcoder whose file does not
            name its target, it is "".
        run, stack, index: the run and the stack in which it was trained, and its position in the stack. If an imported
            SAE does not record them, `run` is "" and the others are derived from the name of its folder.
    """

    name: str
    architecture: str
    config: Any
    site: str | tuple[str, ...]
    params: dict[str, jax.Array]
    l1_coefficient: float = math.nan
    learning_rate: float = math.nan
    seed: int | None = None
    scale: float | tuple[float, ...] = math.nan
    norm_limit: float | tuple[float, ...] = math.inf
    input_norm_limit: float = math.inf
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    target: str | tuple[str, ...] = ""
    run: str = ""
    stack: str = ""
    index: int = 0

    @property
    def targets(self) -> tuple[str, ...]:
        """The sites that it writes; by default those that it reads. ("",) if that is not known."""
        is_unknown = not self.target and contract.writes_others(self.functions)
        return ("",) if is_unknown else super().targets

    @property
    def norm_limits(self) -> dict[str, float]:
        """Of each site that it reads or writes: the norm above which it was not trained on an activation."""
        limits = self.norm_limit if isinstance(self.norm_limit, tuple) else (self.norm_limit,) * len(self.targets)
        return {site: self.input_norm_limit for site in self.sites} | dict(zip(self.targets, limits, strict=True))

    @property
    def functions(self) -> contract.Architecture:
        """The architecture's pure functions."""
        return contract.module_of(self.architecture)

    @property
    def d_in(self) -> int | tuple[int, ...]:
        """The width D of the site; a tuple of widths if it reads several sites."""
        return self.config.d_in

    @property
    def width(self) -> int:
        """The number of features F."""
        return self.config.width

    def __getattr__(self, name: str) -> jax.Array:
        """A parameter, or a number [F] that describes features, such as `threshold`."""
        # `copy` and `pickle` ask for methods before there are any fields.
        params = vars(self).get("params")
        if name.startswith("_") or not isinstance(params, dict):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in params and name != "threshold":  # a parameter of this name may be in other units
            return params[name]
        facts = {name: params[name]} if name in params else {}
        facts |= contract.feature_facts(self.functions, params, self.config)
        if name in facts:
            return facts[name]
        arrays = ", ".join(sorted({*params, *facts}))
        raise AttributeError(f"this SAE ({self.architecture}) has no {name!r}; its arrays are {arrays}")

    def __dir__(self) -> list[str]:
        """The public names, parameters included."""
        facts = jax.eval_shape(lambda params: contract.feature_facts(self.functions, params, self.config), self.params)
        return sorted({name for name in super().__dir__() if not name.startswith("_")} | {*self.params, *facts})

    def __repr__(self) -> str:
        numbers = {"l1_coefficient": self.l1_coefficient, "learning_rate": self.learning_rate, "seed": self.seed}
        known = [f"{name} {value:g}" for name, value in numbers.items() if value is not None and not math.isnan(value)]
        place = ", ".join(self.sites) or "an unknown site"
        written = f" -> {', '.join(self.targets) or 'an unknown site'}" if self.targets != self.sites else ""
        sizes = f"{self.architecture}, {self.width} features of {place}{written}, d_in {self.d_in}"
        return f"<SAE {self.name}: {', '.join([sizes, *known])}>"

    def encode(self, x: Any, sparse: bool = False) -> Any:
        """Feature activations [..., F] of activations [..., D].

        An SAE that reads several sites takes a tuple of arrays, in the order of `site`.

        Args:
            x: the activations, as an array or a torch tensor.
            sparse: return `SparseFeatures`: (indices [..., K], values [..., K]) of the active features. K is the
                largest number of active features of a token. Leave out BOS, which often has hundreds. If K is small,
                the result needs much less memory than [..., F].

        Raises:
            UserError: the last axis is not D, `x` is not an array of real numbers (but text or a dict, for example),
                or `sparse` is True inside `jit`, where K cannot depend on the activations.
        """
        inputs, leading = self._inputs(x)
        if not sparse:
            return self._over_tokens(inference.encode, inputs, leading)
        if self._is_traced(inputs):
            raise UserError("is True inside `jit`, where shapes cannot depend on activations; leave it out", "sparse")
        K = min(SLOTS, self.width)
        while True:
            f, counts = self._over_tokens(inference.encode_sparse, inputs, leading, K)
            most = max(1, int(counts.max(initial=0)))
            if most <= K:
                return inference.SparseFeatures(f.indices[..., :most], f.values[..., :most])
            K = min(batching.padded_size(most), self.width)

    def decode(self, f: Any) -> Any:
        """Reconstructions [..., D] of feature activations; a tuple of them if the SAE writes several sites.

        A skip transcoder adds x @ sae.W_skip to them.

        Args:
            f: an array [..., F], or a tuple (indices [..., K], values [..., K]) such as `SparseFeatures`. The index F
                means no feature.

        Raises:
            UserError: a wrong shape, or indices outside of 0 to F.
        """
        if isinstance(f, tuple):
            indices, values = self._checked_slots(f)
            count = math.prod(values.shape[:-1])
            slots = inference.SparseFeatures(*(part.reshape(count, part.shape[-1]) for part in (indices, values)))
            return self._over_tokens(inference.decode_sparse, slots, values.shape[:-1])
        f = self._checked(f, self.width, "f")
        x_BxD = self.functions.decode(self.params, f.reshape(-1, self.width))
        return jax.tree.map(lambda x: x.reshape(*f.shape[:-1], x.shape[-1]), x_BxD)

    def __call__(self, x: Any) -> Any:
        """The reconstruction [..., D] of activations [..., D], in their dtype; `lm.run(tokens, sae)` splices it in."""
        inputs, leading = self._inputs(x)
        x_hats = self._over_tokens(inference.reconstruct, inputs, leading, self._is_here(inputs))
        dtype = jax.tree.leaves(inputs)[0].dtype
        return jax.tree.map(lambda x_hat: x_hat.astype(dtype), x_hats)

    def save(self, path: str | os.PathLike[str], format: str = "saelens") -> None:
        """Write the SAE to a new folder, which another library and `gsae_jax.load` can read.

        Args:
            path: the new folder.
            format: saelens, dictionary_learning, gemma_scope, jumprelu, llamascopium or sparsify.

        Raises:
            UserError: the format is unknown or cannot store this SAE, or the path exists. Nothing was written.
        """
        with errors.about("format"):
            module = plugins.load("formats", format, having="write")
        module.write(for_export(self), path)

    def _is_traced(self, inputs: Any) -> bool:
        return any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves((inputs, self.params)))

    def _is_here(self, inputs: Any) -> bool:
        """Whether all arrays are there, on one device."""
        arrays = [array for array in jax.tree.leaves((inputs, self.params)) if isinstance(array, jax.Array)]
        return not self._is_traced(inputs) and all(len(array.sharding.device_set) == 1 for array in arrays)

    def _over_tokens(self, function: Callable[..., Any], inputs: Any, leading: tuple[int, ...], *more: int) -> Any:
        """A function of `inference`, of inputs [B, _]; its results have the leading axes that the user gave."""

        def apply(inputs: Any, R: int = 1) -> Any:
            return _apply(function, self.architecture, self.config, more, R, self.params, inputs)

        count = math.prod(leading)
        if self._is_here(inputs):
            extra = max(0, min(ROWS_AT_ONCE, batching.padded_size(count)) - count)
            padded = jax.tree.map(lambda x: batching.pad(x, extra), inputs)
            results = batching.in_batches(apply, padded, ROWS_AT_ONCE, function.__name__)
            results = jax.tree.map(lambda y: y[:count], results)
        else:
            # The first axis may lie on several devices, and is not cut. A single axis is not cut either.
            results = apply(inputs, math.prod(leading[:-1]) if len(leading) > 1 else count)
        return jax.tree.map(lambda y: y.reshape(*leading, *y.shape[1:]), results)

    def _inputs(self, x: Any) -> tuple[contract.Activations, tuple[int, ...]]:
        """Activations [B, D] as the architecture takes them, and the leading axes of `x`."""
        sizes = self.config.d_in
        several = isinstance(sizes, tuple)
        if isinstance(x, Mapping):
            how = "[activations[site] for site in sae.site]" if several else "activations[sae.site]"
            raise UserError(f"is a dict of sites; write {how}", "x")
        if isinstance(x, str) or (isinstance(x, tuple | list) and x and all(isinstance(part, str) for part in x)):
            how = "lm.activations(text, sae.site)" if several else "lm.activations(text, [sae.site])[sae.site]"
            then = ", and give its arrays in the order of sae.site" if several else ""
            raise UserError(f"is text; write {how}{then}", "x")
        if not isinstance(sizes, tuple):
            array = self._checked(x, sizes, "x")
            return array.reshape(-1, sizes), array.shape[:-1]
        if not isinstance(x, tuple | list) or len(x) != len(sizes):
            raise UserError(f"is not a tuple of {len(sizes)} arrays; give activations of {', '.join(self.sites)}", "x")
        arrays = [self._checked(part, size, f"x[{n}]") for n, (part, size) in enumerate(zip(x, sizes, strict=True))]
        shapes = [array.shape[:-1] for array in arrays]
        if len(set(shapes)) > 1:
            raise UserError(f"has leading axes {', '.join(map(str, shapes))}; give arrays of the same tokens", "x")
        return tuple(array.reshape(-1, array.shape[-1]) for array in arrays), shapes[0]

    def _checked(self, value: Any, size: int, name: str) -> jax.Array:
        value = as_floats(value, name)
        if value.ndim == 0 or value.shape[-1] != size:
            raise UserError(f"has shape {list(value.shape)}; the last axis of this SAE's {name} is {size}", name)
        return value

    def _checked_slots(self, f: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        """(indices, values) of active features."""
        if len(f) != 2:
            raise UserError(f"is a tuple of {len(f)}; give (indices, values) or an array [..., {self.width}]", "f")
        indices, values = _as_array(f[0], "f"), as_floats(f[1], "f")
        if indices.shape != values.shape or not indices.ndim or not jnp.issubdtype(indices.dtype, jnp.integer):
            kinds = f"indices of {indices.dtype} {list(indices.shape)} and values {list(values.shape)}"
            raise UserError(f"has {kinds}; give integers and values of one shape", "f")
        if not isinstance(indices, jax.core.Tracer):
            known = np.asarray(indices)  # also inside `jit`
            if ((known < 0) | (known > self.width)).any():
                raise UserError(f"has indices outside 0 to {self.width}, the width, which stands for no feature", "f")
        return indices, values


def for_export(sae: SAE) -> SAE:
    """The SAE as files have it: where it is of one language model, the names of its sites say no model."""
    named = [name for names in (sae.site, sae.target) for name in ((names,) if isinstance(names, str) else names)]
    if len({name.partition("@")[2] for name in named if name}) > 1:
        return sae

    def hooks(names: Any) -> Any:
        return tuple(map(hooks, names)) if isinstance(names, tuple) else names.partition("@")[0]

    return dataclasses.replace(sae, site=hooks(sae.site), target=hooks(sae.target))


class _Static:
    """Everything of an SAE but its parameters, compared by what it says: metadata is a dict, and NaN is not itself."""

    def __init__(self, fields: dict[str, Any]):
        self.fields, self._key = fields, repr(fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return self._key


def _flatten(sae: SAE) -> tuple[tuple[Any], _Static]:
    return (sae.params,), _Static({name: value for name, value in vars(sae).items() if name != "params"})


def _flatten_with_keys(sae: SAE) -> tuple[tuple[Any], _Static]:
    (params,), static = _flatten(sae)
    return ((jax.tree_util.GetAttrKey("params"), params),), static


def _unflatten(static: _Static, children: Iterable[Any]) -> SAE:
    (params,) = children
    return SAE(params=params, **static.fields)


jax.tree_util.register_pytree_with_keys(SAE, _flatten_with_keys, _unflatten, _flatten)


def as_floats(value: Any, name: str) -> jax.Array:
    """An array of floating-point numbers, of the same type if it has one; integers become float32.

    Raises:
        UserError: it is not an array of real numbers, such as a ragged list; the message begins with `name`.
    """
    array = _as_array(value, name)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise UserError(f"is of type {array.dtype}; give real numbers", name)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


def _as_array(value: Any, name: str) -> jax.Array:
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        tensor = value.detach().cpu()
        # NumPy has no bfloat16; float32 holds each of its numbers exactly.
        half = str(tensor.dtype) == "torch.bfloat16"
        value = tensor.float().numpy().astype(jnp.bfloat16) if half else tensor.numpy()
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:  # NumPy refuses ragged lists, JAX text
        why = str(error).partition("\n")[0]
        raise UserError(f"is not an array of numbers ({why}); give one whose rows have equal lengths", name) from error


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _apply(
    function: Callable[..., Any],
    architecture: str,
    config: Any,
    more: tuple[int, ...],
    R: int,
    params: dict[str, jax.Array],
    inputs: Any,
) -> Any:
    """The function of inputs [B, _] as [R, T, _]."""
    count = len(jax.tree.leaves(inputs)[0])
    inputs = jax.tree.map(lambda x: x.reshape(R, count // max(1, R), x.shape[-1]), inputs)
    results = function(contract.module_of(architecture), config, params, inputs, *more)
    return jax.tree.map(lambda y: y.reshape(count, *y.shape[2:]), results)
