"""Screenshots of a run's report for docs/images: `python tests/report_pictures.py RUN docs/images`.

Of a run of recipes/grpo_duplex.py with `--only turns`.

Needs Chromium, chromedriver and selenium; see browser.py.
"""

import argparse
import sys
from pathlib import Path

from browser import chromium, missing, visit

from covo_rl.run.report.page import report_page

#: name -> (part of the report, width, height, dark)
PICTURES = {
    "report-light": ("view=overview", 1280, 860, False),
    "report-groups": ("view=groups&flags=wrong_high_thinking&sort=spread", 1280, 900, False),
    "report-dark": ("view=groups&flags=biggest_change&text=tokens", 1280, 900, True),
    "report-phone": ("view=groups&flags=wrong_high_thinking&sort=spread", 360, 780, True),
    "turns": ("view=groups&sort=spread", 1280, 760, False),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=[name for name in PICTURES if name != "turns"])
    words = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    words.folder.mkdir(parents=True, exist_ok=True)
    page = words.run.resolve() / "report.html"
    page.write_text(report_page(words.run), encoding="utf-8")
    with chromium() as driver:
        for name in words.only:
            part, width, height, dark = PICTURES[name]
            visit(driver, page, part, width=width, height=height, dark=dark)
            if width < 600:
                driver.execute_script("document.querySelector('.group').scrollIntoView()")
                driver.execute_script("window.scrollBy(0, -88)")
            picture = words.folder / f"{name}.png"
            driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
            driver.save_screenshot(str(picture))
            print(picture, f"{picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
