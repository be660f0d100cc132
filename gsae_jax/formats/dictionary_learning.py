"""dictionary_learning: a folder of `config.json` and `ae.pt` (dictionary.py and trainers/ of 0.1.0).

Activations of its language model go in as they are: what it normalises in training it folds into the saved biases.
"""

import itertools
import os
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gsae_jax import errors
from gsae_jax.errors import UserError
from gsae_jax.formats import files, records
from gsae_jax.saes import contract, parameters, trained
from gsae_jax.storage import reading, writing

CONFIG, WEIGHTS = "config.json", "ae.pt"
LAYERS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
JUMPRELU = {name: name for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")}
# Its class -> (our architecture, {our name: its name}).
CLASSES = {
    "GatedAutoEncoder": (
        "gated",
        {
            "W_gate": "encoder.weight",
            "b_gate": "gate_bias",
            "r_mag": "r_mag",
            "b_mag": "mag_bias",
            "W_dec": "decoder.weight",
            "b_dec": "decoder_bias",
        },
    ),
    "AutoEncoder": ("relu", LAYERS | {"b_dec": "bias"}),
    "JumpReluAutoEncoder": ("jumprelu", JUMPRELU),
    "AutoEncoderTopK": ("topk", LAYERS | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("batch_topk", LAYERS | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", JUMPRELU),
    # Inputs are not centred. Read only: the form of a baseline is AutoEncoder.
    "AutoEncoderNew": ("relu", LAYERS | {"b_dec": "decoder.bias"}),
}
TRAINERS = {
    "gated": "GatedSAETrainer",
    "relu": "StandardTrainer",
    "jumprelu": "JumpReluTrainer",
    "topk": "TopKTrainer",
    "batch_topk": "BatchTopKTrainer",
    "matryoshka": "MatryoshkaBatchTopKTrainer",
}
FORMS = {"gated_batch_topk": "gated"}  # with the same function
SELECTING = ("topk", "batch_topk", "matryoshka")  # whose number of features is in the config, and in a tensor
UNSET = -1.0  # the threshold of a TopK SAE that has none
TRAINER: dict[str, tuple[Any, ...]] = {
    "dict_class": tuple(CLASSES),
    "trainer_class": (str,),
    "activation_dim": (int,),
    "dict_size": (int,),
    "layer": (int, None),
    "lm_name": (str, None),
    "submodule_name": (str, None, ...),
}
OURS: dict[str, tuple[Any, ...]] = {"site": (str,), "metadata": (dict,), "record": (dict,)}


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used, or without torch."""
    torch = _torch()
    if form := FORMS.get(sae.architecture):
        sae = records.converted(sae, form)
    params = records.held(sae, dict(CLASSES.values()))
    name, names = next((name, names) for name, (ours, names) in CLASSES.items() if ours == sae.architecture)
    with errors.about(sae.name):
        params = _as_loaded(name, params)
    layer = re.match(r"blocks\.(\d+)\.", sae.sites[0])
    config: dict[str, Any] = {
        "trainer": {
            "dict_class": name,
            "trainer_class": TRAINERS[sae.architecture],
            "activation_dim": sae.config.d_in,
            "dict_size": sae.config.width,
            "layer": int(layer[1]) if layer else None,
            "lm_name": sae.metadata.get("model_name"),
            "submodule_name": sae.site,
        },
        "buffer": {"ctx_len": sae.metadata.get("context_size")},
        records.KEY: {"site": sae.site, "metadata": sae.metadata, "record": records.record(sae)},
    }
    state = {
        theirs: torch.from_numpy(np.array(params[ours].T if _turned(theirs) else params[ours], order="C"))
        for ours, theirs in names.items()
    }
    if sae.architecture in SELECTING:
        config["trainer"]["k"] = sae.config.k
        thresholds = np.unique(params.get("threshold", UNSET))
        if len(thresholds) > 1:
            why = f"has thresholds from {thresholds[0]:g} to {thresholds[-1]:g}, and a {name} has one for all features"
            raise UserError(f"{why}; write the format saelens or jumprelu", sae.name)
        state["threshold"] = torch.tensor(thresholds[0].item())
        state["k"] = torch.tensor(sae.config.k, dtype=torch.int)
    if sae.architecture == "matryoshka":
        groups = [end - start for start, end in itertools.pairwise((0, *sae.config.sizes))]
        state["group_sizes"] = torch.tensor(groups)
    with writing.new_folder(path) as folder:
        files.write_json(folder / CONFIG, config)
        with open(folder / WEIGHTS, "wb") as file:  # torch writes the name of a path into the file
            torch.save(state, file)


def recognises(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / WEIGHTS).is_file()


def read(path: Path) -> trained.SAE:
    """The SAE of such a folder.

    Raises:
        UserError: everything that does not fit, or that we do not have; or without torch.
    """
    config = reading.read_json(path / CONFIG, strict=True)
    trainer: Any = config.get("trainer")
    ours: Any = config.get(records.KEY)
    files.check_supported(path / CONFIG, trainer, TRAINER, ("dict_class",))
    # Theirs is written where the source of activations has a config.
    buffer: Any = config.get("buffer", {} if ours is None else None)
    faults = files.misfits(trainer, TRAINER, "trainer.")
    architecture, names = CLASSES.get(trainer["dict_class"], ("", {})) if not faults else ("", {})
    if architecture in SELECTING:
        faults += files.misfits(trainer, {"k": (int,)}, "trainer.")
    faults += files.misfits(buffer, {"ctx_len": (int, None, *[...] * (ours is None))}, "buffer.")
    if ours is not None:
        faults += files.misfits(ours, OURS, f"{records.KEY}.")
    files.refuse(path / CONFIG, faults)
    F, options = trainer["dict_size"], {}
    if architecture in SELECTING:
        options["k"] = trainer["k"]
        files.refuse(path / CONFIG, [] if 1 <= trainer["k"] <= F else [f"trainer.k is not from 1 to dict_size ({F})"])
    if ours is None:
        carried = {"trainer": trainer, "buffer": buffer}
        metadata = {"model_name": trainer["lm_name"], "context_size": buffer.get("ctx_len")}
        site, record, metadata = trainer.get("submodule_name"), None, metadata | {"dictionary_learning": carried}
    else:
        site, record, metadata = ours["site"], ours["record"], ours["metadata"]
        faults = files.misfits(metadata, records.METADATA, f"{records.KEY}.metadata.")
        faults += records.misfits(record, architecture, f"{records.KEY}.record.", F, options)
        files.refuse(path / CONFIG, faults)

    shapes = records.shapes(architecture, names, trainer["activation_dim"], F)
    wanted = {theirs: shapes[name][:: -1 if _turned(theirs) else 1] for name, theirs in names.items()}
    about, reader = _contents(path / WEIGHTS)
    sizes: tuple[int, ...] = ()
    if architecture in SELECTING:
        wanted |= {"threshold": ()}
        sizes = _numbers(path / WEIGHTS, (about, reader), architecture, F, trainer["k"])
    tensors = files.read_tensors(path / WEIGHTS, (about, reader), wanted)
    params = {name: tensors[theirs].T if _turned(theirs) else tensors[theirs] for name, theirs in names.items()}
    if architecture in SELECTING and "threshold" in params:
        params["threshold"] = np.full(F, params["threshold"])
    if sizes and record is None:
        options["prefixes"] = tuple(size / F for size in sizes)
    if trainer["dict_class"] == "AutoEncoderNew":
        params = records.recentered(architecture, params)
    with errors.about(str(path / WEIGHTS)):
        params = _as_loaded(trainer["dict_class"], params)
    sae = records.build(path, architecture, params, records.Told(site or "", metadata, record), options)
    if sizes and sae.config.sizes != sizes:
        files.refuse(path / WEIGHTS, [f"group_sizes are not those of the options ({sae.config.prefixes})"])
    return sae


def _numbers(file: Path, contents: files.Contents, architecture: str, F: int, k: int) -> tuple[int, ...]:
    """Takes the tensors of integers from the contents of a file, and checks them.

    Returns:
        The sizes of a Matryoshka SAE's prefixes.
    """
    about, reader = contents
    wanted: dict[str, files.Shape] = {"k": ()}
    if architecture == "matryoshka":
        shape = about.get("group_sizes", ((0,), ""))[0]
        wanted["group_sizes"] = shape if len(shape) == 1 else (1,)
    integers = {name: about.pop(name) for name in wanted if name in about}
    numbers = files.read_tensors(file, (integers, reader), wanted, ("int32", "int64"))
    sizes = np.cumsum(numbers.get("group_sizes", ()), dtype=int).tolist()
    faults = [] if numbers["k"] == k else [f"the tensor k is {numbers['k']:g}, but trainer.k is {k}"]
    if sizes and (sizes[-1] != F or numbers["group_sizes"].min() < 1):
        faults.append(f"the tensor group_sizes is not a list of numbers above 0 that sum to dict_size ({F})")
    files.refuse(file, faults)
    return tuple(sizes)


def _as_loaded(dict_class: str, params: dict[str, Any]) -> dict[str, Any]:
    """As its `load_dictionary` makes them: rows of an AutoEncoder's decoder become unit, features take their norms."""
    if dict_class != "AutoEncoder":
        return params
    return parameters.with_unit_rows(contract.module_of(CLASSES[dict_class][0]), params)


def _turned(name: str) -> bool:
    """Whether a tensor of theirs is the transpose of ours: the matrices of torch's layers."""
    return name.endswith(".weight")


def _contents(file: Path) -> files.Contents:
    """Of a file of torch; only tensors are read, and no more of them than the file holds."""
    torch = _torch()
    try:
        with zipfile.ZipFile(file) as archive:
            files.check_archive(file, archive)
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
            for name, value in state.items()
        ):
            raise ValueError("it is not a dict of dense tensors")
        if sum(value.numel() * value.element_size() for value in state.values()) > file.stat().st_size:
            raise ValueError("its tensors are larger than the file")
    except Exception as error:  # torch's readers have errors of many kinds
        reading.check_fetched(file)
        why = str(error).split("\n")[0]
        raise UserError(f"cannot be read as weights of torch ({why}); copy or save it again", str(file)) from error
    about = {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state.items()}
    return about, lambda name: state[name].detach().float().numpy()


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        message = "needs torch for its .pt files; `pip install 'gsae_jax[torch]'` first"
        raise UserError(message, "dictionary_learning") from error
    return torch
