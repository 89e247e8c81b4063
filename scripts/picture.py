"""Take a picture of a report, as docs/ has some.

    python -m scripts.picture FOLDER/report.html OUT.png [--width 1440] [--height 1000] [--dark]

Opens the page in Chromium (`make browser`) and saves what a screen of that size shows of it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1440, help="pixels")
    parser.add_argument("--height", type=int, default=1000, help="pixels")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    program = shutil.which("chromium")
    if program is None:
        print("there is no chromium: make browser", file=sys.stderr)
        return 2
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox, as root has none; the page is a file of our own and fetches nothing.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(
            viewport={"width": arguments.width, "height": arguments.height},
            color_scheme="dark" if arguments.dark else "light",
        )
        page.goto(arguments.report.resolve().as_uri())
        page.screenshot(path=arguments.out)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
