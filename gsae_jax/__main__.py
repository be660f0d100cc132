"""List the commands of the package, each with what it does.

python -m gsae_jax
"""

import ast
import re
from pathlib import Path


def commands() -> dict[str, str]:
    """The first line of the docstring of each command's file, by its name."""
    texts = {file.stem: file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))}
    about = {
        name: ast.get_docstring(ast.parse(text)) or ""
        for name, text in texts.items()
        if re.search(r"^    cli\.run\(", text, re.MULTILINE)
    }
    return {name: text.partition("\n")[0] for name, text in about.items()}


if __name__ == "__main__":
    print("\n".join(f"python -m gsae_jax.{name:<11} {about}" for name, about in commands().items()))
    print("\n--help of each shows its flags.")
