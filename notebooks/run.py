"""Run the notebooks from top to bottom and keep what they show.

python notebooks/run.py [quickstart features gated_vs_baseline tpu_pod]

Each has a kernel of its own. All run in one empty folder, which is no clone of the repository, with the package beside
it: the later ones use the run that `quickstart` trains there, and train it themselves where it is not asked for. Wants
`pip install '.[notebooks]'`.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = ["quickstart", *sorted({path.stem for path in ROOT.glob("notebooks/*.ipynb")} - {"quickstart"})]
# What a test, or this machine, would change in what is shown.
LEFT_OUT = {"PYTEST_CURRENT_TEST", "XLA_FLAGS", "TMPDIR"}


def code_hash(notebook: dict[str, Any]) -> str:
    """Of the code cells, without the account in the repository's address, which whoever publishes it writes there."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    without_account = re.sub(r"github\.com/[\w-]+/", "", json.dumps(code))
    return hashlib.sha256(without_account.encode()).hexdigest()


def executed(names: Sequence[str], scratch: Path) -> Iterator[tuple[str, Any]]:
    """Each notebook's name and the notebook as it ran in `scratch / "work"`, with the hash of its code.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbclient  # the tests that read notebooks do without it
    import nbformat

    installed, work = scratch / "installed", scratch / "work"
    shutil.copytree(ROOT / "gsae_jax", installed / "gsae_jax", ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    for name in names:
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        client = nbclient.NotebookClient(
            notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": str(work)}}
        )
        client.execute(env=environment | {"PYTHONPATH": str(installed)})
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = _as_in_a_terminal(cell.outputs)
        notebook.metadata.language_info = {"name": "python"}  # not of which version
        notebook.metadata.gsae_jax = {"code": code_hash(notebook)}
        yield name, notebook


def _as_in_a_terminal(outputs: list[Any]) -> list[Any]:
    """One stream instead of stdout and stderr, and of a progress bar its end; the rest as it is."""
    streams = [output for output in outputs if output.output_type == "stream"]
    if streams:
        text = "".join(output.text for output in streams)
        streams[0].name, streams[0].text = "stdout", re.sub(r"[^\n]*\r(?=[^\n])", "", text)
    return [output for output in outputs if output.output_type != "stream" or output is streams[0]]


def main() -> None:
    """The command."""
    import nbformat

    names = sys.argv[1:] or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        sys.exit(f"error: no notebook is called {unknown[0]}; write some of {' '.join(NAMES)}, or none for all")
    with tempfile.TemporaryDirectory() as folder:
        for name, notebook in executed(names, Path(folder)):
            nbformat.write(notebook, ROOT / "notebooks" / f"{name}.ipynb")
            print(f"notebooks/{name}.ipynb", flush=True)


if __name__ == "__main__":
    main()
