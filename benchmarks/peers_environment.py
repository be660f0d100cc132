"""The peers' environment: SAELens, dictionary_learning and others, PyTorch libraries, apart from ours."""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARIES = (
    "sae-lens==6.54.12",
    "dictionary-learning==0.1.0",
    "eai-sparsify==1.3.3",
    "llamascopium==2.0.0b34",
    "torch==2.13.0",
)
NAMES = ("sae_lens", "dictionary_learning", "sparsify", "llamascopium")  # of what they install
ENVIRONMENT = ROOT / "build" / "peers"


def existing():
    """The interpreter that has the peers: this one, or that of their environment; None where neither has them."""
    if all(importlib.util.find_spec(name) for name in NAMES):
        return Path(sys.executable)
    installed = ENVIRONMENT / "installed.txt"
    same = installed.exists() and installed.read_text().split() == list(LIBRARIES)
    return ENVIRONMENT / "bin" / "python" if same else None


def environment():
    """The interpreter that has the peers; where none does, they are installed in an environment of their own."""
    python = existing()
    if python is None:
        python = ENVIRONMENT / "bin" / "python"
        print(f"installing {', '.join(LIBRARIES)} in {ENVIRONMENT.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", *LIBRARIES], check=True)
        # Nothing here uses it, and where it is made for another build of torch, transformers cannot be imported.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        (ENVIRONMENT / "installed.txt").write_text("\n".join(LIBRARIES))
    return python
