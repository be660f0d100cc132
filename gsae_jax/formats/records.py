"""What an export says of an SAE besides its function, so that importing it gives the same SAE; and how one is built."""

import dataclasses
import json
import math
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from gsae_jax.storage import reading

KEY = "gsae_jax"  # of the record, in files of other projects
FILE = "gsae_jax.json"  # which has it, beside files that have no place for it
KINDS: dict[str, tuple[Any, ...]] = {
    "name": (str,),
    "options": (dict,),
    "dtype": ("float32", "bfloat16"),
    "l1_coefficient": (float, int, None),
    "learning_rate": (float, int, None),
    "seed": (int, None),
    # Lists of these where several sites are written.
    "scale": (float, int, None, list),
    "norm_limit": (float, int, None, list),
    "input_norm_limit": (float, int, None, ...),  # of a transcoder
    # Where an export of another architecture would have the same file.
    "architecture": (str, ...),
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
    "input_norm_limit": (0, FLOAT32),
}
# Of a folder, and of a line in a table or a figure.
NAME = r"[\w=+-][\w .=+-]{0,119}"
NONE: Mapping[str, Any] = types.MappingProxyType({})
# SAELens' names, of what other formats have a place for too.
METADATA: dict[str, tuple[Any, ...]] = {
    "model_name": (str, None, ...),
    "context_size": (int, None, ...),
    "dataset_path": (str, None, ...),
    "prepend_bos": (bool, None, ...),
}
# Of the file beside. Lists have the names of several sites.
BESIDE: dict[str, tuple[Any, ...]] = {
    "site": (str, list),
    "target": (str, list, ...),  # of a transcoder
    "metadata": (dict,),
    KEY: (dict,),
}
Names = str | tuple[str, ...]  # of a site, or of several


class Told(NamedTuple):
    """What the files of an SAE say besides its function.

    Attributes:
        site: that it reads; "" is unknown.
        target: that it writes if it is a transcoder; "" is unknown, or that it is none.
        metadata: about its model and text.
        record: of our own exports; None for other files.
    """

    site: Names
    metadata: dict[str, Any]
    record: dict[str, Any] | None
    target: Names = ""


class DivergedError(UserError):
    """An SAE has numbers that are not finite, which no reader would take."""

    def __init__(self, name: str, parameters: Iterable[str]):
        """`name`: of the SAE; `parameters`: the names of those that have such numbers."""
        why = "training diverged; train it again with a lower learning rate"
        super().__init__(f"has numbers in {', '.join(parameters)} that are not finite or overflow: {why}", name)


def raise_for(failed: Mapping[str, UserError], written: Sequence[str]) -> None:
    """Raises one error for all SAEs that a format cannot store, or for those that diverged if none is `written`."""
    refused = [error for error in failed.values() if not isinstance(error, DivergedError)]
    if refused:
        first, *rest = {str(error): error for error in refused}.values()  # each sentence once
        first.problem = "; ".join([first.problem, *map(str, rest)])
        if written:
            first.problem += f"; --sae={written[0]} exports one that it can store"
        raise first
    if failed and not written:
        raise next(iter(failed.values()))


def record(sae: trained.SAE) -> dict[str, Any]:
    """What no other format has a place for; null is unknown, or no limit of norms."""
    numbers = {name: getattr(sae, name) for name in ("l1_coefficient", "learning_rate", "scale", "norm_limit")}
    if contract.writes_others(sae.functions):
        numbers["input_norm_limit"] = sae.input_norm_limit
    return {name: _finite(value) for name, value in numbers.items()} | {
        "name": sae.name,
        "run": sae.run,
        "stack": sae.stack,
        "index": sae.index,
        "seed": sae.seed,
        "dtype": sae.config.dtype,
        "options": contract.options(sae.config),
    }


def _finite(value: float | tuple[float, ...]) -> Any:
    if isinstance(value, tuple):
        return [_finite(number) for number in value]
    return value if math.isfinite(value) else None


def write_beside(sae: trained.SAE, folder: Path, architecture: str | None = None) -> None:
    """Write the record, the sites and the metadata to a file of their own.

    Args:
        sae: the SAE.
        folder: of the file.
        architecture: is written if an export of another architecture would have the same files.
    """
    named = {} if architecture is None else {"architecture": architecture}
    tree = {"site": sae.site, "metadata": sae.metadata, KEY: record(sae) | named}
    files.write_json(folder / FILE, tree | ({"target": sae.target} if sae.target else {}))


def read_beside(
    folder: Path, candidates: str | Sequence[str], width: int = 1, options: Mapping[str, Any] = NONE
) -> tuple[str, Told]:
    """(The architecture, what such a file says); the first candidate and nothing where there is no file.

    Args:
        folder: of the file.
        candidates: the architectures that the SAE may be of.
        width: as for `misfits`.
        options: as for `misfits`.

    Raises:
        UserError: everything that does not fit.
    """
    candidates = (candidates,) if isinstance(candidates, str) else candidates
    beside = folder / FILE
    if not beside.exists():
        return candidates[0], Told("", {}, None)
    tree = reading.read_json(beside, strict=True)
    faults = files.misfits(tree, BESIDE)
    faults += [f"{name} is not known" for name in sorted(set(tree) - set(BESIDE))]
    files.refuse(beside, faults)
    kind = architecture(tree[KEY], candidates)
    faults = files.misfits(tree["metadata"], METADATA, "metadata.")
    faults += misfits(tree[KEY], kind, f"{KEY}.", width, options)
    module = contract.module_of(kind)
    for name, writes in (("site", False), ("target", True)):
        faults += [] if name not in tree else _of_wrong_sites(tree[name], name, module, writes)
    files.refuse(beside, faults)
    site, target = (
        tuple(names) if isinstance(names, list) else names for names in (tree["site"], tree.get("target", ""))
    )
    return kind, Told(site, tree["metadata"], tree[KEY], target)


def _of_wrong_sites(names: Any, field: str, module: contract.Architecture, writes: bool) -> list[str]:
    """What is wrong with the names of the sites that an architecture reads or writes."""
    if writes and not contract.writes_others(module):
        return [f"{field} is given, but the architecture writes the site that it reads"]
    several = contract.reads_several(module)
    if isinstance(names, list) != several:
        return [f"{field} is {json.dumps(names)[:60]}, not {'a list of sites' if several else 'one site'}"]
    is_list_of_names = several and names and all(isinstance(name, str) and name for name in names)
    return [] if is_list_of_names or not several else [f"{field} is {json.dumps(names)[:60]}, not a list of names"]


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


def held(sae: trained.SAE, tensors: Mapping[str, Collection[str]], optional: Collection[str] = ()) -> dict[str, Any]:
    """The `arrays` of an SAE that a format can hold.

    Args:
        sae: the SAE.
        tensors: the names of parameters that the format has, by architecture.
        optional: the names of parameters that an SAE of any of these may also have.

    Raises:
        UserError: an SAE of another architecture, or with other parameters.
        DivergedError: as `arrays`.
    """
    if set(sae.params) - set(optional) != set(tensors.get(sae.architecture, ())) - set(optional):
        kind = contract.variant(sae.architecture, sae.config)
        raise UserError(
            f"is of the kind {kind!r}, which this format cannot hold; it holds {', '.join(tensors)}", sae.name
        )
    return arrays(sae)


def converted(sae: trained.SAE, architecture: str) -> trained.SAE:
    """The same function as an SAE of another architecture, which has the default options.

    The architecture must have a converter from that of the SAE. A skip stays.

    Raises:
        UserError: the architecture has no parameters with this function.
        DivergedError: numbers that are not finite, or overflow in this form.
    """
    convert = contract.converter(sae.architecture, architecture)
    assert convert is not None, "callers have asked"
    before = arrays(sae)
    with errors.within(sae.name):
        params: dict[str, Any] = convert(before, sae.config)
    module = contract.module_of(architecture)
    if names := tables.not_finite(module, params):
        raise DivergedError(sae.name, names)
    config = sae.config
    if sae.architecture != architecture:
        kept = {name: getattr(config, name) for name in (*contract.OWN, "skip") if hasattr(config, name)}
        config = module.Config(**kept)
    return dataclasses.replace(sae, architecture=architecture, config=config, params=params)


def shapes(architecture: str, names: Iterable[str], D: int, F: int, D_out: int | None = None) -> dict[str, files.Shape]:
    """Of parameters, by our names; `D_out` is the width of what a transcoder writes."""
    table = contract.module_of(architecture).PARAMETERS
    sizes = types.SimpleNamespace(d_in=D, d_out=D if D_out is None else D_out, width=F)
    return {name: table[name].sizes(sizes) for name in names}


def without_center(architecture: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a transcoder for a file without b_in, which becomes a part of the encoders' biases."""
    if "b_in" not in params:
        return params
    moved = contract.shifted(contract.module_of(architecture), params, -params["b_in"])
    return {name: value for name, value in moved.items() if name != "b_in"}


def with_center(architecture: str, params: dict[str, Any], D: int) -> dict[str, Any]:
    """The parameters of a transcoder from such a file, with b_in = 0 if its architecture centres inputs."""
    centres = "b_in" in contract.module_of(architecture).PARAMETERS
    return params | ({"b_in": np.zeros(D, np.float32)} if centres else {})


def recentered(architecture: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a file that centres inputs by b_dec if our architecture does not, or the reverse."""
    return _moved(architecture, params, 1)


def decentred(architecture: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters for a file of which `recentered` makes these, up to rounding.

    Of what `recentered` makes of the result, this function makes the result again.
    """
    return _moved(architecture, recentered(architecture, _moved(architecture, params, -1)), -1)


def _moved(architecture: str, params: dict[str, Any], sign: int) -> dict[str, Any]:
    """Parameters whose pre-activations are larger by b_dec @ encoder, or smaller, if our architecture does not centre.

    `sign`: 1, or -1 for the reverse.
    """
    module = contract.module_of(architecture)
    if tables.input_bias(module) is None:
        sign = -sign
    return contract.shifted(module, params, sign * params["b_dec"])


def of_unit_rows(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an SAE that compares features by their activations times the norms of their decoder rows.

    Here features are compared as they are. So they are multiplied by the norms, and the rows are divided by them.
    """
    norms = np.linalg.norm(np.asarray(params["W_dec"], np.float64), axis=-1)
    scaled = {name: params[name] * norms for name in ("W_enc", "b_enc")}
    scaled["W_dec"] = params["W_dec"] / np.where(norms > 0, norms, 1)[:, None]
    return params | {name: value.astype(np.float32) for name, value in scaled.items()}


def architecture(record: Any, candidates: Sequence[str]) -> str:
    """The architecture that a record names, of those that a file may be of; without a name, the first."""
    named = record.get("architecture") if isinstance(record, dict) else None
    return next((name for name in candidates if name == named), candidates[0])


def misfits(
    record: dict[str, Any] | None,
    architecture: str,
    where: str = "",
    width: int = 1,
    options: Mapping[str, Any] = NONE,
) -> list[str]:
    """What is wrong with a record; None, of a file that is not ours, has nothing wrong.

    Args:
        record: of a file.
        architecture: of the SAE.
        where: what the fields' names begin with.
        width: features.
        options: those that the other fields of the file state, such as `k`.
    """
    if record is None:
        return []
    faults = files.misfits(record, KINDS, where)
    if not faults:
        if not re.fullmatch(NAME, record["name"]):
            known_as = "up to 120 letters, digits, spaces and _.=+-, not beginning with a dot or a space"
            faults.append(f"{where}name is {record['name'][:60]!r}; it has {known_as}")
        if (named := record.get("architecture", architecture)) != architecture:
            faults.append(f"{where}architecture is {named[:60]!r}, not {architecture!r}")
        faults += [
            f"{where}{name} is {json.dumps(record[name])[:60]}, not from {low:g} to {high:g}"
            for name, (low, high) in RANGES.items()
            for value in _listed(record.get(name))
            if value is not None and not (type(value) in (int, float) and low <= value <= high)
        ]
        faults += [
            f"{where}options.{name} is {json.dumps(record['options'][name])[:60]}, but {name} is {value}"
            for name, value in options.items()
            if record["options"].get(name, value) != value
        ]
        module, given = contract.module_of(architecture), {**options, **record["options"]}
        faults += [
            f"{where}{name} is a list, but the architecture writes one site"
            for name in ("scale", "norm_limit")
            if isinstance(record[name], list) and not contract.reads_several(module)
        ]
        try:
            contract.build_config(module, architecture, (1,), None, width, record["dtype"], given)
        except UserError as error:
            faults.append(f"{where}{error}")
        faults += [f"{where}{name} is not known" for name in sorted(set(record) - set(KINDS))]
    return faults


def build(
    path: Path, architecture: str, params: dict[str, Any], told: Told, options: Mapping[str, Any] = NONE
) -> trained.SAE:
    """The SAE of a file, with its record; one that is not ours has the name of its folder, or file.

    Args:
        path: of the file, or of its folder.
        architecture: of the SAE.
        params: all of its parameters.
        told: what its files say besides.
        options: those that the other fields of the file state, such as `k`.

    Raises:
        UserError: parameters that do not fit the record, or overflow.
    """
    # A name ends in a number, as in a stack.
    path = path.absolute()
    stem = path.name if path.is_dir() else path.parent.name if path.stem == "params" else path.stem
    stem = re.sub(r"^[. ]|[^\w .=+-]", "_", stem)[:100]
    name = stem if re.search(r"._\d+$", stem) else f"{stem}_0"
    record = told.record or {"name": name, "options": {}, "dtype": "float32"}
    module = contract.module_of(architecture)
    names = tables.not_finite(module, params)
    files.refuse(path, [f"the parameter {name} has numbers that are not finite or overflow" for name in names])
    sizes = {
        (size, module.PARAMETERS[name].site): length
        for name, value in params.items()
        for size, length in zip(module.PARAMETERS[name].shape, value.shape, strict=True)
    }
    d_in, d_out = (
        tuple(length for (size, _), length in sorted(sizes.items()) if size == which) for which in ("d_in", "d_out")
    )
    with errors.within(name):
        given = {**options, **record["options"]}
        width, dtype = sizes["width", 0], record["dtype"]
        config = contract.build_config(module, architecture, d_in, d_out or None, width, dtype, given)
    wanted = jax.eval_shape(lambda: module.init(jax.random.key(0), config))
    if wanted.keys() != params.keys():
        kind = contract.variant(architecture, config)
        files.refuse(path, [f"its options are those of {kind!r}, but it has the tensors {', '.join(sorted(params))}"])
    kind, normal = contract.variant(architecture, config), contract.normal_form(module, params, config)
    unlike = [name for name in params if np.any(normal[name] != params[name])]
    files.refuse(
        path, [f"its options are those of {kind!r}, with which the tensor {name} would be another" for name in unlike]
    )
    limit, sites_read = _limit(record.get("norm_limit")), _site(told.site, told.record is not None)
    scale = record.get("scale")
    if isinstance(scale, list):
        scale = tuple(math.nan if number is None else number for number in scale)
    lists = {"site": sites_read, "norm_limit": limit, "scale": scale}
    files.refuse(
        path,
        [
            f"{field} is a list of {len(value)}, but the tensors are of {len(d_in)} sites"
            for field, value in lists.items()
            if isinstance(value, tuple) and len(value) != len(d_in)
        ],
    )
    numbers = {name: record.get(name) for name in ("l1_coefficient", "learning_rate")} | {"scale": scale}
    sae = trained.SAE(
        name=record["name"],
        architecture=architecture,
        config=config,
        site=sites_read,
        params={name: jnp.asarray(value) for name, value in params.items()},
        seed=record.get("seed"),
        norm_limit=limit,
        input_norm_limit=_limit(record.get("input_norm_limit")),
        metadata=told.metadata,
        target=_site(told.target, told.record is not None),
        **_identity(record),
    )
    return dataclasses.replace(sae, **{name: value for name, value in numbers.items() if value is not None})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _site(names: Any, ours: bool) -> Any:
    """The site that a file names, or several."""
    if isinstance(names, tuple):
        return tuple(_site(name, ours) for name in names)
    return names if ours and names else sites.hook_name(names or "") or names or ""


def _limit(value: Any) -> Any:
    """The limits of norms; null is none."""
    if isinstance(value, list):
        return tuple(_limit(number) for number in value)
    return math.inf if value is None else value


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """The run, the stack and the place there; without them, what the name says, which may be a folder's."""
    if "stack" in record:
        return {name: record[name] for name in ("run", "stack", "index") if name in record}
    stem, _, number = record["name"].rpartition("_")
    return {"stack": stem, "index": int(number)} if stem and number.isdecimal() else {"stack": record["name"]}
