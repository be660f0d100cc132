"""The peers' environment: SAELens and dictionary_learning, PyTorch libraries, apart from ours."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARIES = ("sae-lens==6.54.12", "dictionary-learning==0.1.0", "torch==2.13.0")
ENVIRONMENT = ROOT / "build" / "peers"


def environment():
    """The interpreter of the peers' environment, made where there is none with these libraries."""
    python, installed = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed.txt"
    if not installed.exists() or installed.read_text().split() != list(LIBRARIES):
        print(f"installing {', '.join(LIBRARIES)} in {ENVIRONMENT.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", *LIBRARIES], check=True)
        # Nothing here uses it, and where it is made for another build of torch, transformers cannot be imported.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        installed.write_text("\n".join(LIBRARIES))
    return python
