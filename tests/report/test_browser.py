"""Reports as people open them: in a browser, without network. Screenshots are kept in build/screenshots."""

import shutil
from pathlib import Path

import pytest

from shardprune.report.page.write import write_comparison
from tests.support.entries import entries

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}

TIME = ("Timeline of the workers (s)",)
WORK = ("Peak memory of each worker (GiB)", *TIME)
SPARSITY, ERROR = "Sparsity by layer and projection (% of weights)", "Output error by layer (relative, no unit)"
LOSSES = "Losses of the fine-tuning (nats per token) and learning rate, by step"
PAGES = {  # the plots of each page, in their order
    "owl": (SPARSITY, "Outlier ratios by layer and projection (% of weights)", ERROR, *WORK),
    "wanda": WORK,  # zeros are the same share everywhere
    "rebuilt": (ERROR, "Error of rebuilt blocks by layer (relative, no unit)", *WORK),
    "composite": (ERROR, "Output error of narrowed blocks by layer (relative, no unit)", *WORK),
    "mop": ("Path of the search (score: perplexity on the calibration data)", *WORK),
    "interrupted": (ERROR, *WORK),
    "pipeline": (ERROR, *WORK, LOSSES, *WORK),
}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


def opened(browser, file, scheme="light", size=DESK):
    """A page, which has drawn its plots, said nothing on the console, and asked for no other file."""
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function(
        "document.querySelectorAll('.plot').length === document.querySelectorAll('.main-svg').length / 3"
    )
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    return page


# Titles and labels of axes and entries of legends that reach beyond their plot or into one another, or wait behind a
# scroll bar.
CUT_OFF = """[...document.querySelectorAll('.plot')].flatMap(plot => {
  const frame = plot.getBoundingClientRect();
  const texts = [...plot.querySelectorAll('.xtitle, .ytitle, .y2title, .xtick text, .ytick text, .legendtext')];
  const out = texts.filter(text => { const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1; });
  const bars = [...plot.querySelectorAll('.legend .scrollbar')].filter(bar => bar.getBoundingClientRect().height > 1);
  const entries = [...plot.querySelectorAll('.legendtext')].map(text => [text, text.getBoundingClientRect()]);
  const over = entries.filter(([one, a]) => entries.some(([two, b]) => one !== two &&
    a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)).map(([one]) => one);
  return [...[...out, ...over].map(text => text.textContent), ...bars.map(() => 'a scroll bar')];
})"""


def shot(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@pytest.mark.parametrize("name", entries(list(PAGES), "wanda", "rebuilt", "composite", "interrupted"))
def test_every_plot_is_there(browser, runs, name):
    page = opened(browser, runs.folder / name / "report.html")
    assert tuple(page.locator("figure h3").all_inner_texts()) == PAGES[name]
    for plot in page.locator(".plot").all():
        assert plot.locator("svg.main-svg").first.bounding_box()["height"] > 60
        assert plot.locator(".point, .points path, .hm image, .js-line").count() > 0, "it shows no data"
    shot(page, name)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("owl", "light"),
        ("pipeline", "dark"),
        ("comparison", "light"),
        pytest.param("owl", "dark", marks=pytest.mark.long),
        pytest.param("mop", "light", marks=pytest.mark.long),
    ],
)
def test_it_can_be_read_on_a_phone(browser, runs, name, scheme):
    if name == "comparison":
        outs = [str(runs.folder / one) for one in ("owl", "wanda", "mop")]
        page = opened(browser, Path(write_comparison(outs, str(runs.folder / "phone.html"))[0]), scheme, PHONE)
    else:
        page = opened(browser, runs.folder / name / "report.html", scheme, PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    cut_off = page.evaluate(CUT_OFF)
    assert cut_off == []
    if name == "owl":
        assert page.locator(".heatmap-label").first.bounding_box()["width"] > 10
    shot(page, f"phone-{name}-{scheme}")


def luminance(color):
    """The relative luminance of a CSS colour `rgb(r, g, b)` (WCAG 2.2)."""
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Plots are drawn anew some time after the scheme has changed: texts of axes are then light on dark ground, or dark on
# light ground.
DRAWN_IN = """scheme => [...document.querySelectorAll('.xtick text, .ytick text')].every(text => {
    const [red, green, blue] = getComputedStyle(text).fill.match(/\\d+/g).map(Number);
    return (red + green + blue > 384) === (scheme === 'dark');
})"""


@pytest.mark.parametrize("first", entries(["light", "dark"], "dark"))
def test_text_and_axes_stand_out_in_either_scheme(browser, runs, first):
    """Also where the scheme changes while the page is open."""
    page = opened(browser, runs.folder / "owl" / "report.html", first)
    for scheme in (first, "dark" if first == "light" else "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(DRAWN_IN, arg=scheme, timeout=60_000)
        behind = page.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor")
        assert (luminance(behind) > 0.5) == (scheme == "light")
        texts = page.evaluate(
            "[...document.querySelectorAll('.xtick text, .ytick text')].map(t => getComputedStyle(t).fill)"
        )
        assert len(texts) > 10
        assert all(contrast(text, behind) >= 4.5 for text in texts)
        words = page.evaluate(
            "[...document.querySelectorAll('h3, dt, dd, td, figcaption')].map(t => getComputedStyle(t).color)"
        )
        assert all(contrast(word, behind) >= 4.5 for word in words)


def test_a_click_on_a_heading_sorts_the_table(browser, runs):
    outs = [str(runs.folder / name) for name in ("owl", "wanda", "mop", "composite")]
    page = opened(browser, Path(write_comparison(outs, str(runs.folder / "sorted.html"))[0]))
    headings = page.locator("th").all_inner_texts()

    def column(name):
        return [row.locator("td").nth(headings.index(name)).inner_text() for row in page.locator("tbody tr").all()]

    def number(text):
        return float(text.rstrip("%").replace(",", ""))

    before = column("run")
    for name in ("seconds", "zero"):
        unsorted = column(name)
        for way, reverse in (("ascending", False), ("descending", True)):
            page.get_by_role("button", name=name, exact=True).click()
            assert column(name) == sorted(unsorted, key=number, reverse=reverse)
            assert page.locator("th[aria-sort]").all_inner_texts() == [name]
            assert page.locator("th[aria-sort]").get_attribute("aria-sort") == way
    page.get_by_role("button", name="size (MB)").focus()
    page.keyboard.press("Enter")
    assert column("size (MB)")[-1] == "-", "of the original, whose files are not known"
    page.get_by_role("button", name="run", exact=True).click()
    assert column("run") == sorted(before)
    page.get_by_role("button", name="#").click()
    assert column("run") == before
    shot(page, "comparison-sorted")


def test_runs_are_compared(browser, runs):
    outs = [str(runs.folder / name) for name in ("owl", "wanda", "mop", "pipeline")]
    page = opened(browser, Path(write_comparison(outs, str(runs.folder / "all.html"))[0]))
    titles = page.locator("figure h3").all_inner_texts()
    # The pipeline was evaluated on fewer windows as well, which compare with no other.
    compression, seconds = titles
    assert "(% of the original's parameters)" in compression
    assert seconds.endswith("against time (s)")
    numbers = set(page.locator(".plot").first.locator(".textpoint text").all_text_contents())
    named = {
        row.locator("td").nth(0).inner_text(): row.locator("td").nth(1).inner_text()
        for row in page.locator("tbody tr").all()
    }
    assert {named[number] for number in numbers} == {
        "model",
        "owl",
        "wanda",
        "mop",
        "pipeline/pruned",
        "pipeline/recovered",
    }
    shot(page, "comparison")
