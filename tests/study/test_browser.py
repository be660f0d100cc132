"""The study in a browser, as a rater sees it: with and without scripts, by keyboard, on a phone, in the dark."""

import shutil

import pytest

from gsae_jax import studying
from gsae_jax.rating import server
from gsae_jax.rating.study import PERSON, Study
from tests.test_browser import PHONE, SCREEN, browser  # noqa: F401 (a fixture)
from tests.test_viewer_browser import COLOURS, SMALL, Watched, contrast, luminance
from tests.viewed import HOSTILE, serving, with_texts

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("default"),  # those of the browser's driver are not ours
]


@pytest.fixture
def study(collected_run, tmp_path):
    wanted = studying.Wanted([str(collected_run)], "gated", "baseline", 2, 1)
    study = Study(studying.new(wanted, str(tmp_path / "study")))
    yield study
    study.close()


@pytest.fixture
def address(study):
    with serving(server.application(study)) as port:
        yield f"http://127.0.0.1:{port}"


IN_SIGHT = """() => {
    const box = document.querySelector("[role=alert]").getBoundingClientRect();
    return box.top >= 0 && box.bottom <= innerHeight;
}"""


def link(address, study):
    return f"{address}/r/{study.raters(PERSON)[0].token}/"


def test_a_person_rates_all_without_scripts(browser, study, address):  # noqa: F811
    with Watched(browser, address, viewport=SCREEN, java_script_enabled=False) as page:
        page.goto(link(address, study))
        page.get_by_role("link", name="Begin").click()
        heading = page.locator("h1")
        assert heading.inner_text() == "Feature 1 of 4"
        context = page.locator(".contexts details").first
        assert context.locator("mark").is_visible()
        context.locator("summary").click()
        assert context.get_attribute("open") is not None
        page.get_by_label("Explanation").fill("the word def\n  and 猫")
        page.get_by_label("Maybe").check()
        page.get_by_role("button", name="Save and go on").click()
        assert heading.inner_text() == "Feature 2 of 4"
        assert page.get_by_text("1 of 4 answered").is_visible()
        page.get_by_label("Explanation").fill("half")
        page.get_by_role("button", name="Back").click()
        assert heading.inner_text() == "Feature 1 of 4"
        assert page.get_by_label("Explanation").input_value() == "the word def\n  and 猫"
        assert page.get_by_label("Maybe").is_checked()
        page.get_by_label("No").check()
        page.get_by_role("button", name="Overview").click()
        assert page.locator(".places").inner_text().split() == [
            *("1", "answered", "2", "begun", "3", "open", "4", "open")
        ]
        page.get_by_role("link", name="2 begun").click()
        assert page.get_by_label("Explanation").input_value() == "half"
        page.get_by_label("Yes").check()
        for _ in range(2):
            page.get_by_role("button", name="Save and go on").click()
            page.get_by_label("No").check()
        page.get_by_role("button", name="Save and finish").click()
        assert heading.inner_text() == "Thank you"
    answers = {study.order(1).index(each.item): (each.score, each.explanation) for each in study.answers()}
    assert answers == {0: (0.0, "the word def\n  and 猫"), 1: (2.0, "half"), 2: (0.0, ""), 3: (0.0, "")}
    assert [(each.score, each.version) for each in study.earlier_answers()] == [(1.0, 1)]


def test_the_keyboard_is_enough(browser, study, address):  # noqa: F811
    with Watched(browser, address, viewport=SCREEN) as page:
        page.goto(f"{link(address, study)}1")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.name") == "explanation"
        page.keyboard.type("a word")
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")  # from yes, which is first, to maybe
        assert page.get_by_label("Maybe").is_checked()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_url("**/2#main")
    (answer,) = study.answers()
    assert (answer.score, answer.explanation) == (1.0, "a word")


def test_two_windows_and_what_is_missing_are_told(browser, study, address):  # noqa: F811
    # Chromium itself writes refused requests into the console.
    first, second = (Watched(browser, address, viewport=PHONE) for _ in range(2))
    for window in (first, second):
        window.page.goto(f"{link(address, study)}1")
    for window, text in ((first, "from one"), (second, "from the other")):
        window.page.get_by_label("Explanation").fill(text)
        window.page.get_by_label("Yes").check()
        window.page.get_by_role("button", name="Save").click()
    assert first.page.locator("h1").inner_text() == "Feature 2 of 4"
    alert = second.page.get_by_role("alert")
    assert "another window" in alert.inner_text()
    assert second.page.locator("q").inner_text().strip('“”"') == "Yes: from one"
    assert second.page.get_by_label("Explanation").input_value() == "from the other"
    second.page.wait_for_function(IN_SIGHT)  # though the question is far below
    second.page.get_by_role("button", name="Save").click()
    second.page.wait_for_url("**/2#main")
    second.page.wait_for_function("scrollY < 100")
    second.page.get_by_role("button", name="Save").click()
    alert = second.page.get_by_role("alert")
    assert "Choose" in alert.inner_text()
    assert all("409" in message or "400" in message for message in second.messages)
    assert not first.messages
    first.page.close()
    second.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone_and_is_readable(browser, study, address, scheme):  # noqa: F811
    for viewport in (PHONE, SCREEN):
        with Watched(browser, address, viewport=viewport, color_scheme=scheme) as page:
            for path in ("", "1", "overview", "end"):
                page.goto(f"{link(address, study)}{path}")
                assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], path
                background = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
                assert (background < 0.1) == (scheme == "dark")
                for element in ("body", "a", ".value", ".note", "label", "legend", "button", "textarea", ".chip"):
                    for each in page.locator(f"{element}:visible").all()[:2]:
                        colours = each.evaluate(COLOURS)
                        assert contrast(*colours) >= 4.5, (path, element, colours)
                small = page.evaluate(SMALL)
                assert not small, (path, small)
                for each in page.locator("button:visible, .choices label:visible, .places a:visible").all()[:8]:
                    assert each.bounding_box()["height"] >= 24, path  # of a finger
            page.goto(f"{link(address, study)}1")
            assert page.locator(".narrow").is_visible() == (viewport is PHONE)
            if viewport is SCREEN:  # the question stays in sight
                page.evaluate("scrollTo(0, 600)")
                assert page.get_by_role("button", name="Save").bounding_box()["y"] < viewport["height"]


def test_a_hostile_text_does_nothing(browser, collected_run, tmp_path):  # noqa: F811
    shutil.copytree(collected_run / "features", tmp_path / "features")
    for path in (tmp_path / "features").glob("*.sqlite"):
        with_texts(path, HOSTILE)
    wanted = studying.Wanted([str(tmp_path / "features")], "gated", "baseline", 2, 1)
    study = Study(studying.new(wanted, str(tmp_path / "study")))
    with serving(server.application(study)) as port:
        address = f"http://127.0.0.1:{port}"
        with Watched(browser, address, viewport=SCREEN) as page:
            page.goto(f"{link(address, study)}1")
            page.get_by_label("Explanation").fill(f"</textarea>{HOSTILE}")
            page.get_by_label("Yes").check()
            page.get_by_role("button", name="Save").click()
            page.get_by_role("button", name="Back").click()
            page.wait_for_timeout(200)
            assert page.get_by_label("Explanation").input_value() == f"</textarea>{HOSTILE}"
            assert page.locator("img").count() == 0
            assert HOSTILE.replace(" ", "·") in page.locator("main").inner_text()
    study.close()
