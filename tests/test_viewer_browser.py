"""The pages over collected features in a browser: lists, search, a feature, comparing, a text, steering; as files."""

import json
import re
import shutil
import time

import pytest

from gsae_jax import viewing
from gsae_jax.viewer import server
from tests.test_browser import PHONE, SCREEN, browser  # noqa: F401 (a fixture)
from tests.viewed import HOSTILE, serving, widened, with_texts

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("default"),  # those of the browser's driver are not ours
]
LARGE = 16_384


@pytest.fixture(scope="module")
def address(collected_run):
    with serving(server.application(*viewing.pages(viewing.Wanted(str(collected_run))))) as port:
        yield f"http://127.0.0.1:{port}"


class Watched:
    """A page whose console and requests are looked at; nothing may be said, and nothing may leave the machine."""

    def __init__(self, browser, allowed, **options):  # noqa: F811
        self.page = browser.new_page(**options)
        self.messages, self.requests = [], []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.allowed = allowed

    def __enter__(self):
        return self.page

    def __exit__(self, *_):
        assert not self.messages
        assert self.requests
        assert all(url.startswith((self.allowed, "about:")) for url in self.requests), self.requests
        self.page.close()


def open_list(page, url):
    page.goto(url)
    page.wait_for_selector("body[data-ready]")


def follow(page, link):
    """Clicks on what leads to another page, and waits for that page and its scripts."""
    with page.expect_navigation():
        link.click()


def numbers(page, column=1):
    cells = page.locator(f"[data-list] tbody td:nth-child({column})").all_inner_texts()
    return [float(cell.replace(",", "")) for cell in cells]


def test_lists_are_sorted_filtered_and_searched(browser, address):  # noqa: F811
    with Watched(browser, address, viewport=SCREEN) as page:
        page.goto(f"{address}/")
        point = page.locator("svg a").first
        point.hover()
        tip = page.locator("[data-readout]").inner_text()
        assert re.match(r"\w+_\d: L0 [\d.]+, loss recovered", tip)
        follow(page, point)
        page.wait_for_selector("body[data-ready]")
        assert page.locator("h1").inner_text() == tip.split(":")[0]

        open_list(page, f"{address}/baseline_0/")
        assert numbers(page) == [*range(100)]
        page.get_by_role("button", name="Show more").click()
        assert numbers(page) == [*range(128)]
        heads = page.locator("[data-list] th").all_inner_texts()
        for name in ("density %", "strongest"):
            page.get_by_role("button", name=name, exact=True).click()
            values = numbers(page, heads.index(name) + 1)
            assert values == sorted(values, reverse=True)
            page.get_by_role("button", name=name, exact=True).click()
            assert numbers(page, heads.index(name) + 1) == sorted(numbers(page, heads.index(name) + 1))
        head = page.locator("th[data-name=strongest]")
        assert head.get_attribute("aria-sort") == "ascending"

        # The address has the state, so that it can be sent.
        page.get_by_text("Filter by numbers").click()
        page.get_by_label("strongest, at most").fill("0.5")
        page.get_by_label("Search").select_option("token")
        page.locator("input[type=search]").fill("def")
        page.keyboard.press("Enter")
        page.wait_for_function("location.hash.includes('q=def')")
        page.wait_for_function("document.querySelector('[data-status]').textContent.startsWith('128') === false")
        found, status = numbers(page), page.locator("[data-status]").inner_text()
        with Watched(browser, address, viewport=SCREEN) as other:
            open_list(other, page.url)
            other.wait_for_function(f"document.querySelector('[data-status]').textContent === {json.dumps(status)}")
            assert numbers(other) == found
            assert other.locator("input[type=search]").input_value() == "def"

        page.goto(f"{address}/baseline_0/#kind=number&q=3,17")  # the same page with another state
        page.wait_for_function("document.querySelector('[data-status]').textContent.startsWith('2 ')")
        assert numbers(page) == [3, 17]
        page.locator("input[type=search]").fill("x")
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-status].failed")
        open_list(page, f"{address}/baseline_0/?kind=context&q=the")
        assert page.locator("select[name=kind]").input_value() == "context"


def test_a_feature_and_its_neighbours(browser, address):  # noqa: F811
    with Watched(browser, address, viewport=SCREEN) as page:
        page.goto(f"{address}/gated_0/3")
        context = page.locator(".contexts details").first
        short = context.inner_text()
        assert context.locator("mark").is_visible()
        context.locator("summary").click()
        assert len(context.inner_text()) >= len(short)
        colours = context.locator("mark").evaluate("mark => getComputedStyle(mark).backgroundColor")
        assert colours != "rgba(0, 0, 0, 0)"
        follow(page, page.get_by_role("link", name="Compare with").first)
        assert "/compare?a=gated_0/3&b=" in page.url
        assert page.locator(".both > section").count() == 2
        left, right = (section.bounding_box() for section in page.locator(".both > section").all())
        assert left["x"] + left["width"] <= right["x"]
        page.get_by_label("Feature or SAE").fill("gated_0")
        page.get_by_label("and", exact=True).fill("baseline_0")
        follow(page, page.get_by_role("button", name="Compare"))
        page.wait_for_selector("body[data-ready]")
        cosines = numbers(page, 3)
        assert cosines == sorted(cosines, reverse=True)
        assert len(cosines) == 64
        follow(page, page.locator("[data-list] tbody td:nth-child(3) a").first)
        assert page.locator(".both > section").count() == 2


def test_the_keyboard_is_enough(browser, address):  # noqa: F811
    with Watched(browser, address, viewport=SCREEN) as page:
        page.goto(f"{address}/gated_0/3")
        page.keyboard.press("ArrowRight")
        page.wait_for_url("**/gated_0/4")
        page.keyboard.press("ArrowLeft")
        page.wait_for_url("**/gated_0/3")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        summary = page.locator(".contexts summary").first
        summary.focus()
        page.keyboard.press("Enter")
        assert page.locator(".contexts details").first.get_attribute("open") is not None
        assert summary.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
        open_list(page, f"{address}/gated_0/")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.name") == "q"
        button = page.get_by_role("button", name="strongest", exact=True)
        button.focus()
        page.keyboard.press("Enter")
        assert page.locator("th[data-name=strongest]").get_attribute("aria-sort") == "descending"
        page.goto(f"{address}/")
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.hasAttribute('data-tip')"):
                break
        assert "L0" in page.locator("[data-readout]").inner_text()
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")


def test_a_text_and_steering(browser, address):  # noqa: F811
    with Watched(browser, address, viewport=SCREEN) as page:
        page.goto(f"{address}/text?sae=gated_0")
        page.locator("textarea").fill("def value\n\treturn")
        page.get_by_role("button", name="Show features").click()
        page.wait_for_selector("[data-results]:not([hidden])", timeout=120_000)
        texts = page.locator("[data-tokens] button").all_inner_texts()
        assert "".join(texts[1:]) == "def·value⏎→return"
        assert page.locator("[data-tokens] button").first.is_disabled()
        page.locator("[data-tokens] button").nth(2).click()
        assert page.locator("[data-of-token]").inner_text().startswith("Features of ·value")
        values = [float(text) for text in page.locator("[data-features] td:nth-child(2)").all_inner_texts()]
        assert values == sorted(values, reverse=True)
        page.get_by_role("button", name=re.compile(r"Show feature \d")).first.click()
        assert page.locator("[data-tokens] button[class^=a]").count() >= 1
        follow(page, page.locator("[data-features] a").first)
        assert re.search(r"/gated_0/\d+$", page.url)
        follow(page, page.get_by_role("link", name="Steer with it"))
        assert page.locator("[name=feature]").input_value() == page.url.rpartition("/")[2]
        page.locator("[name=strength]").fill("60")
        page.get_by_role("button", name="Add a feature").click()
        second = page.locator("[data-edit]").nth(1)
        second.locator("[name=sae]").select_option("baseline_0")
        second.locator("[name=feature]").fill("5")
        second.locator("[name=kind]").select_option("ablate")
        page.locator("[name=tokens]").select_option("16")
        page.locator("textarea").fill("def value")
        page.get_by_role("button", name="Run").click()
        page.wait_for_selector("[data-results]:not([hidden])", timeout=120_000)
        without, steered = (page.locator(f"[data-{name}]").inner_text() for name in ("without", "with"))
        assert without.startswith("def value")
        assert steered.startswith("def value")
        assert without != steered
        assert page.locator("[data-probabilities] tr").count() >= 10
    # What the server refuses is a sentence in the page. Chromium itself writes failed requests into the console.
    watched = Watched(browser, address, viewport=SCREEN)
    page = watched.page
    page.goto(f"{address}/steer?f=gated_0/3")
    page.locator("[name=feature]").fill("64")
    page.get_by_role("button", name="Run").click()
    page.wait_for_selector("[data-status].failed", timeout=120_000)
    assert "0 to 63" in page.locator("[data-status]").inner_text()
    assert all("400" in message for message in watched.messages)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone_and_is_readable(browser, address, scheme):  # noqa: F811
    for viewport in (PHONE, SCREEN):
        with Watched(browser, address, viewport=viewport, color_scheme=scheme) as page:
            for path in ("", "gated_0/", "gated_0/3", "compare", "compare?a=gated_0/3&b=baseline_0/5", "text", "steer"):
                page.goto(f"{address}/{path}")
                assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], path
                background = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
                assert (background < 0.1) == (scheme == "dark")
                for element in ("body", "a", "th", ".value", ".note", "dt", "button", "input", ".chip"):
                    for each in page.locator(f"{element}:visible").all()[:2]:
                        colours = each.evaluate(COLOURS)
                        assert contrast(*colours) >= 4.5, (path, element, colours)
                small = page.evaluate(SMALL)
                assert not small, (path, small)
                for each in page.locator("button:visible, header a:visible").all()[:8]:
                    assert each.bounding_box()["height"] >= 24, path  # of a finger


COLOURS = """element => {
    let under = element;
    while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)") under = under.parentElement;
    return [getComputedStyle(element).color, getComputedStyle(under).backgroundColor];
}"""
SMALL = """() => [...document.querySelectorAll("main *")].filter(element => {
    const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!element.checkVisibility() || !hasText) return false;
    const svg = element.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    if (element.tagName === "title") return false;
    return parseFloat(getComputedStyle(element).fontSize) * scale < 11;
}).map(element => element.outerHTML.slice(0, 100))"""


def luminance(colour):
    channels = [float(each) / 255 for each in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_a_hostile_text_does_nothing(browser, collected_run, tmp_path):  # noqa: F811
    folder = tmp_path / "features"
    shutil.copytree(collected_run / "features", folder)
    for path in folder.glob("*.sqlite"):
        with_texts(path, HOSTILE)
    wanted = viewing.Wanted(str(collected_run), str(folder))
    out = viewing.export(wanted, str(tmp_path / "pages"))
    with serving(server.application(*viewing.pages(wanted))) as port:
        for base, index in ((f"http://127.0.0.1:{port}", ""), (out.as_uri(), "/index.html")):
            with Watched(browser, base, viewport=SCREEN) as page:
                for path in (
                    "/gated_0/",
                    "/gated_0/3",
                    "/compare?a=gated_0/3&b=gated_1/3",
                    "/compare?a=gated_0&b=gated_1",
                ):
                    head, _, query = path.partition("?")
                    page.goto(f"{base}{head.rstrip('/')}{index or ('/' if head[-1] == '/' else '')}?{query}")
                    page.wait_for_timeout(200)
                    assert page.locator("img").count() == 0
                    assert query or HOSTILE.replace(" ", "·") in page.locator("main").inner_text()
            with Watched(browser, base, viewport=SCREEN) as page:
                open_list(page, f"{base}/gated_0{index or '/'}")
                page.locator("input[type=search]").fill(HOSTILE)
                page.keyboard.press("Enter")
                page.wait_for_function("location.hash.includes('img')")
                page.wait_for_timeout(300)
                assert len(numbers(page)) == 64
        with Watched(browser, f"http://127.0.0.1:{port}", viewport=SCREEN) as page:
            page.goto(f"http://127.0.0.1:{port}/text")
            page.locator("textarea").fill(HOSTILE)
            page.get_by_role("button", name="Show features").click()
            page.wait_for_selector("[data-results]:not([hidden])", timeout=120_000)
            assert page.locator("img").count() == 0


def test_files_open_from_a_disk(browser, collected_run, tmp_path):  # noqa: F811
    out = viewing.export(viewing.Wanted(str(collected_run)), str(tmp_path / "pages"))
    library = viewing.pages(viewing.Wanted(str(collected_run)))[0].library
    with Watched(browser, out.as_uri(), viewport=SCREEN) as page:
        page.goto((out / "index.html").as_uri())
        assert page.get_by_role("link", name="Steer").count() == 0
        follow(page, page.get_by_role("link", name="gated_0", exact=True).last)
        page.wait_for_selector("body[data-ready]")
        assert len(numbers(page)) == 64
        page.get_by_role("button", name="strongest", exact=True).click()
        entry = library.entries["gated_0"]
        for kind, text in (("token", "def"), ("context", "THE"), ("promotes", entry.words[1][3][0])):
            page.locator("select[name=kind]").select_option(kind)
            page.locator("input[type=search]").fill(text)
            page.get_by_role("button", name="Search").click()
            expected = sorted(entry.search(kind, text))
            page.wait_for_function(
                f"document.querySelector('[data-status]').textContent.startsWith('{len(expected)} ')"
            )
            assert sorted(numbers(page)) == expected
        follow(page, page.locator("[data-list] tbody a").first)
        assert page.locator(".contexts mark").count() > 0
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.title.startsWith('gated_0 / ')")
        follow(page, page.get_by_role("link", name="Compare with").first)
        page.wait_for_selector("iframe")
        assert page.locator("iframe").count() == 2
        page.frame_locator("iframe").last.locator(".contexts").first.wait_for()
        page.get_by_label("Feature or SAE").fill("gated_0")
        page.get_by_label("and", exact=True).fill("baseline_0")
        follow(page, page.get_by_role("button", name="Compare"))
        page.wait_for_selector("body[data-ready]")
        assert len(numbers(page)) == 64
        follow(page, page.locator("[data-list] tbody td:nth-child(3) a").first)
        page.wait_for_selector("iframe")


def test_many_features_are_shown(browser, collected_run, tmp_path):  # noqa: F811
    """And prints how long that takes, for who runs it with `-s`; how fast a machine is decides no test."""
    (tmp_path / "features").mkdir()
    widened(collected_run / "features" / "gated_0.sqlite", tmp_path / "features" / "gated_0.sqlite", LARGE)
    pages, _ = viewing.pages(viewing.Wanted(features=str(tmp_path / "features")))
    with serving(server.application(pages, None)) as port:
        address = f"http://127.0.0.1:{port}"
        with Watched(browser, address, viewport=SCREEN) as page:
            start = time.monotonic()
            page.goto(f"{address}/")  # the first page reads the file
            first = time.monotonic() - start
            lists = []
            for _ in range(2):
                start = time.monotonic()
                open_list(page, f"{address}/gated_0/")
                lists.append(time.monotonic() - start)
                page.goto("about:blank")
            shown = ", ".join(f"{each:.2f}" for each in lists)
            print(f"{LARGE:,} features: the first page {first:.2f} s, the list {shown} s")
            open_list(page, f"{address}/gated_0/")
            assert page.locator("[data-status]").inner_text() == "16,384 of 16,384 rows"
            start = time.monotonic()
            page.get_by_role("button", name="density %").click()
            assert page.locator("th[aria-sort]").count() == 1
            print(f"sorted: {1e3 * (time.monotonic() - start):.0f} ms")
            times = []
            for number in (3, 9_000, LARGE - 1):
                start = time.monotonic()
                page.goto(f"{address}/gated_0/{number}")
                times.append(time.monotonic() - start)
            print(f"a feature: {', '.join(f'{1e3 * each:.0f}' for each in times)} ms")
