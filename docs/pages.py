"""A hook of mkdocs: README.md, CONTRIBUTING.md, CHANGELOG.md, the embedded model's card and the notebooks become pages.

So does the list of all settings, from the dataclasses that hold them.
"""

import posixpath
import re
from pathlib import Path

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gsae_jax import settings
from gsae_jax.config import Experiment

ROOT = Path(__file__).parent.parent
# In the repository -> on the site; what lies in docs/ keeps its place.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {"gsae_jax/lms/embedded/README.md": "embedded.md"}
PAGES |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
FOLDERS = {"notebooks": "notebooks/quickstart.md"}
PICTURES = ("gsae_jax/lms/embedded/loss.png",)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them."""
    for path, page in PAGES.items():
        if path.endswith(".ipynb"):
            text, resources = nbconvert.MarkdownExporter().from_filename(str(ROOT / path))
            folder = posixpath.dirname(page)
            for name, content in resources["outputs"].items():
                picture = f"{posixpath.basename(path).removesuffix('.ipynb')}-{name}"
                text = text.replace(f"({name})", f"({picture})")
                files.append(File.generated(config, f"{folder}/{picture}", content=content))
        else:
            text = (ROOT / path).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    about = "# Settings\n\n`python -m gsae_jax.settings` lists these too.\n\n"
    files.append(File.generated(config, "settings.md", content=about + settings.markdown(Experiment)))
    for path in PICTURES:
        files.append(File.generated(config, posixpath.basename(path), content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that are right in the repository become right on the site."""
    site = {path: name for name, path in PAGES.items()}
    here = site.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        target, anchor = re.fullmatch(r"([^#]*)(#.*)?", match[1]).groups("")
        if not target or re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        target = (PAGES | FOLDERS).get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            return match[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)
