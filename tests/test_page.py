import base64
import dataclasses
import json
import re
import shutil
import time

import pytest
import torch
from made_up import resnet_labels, result_of

from cka_hooks.names import glob_regex
from cka_hooks.results.result import CKAResult
from cka_hooks.views.page import colour, page_data, script_json

RESNET18, RESNET152 = resnet_labels((2, 2, 2, 2)), resnet_labels((3, 8, 36, 3))
EVIL = [
    "</script><script>window.hacked=1</script>",
    '<img src="x" onerror="window.hacked=1">',
    '<a href="javascript:window.hacked=1">x</a>',
    "<b>bold</b> &amp; &lt;i&gt; $x_1$",
    "@DATA@ @SUMMARY@ @TITLE@",
    "<!--<script>",
    "\u2028\u2029\ud800 \x00 '\"`${window.hacked=1}",
]


def test_json_cannot_end_the_script_it_stands_in():
    text = script_json(EVIL)
    assert not set("<\u2028\u2029") & set(text)
    assert json.loads(text) == EVIL


def test_the_page_gets_null_for_undefined():
    data = page_data(result_of(["a", "b"], degenerate=("b",)))
    assert data["matrix"] == [[1.0, None], [None, None]]
    assert data["stderr"][0] == [0.0, None]
    json.dumps(data, allow_nan=False)


def test_the_page_is_written_whole_and_names_the_models(tmp_path):
    two = result_of({"a": ["x", "y"], "b": ["x", "z"]})
    two.between("a", "b").to_html(tmp_path / "cka.html")
    page = (tmp_path / "cka.html").read_text(encoding="utf-8")
    assert "<title>a against b: CKA, 640 samples</title>" in page
    assert page.rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["cka.html"]
    two.to_html(tmp_path / "cka.html", title="R&D <1>")
    assert "<title>R&amp;D &lt;1&gt;</title>" in (tmp_path / "cka.html").read_text(encoding="utf-8")


def test_a_page_is_small(tmp_path):
    result_of(RESNET18[:60]).to_html(tmp_path / "cka.html")
    assert (tmp_path / "cka.html").stat().st_size < 200_000
    result_of(RESNET152[:400]).to_html(tmp_path / "cka.html")
    assert (tmp_path / "cka.html").stat().st_size < 4_000_000


# ---- in a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no headless browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


class Page:
    """An open page and what its user does."""

    def __init__(self, browser, path):
        self.browser, self.url = browser, path.as_uri()
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(self.url)
        self.wait("return document.body.dataset.ready === 'yes'")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def wait(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not (found := self.run(condition)):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.03)
        return found

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def texts(self, selector):
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent.toWellFormed())", selector
        )

    def element(self, name):
        return self.browser.find_element("id", name)

    def point(self, row, column):
        """The middle of a cell, in pixels from the top left of the window."""
        return self.run(
            """
            heatmap.scrollIntoView({block: "center"});
            const box = heatmap.getBoundingClientRect();
            return [box.left + xOf(arguments[1]), box.top + yOf(arguments[0])];
            """,
            row,
            column,
        )

    def shown(self):
        """Labels of the rows and columns of the heatmap as it is now."""
        return self.run(
            """
            const { r0, r1, c0, c1 } = zoomed();
            const of = (side, kept, lo, hi) => kept.slice(lo, hi + 1).map((i) => side[i]);
            return [of(rows, view.rows, r0, r1), of(columns, view.columns, c0, c1)];
            """
        )

    def colour(self, row, column):
        """Red, green, blue and opacity in the middle of a cell."""
        return self.run(
            """
            const canvas = heatmap.querySelector("canvas"), ratio = canvas.width / view.width;
            const x = (xOf(arguments[1]) - view.left) * ratio, y = (yOf(arguments[0]) - view.top) * ratio;
            return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
            """,
            row,
            column,
        )

    def drag(self, start, end):
        """The mouse from the middle of one cell to that of another, with its button down."""
        (x, y), (to_x, to_y) = self.point(*start), self.point(*end)
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, button="left", clickCount=1)
        for step in (0.5, 1):
            self.mouse("mouseMoved", x + step * (to_x - x), y + step * (to_y - y), button="left")
        self.mouse("mouseReleased", to_x, to_y, button="left", clickCount=1)

    def mouse(self, kind, x, y, **more):
        self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **more})

    def hover(self, row, column):
        x, y = self.point(row, column)
        self.mouse("mouseMoved", x - 1, y)
        self.mouse("mouseMoved", x, y)

    def click(self, row, column):
        self.hover(row, column)
        x, y = self.point(row, column)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def errors(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] != "INFO"]

    def requests(self):
        """The addresses that the page asked for since it was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            # The browser's own start page may still be loading when ours is opened.
            if message["method"] == "Network.requestWillBeSent" and message["params"]["documentURL"] == self.url
        ]


@pytest.fixture
def open_page(browser, tmp_path):
    pages = []

    def done():
        """A page asked for nothing and nothing went wrong in it; the next one that is opened empties the log."""
        for page in pages:
            assert page.errors() == []
            requests = page.requests()
            assert page.url in requests
            assert [url for url in requests if url != page.url and not url.startswith(("data:", "blob:"))] == []
        pages.clear()

    def opened(result):
        done()
        result.to_html(tmp_path / "cka.html")
        pages.append(Page(browser, tmp_path / "cka.html"))
        return pages[-1]

    yield opened
    done()


SMALL = result_of(RESNET18, degenerate=("layer2.0.relu",))


def test_hover_tells_both_layers_value_and_error(open_page):
    page = open_page(SMALL)
    page.hover(0, 5)
    page.wait("return document.getElementById('tip').style.display === 'block'")
    value, error = SMALL.matrix[0, 5].item(), SMALL.stderr[0, 5].item()
    assert page.text("tip") == f"conv1\n{SMALL.rows[5]}\nCKA {value:.3f}, standard error {error:.3f}"
    at = SMALL.rows.index("layer2.0.relu")
    page.hover(at, 3)
    page.wait("return document.getElementById('tip').textContent.includes('undefined')")
    assert page.text("tip") == "layer2.0.relu\nmaxpool\nCKA is undefined"
    assert not page.run("return document.getElementById('undefined').hidden")


def test_a_click_shows_that_row_against_all(open_page):
    page = open_page(SMALL)
    assert page.text("chosen") == "conv1 against all"
    page.click(9, 20)
    page.wait("return document.getElementById('chosen').textContent !== 'conv1 against all'")
    assert page.text("chosen") == f"{SMALL.rows[9]} against all"
    expected = [None if value != value else float(f"{value:.5g}") for value in SMALL.matrix[9].tolist()]
    assert page.run("const { other, value } = againstAll(chosen); return other.map((_, i) => value(i))") == expected
    best = max((value, label) for value, label in zip(expected, SMALL.rows, strict=True) if value not in (None, 1.0))
    assert page.texts("#top li")[0].startswith(f"{best[1]}: {best[0]:.3f}, standard error ")
    top, bottom = page.run(
        "const box = heatmap.querySelector('rect.chosen').getBBox(); return [box.y, box.y + box.height]"
    )
    assert top < page.run("return yOf(9)") < bottom
    assert bottom - top == pytest.approx(page.run("return yOf(8) - yOf(9)"), rel=1e-3)


def test_search_lists_marks_and_filters(open_page):
    page = open_page(SMALL)
    page.element("search").send_keys("LAYER3 bn1")
    found = [label for label in SMALL.rows if "layer3" in label and "bn1" in label]
    assert page.texts("#list button") == found
    assert page.text("count") == f"{len(found)} of {len(SMALL.rows)} layers"
    assert page.run("return heatmap.querySelectorAll('.match').length") == 2 * len(found)
    page.element("only").click()
    assert page.shown() == [found, found]
    assert page.run("return heatmap.querySelectorAll('.match').length") == 0
    page.click(1, 0)
    page.wait(f"return document.getElementById('chosen').textContent === {found[1] + ' against all'!r}")
    page.element("search").clear()
    page.element("search").send_keys("nothing like it")
    assert page.texts("#list button") == []
    assert page.shown() == [[], []]
    assert page.texts("#heatmap p") == ["No layer matches."]
    page.element("search").clear()
    page.element("search").send_keys("layer1.0.conv?, fc")
    expected = ["layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "fc"]
    assert page.shown() == [expected, expected]


GLOBS = [
    "conv1",
    "layer1.*",
    "layer*.*.conv2",
    "layer1.**",
    "**",
    "layer[!1].0.conv1",
    "layer[12].?.bn1",
    "a/**",
    "*",
    "?c",
]
GLOBS += ["[z-a]", "relu[#]2", "(a+b)", "**.relu#2", "layer1.0.conv[1-2]", "b/layer1.*.bn?", "[", "[]x]", "$^.\\d{2}"]


@pytest.mark.parametrize("models", [("",), ("a", "b/c")])
def test_search_takes_the_globs_that_layers_takes(open_page, models):
    labels = [*RESNET18, "(a+b)", "[z-a]", "[", "$^.\\d{2}"]
    page = open_page(result_of(dict.fromkeys(models, labels)))
    everything = page.run("return all")
    for pattern in GLOBS:
        regex = glob_regex(pattern)
        expected = [
            label
            for label in everything
            if regex.fullmatch(label)
            or regex.fullmatch(label.removeprefix("a/").removeprefix("b/c/"))
            or pattern.lower() in label.lower()
        ]
        assert page.run("return [...found(arguments[0])]", pattern) == expected, pattern


def test_zooming_with_the_mouse(open_page):
    page = open_page(SMALL)
    page.drag((10, 20), (14, 23))
    assert page.shown() == [list(SMALL.rows[10:15]), list(SMALL.rows[20:24])]
    assert page.text("chosen") == "conv1 against all"
    assert page.texts("#heatmap .ytick") == list(SMALL.rows[10:15])
    page.hover(12, 21)
    page.wait("return tip.style.display === 'block'")
    assert page.text("tip").startswith(f"{SMALL.rows[12]}\n{SMALL.rows[21]}\n")
    page.element("whole").click()
    assert page.shown() == [list(SMALL.rows)] * 2
    page.drag((14, 23), (10, 20))
    x, y = page.point(11, 21)
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            page.mouse(kind, x, y, button="left", clickCount=count)
    assert page.shown() == [list(SMALL.rows)] * 2


def test_colours_are_those_of_the_values_or_fit_them(open_page):
    result = SMALL.select("layer1.**")
    page = open_page(result)
    at = result.rows.index("layer1.1.conv2")
    shade = "#" + "".join(f"{part:02x}" for part in page.colour(0, at)[:3])
    assert shade == colour(float(f"{result.matrix[0, at]:.5g}"))
    assert (page.text("low"), page.text("high")) == ("0", "1")
    page.element("fit").click()
    lowest = result.matrix.min().item()
    row, column = divmod(result.matrix.argmin().item(), len(result.rows))
    assert "#" + "".join(f"{part:02x}" for part in page.colour(row, column)[:3]) == colour(0.0)
    assert float(page.text("low")) == pytest.approx(lowest, abs=5e-4)


def test_undefined_entries_are_grey_and_the_legend_says_so(open_page):
    page = open_page(SMALL)
    at = SMALL.rows.index("layer2.0.relu")
    assert page.colour(at, 3)[3] == 0
    grey = page.run("return getComputedStyle(heatmap.querySelector('canvas')).backgroundColor")
    assert page.run("return getComputedStyle(document.querySelector('#undefined .swatch')).backgroundColor") == grey
    assert "undefined" in page.text("legend")
    whole = open_page(SMALL.select("layer1.**"))
    assert whole.run("return document.getElementById('undefined').hidden")


def test_entries_that_may_be_unrelated_are_hatched(open_page):
    """Of the example, conv1 and fc: hatched cells have two colours, others one."""
    example = CKAResult.example()
    null = {"null_variance": torch.full_like(example.matrix, 0.1), "null_skewness": torch.zeros_like(example.matrix)}
    page = open_page(dataclasses.replace(example, **null))
    hatched = """
        const canvas = heatmap.querySelector("canvas");
        const [w, h] = [Math.round(canvas.width / 3), Math.round(canvas.height / 3)];
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const several = (i, j) => {
            const seen = new Set();
            for (let y = (2 - i) * h + 2; y < (3 - i) * h - 2; y++) for (let x = j * w + 2; x < (j + 1) * w - 2; x++)
                seen.add(pixels.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3).join());
            return seen.size > 1;
        };
        return [0, 1, 2].map((i) => [0, 1, 2].map((j) => several(i, j)));
    """
    assert page.run(hatched) == [[False, False, True], [False, False, False], [True, False, False]]
    assert "indistinguishable from unrelated" in page.text("unrelated")
    assert not page.run("return document.getElementById('unrelated').hidden")
    page.hover(0, 2)
    page.wait("return tip.textContent.includes('p = 0.057')")
    page.hover(0, 1)
    page.wait("return tip.textContent.endsWith('p = 0.0022')")
    assert open_page(SMALL).run("return document.getElementById('unrelated').hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page(open_page, browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page = open_page(SMALL)
        style = "const style = getComputedStyle(document.querySelector(arguments[0]));"
        read = f"{style} return [style.color, style.fill, style.backgroundColor]"
        ground = brightness(page.run(read, "body")[2])
        assert (ground < 60) == (scheme == "dark")
        for selector in ("body", "#summary", "#count", "#list li:last-child button", "#readout"):
            assert abs(brightness(page.run(read, selector)[0]) - ground) > 100, selector
        for selector in ("#heatmap .ytick", "#against .ytick"):
            assert abs(brightness(page.run(read, selector)[1]) - ground) > 100, selector
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_everything_works_from_the_keyboard(open_page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page = open_page(SMALL)
    search = page.element("search")
    search.send_keys("layer4", keys.ENTER)
    assert page.text("chosen").startswith("layer4.0.conv1 ")
    search.send_keys(keys.ARROW_DOWN)
    page.browser.switch_to.active_element.send_keys(keys.ARROW_DOWN)
    page.browser.switch_to.active_element.send_keys(keys.ENTER)
    assert page.text("chosen").startswith("layer4.0.bn1 ")
    page.browser.switch_to.active_element.send_keys(keys.ARROW_UP)
    page.browser.switch_to.active_element.send_keys(keys.ARROW_UP)
    assert page.browser.switch_to.active_element.get_attribute("id") == "search"
    search.send_keys(keys.ESCAPE)
    assert page.text("count") == f"{len(SMALL.rows)} of {len(SMALL.rows)} layers"
    heatmap = page.element("heatmap")
    heatmap.send_keys(keys.ARROW_UP)
    assert page.text("readout").startswith("conv1 · conv1: CKA 1.000")
    heatmap.send_keys(keys.ARROW_UP, keys.ARROW_UP, keys.ARROW_RIGHT)
    assert page.text("readout").startswith("relu · bn1: CKA ")
    heatmap.send_keys(keys.END)
    assert page.text("readout").startswith("relu · fc: CKA ")
    heatmap.send_keys(keys.ENTER)
    assert page.text("chosen") == "relu against all"
    heatmap.send_keys(keys.HOME, keys.ARROW_LEFT, keys.ESCAPE)


def labels_overlap(page, selector):
    return page.run(
        """
        const boxes = [...document.querySelectorAll(arguments[0])].map((e) => e.getBoundingClientRect());
        return boxes.some((a, i) => boxes.some((b, j) => j < i
            && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1));
        """,
        selector,
    )


@pytest.mark.parametrize(
    "result",
    [
        CKAResult.example(),
        SMALL,
        result_of(RESNET152[:400]),
        result_of({"a": RESNET18, "b": RESNET152}).between("a", "b"),
    ],
    ids=["3", "86", "400", "rectangular"],
)
def test_labels_do_not_overlap_also_when_zoomed(open_page, result):
    page = open_page(result)
    ticks = "#heatmap .ytick", "#heatmap .xtick", "#against .ytick"
    assert all(page.texts(selector) for selector in ticks)
    assert not any(labels_overlap(page, selector) for selector in ticks)
    page.run("zoomTo({ r0: 0, r1: 2, c0: 0, c1: 2 })")
    assert page.texts("#heatmap .ytick") == [result.layer_of(label) for label in result.rows[:3]]
    assert not any(labels_overlap(page, selector) for selector in ticks)


def test_names_that_differ_in_the_middle_stay_different_when_they_are_shortened(open_page):
    page = open_page(result_of([f"{'a' * 40} {i} {'b' * 60}" for i in range(3)]))
    for selector in ("#heatmap .ytick", "#heatmap .xtick", "#against .ytick"):
        found = page.texts(selector)
        assert len(set(found)) == 3, found
        assert max(map(len, found)) < 40


def test_400_layers_answer_quickly(open_page):
    page = open_page(result_of(RESNET152[:400]))
    start = time.monotonic()
    page.click(200, 100)
    page.wait("return !document.getElementById('chosen').textContent.startsWith('conv1')")
    page.element("search").send_keys("bn2")
    assert len(page.texts("#list button")) == sum("bn2" in label for label in RESNET152[:400])
    assert time.monotonic() - start < 15


def test_a_rectangular_page_pairs_rows_with_columns(open_page):
    block = result_of({"a": ["x", "y", "z"], "b": ["x", "y"]}).between("a", "b")
    page = open_page(block)
    page.click(2, 1)
    page.wait("return document.getElementById('chosen').textContent === 'a/z against all'")
    assert page.run("return againstAll(chosen).other") == list(block.columns)
    page.element("search").send_keys("b/y\n")
    assert page.text("chosen") == "b/y against all"
    assert page.run("const { other, value } = againstAll(chosen); return other.map((_, i) => value(i))") == [
        float(f"{value:.5g}") for value in block.matrix[:, 1].tolist()
    ]


def test_the_page_forbids_itself_every_request(browser, tmp_path):
    SMALL.to_html(tmp_path / "cka.html")
    page = Page(browser, tmp_path / "cka.html")
    page.run("const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image)")
    time.sleep(0.3)
    assert any("Content Security Policy" in message for message in page.errors())


def test_markup_in_names_stays_text(open_page):
    result = result_of({"<i>m</i>": EVIL, "n": EVIL})
    page = open_page(result)
    for row in range(len(EVIL)):
        page.click(row, row + 1)
    page.element("search").send_keys("<b>")
    time.sleep(0.2)
    assert page.run("return window.hacked") is None
    assert len(page.texts("script")) == 2
    assert page.texts("body img, body a[href], body i, main b") == []
    labels = json.loads(page.text("data"))["rows"]["labels"]
    assert labels[1] == "<i>m</i>/" + EVIL[1]
    assert page.texts("#list button") == [label for label in labels if "<b>" in label]
    assert any("<b>" in text or "<i>" in text for text in page.texts("#heatmap .ytick"))


def test_the_page_prints(open_page, tmp_path):
    page = open_page(SMALL)
    printed = page.browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    content = base64.b64decode(printed["data"])
    assert content.startswith(b"%PDF")
    assert len(content) > 5000
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        shown = "return [...arguments].map((s) => getComputedStyle(document.querySelector(s)).display)"
        assert page.run(shown, ".controls", "#keys", "main") == ["none", "none", "block"]
        page.run("dispatchEvent(new Event('beforeprint'))")
        assert page.wait("return view.left + view.width <= 680")
        page.run("dispatchEvent(new Event('afterprint'))")
        page.wait("return view.left + view.width > 680")
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("width", [400, 620])
def test_a_narrow_window_has_one_column(open_page, browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for result in (SMALL, result_of({"a long name of a model": RESNET18, "b": RESNET18})):
            page = open_page(result)
            assert page.run("return innerWidth") == width
            assert page.run("return document.documentElement.scrollWidth <= innerWidth")
            assert page.run("return view.width") > 100
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
