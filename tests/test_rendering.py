"""Templates: what they do with hostile text and with values that are missing, and that the package carries them."""

import ast
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
import yaml

from gsae_jax import rendering
from gsae_jax.evaluation import plots, report, tables
from gsae_jax.formats import saelens
from gsae_jax.publishing import model_card
from gsae_jax.saes import gated
from tests.sae_files import make

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / "gsae_jax" / "templates"
HOSTILE = "<script>alert(1)</script>|a`b`\n\n# {{ 7 * 7 }}{% x %} ![i](http://x) \\| \"q\" 'p' &amp;"
NUMBERS = ("l0", "loss_recovered", "gamma", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl", "alive")


def record(text):
    """Of an SAE of which there is something to note."""
    about = {"name": text, "model": text, "site": text, "architecture": text, "not_finite": [text]}
    numbers = dict.fromkeys(NUMBERS, 0.5) | {"fvu": 2.0, "fvu_all": 2.0, "l1_coefficient": 0.1, "learning_rate": 0.1}
    return about | numbers | {"ito": 0, "width": 64, "tokens": 8, "extreme": 1, "intervals": {"l0": (0.4, 0.6)}}


def ratio(text):
    about = dict.fromkeys(("site", "stack", "baseline", "variant"), text)
    numbers = dict.fromkeys(("level", "l0", "baseline_l0", "ratio", "low", "high", "learning_rate"), 0.5)
    return (
        about
        | numbers
        | {"width": 64, "seeds": (0,), "runs": (text,), "baseline_learning_rate": 0.1, "unknown": ("", "")}
    )


def difference(text):
    counts = dict.fromkeys(("only_first", "shared", "only_second", "between", "alive"), 1)
    return dict.fromkeys(("name", "first", "second"), text) | counts | {"cosine": 0.5}


def hostile_sae():
    metadata = {"model_name": f"{HOSTILE.replace('/', '')}/m", "dataset_path": HOSTILE, "context_size": 16}
    return dataclasses.replace(make(gated), name=HOSTILE, site=HOSTILE, metadata=metadata)


def check_markdown(page):
    """Outside our own code nothing in the page is active; returns how many bars the rows of its tables have."""
    text = re.sub(r"\A---\n.*?\n---\n|```python\n.*?```", "", page, flags=re.DOTALL)
    assert "<" not in text.replace("(γ < 1)", "")  # our own text
    for active in ("](http", "`b`", "49"):
        assert active not in text
    assert "{{ 7 &#42; 7 }}" in text
    assert not re.search(r"^# \{\{", text, re.MULTILINE)
    return {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}


def test_text_in_the_reports_pages_is_text():
    picture, facts = plots.Panel(HOSTILE, b"<svg/>"), {HOSTILE: HOSTILE}
    about = report.About({}, facts, {HOSTILE: facts}, [difference(HOSTILE)])
    pages = report.pages([record(HOSTILE)], [ratio(HOSTILE)], {key: [picture] for key in report.FIGURES}, about)
    assert check_markdown(pages["report.md"]) == {14, 10, 3}  # bars in a row of each table

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags, self.cells = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)

        def handle_data(self, text):
            if self.tags and self.tags[-1] == "td":
                self.cells.append(text)

    reader = Reader()
    reader.feed(pages["report.html"])
    assert "script" not in reader.tags
    assert reader.tags.count("img") == len(report.FIGURES)
    # A name and two models, a name, a site, and two facts with their names, as they were.
    assert reader.cells.count(HOSTILE) == 9


def test_text_in_a_model_card_is_text():
    sae = hostile_sae()
    for formats in (["saelens", "dictionary_learning"], ["gemma_scope"]):
        training, labels = {"Devices": HOSTILE}, model_card.Labels("user/model", "user/text", "mit")
        card = model_card.card("user/name", formats, {HOSTILE: sae}, [record(HOSTILE)], training, labels)
        assert check_markdown(card) == {3, 14}
        front_matter = yaml.safe_load(card.split("---\n")[1])
        assert front_matter["tags"] == ["sparse-autoencoder", "gated"]
        assert front_matter["base_model"] == "user/model"
        code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(code) == 3
        for block in code:
            strings = [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
            assert any(isinstance(string, str) and string.endswith(HOSTILE) for string in strings)


def test_text_in_the_card_of_an_exported_sae_is_text(tmp_path):
    saelens.write(dataclasses.replace(hostile_sae(), name=HOSTILE), tmp_path / "sae")
    card = (tmp_path / "sae" / "README.md").read_text("utf-8")
    check_markdown(card)
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["sparse-autoencoder", "gated"]


def values():
    """What every page needs, and no more."""
    measured = report.contents([record("a")])
    names = (
        "repo",
        "for_saelens",
        "name",
        "site",
        "lm",
        "lm_revision",
        "model",
        "dataset",
        "context_length",
        "count",
        "config",
    )
    lists = {name: ["a"] for name in ("formats", "architectures", "sites")}
    facts = tables.facts({"a": {"steps": 1}})
    page = {"ratios": tables.ratios([ratio("a")]), "figures": {"gamma": []}, "measured": facts, "runs": facts}
    page["models"] = tables.models([difference("a")])
    return {
        "report.md": measured | page,
        "report.html": measured | page,
        "model_card.md": {name: measured[name] for name in measured if name != "tokens"}
        | dict.fromkeys(names, "a")
        | lists
        | {"labels": model_card.UNLABELLED, "training": {"a": "a"}},
        "saelens_card.md": dict.fromkeys(("name", "architecture", "site", "target", "model"), "a")
        | {"width": 64, "is_transcoder": True},
        "space_card.md": {"repo": "user/name"},
    }


@pytest.mark.parametrize("template", values())
def test_a_value_that_is_missing_is_an_error(template):
    whole = values()[template]
    rendering.render(template, **whole)
    for name in whole:
        with pytest.raises((jinja2.UndefinedError, TypeError, yaml.YAMLError)):
            rendering.render(template, **{other: value for other, value in whole.items() if other != name})


def test_every_figure_has_a_text():
    with pytest.raises(jinja2.UndefinedError, match="unknown"):
        rendering.render("report.md", **values()["report.md"] | {"figures": {"unknown": ""}})


def test_a_built_package_carries_the_templates(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    carried = {path.name for path in (tmp_path / "gsae_jax" / "templates").iterdir()}
    assert carried == {path.name for path in TEMPLATES.iterdir()} >= {"report.html", "table.md", "texts.jinja"}
    prompts = {path.name for path in (tmp_path / "gsae_jax" / "rating" / "prompts").iterdir()}
    assert prompts == {"explain.txt", "detection.txt", "fuzzing.txt"}
