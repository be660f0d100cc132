"""Copy the repository's address, `URL` in setup.py, into the notebooks: their Colab badges and their installation.

python notebooks/address.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWNER = re.compile(r"(github(?:\.com)?/)([\w-]+)(?=/gsae_jax\b)")  # Colab's addresses have /github/


def owner(setup: str) -> str:
    """The account in `URL` of the text of setup.py."""
    (account,) = re.findall(r'^URL = "https://github\.com/([\w-]+)/gsae_jax"$', setup, re.MULTILINE)
    return account


def with_owner(text: str, account: str) -> str:
    """The text with this account in every address of the repository."""
    return OWNER.sub(rf"\g<1>{account}", text)


def main() -> None:
    """The command."""
    account = owner((ROOT / "setup.py").read_text("utf-8"))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        path.write_text(with_owner(path.read_text("utf-8"), account), "utf-8")


if __name__ == "__main__":
    main()
