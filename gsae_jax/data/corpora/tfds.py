"""Any TFDS data set that is already prepared in a random-access format, by name: `data.name="wiki40b/en"`."""

import re
from typing import Any

import tensorflow_datasets as tfds

from gsae_jax import config as config_lib
from gsae_jax import errors
from gsae_jax.errors import UserError, known_names
from gsae_jax.storage import paths, reading

READS = ("name", "field")
OWN = "tensorflow_datasets."
CLASSES = ("pythonClassName", "python_class_name", "type")  # the fields of features.json that name a class


def open_corpus(config: config_lib.Data) -> tuple[tfds.core.DatasetBuilder, str]:
    """The prepared data set `data.name` below `data.data_dir`, and the name of its text feature.

    Raises:
        UserError: it is not there, has no text feature called `data.field`, or cannot be read at random.
    """
    where = config.data_dir or tfds.core.constants.DATA_DIR
    if not re.fullmatch(r"\w+(/[\w.,=-]+)*(:\d[\w.*]*)?", config.name):  # TFDS asks other hosts for `namespace:name`
        raise UserError(f"is {config.name!r}; write the name of a data set such as wiki40b/en", "data.name")
    _check_features(paths.of(where) / re.split("[/:]", config.name)[0])
    try:
        builder = tfds.builder(config.name, data_dir=config.data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"{config.name!r} is not a data set prepared in {where}", "data.name") from error
    except Exception as error:  # whatever a wrong value in its files or in its name leads to
        why = f"{config.name!r} in {where} cannot be read ({type(error).__name__}: {error})"
        raise UserError(f"{why}; write a data set prepared there, or prepare it again", "data.name") from error
    if not builder.data_path.exists():
        raise UserError(
            f"{config.name!r} is not prepared in {where}; "
            f"run `tfds build {config.name} --file_format=array_record` first",
            "data.name",
        )
    if config.field not in (builder.info.features or {}):
        raise UserError(
            f"{config.field!r} is not a feature of {config.name}; {known_names(config.field, builder.info.features)}",
            "data.field",
        )
    if not isinstance(builder.info.features[config.field], tfds.features.Text):
        raise UserError(
            f"{config.field!r} of {config.name} is {builder.info.features[config.field]}; write a text feature",
            "data.field",
        )
    formats = {builder.info.file_format, *builder.info.available_file_formats()}
    if tfds.core.file_adapters.FileFormat.ARRAY_RECORD not in formats:
        raise UserError(
            f"{config.name!r} is stored as {builder.info.file_format.value}, which cannot be read at random; "
            "convert it with `python -m tensorflow_datasets.scripts.convert_format --out_file_format=array_record "
            f"--dataset_version_dir={builder.data_path}`",
            "data.name",
        )
    return builder, config.field


def _check_features(folder: paths.Path) -> None:
    """Raises `UserError` for features of foreign classes: TFDS imports any module that a file names."""

    def classes(tree: Any) -> list[str]:
        values = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        below = [name for _, value in values for name in classes(value)]
        named = [value for key, value in values if key in CLASSES and isinstance(value, str)]
        return below + named

    for file in [*folder.glob("*/features.json"), *folder.glob("*/*/features.json")]:
        with errors.about("data.name"):
            tree = reading.read_json(file, advice="prepare the data set again")
        foreign = [name for name in classes(tree) if not name.startswith(OWN)]
        if foreign:
            raise UserError(
                f"{file} names {foreign[0]!r}, which is not a feature of TFDS; prepare it again", "data.name"
            )
