"""The report's page in a browser, on a screen and on a phone."""

import shutil

import pytest

import gsae_jax

pytestmark = pytest.mark.browser

SCREEN, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "Debian's package `chromium` is not installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def report(config_dict, tmp_path):
    gsae_jax.fit(config_dict, tmp_path / "run")
    return tmp_path / "run" / "report" / "report.html"


@pytest.mark.filterwarnings("default")  # those of the browser's driver are not ours
def test_the_report_is_readable_on_a_screen_and_on_a_phone(browser, report):
    for viewport in (SCREEN, PHONE):
        page = browser.new_page(viewport=viewport)
        messages, requests = [], []
        page.on("console", lambda message, to=messages: to.append(message.text))
        page.on("pageerror", lambda error, to=messages: to.append(str(error)))
        page.on("request", lambda request, to=requests: to.append(request.url))
        page.goto(report.as_uri())
        assert not messages
        # The page needs no other file and no network.
        assert all(url == report.as_uri() or url.startswith("data:") for url in requests)

        # The page itself does not scroll sideways; a wide table does, and its first column stays in sight.
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        wide = page.locator(".wide")
        assert wide.count() >= 4
        for table in wide.all():
            table.evaluate("box => { box.scrollLeft = box.scrollWidth }")
            name, last = table.locator("tbody tr").first.locator("td").first, table.locator("thead th").last
            for cell in (name, last):
                box = cell.bounding_box()
                assert 0 <= box["x"] <= viewport["width"]
                assert box["x"] + box["width"] <= viewport["width"] + 1
            assert name.evaluate("cell => parseFloat(getComputedStyle(cell).fontSize)") >= 12
            scrolls = table.evaluate("box => box.scrollWidth > box.clientWidth")
            assert not scrolls or viewport is PHONE or table.locator("th").count() > 10

        # Definitions are a touch away, below the tables of the sites.
        meanings = page.locator("details")
        assert meanings.count() == 1
        assert not meanings.locator("dl").is_visible()
        meanings.locator("summary").click()
        assert meanings.locator("dl").is_visible()
        assert meanings.bounding_box()["y"] > wide.first.bounding_box()["y"]
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]

        figures = page.locator("img")
        assert figures.count() >= 4
        for figure in figures.all():
            assert figure.evaluate("image => image.complete && image.naturalWidth > 0")
            assert figure.get_attribute("alt")
            box = figure.bounding_box()
            assert box["width"] <= viewport["width"]
            # Two panels share a screen; a phone shows one at full width.
            assert box["width"] >= (0.8 * viewport["width"] if viewport is PHONE else 300)
        page.close()
