"""Finding out which format a path is in."""

from pathlib import Path

from gsae_jax import plugins
from gsae_jax.config import ConfigError
from gsae_jax.saes import trained


def read(path: Path) -> dict[str, trained.SAE]:
    """The SAE of a path in a known format, or those of a folder of such folders, by name; none where it is neither.

    Raises:
        ConfigError: a file that does not fit its format, or two SAEs of one name.
    """
    path = path.expanduser()
    formats = plugins.known("exchange", having="recognises").values()
    folders = path.is_dir() and not (path / "config.json").exists()  # which runs have
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir()) if folders else []
    found: dict[str, trained.SAE] = {}
    for folder in [path] if any(format.recognises(path) for format in formats) else inside:
        for format in formats:
            if format.recognises(folder):
                sae = format.read(folder)
                if sae.name in found:
                    raise ConfigError(str(folder), f"has the second SAE called {sae.name!r}; load them one by one")
                found[sae.name] = sae
                break
    return found
