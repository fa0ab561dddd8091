"""The page of a run in a real browser: it draws, answers mouse and keys, and asks nobody."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.report.write import write_report
from tests.browser import Browser
from tests.made_runs import add_start, append_steps, made_run

CHART = "document.querySelector('figure[data-chart=\"0\"]')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_run(tmp_path_factory.mktemp("runs") / "made<b>", steps=80)
    add_start(folder, 2, exit={"code": 0, "reason": "finished", "time": 2.0})
    append_steps(folder, range(31, 81), attempt=2, skipped=(35,))
    return write_report(folder)


def ticks(browser: Browser) -> list[str]:
    found = browser.run(f"[...{CHART}.querySelectorAll('.tick:not(.y):not(.name)')]"
                        ".map((each) => each.textContent).join()")  # fmt: skip
    return str(found).split(",")


def test_a_page_draws_zooms_and_reads_off_and_asks_for_nothing(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    browser.open(page, width=1280)
    box = browser.run(f"(() => {{ {CHART}.scrollIntoView(); const b = {CHART}"
                      ".querySelector('svg[role=img]').getBoundingClientRect();"
                      " return [b.left, b.top, b.width, b.height]; })()")  # fmt: skip
    left, top, width, height = box
    middle = top + height / 2
    browser.mouse("mouseMoved", left + width / 2, middle)
    said = browser.run(f"{CHART}.querySelector('output').textContent")
    assert re.match(r"step (3[789]|40): train 2\.0\d+, evaluation 2\.15495", said), said
    assert browser.run("document.querySelectorAll('.cross[d^=M]').length") == 8  # all together
    before = ticks(browser)
    browser.mouse("mousePressed", left + 0.6 * width, middle)
    browser.mouse("mouseMoved", left + 0.8 * width, middle)
    browser.mouse("mouseReleased", left + 0.8 * width, middle)
    assert ticks(browser) != before
    assert not browser.run("document.getElementById('whole').disabled")
    browser.run("document.getElementById('whole').click()")
    assert ticks(browser) == before
    browser.mouse("mouseMoved", 1, 1)
    browser.run(f"{CHART}.focus()")
    browser.key("ArrowRight")
    assert browser.run(f"{CHART}.querySelector('output').textContent").startswith("step 1:")
    browser.key("l")
    assert browser.run(f"{CHART}.querySelector('.log input').checked")
    browser.run("(() => { const s = document.getElementById('smooth'); s.value = 5;"
                " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert browser.run(f"{CHART}.querySelectorAll('.faint').length") == 1
    assert browser.run(f"{CHART}.querySelectorAll('.mark').length") == 2
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert not browser.complaints
    assert [url for url in browser.requests if url != page.absolute().as_uri()] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_fits_and_follows_the_colours_of_the_system(
    browser: Browser, page: Path, scheme: str
) -> None:
    browser.open(page, width=400, scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") <= 400
    paper = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(251, 251, 250)", "dark": "rgb(22, 22, 22)"}
    assert browser.run(paper) == colours[scheme]
    other = "dark" if scheme == "light" else "light"
    browser.run(f"(() => {{ const s = document.getElementById('theme'); s.value = '{other}';"
                " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert browser.run(paper) == colours[other]
