"""The studio in a browser: headless Chromium on the shipped model's server, at two sizes."""
from __future__ import annotations

import base64
import io
import json
import shutil
import threading

import pytest
import torch
from PIL import Image

REASON = "needs the packages of requirements-serve.txt, selenium, chromium and chromedriver (Debian: chromium-driver)"
pytest.importorskip("fastapi", reason=REASON)
webdriver = pytest.importorskip("selenium.webdriver", reason=REASON)
if not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))):
    pytest.skip(REASON, allow_module_level=True)

from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

from dalle.loading import load  # noqa: E402
from server.app import make_app  # noqa: E402
from server.guard import Guard  # noqa: E402
from server.options import COMMAND  # noqa: E402
from server.running import Server, listen  # noqa: E402
from server.scheduler import Busy  # noqa: E402
from server.schemas import ApiError  # noqa: E402

SIZES = {"wide": (1280, 800), "narrow": (360, 740)}

#: Keeps every state of every picture: what is shown for a moment is seen, too.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  for (const image of document.querySelectorAll("#shown li:not([data-state=done]) img"))
    if (!seen.some(([, source]) => source === image.src)) seen.push([image.closest("li").dataset.place, image.src]);
}).observe(document.getElementById("shown"), { childList: true, subtree: true });
"""

#: What reaches beyond the window.
WIDE = """
const end = document.documentElement.clientWidth + 1;
return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
  && node.getBoundingClientRect().right > end).map((node) => node.outerHTML);
"""
CONTROLS = {"button", "textbox", "spinbutton", "slider", "combobox", "radio", "gridcell", "image", "dialog", "grid"}


class Page:
    """The studio in a browser."""

    def __init__(self, address, downloads):
        options = webdriver.ChromeOptions()
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.address, self.downloads, self.script = address, downloads, self.driver.execute_script
        self.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def command(self, name, **parameters):
        self.driver.execute_cdp_cmd(name, parameters)

    def open(self):
        self.driver.get(self.address)
        self.until(lambda: self.find("#model").text == "demo")
        self.script(WATCH)

    def begin(self, width, height):
        """A new session in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.open()
        self.script("sessionStorage.clear()")
        self.open()

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def until(self, condition):
        return WebDriverWait(self.driver, 60, 0.02).until(lambda _: condition())

    def keys(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def pictures(self):
        """The sources of the run's pictures, when all are there."""
        self.until(lambda: not self.find("#cancel").is_displayed() and not self.all("#shown li:not([data-state=done])"))
        return [image.get_attribute("src") for image in self.all("#shown .frame img")]

    def says(self, selector, text):
        self.until(lambda: text in self.find(selector).text)

    def problems(self):
        """Requests to other addresses, console messages, nameless controls, and what reaches beyond the window."""
        sent = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
        assert len(urls) > 5
        elsewhere = [url for url in urls if not url.startswith((self.address, "data:", "blob:"))]
        refused = "the server responded with a status of"
        console = [entry["message"] for entry in self.driver.get_log("browser") if refused not in entry["message"]]
        tree = self.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        controls = [node for node in tree if not node["ignored"] and node["role"]["value"] in CONTROLS]
        nameless = [node for node in controls if not node["name"]["value"]]
        assert len(controls) > 10
        return [*elsewhere, *console, *nameless, *self.script(WIDE)]


@pytest.fixture(scope="module")
def app():
    """The application, and where it is served."""
    app, taken = make_app(load("demo"), COMMAND.parse(["--dalle-path", "demo"])), listen("127.0.0.1", 0)
    server = Server(app, 1.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    app.address = f"http://127.0.0.1:{taken.getsockname()[1]}/"
    yield app
    server.should_exit = True
    thread.join(20)
    app.state.scheduler.stop()


@pytest.fixture(scope="module")
def browser(app, tmp_path_factory):
    page = Page(app.address, tmp_path_factory.mktemp("downloads"))
    yield page
    page.driver.quit()


@pytest.fixture
def page(browser, request):
    browser.begin(*SIZES[getattr(request, "param", "wide")])
    return browser


def opened(source):
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    picture.load()
    return picture


def kept(picture, reference, cells):
    """Whether these cells (row, column) of two pictures are about the same."""
    boxes = [(8 * column, 8 * row, 8 * column + 8, 8 * row + 8) for row, column in cells]
    crops = [(picture.convert("RGB").crop(box), reference.convert("RGB").crop(box)) for box in boxes]
    differences = [abs(a - b) for one, other in crops for a, b in zip(one.tobytes(), other.tobytes())]
    return sum(differences) / len(differences) < 16


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_type_generate_watch_paint_complete_download(page):
    page.find("#prompt").send_keys("grinning cat")
    page.find("#seed").send_keys("7")
    page.find("#generate").click()
    first = page.pictures()
    assert len(set(first)) == 4 and page.find("#shown h2").text == "grinning cat"
    # The preview: ever more of each picture, and what is there is about the picture that it becomes.
    seen = [opened(source) for place, source in page.script("return seen") if place == "0"]
    shown = [sum(picture.getchannel("A").tobytes()) // 255 for picture in seen]
    assert len(shown) >= 2 and shown == sorted(set(shown)) and shown[0] > 0 and shown[-1] < 64 * 64
    # The likeliest first, or as sampled.
    scores = [float(each.text.split()[0].replace("−", "-")) for each in page.all("#shown .score")]
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    Select(page.find("#order")).select_by_value("sampled")
    sampled = page.pictures()
    assert sorted(sampled) == sorted(first)
    assert kept(seen[-1], opened(sampled[0]), [(row, column) for row in range(3) for column in range(8)])
    # The same seed gives the same pictures, variations others.
    page.find("#generate").click()
    page.until(lambda: len(page.all("#history li")) == 2)
    assert page.pictures() == sampled
    page.find("#shown .deeds button:last-child").click()
    page.until(lambda: len(page.all("#history li")) == 3)
    assert not set(page.pictures()) & set(sampled)
    # A download holds its settings.
    page.all("#history li button")[-1].click()
    page.until(lambda: page.pictures() == sampled)
    page.find('#shown [aria-label="Download"]').click()
    file = page.downloads / "grinning-cat-7-0.png"
    page.until(file.exists)
    with Image.open(file) as picture:
        about = json.loads(picture.text["Comment"])
    file.unlink()
    assert (about["prompt"], about["seed"], about["first_image"]) == ("grinning cat", 7, 0)
    # Paint: two cells by the mouse, one by the keyboard.
    page.find('#shown [aria-label="Paint a part anew"]').click()
    cells = page.all("#cells [role=gridcell]")
    assert len(cells) == 64 and not page.find("#complete").is_enabled()
    ActionChains(page.driver).click_and_hold(cells[6 * 8 + 2]).move_to_element(cells[6 * 8 + 3]).release().perform()
    page.keys(Keys.DOWN, Keys.SPACE)
    marked = [divmod(place, 8) for place, cell in enumerate(cells) if cell.get_attribute("aria-selected") == "true"]
    assert marked == [(6, 2), (6, 3), (7, 2)] and page.problems() == []
    page.find("#complete").click()
    page.until(lambda: len(page.all("#history li")) == 4)
    completed = [opened(source) for source in page.pictures()]
    rest = [(row, column) for row in range(5) for column in range(8)]
    assert all(kept(picture, opened(sampled[0]), rest) for picture in completed)
    assert "3 codes painted anew" in page.find("#shown .meta").text
    # The session is there again when the page is.
    page.open()
    assert len(page.pictures()) == 4 and len(page.all("#history li")) == 4
    assert page.problems() == []


def test_all_of_it_by_keyboard(page):
    """From the top of the page: Tab, arrows, Enter and space are enough, and focus is seen."""
    order = []
    while "generate" not in order:
        page.keys(Keys.TAB)
        order.append(page.script("return document.activeElement.id"))
        assert page.script("return document.activeElement.matches(':focus-visible')") and len(order) < 30
    assert [name for name in order if name] == ["prompt", "n", "seed", "cond_scale", "generate"]
    page.find("#prompt").send_keys("octopus", Keys.ENTER)
    first = page.pictures()
    page.find("#shown button.frame").send_keys(Keys.ENTER)
    shown = lambda: page.find("#viewer article > img").get_attribute("src")  # noqa: E731
    assert shown() == first[0]
    page.keys(Keys.ARROW_RIGHT)
    page.until(lambda: shown() == first[1])
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.find("#viewer").is_displayed())
    assert page.script("return document.activeElement.matches('#shown button.frame')")
    page.find('#shown [aria-label="Paint a part anew"]').send_keys(Keys.ENTER)
    page.keys(Keys.SPACE)
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(2 * Keys.ARROW_RIGHT).key_up(Keys.SHIFT).perform()
    page.keys(Keys.END, Keys.ENTER)
    marked = lambda: [place for place, cell in enumerate(page.all("#cells [role=gridcell]"))  # noqa: E731
                      if cell.get_attribute("aria-selected") == "true"]
    assert marked() == [0, 1, 2, 7]
    page.find("#undo").send_keys(Keys.ENTER)
    assert marked() == [0, 1, 2] and page.find("#editor-status").text == "3 of 64 codes marked"
    page.find("#complete").send_keys(Keys.ENTER)
    page.says("#shown .meta", "3 codes painted anew")
    page.pictures()
    # Focus is not lost with what had it.
    assert page.script("return document.activeElement.id") == "shown-title"
    page.find("#history li:last-child button").send_keys(Keys.ENTER)
    assert page.script("return document.activeElement.matches('#history li:last-child button')")
    assert page.pictures() == first


def test_a_picture_of_ones_own_is_completed(page, tmp_path):
    picture = Image.new("RGB", (300, 200), "white")
    picture.paste((200, 30, 30), (50, 0, 250, 200))
    picture.save(tmp_path / "red.png")
    (tmp_path / "none.png").write_text("no picture")
    page.find("#file").send_keys(str(tmp_path / "none.png"))
    page.says("#notice", "none.png is not a picture")
    page.find("#file").send_keys(str(tmp_path / "red.png"))
    page.until(page.find("#editor").is_displayed)
    page.find("#editor-prompt").send_keys("red square")
    page.find("#presets button").click()
    page.find("#complete").click()
    page.says("#shown .meta", "32 codes painted anew")
    for source in page.pictures():
        assert kept(opened(source), Image.new("RGB", (64, 64), (200, 30, 30)), [(0, 0), (1, 4), (2, 7)])


def test_errors_are_said_and_a_busy_server_is_tried_again(page, app, monkeypatch):
    page.find("#more summary").click()
    page.find("#num_candidates").send_keys("3")
    page.find("#prompt").send_keys("wolf", Keys.ENTER)
    page.says("#notice", "num_candidates must be at least n")
    assert page.find("#num_candidates").get_attribute("aria-invalid") == "true"
    page.find("#num_candidates").send_keys(Keys.BACKSPACE, "8")
    add, refused = app.state.scheduler.add, []

    def busy(job):
        if not refused:
            refused.append(job)
            raise Busy(9, 1)
        add(job)

    monkeypatch.setattr(app.state.scheduler, "add", busy)
    page.find("#generate").click()
    page.says("#notice", "The server is busy")
    assert len(page.pictures()) == 4 and len(refused) == 1 and not page.find("#notice").is_displayed()


def test_clip_orders_the_pictures_where_the_server_has_it(page, app, monkeypatch):
    class Reddest:
        """The redder a picture, the better it fits."""

        def similarity(self, prompt, pictures):
            return torch.tensor([float(picture.resize((1, 1)).getpixel((0, 0))[0]) for picture in pictures])

    for holder in (app.state.api, app.state.scheduler):
        monkeypatch.setattr(holder, "ranker", Reddest())
    page.open()
    page.find("#prompt").send_keys("rainbow", Keys.ENTER)
    reds = [opened(source).resize((1, 1)).getpixel((0, 0))[0] for source in page.pictures()]
    assert reds == sorted(reds, reverse=True) and page.find("#shown .score").text == f"CLIP {reds[0]}.000"
    Select(page.find("#order")).select_by_value("likelihood")
    assert "nats/code" in page.find("#shown .score").text


def test_what_is_cancelled_leaves_the_server(page, app, monkeypatch):
    scheduler, going = app.state.scheduler, threading.Event()
    turn = scheduler._turn
    monkeypatch.setattr(scheduler, "_turn", lambda: (turn(), going.wait(0.2)))
    page.find("#prompt").send_keys("wolf", Keys.ENTER)
    page.until(lambda: scheduler.running)
    page.find("#cancel").click()
    page.says("#status", "Cancelled.")
    page.until(lambda: not scheduler.running)
    assert page.find("#generate").text == "Generate" and not page.all("#history li")
    going.set()


def test_the_page_asks_for_the_key(page, app, monkeypatch):
    monkeypatch.setattr(Guard, "refusal", needs_key)
    page.driver.get(page.address)
    page.until(page.find("#key").is_displayed)
    page.find("#key-value").send_keys("wrong", Keys.ENTER)
    page.until(lambda: not page.find("#key-value").get_attribute("value") and page.find("#key").is_displayed())
    page.says("#key-problem", "Incorrect")
    page.find("#key-value").send_keys("secret", Keys.ENTER)
    page.until(lambda: page.find("#model").text == "demo" and not page.find("#notice").is_displayed())


def needs_key(guard, scope):
    if scope["path"].startswith("/v1") and dict(scope["headers"]).get(b"authorization") != b"Bearer secret":
        return ApiError("Incorrect API key provided", status=401)
    return None
