"""Renders the templates of reports and model cards. Every value is escaped, and a missing value is an error."""

import html
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

# A name in Markdown must not become a link, a picture, code or a new table cell. Entities prevent that everywhere but
# for bars: GitHub splits a table's cells at every bar without a backslash before it.
IN_MARKDOWN = str.maketrans(
    {character: f"&#{ord(character)};" for character in "\\`*[]"} | {"|": "\\|", "\n": " ", "\r": " "}
)


def render(template: str, **values: Any) -> str:
    """The text of a file in `gsae_jax/templates/`.

    Args:
        template: the file's name. Values are escaped for HTML where it ends in `.html`, and else for Markdown.
        values: by the names that the template uses.

    Raises:
        jinja2.UndefinedError: the template uses a name that is not among these. Filters and formats that get such a
            value raise errors of their own.
    """
    templates = HTML if template.endswith(".html") else MARKDOWN
    return templates.get_template(template).render(values)


def in_markdown(value: Any) -> Markup:
    """The value as text of one line. A value that is escaped already does not change."""
    if hasattr(value, "__html__"):
        return Markup(value)
    return Markup(html.escape(str(value), quote=False).translate(IN_MARKDOWN))


def in_yaml(value: Any) -> Markup:
    """The value as it stands after a key in YAML, a list on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return Markup(text.removesuffix("...\n").rstrip("\n"))  # three dots end a document


def environment(*packages: str, **options: Any) -> jinja2.Environment:
    """What renders the templates in the folders `templates` of packages; `options` are those of jinja2."""
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in packages]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    made.filters |= {"markdown": in_markdown, "yaml": in_yaml, "repr": lambda text: repr(str(text))}
    # Model cards write strings of Python code with `tojson`. Python reads no surrogate pairs.
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return made


HTML = environment("gsae_jax")
MARKDOWN = environment("gsae_jax", finalize=in_markdown)  # before jinja2's own escape, which then has nothing to do
