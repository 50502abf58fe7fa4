"""Chromium for tests and screenshots of the report: selenium with the browser and driver that the system has."""

import json
import shutil
import time
from contextlib import contextmanager
from urllib.parse import quote


def missing():
    """Why no browser can be started; empty where one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed: pip install -e '.[dev]'"
    programs = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    return f"no {' and no '.join(programs)} in PATH (Debian: chromium, chromium-driver)" if programs else ""


@contextmanager
def chromium():
    """A headless browser, closed at the end."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required",
                 "--hide-scrollbars", "--disable-dev-shm-usage", "--window-size=1360,900"):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def visit(driver, path, address="", *, width=1360, height=900, dark=False, ready=True):
    """Open a report anew at a part of it; returns the seconds until it was drawn."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get("about:blank")
    start = time.perf_counter()
    driver.get("file://" + quote(str(path)) + ("#" + address if address else ""))
    if ready:
        until(driver, "return document.readyState === 'complete' && !document.getElementById('status')")
    return time.perf_counter() - start


def until(driver, script, seconds=20.0, *values):
    """The script's first value that is true."""
    end = time.monotonic() + seconds
    while not (value := driver.execute_script(script, *values)):
        assert time.monotonic() < end, f"not within {seconds} s: {script}; {json.dumps(driver.get_log('browser'))}"
        time.sleep(0.02)
    return value
