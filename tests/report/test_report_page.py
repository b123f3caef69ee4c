"""The report in a browser: pictures that are not blank, a silent console, no request, keys, colours, small screens.

Without a browser on the machine, or without playwright to steer it, these tests are skipped; .ci/run installs both.
"""

import shutil

import pytest
from report_runs import made

from ted_scale.report.page import write

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
LONG = 100_000
COLOURS = """() => {
  const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
  const canvas = all(document.querySelector("figure.chart")).find((e) => e.tagName === "CANVAS" && e.width > 300);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
UNNAMED = """[...document.querySelectorAll("button, input, a")]
  .filter((e) => !(e.textContent || e.labels?.[0]?.textContent).trim()).length"""
LOADED = "performance.timing.loadEventEnd - performance.timing.navigationStart"
IDS = "[...document.querySelectorAll('[id]')].map((e) => e.id)"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"{BROWSER} does not start here: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """Of a run of 100,000 steps with 16 layers, whose losses have a spike in the middle."""
    place = tmp_path_factory.mktemp("long")
    return write([made(place, steps=LONG, layers=16, every=10)], place / "report.html")


@pytest.fixture(scope="module")
def two_pages(tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    return write([made(place, name="a"), made(place, name="b", method="ce")], place / "report.html")


def opened(browser, path, **how):
    """(the page, what its console said, what it asked for)"""
    page = browser.new_page(**how)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return page, said, asked


def shown(page, number: int = 0):
    """The chart, once it is drawn."""
    chart = page.locator("figure.chart").nth(number)
    chart.scroll_into_view_if_needed()
    chart.locator("canvas").first.wait_for(state="attached", timeout=60_000)
    chart.locator(".plot > *").first.wait_for(state="attached", timeout=60_000)
    page.wait_for_timeout(500)
    return chart


def test_a_long_run_is_small_opens_at_once_and_asks_for_nothing(browser, long_page):
    assert long_page.stat().st_size < 3_000_000
    page, said, asked = opened(browser, long_page)
    times = [page.evaluate(LOADED)]
    for _ in range(2):  # a test beside this one may have the cores
        page.reload()
        times.append(page.evaluate(LOADED))
    for number in range(page.locator("figure.chart").count()):
        shown(page, number)
    assert min(times) < 2000
    assert said == [] and asked == 3 * [long_page.as_uri()]


def test_a_zoom_in_time_fits_the_height_to_what_is_seen(browser, long_page):
    """Or the first steps and one spike would press all others into a line."""
    page, said, _ = opened(browser, long_page)
    shown(page, 0).locator(".plot").focus()
    top = "Object.values(Bokeh.index.roots)[0].model.y_range.end"
    assert page.evaluate(top) > 40
    for key in ("End", "+"):
        page.keyboard.press(key)
    page.wait_for_timeout(1000)
    assert page.evaluate(top) < 10 and said == []


def test_every_chart_is_drawn_and_the_spike_is_in_it(browser, long_page):
    page, said, _ = opened(browser, long_page)
    highest = "(n) => Math.max(...Object.values(Bokeh.index.roots)[n].model.renderers[0].data_source.data.y)"
    shown(page, 0)
    assert page.evaluate(highest, 0) > 40
    colours = page.evaluate(COLOURS)
    assert colours > 8 and said == []  # a blank canvas has one
    inks = page.evaluate("Object.values(Bokeh.index.roots)[0].model.renderers.map((r) => r.glyph.line_color.value)")
    assert len(set(inks)) == len(inks) > 1  # each line has the colour of its button


def test_the_axis_turns_to_tokens_and_to_seconds(browser, two_pages):
    page, said, _ = opened(browser, two_pages)
    shown(page, 0)
    end = "Math.max(...Object.values(Bokeh.index.roots)[0].model.renderers[0].data_source.data.x)"
    ends = {}
    for axis in ("tokens", "seconds", "steps"):
        page.check(f"input[name=axis][value={axis}]")
        ends[axis] = page.evaluate(end)
    assert ends == {"steps": 40, "tokens": 40 * 256, "seconds": pytest.approx(4.0)} and said == []


def test_keys_read_the_values_and_a_button_hides_a_line(browser, two_pages):
    page, said, _ = opened(browser, two_pages)
    chart = shown(page, 0)
    chart.locator(".plot").focus()
    page.keyboard.press("End")
    assert "a " in chart.locator(".readout").text_content() and "step" in chart.locator(".readout").text_content()
    button = chart.locator(".legend button").first
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert page.evaluate("Object.values(Bokeh.index.roots)[0].model.renderers.map((r) => r.visible).includes(false)")
    assert said == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk_in_both_themes(browser, two_pages, theme, width):
    page, said, _ = opened(browser, two_pages, viewport={"width": width, "height": 800}, color_scheme=theme)
    shown(page, 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 22, 26)"}[theme] and said == []


def test_a_screen_reader_has_a_name_for_every_chart_and_every_control(browser, two_pages):
    page, _, _ = opened(browser, two_pages)
    plots = page.locator("figure.chart .plot")
    assert plots.count() > 5
    for number in range(plots.count()):
        assert len(plots.nth(number).get_attribute("aria-label")) > 40
        assert page.locator("figure.chart").nth(number).locator("details table").count() == 1
    assert page.evaluate(UNNAMED) == 0
    ids = page.evaluate(IDS)
    assert len({*ids}) == len(ids)
