"""report.html in Chromium, by file://: it shows, sorts, filters and prints, and runs only its own script."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pypdfium2
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

import engine
from engine.report.render import write_report
from tests.helpers.images import write_images
from tests.helpers.reports import HOSTILE, LABELS, with_explanations, with_operating_points

pytestmark = [pytest.mark.browser, pytest.mark.slow]
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
Browser = webdriver.Chrome


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """Of real results with every column, failures, hostile names and labels, thumbnails, overlays."""
    folder = tmp_path_factory.mktemp("browser")
    archive = write_images(folder / "archive", 24)
    names = sorted(path.name for path in archive.iterdir())
    evil = [name.replace("/", "_") for name in HOSTILE[:6]]
    for name in evil:
        shutil.copy(archive / names[0], archive / name)
    paths = [*dict.fromkeys([*names, *evil, *HOSTILE]), "gone.png"]
    labels = [*(["normal", "osteopenia", "osteoporosis"] * 8), *(LABELS * 4)]
    pd.DataFrame({"path": paths, "label": labels[: len(paths)]}).to_parquet(archive / "m.parquet")
    results = folder / "results"
    engine.screen(archive / "m.parquet", output=results, bundle=bundle, part_rows=6)
    with_operating_points(results)
    with_explanations(results, row=3)
    write_report(results, thumbnails=12)
    return results / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    result, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert result, "REQUIRE_BROWSER=1, and there is no Chromium"
    assert driver, "REQUIRE_BROWSER=1, and there is no chromedriver"
    options.binary_location = result
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def page(browser: Browser, report: Path) -> Browser:
    """The report, opened anew at the usual size."""
    size(browser, 1200)
    for kind in ("browser", "performance"):  # of the page before
        browser.get_log(kind)
    browser.get(report.as_uri())
    return browser


def size(browser: Browser, width: int) -> None:
    shape = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)


def column(page: Browser, name: str) -> list[str]:
    """The cells of the rows that are shown."""
    script = """
        const place = [...document.querySelectorAll("#work thead th")]
            .findIndex((cell) => cell.textContent === arguments[0]);
        return [...document.querySelectorAll("#work tbody tr")].filter((row) => row.offsetParent)
            .map((row) => row.cells[place].dataset.value ?? row.cells[place].firstChild.textContent);
    """
    return list(page.execute_script(script, name))


def header(page: Browser, name: str) -> Any:
    return page.find_element(By.XPATH, f"//table[@id='work']/thead//th[normalize-space()='{name}']")


def screenshot(page: Browser) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(page.get_screenshot_as_base64())))
    return np.asarray(picture.convert("L"))


def test_the_page_opens_without_requests_and_errors(page: Browser) -> None:
    assert page.get_log("browser") == []
    sent = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert sent
    assert {url.split(":")[0] for url in sent} <= {"file", "data"}
    assert {url for url in sent if url.startswith("file:")} == {page.current_url}
    assert page.execute_script(
        "return [...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    )


def test_hostile_texts_stay_text(page: Browser) -> None:
    shown = [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#work th.path")]
    assert HOSTILE[0] in shown
    assert "<_script><script>alert(2)<_script>.png" in shown
    assert [text for text in shown if "\ufffdgnp.exe\ufffd\ufffd[31m.png" in text]
    labels = [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#work td[data-label=label]")]
    assert LABELS[0] in labels
    assert page.execute_script("return document.scripts.length") == 1
    assert (
        page.execute_script("return document.querySelectorAll('#work :is(b, svg[onload], script)').length")
        == 0
    )
    # and if something got in all the same, the page's policy would not run it
    page.execute_script(
        "const other = document.createElement('script'); other.textContent = 'window.ran = 1';"
        "document.body.append(other); const image = new Image(); image.src = 'http://127.0.0.1:9/x.png';"
        "document.body.append(image);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 2\">');"
    )
    assert page.execute_script("return window.ran") is None
    refused = [entry["message"] for entry in page.get_log("browser")]
    assert any("script" in text and "Content Security Policy" in text for text in refused)
    assert any("127.0.0.1:9" in text and "Content Security Policy" in text for text in refused)


def test_sorting(page: Browser) -> None:
    risk = [float(value) for value in column(page, "osteoporosis")]
    assert risk == sorted(risk, reverse=True)
    assert header(page, "osteoporosis").get_attribute("aria-sort") == "descending"
    button = header(page, "osteoporosis").find_element(By.TAG_NAME, "button")
    button.click()
    assert [float(value) for value in column(page, "osteoporosis")] == sorted(risk)
    assert header(page, "osteoporosis").get_attribute("aria-sort") == "ascending"
    # by the keyboard, another column
    page.execute_script("arguments[0].focus()", button)
    ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).send_keys(
        Keys.ENTER
    ).perform()
    assert page.switch_to.active_element.text == "path"
    assert header(page, "path").get_attribute("aria-sort") == "ascending"
    assert header(page, "osteoporosis").get_attribute("aria-sort") is None
    paths = [path for path in column(page, "path") if path.startswith("image-")]
    assert paths == sorted(paths)
    assert len(column(page, "row")) == len(risk)
    header(page, "row").find_element(By.TAG_NAME, "button").click()
    numbers = [int(value) for value in column(page, "row")]
    assert numbers == sorted(numbers, reverse=True)


def test_filtering(page: Browser) -> None:
    total = len(column(page, "row"))
    count = page.find_element(By.ID, "filter-count")
    assert count.text == f"{total} of {total} rows"
    search = page.find_element(By.ID, "filter-text")
    search.send_keys("IMAGE-1")
    assert column(page, "path")
    assert all("image-1" in path for path in column(page, "path"))
    assert count.text == f"{len(column(page, 'path'))} of {total} rows"
    search.clear()
    search.send_keys("<img src=x")
    assert column(page, "path") == [HOSTILE[0]]
    search.clear()
    search.send_keys(Keys.SPACE, Keys.BACKSPACE)
    for name, position in (("prediction", "predicted"), ("triage", "triage")):
        choice = Select(page.find_element(By.ID, f"filter-{name}"))
        for option in [item.get_attribute("value") for item in choice.options][1:]:
            choice.select_by_value(option)
            assert set(column(page, position)) == {option.replace("_", " ")}
        choice.select_by_value("")
    Select(page.find_element(By.ID, "filter-list")).select_by_value("abstained")
    assert set(column(page, "triage")) == {"gray zone"}
    header(page, "row").find_element(By.TAG_NAME, "button").click()  # what is hidden stays so
    assert set(column(page, "triage")) == {"gray zone"}
    Select(page.find_element(By.ID, "filter-list")).select_by_value("")
    assert len(column(page, "row")) == total


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_overflows(page: Browser, width: int) -> None:
    size(page, width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    outside = """
        return [...document.querySelectorAll("body *")].filter((one) =>
            one.getBoundingClientRect().right > arguments[0] + 1 && !one.closest(".scroll")).length
    """
    assert page.execute_script(outside, width) == 0
    if width == 360:  # the list needs no scrolling either, and is sorted and filtered there too
        total = len(column(page, "row"))
        page.find_element(By.ID, "filter-text").send_keys("image-2")
        assert 0 < len(column(page, "row")) < total
        header(page, "row").find_element(By.TAG_NAME, "button").click()
        assert column(page, "row") == sorted(column(page, "row"), key=int, reverse=True)
        assert page.execute_script(
            "const list = document.getElementById('work');"
            "return list.scrollWidth <= list.parentNode.clientWidth"
        )


def test_light_and_dark(page: Browser) -> None:
    result = {}
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        result[scheme] = screenshot(page)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert np.median(result["light"]) > 240
    assert np.median(result["dark"]) < 40
    assert result["light"].min() < 60  # there is ink
    assert result["dark"].max() > 200


def test_without_script_it_is_a_plain_table(page: Browser, report: Path) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.get(report.as_uri())
        assert not page.find_element(By.CLASS_NAME, "filters").is_displayed()
        assert len(page.find_elements(By.CSS_SELECTOR, "#work tbody tr")) > 20
        assert not page.find_elements(By.CSS_SELECTOR, "#work button")
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_printing(page: Browser) -> None:
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    paper = {"preferCSSPageSize": True, "printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69}
    document = pypdfium2.PdfDocument(base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", paper)["data"]))
    assert 4 <= len(document) <= 12
    whole = ""
    for sheet in document:
        ink = np.asarray(sheet.render(scale=0.5).to_pil().convert("L"))
        assert (ink < 200).sum() > 50, "a blank page"
        assert (ink[:, -8:] > 200).all(), "something is cut off at the right"
        whole += sheet.get_textpage().get_text_range()
    document.close()
    words = re.sub(r"\s+", " ", whole)
    for heading in ("Screening report", "Work list", "Provenance", "Research use only", "imagecodecs"):
        assert heading in words  # the last one is in a fold that is closed on the screen
