"""Takes the pictures of `docs/guides/study.md`: `python docs/study.py STUDY [REPORT]`.

STUDY is a new study, in which it answers. REPORT is the folder of a report that `study analyse` wrote.

Playwright and Debian's package `chromium` must be installed.
"""

import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from gsae_jax.rating import server
from gsae_jax.rating.study import PERSON, Study
from gsae_jax.web import server as web

HERE = Path(__file__).parent
PLACE = 7  # of the feature in the pictures
SCREEN, PHONE = {"width": 1100, "height": 800}, {"width": 390, "height": 844}


def main(folder, report=""):
    study = Study(folder)
    listening = web.listening(server.application(study), "127.0.0.1", 0)
    threading.Thread(target=listening.run, daemon=True).start()
    address = f"http://127.0.0.1:{listening.effective_port}/r/{study.raters(PERSON)[0].token}/"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SCREEN, color_scheme="light")

        def take(name):
            page.screenshot(path=HERE / f"study_{name}.png")

        page.goto(address)
        take("instructions")
        for place in range(1, PLACE):
            page.goto(f"{address}{place}")
            page.get_by_label("No").check()
            page.get_by_role("button", name="Save").click()
        page.get_by_label("Explanation").fill("the @ of a decorator")
        page.get_by_label("Yes").check()
        take("feature")
        page.goto(f"{address}overview")
        page.set_viewport_size({"width": 1100, "height": 360})
        take("overview")
        page = browser.new_page(viewport=PHONE, color_scheme="dark")
        page.goto(f"{address}{PLACE}")
        take("phone")
        if report:
            page = browser.new_page(viewport=SCREEN, color_scheme="light")
            page.goto(f"{(Path(report) / 'report.html').absolute().as_uri()}")
            take("report")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
