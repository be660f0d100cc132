"""What an export says of an SAE besides its function, so that importing it gives the same SAE; and how one is built."""

import dataclasses
import json
import math
import re
import types
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import errors
from gsae_jax.config import FLOAT32, INT32
from gsae_jax.errors import UserError
from gsae_jax.formats import files
from gsae_jax.lms import sites
from gsae_jax.saes import contract, trained
from gsae_jax.saes import parameters as tables

KEY = "gsae_jax"  # of the record, in files of other projects
KINDS: dict[str, tuple[Any, ...]] = {
    "name": (str,),
    "options": (dict,),
    "dtype": ("float32", "bfloat16"),
    "l1_coefficient": (float, int, None),
    "learning_rate": (float, int, None),
    "seed": (int, None),
    "scale": (float, int, None),
    "norm_limit": (float, int, None),
    # Exports of earlier versions have none of these.
    "run": (str, ...),
    "stack": (str, ...),
    "index": (int, ...),
}
# Of these the least and the most, as in a run.
RANGES = {
    "l1_coefficient": (0, FLOAT32),
    "learning_rate": (0, FLOAT32),
    "seed": (0, INT32),
    "index": (0, INT32),
    "scale": (1e-30, FLOAT32),
    "norm_limit": (0, FLOAT32),
}
# Of a folder, and of a line in a table or a figure.
NAME = r"[\w=+-][\w .=+-]{0,119}"
# SAELens' names, of what other formats have a place for too.
METADATA: dict[str, tuple[Any, ...]] = {
    "model_name": (str, None, ...),
    "context_size": (int, None, ...),
    "dataset_path": (str, None, ...),
    "prepend_bos": (bool, None, ...),
}


class DivergedError(UserError):
    """An SAE has numbers that are not finite, which no reader would take."""

    def __init__(self, name: str, parameters: Iterable[str]):
        """`name`: of the SAE; `parameters`: the names of those that have such numbers."""
        why = "training diverged; train it again with a lower learning rate"
        super().__init__(f"has numbers in {', '.join(parameters)} that are not finite or overflow: {why}", name)


def record(sae: trained.SAE) -> dict[str, Any]:
    """What no other format has a place for; null is unknown, or no limit of norms."""
    numbers = {name: getattr(sae, name) for name in ("l1_coefficient", "learning_rate", "scale", "norm_limit")}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()} | {
        "name": sae.name,
        "run": sae.run,
        "stack": sae.stack,
        "index": sae.index,
        "seed": sae.seed,
        "dtype": sae.config.dtype,
        "options": contract.options(sae.config),
    }


def arrays(sae: trained.SAE) -> dict[str, Any]:
    """The parameters on the host in float32, in the normal form of their architecture.

    Raises:
        DivergedError: numbers that are not finite, or overflow where they are used.
    """
    params = contract.normal_form(sae.functions, sae.params, sae.config)
    params_on_host = {name: np.asarray(value, np.float32, order="C") for name, value in params.items()}
    if names := tables.not_finite(sae.functions, params_on_host):
        raise DivergedError(sae.name, names)
    return params_on_host


def held(sae: trained.SAE, tensors: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """The `arrays` of an SAE that a format can hold.

    Args:
        sae: the SAE.
        tensors: the names of parameters that the format has, by architecture.

    Raises:
        UserError: an SAE of another architecture, or with other parameters.
        DivergedError: as `arrays`.
    """
    if set(sae.params) != set(tensors.get(sae.architecture, ())):
        kind = contract.variant(sae.architecture, sae.config)
        raise UserError(
            f"is of the kind {kind!r}, which this format cannot hold; export one of {', '.join(tensors)}", sae.name
        )
    return arrays(sae)


def shapes(architecture: str, names: Iterable[str], D: int, F: int) -> dict[str, files.Shape]:
    """Of parameters, by our names."""
    table = contract.module_of(architecture).PARAMETERS
    return {name: table[name].sizes(types.SimpleNamespace(d_in=D, width=F)) for name in names}


def recentered(architecture: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a file that centres inputs by b_dec if our architecture does not, or the reverse."""
    module = contract.module_of(architecture)
    sign = 1 if tables.input_bias(module) else -1
    return contract.shifted(module, params, sign * params["b_dec"])


def misfits(record: dict[str, Any] | None, architecture: str, where: str = "") -> list[str]:
    """What is wrong with a record; None, of a file that is not ours, has nothing wrong."""
    if record is None:
        return []
    faults = files.misfits(record, KINDS, where)
    if not faults:
        if not re.fullmatch(NAME, record["name"]):
            known_as = "up to 120 letters, digits, spaces and _.=+-, not beginning with a dot or a space"
            faults.append(f"{where}name is {record['name'][:60]!r}; it has {known_as}")
        faults += [
            f"{where}{name} is {json.dumps(record[name])[:60]}, not from {low:g} to {high:g}"
            for name, (low, high) in RANGES.items()
            if record.get(name) is not None and not low <= record[name] <= high
        ]
        try:
            contract.build_config(
                contract.module_of(architecture), architecture, (1,), None, 1, record["dtype"], record["options"]
            )
        except UserError as error:
            faults.append(f"{where}{error}")
        faults += [f"{where}{name} is not known" for name in sorted(set(record) - set(KINDS))]
    return faults


def build(
    path: Path,
    architecture: str,
    params: dict[str, Any],
    site: str | None,
    record: dict[str, Any] | None,
    metadata: dict[str, Any],
) -> trained.SAE:
    """The SAE of a file, with its record; one that is not ours has the name of its folder, or file.

    Raises:
        UserError: parameters that do not fit the record, or overflow.
    """
    # A name ends in a number, as in a stack.
    path = path.absolute()
    stem = path.name if path.is_dir() else path.parent.name if path.stem == "params" else path.stem
    stem = re.sub(r"^[. ]|[^\w .=+-]", "_", stem)[:100]
    name = stem if re.search(r"._\d+$", stem) else f"{stem}_0"
    ours, record = record is not None, record or {"name": name, "options": {}, "dtype": "float32"}
    module = contract.module_of(architecture)
    names = tables.not_finite(module, params)
    files.refuse(path, [f"the parameter {name} has numbers that are not finite or overflow" for name in names])
    width, d_in = params["W_dec"].shape
    with errors.within(name):
        config = contract.build_config(module, architecture, (d_in,), None, width, record["dtype"], record["options"])
    wanted = jax.eval_shape(lambda: module.init(jax.random.key(0), config))
    if wanted.keys() != params.keys():
        kind = contract.variant(architecture, config)
        files.refuse(path, [f"its options are those of {kind!r}, but it has the tensors {', '.join(sorted(params))}"])
    kind, normal = contract.variant(architecture, config), contract.normal_form(module, params, config)
    unlike = [name for name in params if np.any(normal[name] != params[name])]
    files.refuse(
        path, [f"its options are those of {kind!r}, with which the tensor {name} would be another" for name in unlike]
    )
    numbers = {name: record.get(name) for name in ("l1_coefficient", "learning_rate", "scale")}
    limit = record.get("norm_limit")
    sae = trained.SAE(
        name=record["name"],
        architecture=architecture,
        config=config,
        site=site if ours and site else sites.hook_name(site or "") or site or "",
        params={name: jnp.asarray(value) for name, value in params.items()},
        seed=record.get("seed"),
        norm_limit=math.inf if limit is None else limit,
        metadata=metadata,
        **_identity(record),
    )
    return dataclasses.replace(sae, **{name: value for name, value in numbers.items() if value is not None})


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """The run, the stack and the place there; without them, what the name says, which may be a folder's."""
    if "stack" in record:
        return {name: record[name] for name in ("run", "stack", "index") if name in record}
    stem, _, number = record["name"].rpartition("_")
    return {"stack": stem, "index": int(number)} if stem and number.isdecimal() else {"stack": record["name"]}
