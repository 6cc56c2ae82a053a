import base64
import json
import shutil
import time

import pytest
from made_up import resnet_labels, result_of

from cka_hooks.results.result import CKAResult
from cka_hooks.views.page import page_data, script_json

RESNET18, RESNET152 = resnet_labels((2, 2, 2, 2)), resnet_labels((3, 8, 36, 3))
EVIL = [
    "</script><script>window.hacked=1</script>",
    '<img src="x" onerror="window.hacked=1">',
    '<a href="javascript:window.hacked=1">x</a>',
    "<b>bold</b> &amp; &lt;i&gt; $x_1$",
    "@DATA@ @PLOTLY@ @TITLE@",
    "<!--<script>",
    "\u2028\u2029\ud800 \x00 '\"`${window.hacked=1}",
]


def test_json_cannot_end_the_script_it_stands_in():
    text = script_json(EVIL)
    assert not set("<>&\u2028\u2029") & set(text)
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
    assert "<title>CKA of a against b</title>" in page
    assert page.rstrip().endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["cka.html"]
    two.to_html(tmp_path / "cka.html", title="R&D <1>")
    assert "<title>R&amp;D &lt;1&gt;</title>" in (tmp_path / "cka.html").read_text(encoding="utf-8")


def test_400_layers_make_a_page_not_much_larger_than_plotly(tmp_path):
    from plotly.offline import get_plotlyjs

    result_of(RESNET152[:400]).to_html(tmp_path / "cka.html")
    assert (tmp_path / "cka.html").stat().st_size < len(get_plotlyjs()) + 3_500_000


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
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def element(self, name):
        return self.browser.find_element("id", name)

    def point(self, row, column):
        """The middle of a cell, in pixels from the top left of the window."""
        return self.run(
            """
            const plot = document.getElementById("heatmap"); plot.scrollIntoView({block: "center"});
            const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
            const x = plot.layout.xaxis.range, y = plot.layout.yaxis.range;
            return [box.left + (arguments[1] - x[0]) / (x[1] - x[0]) * box.width,
                    box.bottom - (arguments[0] - y[0]) / (y[1] - y[0]) * box.height];
            """,
            row,
            column,
        )

    def mouse(self, kind, x, y, **more):
        self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, **more})

    def hover(self, row, column):
        x, y = self.point(row, column)
        self.mouse("mouseMoved", x - 1, y)
        self.mouse("mouseMoved", x, y)

    def click(self, row, column):
        self.hover(row, column)
        x, y = self.point(row, column)
        time.sleep(0.1)  # plotly looks where the mouse is at most every 50 ms
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

    def opened(result):
        result.to_html(tmp_path / "cka.html")
        pages.append(Page(browser, tmp_path / "cka.html"))
        return pages[-1]

    yield opened
    for page in pages:
        assert page.errors() == []
        requests = page.requests()
        assert page.url in requests
        assert [url for url in requests if url != page.url and not url.startswith(("data:", "blob:"))] == []


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
    drawn = page.run("return document.getElementById('against').data[0].x")
    expected = [None if value != value else float(f"{value:.5g}") for value in SMALL.matrix[9].tolist()]
    assert drawn == expected
    best = max((value, label) for value, label in zip(expected, SMALL.rows, strict=True) if value not in (None, 1.0))
    assert page.texts("#top li")[0].startswith(f"{best[1]}: {best[0]:.3f} (standard error ")
    boxes = page.run("return document.getElementById('heatmap').layout.shapes.filter((s) => s.type === 'rect')")
    assert [(box["y0"], box["y1"]) for box in boxes] == [(8.5, 9.5)]


def test_search_lists_marks_and_filters(open_page):
    page = open_page(SMALL)
    page.element("search").send_keys("LAYER3 bn1")
    found = [label for label in SMALL.rows if "layer3" in label and "bn1" in label]
    assert page.texts("#list button") == found
    assert page.text("count") == f"{len(found)} of {len(SMALL.rows)} layers"
    marked = page.run("return document.getElementById('heatmap').data[1].y")
    assert [SMALL.rows[y] for y in marked[: len(found)]] == found
    page.element("only").click()
    z = page.run("return document.getElementById('heatmap').data[0].z")
    at = [SMALL.rows.index(label) for label in found]
    assert z == [[float(f"{SMALL.matrix[i, j].item():.5g}") for j in at] for i in at]
    page.click(1, 0)
    page.wait(f"return document.getElementById('chosen').textContent === {found[1] + ' against all'!r}")
    page.element("search").clear()
    page.element("search").send_keys("nothing like it")
    assert page.texts("#list button") == []
    assert len(page.run("return document.getElementById('heatmap').data[0].z")) == len(SMALL.rows)


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
    ticks = "#heatmap .ytick text", "#heatmap .xtick text", "#against .ytick text"
    assert all(page.texts(selector) for selector in ticks)
    assert not any(labels_overlap(page, selector) for selector in ticks)
    page.run("return Plotly.relayout('heatmap', {'yaxis.range': [-0.5, 2.5], 'xaxis.range': [-0.5, 2.5]})")
    assert page.texts("#heatmap .ytick text") == [result.layer_of(label) for label in result.rows[:3]]
    assert not any(labels_overlap(page, selector) for selector in ticks)


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
    assert len(page.run("return document.getElementById('against').data[0].x")) == 2
    page.element("search").send_keys("b/y\n")
    assert page.text("chosen") == "b/y against all"
    assert page.run("return document.getElementById('against').data[0].x") == [
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
    assert len(page.texts("script")) == 3
    assert page.texts("body img, body a[href], body i, main b") == []
    labels = json.loads(page.text("data"))["rows"]["labels"]
    assert labels[1] == "<i>m</i>/" + EVIL[1]
    assert page.texts("#list button") == [label for label in labels if "<b>" in label]
    assert any("<b>" in text or "<i>" in text for text in page.texts("#heatmap .ytick text"))


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
        assert page.wait("return document.getElementById('heatmap').layout.width <= 680")
        page.run("dispatchEvent(new Event('afterprint'))")
        page.wait("return document.getElementById('heatmap').layout.width > 680")
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_narrow_window_has_one_column(open_page, browser):
    size = browser.get_window_size()
    browser.set_window_size(620, 900)
    try:
        page = open_page(SMALL)
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.set_window_size(size["width"], size["height"])
