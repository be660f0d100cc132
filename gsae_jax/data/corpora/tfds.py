"""Any TFDS data set that is already prepared in a random-access format, by name: `data.name="wiki40b/en"`."""

import tensorflow_datasets as tfds

from gsae_jax import config as config_lib
from gsae_jax.config import ConfigError, known_names


def open_corpus(config: config_lib.Data) -> tuple[tfds.core.DatasetBuilder, str]:
    """The prepared data set `data.name` below `data.data_dir`, and the name of its text feature.

    Raises:
        ConfigError: it is not there, has no text feature called `data.field`, or cannot be read at random.
    """
    where = config.data_dir or tfds.core.constants.DATA_DIR
    try:
        found = tfds.builder(config.name, data_dir=config.data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ConfigError("data.name", f"{config.name!r} is not a data set prepared in {where}") from error
    if not found.data_path.exists():
        raise ConfigError(
            "data.name",
            f"{config.name!r} is not prepared in {where}; "
            f"run `tfds build {config.name} --file_format=array_record` first",
        )
    if config.field not in (found.info.features or {}):
        raise ConfigError(
            "data.field",
            f"{config.field!r} is not a feature of {config.name}; {known_names(config.field, found.info.features)}",
        )
    if not isinstance(found.info.features[config.field], tfds.features.Text):
        raise ConfigError(
            "data.field",
            f"{config.field!r} of {config.name} is {found.info.features[config.field]}; write a text feature",
        )
    formats = {found.info.file_format, *found.info.available_file_formats()}
    if tfds.core.file_adapters.FileFormat.ARRAY_RECORD not in formats:
        raise ConfigError(
            "data.name",
            f"{config.name!r} is stored as {found.info.file_format.value}, which cannot be read at random; "
            "convert it with `python -m tensorflow_datasets.scripts.convert_format --out_file_format=array_record "
            f"--dataset_version_dir={found.data_path}`",
        )
    return found, config.field
