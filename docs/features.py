"""Takes the pictures of `docs/guides/features.md`: `python docs/features.py RUN [FOLDER]` for a run with features.

Playwright and Debian's package `chromium` must be installed.
"""

import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from gsae_jax import viewing
from gsae_jax.viewer import server
from gsae_jax.web import server as web

HERE = Path(__file__).parent
SAE, FEATURE = "gated_1", 79
SCREEN, PHONE = {"width": 1100, "height": 800}, {"width": 390, "height": 844}
RESULTS = "[data-results]:not([hidden])"


def main(run, folder=""):
    app = server.application(*viewing.pages(viewing.Wanted(run, folder)))
    listening = web.listening(app, "127.0.0.1", 0)
    threading.Thread(target=listening.run, daemon=True).start()
    address = f"http://127.0.0.1:{listening.effective_port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SCREEN, color_scheme="light")

        def take(name):
            page.screenshot(path=HERE / f"features_{name}.png")

        page.goto(f"{address}/")
        page.locator("svg a").nth(4).hover()
        take("saes")
        page.goto(f"{address}/{SAE}/#sort=divergence&order=desc&max_density=5")
        page.wait_for_selector("body[data-ready]")
        take("list")
        page.goto(f"{address}/{SAE}/{FEATURE}")
        take("feature")
        page.goto(f"{address}/text?sae={SAE}")
        page.locator("textarea").fill("import os, sys\nif sys.platform == 'win32':\n    sys.exit(os.name)")
        page.get_by_role("button", name="Show features").click()
        page.wait_for_selector(RESULTS, timeout=300_000)
        page.locator("[data-tokens] button", has_text=".").first.click()
        page.get_by_role("button", name=f"Show feature {FEATURE} on the text").click()
        take("text")
        page.goto(f"{address}/steer?f={SAE}/{FEATURE}")
        page.locator("textarea").fill("    value = self.")
        page.locator("[name=tokens]").select_option("16")
        page.get_by_role("button", name="Run").click()
        page.wait_for_selector(RESULTS, timeout=300_000)
        page.get_by_role("heading", name="Next token").evaluate("heading => scrollTo(0, heading.offsetTop - 640)")
        take("steer")
        page = browser.new_page(viewport=PHONE, color_scheme="dark")
        page.goto(f"{address}/{SAE}/{FEATURE}")
        take("phone")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
