"""The pages over collected features, without a browser: what they show, what they refuse, and as files."""

import contextlib
import html.parser
import json
import re
import shutil
import sqlite3
import urllib.parse
from pathlib import Path

import jax
import numpy as np
import pytest

import gsae_jax
from gsae_jax import taps, viewing
from gsae_jax.errors import UserError
from gsae_jax.features import ratings
from gsae_jax.lms import generation
from gsae_jax.viewer import figures, server
from gsae_jax.viewer.pages import Links
from gsae_jax.web import contexts, histograms
from tests.refusals import refused
from tests.viewed import HERE, HOSTILE, OURS, change_about, get, with_texts


@pytest.fixture(scope="module")
def entry(viewed):
    """An SAE with features that are active."""
    return viewed[0].library.entries["gated_0"]


class Elements(html.parser.HTMLParser):
    """The elements of a page: (name, attributes, text inside)."""

    VOID = ("meta", "link", "input", "rect", "line", "polyline", "br", "img", "source")

    def __init__(self, text):
        super().__init__()
        self.found, self._open = [], []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])
        if tag not in (*self.VOID, "option", "circle") or tag == "circle":
            self._open.append(self.found[-1])

    def handle_startendtag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [each for each in self.found if each[0] == tag and wanted.items() <= each[1].items()]


def most_active(entry):
    return int(np.argmax(entry.columns["fired"]))


def test_the_list_of_saes_has_the_numbers_of_the_report(client, viewed, collected_run):
    page = Elements(get(client, "/"))
    records = json.loads((collected_run / "report" / "report.json").read_text())["saes"]
    rows = [row[2] for row in page.all("tr")][1:]
    assert len(rows) == len(records) == 3
    for record in records:
        (row,) = (row for row in rows if row.startswith(record["name"]))
        assert f"{record['loss_recovered']:.3g}" in row or record["loss_recovered"] is None
    points = {link["href"]: link["aria-label"] for _, link, _ in page.all("a") if "data-tip" in link}
    drawn = {r["name"]: r for r in records if r["l0"] and -0.5 <= (r["loss_recovered"] or -1) <= 1.5}
    assert points.keys() == {f"/{name}/" for name in drawn}
    for name, record in drawn.items():
        assert f"L0 {record['l0']:.4g}" in points[f"/{name}/"]


def test_a_feature_has_a_page_with_everything_in_the_file(client, entry):
    number = most_active(entry)
    feature = entry.features[number]
    page = Elements(get(client, f"/gated_0/{number}"))
    shown = [each[2] for each in page.all("code", class_="row")]
    assert len(shown) == len(feature.contexts) > 5
    texts = ["".join(map(contexts.visible, context.tokens)) for context in feature.contexts]
    for row, text in zip(shown, texts, strict=True):  # in the order of the file: the strongest, then from the highest
        assert re.sub(r"[…·∅]", "", row).replace(" ", "") == re.sub(r"[…·∅]", "", text).replace(" ", "")
    marks = [each for each in page.all("mark")]
    assert [mark[1]["title"] for mark in marks] == [f"{c.activation:.3g}" for c in feature.contexts]
    assert marks[0][1]["class"] == "a9"
    words = {each[2] for each in page.all("code", class_="chip")}
    for effects in feature.effects.values():
        assert len(effects) == 20
        assert {contexts.visible_token(effect.text) for effect in effects} <= words
    links = {each[1]["href"] for each in page.all("a")}
    for sae, each in feature.neighbours.items():
        assert {f"/{sae}/{other.feature}" for other in each} <= links
    assert {f"/gated_0/{other.feature}" for other in feature.cofiring} <= links
    bars = [each for each in page.all("title") if "tokens" in each[2]]
    assert sum(int(bar[2].split()[-2].replace(",", "")) for bar in bars) == feature.numbers["fired"]
    values = [each[2] for each in page.all("dd")]
    assert f"{100 * feature.numbers['density']:.3g}" in values
    assert f"{feature.numbers['threshold']:.3g}" in values


def test_segments_are_the_row_with_levels_of_activation(entry):
    for number in range(0, 64, 7):
        page = entry.page(number)
        for shown in page.strongest + [each for _, group in page.quantiles for each in group]:
            parts = [*shown.before, *shown.window, *shown.after]
            context = shown.context
            assert "".join(part.text for part in parts) == "".join(context.tokens)
            assert [part.activation for part in parts if part.level] == context.activations[
                context.activations != 0
            ].tolist()
            assert [part.text for part in parts if part.is_here] == [context.tokens[context.position]]
            assert shown.window[[part.is_here for part in shown.window].index(True)].activation == context.activation
    assert [contexts.level(value, 2.0) for value in (0, 0.01, 1, 2, 3, -0.01, -2)] == [0, 1, 5, 9, 9, -1, -9]


def test_what_cannot_be_seen_is_written(entry):
    assert contexts.visible("a\n\tb \u202e\x00é\u2028\U000e0001") == "a⏎→b \\u202e\\x00é\\u2028\\U000e0001"
    assert contexts.visible_token(" a\n") == "·a⏎"
    assert contexts.visible_token("") == "∅"


def script_of(text, name):
    return json.loads(re.fullmatch(rf"{name} = (.*)", text, re.DOTALL)[1])


def test_the_list_of_features_has_their_numbers(client, entry):
    columns = {each["name"]: each for each in script_of(get(client, "/gated_0/list.js"), "LIST")["columns"]}
    theirs = entry.features.columns()
    assert columns["feature"]["values"] == theirs["feature"].tolist()
    for name in theirs.keys() - {"feature"}:
        expected = theirs[name] * (100 if name == "density" else 1)
        ours = [np.nan if value is None else value for value in columns[name]["values"]]
        np.testing.assert_allclose(ours, expected.astype(float), rtol=1e-3)
    for number, feature in enumerate(entry.features):
        strongest = [c.tokens[c.position] for c in feature.contexts if c.quantile is None][:1] or [None]
        assert columns["on"]["values"][number] == strongest[0]
        promoted = [effect.text for effect in feature.effects["direct"] if effect.effect > 0][:3]
        assert columns["promotes"]["values"][number] == promoted
    page = Elements(get(client, "/gated_0/"))
    heads = [each[1]["data-name"] for each in page.all("th")]
    assert heads == list(columns)  # the script sorts columns by their places
    assert len(page.all("tr")) == 1 + 64


def test_search(client, entry):
    feature = entry.features[most_active(entry)]
    word = feature.contexts[0].tokens[feature.contexts[0].position].strip()
    promoted = feature.effects["direct"][0].text
    for kind, text, expected in (
        ("token", word, entry.features.active_on(word)),
        ("context", "the", entry.features.with_context("the")),
        ("promotes", promoted, entry.features.promoting(promoted)),
        ("number", "3, 17 3", [3, 17]),
    ):
        query = urllib.parse.urlencode({"kind": kind, "q": text})
        assert json.loads(get(client, f"/gated_0/search?{query}")) == expected != []
        rows = Elements(get(client, f"/gated_0/?{query}")).all("tr")[1:]  # without the script
        assert [int(re.match(r"\d+", row[2])[0]) for row in rows] == expected[:100]
    assert "numbers" in json.loads(get(client, "/gated_0/search?kind=number&q=x", 400))["error"]
    assert "token" in json.loads(get(client, "/gated_0/search?kind=colour&q=x", 400))["error"]
    with refused("kind", "token"):
        entry.search("colour", "x")
    index = entry.index()
    assert index["active_on"][word] == entry.features.active_on(word)
    assert index["promoting"][promoted.strip()] == entry.features.promoting(promoted)
    found = {feature for text, features in index["with_context"] if "the" in text.lower() for feature in features}
    assert sorted(found) == entry.features.with_context("the")


def test_comparing(client, viewed):
    page = Elements(get(client, "/compare?a=gated_0/3&b=baseline_0/5"))
    assert [each[2] for each in page.all("h2")][:2] == ["gated_0 / 3", "baseline_0 / 5"]
    a, b = (viewed[0].library.entries[name] for name in ("gated_0", "baseline_0"))
    pairs = script_of(get(client, "/compare/list.js?a=gated_0&b=baseline_0"), "LIST")["columns"]
    values = {each["name"]: each["values"] for each in pairs}
    assert sorted(values["feature"]) == list(range(64))
    assert values["cosine"] == sorted(values["cosine"], reverse=True)
    sae, other = (gsae_jax.load(Path(a.features.path).parent.parent)[name] for name in ("gated_0", "baseline_0"))
    cosines = np.asarray(sae.W_dec) @ np.asarray(other.W_dec).T
    cosines /= np.linalg.norm(sae.W_dec, axis=-1)[:, None] * np.linalg.norm(other.W_dec, axis=-1)
    for mine, theirs, cosine in zip(values["feature"], values["other"], values["cosine"], strict=True):
        np.testing.assert_allclose([cosine, cosines[mine, theirs]], cosines[mine].max(), atol=1e-3)
    assert len(Elements(get(client, "/compare?a=gated_0&b=baseline_0")).all("tr")) == 65
    # One feature and an SAE: the nearest.
    nearest = b.nearest(a)[5][0]
    assert f"gated_0 / {nearest}" in get(client, "/compare?a=gated_0&b=baseline_0/5")
    for query in (
        "a=nothing&b=gated_0",
        "a=gated_0/64&b=gated_0/1",
        "a=gated_0/x&b=gated_0/1",
        "a=gated_0/-1&b=gated_0",
    ):
        assert "alert" in get(client, f"/compare?{query}", 404)


def test_hostile_texts_are_shown_and_do_nothing(collected_run, tmp_path):
    """Token texts, names of SAEs, search words and paths: nothing of them becomes an element or an attribute."""
    folder = tmp_path / "features"
    shutil.copytree(collected_run / "features", folder)
    for path in folder.glob("gated_*.sqlite"):
        with_texts(path, HOSTILE)
        facts = {"architecture": HOSTILE, "text": HOSTILE, "model": HOSTILE, "sites": [HOSTILE]}
        change_about(path, sae=f"{HOSTILE}{path.stem}", **facts)
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE neighbours SET sae = ? || sae WHERE sae LIKE 'gated%'", (HOSTILE,))
    (folder / "gated_0.sqlite").rename(folder / "a b#<i>&'\"%.sqlite")
    pages, _ = viewing.pages(viewing.Wanted(features=str(folder)))
    key = "a b#<i>&'\"%"
    quoted = urllib.parse.quote(key)
    client = server.application(pages, None).test_client()
    word = urllib.parse.quote(HOSTILE)
    paths = ["/", f"/{quoted}/", f"/{quoted}/7", "/gated_1/3", f"/compare?a={quoted}/7&b=gated_1/3"]
    paths += [f"/compare?a={quoted}&b=gated_1", f"/{quoted}/?kind=token&q={word}"]
    for path in paths:
        text = get(client, path)
        page = Elements(text)
        assert {each[0] for each in page.found}.isdisjoint({"img", "i", "iframe", "style"}), path
        assert not any(name.startswith("on") or name == "style" for each in page.found for name in each[1])
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        for each in page.all("a"):
            assert each[1]["href"].startswith(("/", "#main")), each
        for each in page.all("script"):
            assert not each[2]  # all scripts are files
    for path in (f"/{word}/", f"/{quoted}/x", f"/compare?a={word}&b={word}"):
        assert "<img" not in get(client, path, 404)
    assert client.get("/gated_1/list.js", headers=HERE).mimetype == "text/javascript"


def test_a_text_has_the_features_that_the_sae_gives(client, collected_run, lm_dir):
    lm, sae = gsae_jax.load_lm(lm_dir), gsae_jax.load(collected_run)["gated_0"]
    text = "def value return"
    answer = client.post("/api/text", json={"sae": "gated_0", "text": text}, headers=OURS).json
    tokens = lm.tokenize(text).tokens_BxT
    f = np.asarray(sae.encode(lm.activations(tokens, sae.site)[sae.site])[0])
    assert "".join(answer["tokens"][1:]) == text
    assert answer["active"][0] is None  # BOS
    assert sum(map(len, answer["active"][1:])) > 10
    for active, expected in zip(answer["active"][1:], f[1:], strict=True):
        assert {number for number, _ in active} == {*np.flatnonzero(expected)}
        np.testing.assert_allclose([v for _, v in active], np.sort(expected[expected > 0])[::-1], rtol=1e-3)
        assert all(str(number) in answer["features"] for number, _ in active)


def test_pages_that_compute_begin_with_text_of_a_context(client, collected_run):
    """So that the text is of the language that the model knows, and the chosen feature is active at its end."""
    features = gsae_jax.features.load(collected_run)["gated_0"]
    number = next(each.number for each in features if each.contexts and each.contexts[0].position > 2)
    context = features[number].contexts[0]
    for path, exact in ((f"/steer?f=gated_0/{number}", True), ("/steer", False), ("/text?sae=gated_0", False)):
        example = html.unescape(re.search(r"<textarea[^>]*>\n(.*?)</textarea>", get(client, path), re.DOTALL)[1])
        assert example.strip()
        assert not exact or "".join(context.tokens[: context.position + 1]).endswith(example)


def test_steering_and_ablating_are_those_of_taps(client, collected_run, lm_dir):
    lm, saes = gsae_jax.load_lm(lm_dir), gsae_jax.load(collected_run)
    strength = 40.0
    edits = [
        {"sae": "gated_0", "feature": 3, "strength": strength},
        {"sae": "gated_0", "feature": 5, "strength": None},
        {"sae": "baseline_0", "feature": 9, "strength": -1.5},
    ]
    tap = taps.chain(
        taps.ablate(saes["gated_0"], [5]),
        taps.steer(saes["gated_0"], 3, strength),
        taps.steer(saes["baseline_0"], 9, -1.5),
    )
    body = {"text": "def value", "edits": edits, "tokens": 16, "temperature": 0.7, "seed": 4}
    answer = client.post("/api/steer", json=body, headers=OURS).json
    sampling = {"max_new_tokens": 16, "temperature": 0.7, "seed": 4}
    assert "def value" + answer["without"] == lm.generate("def value", **sampling)
    assert "def value" + answer["with"] == lm.generate("def value", tap, **sampling)
    after = [jax.nn.softmax(lm.run("def value", each)[0, -1]) for each in (taps.chain(), tap)]
    texts = gsae_jax.lms.tokenizer.token_texts(lm.tokenizer, range(lm.config.d_vocab))
    likely = {int(token) for p in after for token in np.argsort(-p)[:10]}
    rows = {tuple(row) for row in answer["probabilities"]}
    assert len(rows) == len(likely) > 10
    for token in likely:
        expected = [float(p[token]) for p in after]
        assert any(row[0] == texts[token] and np.allclose(row[1:], expected, rtol=1e-3) for row in rows)
    compiled = generation._compiled.cache_info().misses
    for other in (1.0, 7.0, -3.0):
        body["edits"][0]["strength"] = other
        assert client.post("/api/steer", json=body, headers=OURS).status_code == 200
    assert generation._compiled.cache_info().misses == compiled


def test_pages_as_files_lead_to_files(collected_run, viewed, tmp_path):
    out = viewing.export(viewing.Wanted(str(collected_run)), str(tmp_path / "pages"))
    pages = sorted(out.rglob("*.html"))
    library = viewed[0].library
    features = sum(map(len, library))
    assert len(pages) == 2 + len(library.entries) + features + 3 * 2
    checked = set()
    for page in pages:
        if page.parent.name.isdigit() and int(page.parent.name) % 16:
            continue
        elements = Elements(page.read_text("utf-8"))
        for _, attributes, _ in elements.found:
            for name in ("href", "src", "action"):
                target = urllib.parse.urlsplit(attributes.get(name) or "")
                if attributes.get(name, "#").startswith("#"):
                    continue
                assert (target.scheme, target.netloc, target.path[:1] == "/") == ("", "", False), (page, target)
                place = (page.parent / urllib.parse.unquote(target.path)).resolve()
                assert place.is_file(), (page, target)
                assert place.is_relative_to(out.resolve()), (page, target)
                checked.add(place)
        assert not any("/api/" in text for _, _, text in elements.found)
    assert len(checked) > features / 2
    number = most_active(library.entries["gated_0"])
    text = (out / "gated_0" / str(number) / "index.html").read_text("utf-8")
    shown = [each[2] for each in Elements(text).all("code", class_="row")]
    live = Elements(viewed[0].feature(Links(), library.entries["gated_0"], number)).all("code", class_="row")
    assert shown == [each[2] for each in live]
    index = script_of((out / "gated_0" / "search.js").read_text("utf-8"), "SEARCH")
    assert index == json.loads(json.dumps(library.entries["gated_0"].index()))
    with refused("--export", "exists"):
        viewing.export(viewing.Wanted(str(collected_run)), str(out))


def test_what_cannot_be_looked_at_is_refused(collected_run, lm_dir, tmp_path):
    with refused("--workdir", "missing"):
        viewing.pages(viewing.Wanted())
    with refused("--workdir", str(tmp_path)):
        viewing.pages(viewing.Wanted(str(tmp_path)))
    with refused("--features", "not on this machine"):
        viewing.pages(viewing.Wanted("gs://bucket/run"))
    (tmp_path / "empty").mkdir()
    with refused("--workdir", "nowhere"):
        viewing.pages(viewing.Wanted("nowhere", str(collected_run / "features")))
    with refused("--features", "gsae_jax.collect"):
        viewing.pages(viewing.Wanted(features=str(tmp_path / "empty")))
    bare = tmp_path / "run"
    shutil.copytree(collected_run, bare, ignore=shutil.ignore_patterns("features", "report"))
    with refused("--workdir", "gsae_jax.collect --workdir"):
        viewing.pages(viewing.Wanted(str(bare)))
    for port in (-1, 65536):
        with refused("--port", str(port)):
            viewing.serve(viewing.Wanted(str(collected_run)), "127.0.0.1", port)
    # Without a report there is no frontier, and all else.
    folder = str(collected_run / "features")
    pages, live = viewing.pages(viewing.Wanted(str(bare), folder))
    assert not pages.library.frontiers
    assert live().lm.config.d_vocab
    assert viewing.pages(viewing.Wanted(features=folder))[1] is None
    # The features are not those of the run, or of its language model.
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for change, field in (
        ({"parameters": "x"}, "--features"),
        ({"language_model": {}}, "lm.path"),
        ({"step": 3}, "--features"),
    ):
        before = change_about(other / "gated_0.sqlite", **change)
        _, live = viewing.pages(viewing.Wanted(str(collected_run), str(other)))
        with pytest.raises(UserError) as caught:
            live()
        assert caught.value.field == field, caught.value
        assert field != "--features" or "--overwrite" in caught.value.problem
        change_about(other / "gated_0.sqlite", **before)


def test_frontiers_and_histograms_at_their_edges():
    nothing = histograms.histogram(np.array([0.0, 1.0, 2.0]), np.zeros(3, int))
    assert nothing is None
    assert figures.frontiers([]) == []
    base = {"site": "s", "variant": "relu", "width": 8, "stack": "a", "run": "r"}
    records = [base | {"name": f"a_{n}", "index": n, "l0": l0, "loss_recovered": y} for n, (l0, y) in enumerate(POINTS)]
    (frontier,) = figures.frontiers(records)
    assert frontier.beyond == 4
    ((_, _, points),) = frontier.lines
    assert [point.record["name"] for point in points] == ["a_0"]
    assert frontier.left <= points[0].x <= frontier.right
    assert frontier.top <= points[0].y <= frontier.bottom
    assert frontier.x_ticks or frontier.y_ticks


POINTS = ((20.0, 0.9), (float("nan"), 0.9), (20.0, float("nan")), (0.0, 0.5), (30.0, -40.0))


def test_ratings_are_shown(collected_run, tmp_path):
    """Of raters that run by themselves: on the feature's page, and as a column of the list."""
    shutil.copytree(collected_run / "features", tmp_path / "features")
    features = gsae_jax.features.load(tmp_path / "features")["gated_0"]
    rating = gsae_jax.features.Rating(0.75, 0.5, 1.0, f"words {HOSTILE}")
    ratings.write(features.path, features.about["collection"], "a rater", [(3, rating)])
    pages, _ = viewing.pages(viewing.Wanted(features=str(tmp_path / "features")))
    client = server.application(pages, None).test_client()
    page = get(client, "/gated_0/3")
    assert HOSTILE not in page
    assert "0.75 (0.50 to 1.00)" in page
    assert "a rater" not in get(client, "/gated_0/4")
    (heading,) = (each for each in Elements(get(client, "/gated_0/")).all("th", data_name="score of a rater"))
    assert heading[2] == "score of a rater"
    listing = json.loads(get(client, "/gated_0/list.js").removeprefix("LIST = "))
    (column,) = (each for each in listing["columns"] if each["name"] == "score of a rater")
    assert column["values"][2:5] == [None, 0.75, None]
