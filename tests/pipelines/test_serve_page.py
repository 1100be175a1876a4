"""The page of `fusion serve` in headless Chromium, against a real server and a real index."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusion_core import search
from fusion_core.search import Searcher
from tests.corpora import HTML_CAPTION, photo, write_scene_index
from tests.pipelines.serving import Client, open_searcher, serving

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium-driver"
    ),
    # Selenium leaves closing its sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
TOKEN = "a secret of enough letters"


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return open_searcher(write_scene_index(tmp_path_factory.mktemp("scenes")))


@pytest.fixture(scope="module")
def client(searcher: Searcher) -> Iterator[Client]:
    with serving(searcher) as client:
        yield client


class Page:
    """A browser's window, by what a user sees and does."""

    def __init__(self, driver: Any):
        self.driver = driver

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def see(self, selector: str) -> list[Any]:
        script = "return [...document.querySelectorAll(arguments[0])].filter((found) => found.checkVisibility())"
        return list(self.run(script, selector))  # in one step: results come and go

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def wait(self, condition: Callable[[], Any], seconds: float = 10) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: condition())

    def results(self) -> list[Any]:
        """The tiles, once an answer has come and its pictures are there."""
        script = """
          if (document.querySelector('#grid[aria-busy]')) return [];
          const tiles = [...document.querySelectorAll('.tile')];
          const images = tiles.slice(0, 4).map((tile) => tile.querySelector('img'));
          return images.every((image) => image.hidden || image.naturalWidth) ? tiles : []"""
        return list(self.wait(lambda: self.run(script)))

    def ids(self) -> list[int]:
        self.results()
        return list(self.run("return [...document.querySelectorAll('.tile')].map((tile) => Number(tile.dataset.id))"))

    def wait_for_ids(self, ids: list[int]) -> None:
        self.wait(lambda: self.ids() == ids)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> Any:
        return self.driver.switch_to.active_element

    def problem(self) -> str:
        return str(self.wait(lambda: self.see("#problem"))[0].text)

    def complaints(self) -> list[str]:
        """What the console holds against the page itself."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "Content Security" in entry["message"]
                or entry["source"] == "javascript"]  # fmt: skip


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(driver: Any) -> Page:
    driver.get_log("browser")
    return Page(driver)


def test_a_search_from_the_empty_page(page: Page, client: Client) -> None:
    page.driver.get(client.url)
    page.wait(lambda: page.see("#examples a"))
    assert page.see("#welcome") and not page.see(".tile")
    page.see("#examples a")[0].click()
    assert len(page.results()) == 30 and "30 results" in page.one("#status").text
    page.one("#text").clear()
    page.one("#text").send_keys("two large red stars\n")
    page.wait(lambda: "two large red stars" in page.one("#status").text)
    assert page.ids() == client.get("/search?text=two+large+red+stars&k=30").ids
    first = page.see("#grid li")[0]
    caption = client.get("/search?text=two+large+red+stars&k=1").json["results"][0]["caption"]
    assert caption in first.text and first.find_element("css selector", "img").get_attribute("alt") == caption
    page.one("#more").click()
    page.wait(lambda: len(page.see(".tile")) == 43)
    assert not page.see("#more")
    page.driver.back()
    page.wait(lambda: "two large" not in page.one("#text").get_attribute("value"))
    assert page.complaints() == []
    origins = page.run("return performance.getEntriesByType('resource').map((e) => new URL(e.name).origin)")
    assert set(origins) == {client.url}


def test_captions_are_text(page: Page, client: Client) -> None:
    page.driver.get(f"{client.url}/?q=onerror+script&k=60")
    page.results()
    shown = [found.text for found in page.see(".caption")]
    assert HTML_CAPTION in shown
    assert page.driver.title != "broken" and not page.driver.find_elements("css selector", ".caption *")


def test_a_click_or_enter_gives_more_like_it_and_back_returns(page: Page, client: Client) -> None:
    page.driver.get(f"{client.url}/?q=a+blue+ring")
    before = page.ids()
    page.results()[2].click()
    page.wait(lambda: f"like={before[2]}" in page.driver.current_url and page.ids() != before)
    assert page.ids() == client.get(f"/similar/{before[2]}?k=30").ids
    assert page.see("#picture") and page.one("#text").get_attribute("value") == ""
    page.driver.back()
    page.wait(lambda: page.ids() == before)
    assert page.one("#text").get_attribute("value") == "a blue ring"


def test_picture_and_words_together_are_weighed(page: Page, client: Client, searcher: Searcher) -> None:
    page.driver.get(f"{client.url}/?like=3")
    page.results()
    assert not page.see("#weight-row")
    page.one("#text").send_keys("green\n")
    page.wait(lambda: page.see("#weight-row") and "green" in page.one("#status").text)
    both = page.ids()
    (row,) = searcher.index.meta([3]).to_pylist()
    assert both == client.post_form(search.fetch_image(row), text="green", k="30").ids
    page.run("const w = document.getElementById('weight'); w.value = 0; w.dispatchEvent(new Event('input'))")
    page.wait(lambda: "weight=0" in page.driver.current_url)
    page.wait(lambda: page.ids() == client.get("/search?text=green&k=30").ids)
    page.one("#picture-remove").click()
    page.wait(lambda: "like" not in page.driver.current_url)
    assert not page.see("#picture") and not page.see("#weight-row")


def test_a_picture_by_file_by_drop_and_by_paste(page: Page, client: Client, searcher: Searcher, tmp_path: Path) -> None:
    row = next(row for row in searcher.index.meta(range(40)).to_pylist() if row["key"] == "000000007")
    picture = tmp_path / "query.jpg"
    picture.write_bytes(search.fetch_image(row))
    page.driver.get(client.url)
    page.wait(lambda: page.see("#welcome"))
    page.one("#file").send_keys(str(picture))
    assert page.ids()[0] == row["id"] and page.see("#picture img")
    expected = page.ids()
    hand_over = """
      const [event, name, address] = arguments;
      return fetch(address).then((r) => r.blob()).then((blob) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([blob], "x.jpg", { type: "image/jpeg" }));
        const detail = { bubbles: true, cancelable: true, [name]: transfer };
        document.dispatchEvent(event === "paste" ? new ClipboardEvent(event, detail) : new DragEvent(event, detail));
      })"""
    for number, (event, name) in enumerate((("drop", "dataTransfer"), ("paste", "clipboardData")), 2):
        page.run(hand_over, event, name, f"image/{row['id']}")
        page.wait(lambda number=number: f"picture={number}" in page.driver.current_url)
        assert page.ids() == expected
    page.driver.refresh()
    assert "Add it once more" in page.problem()


def test_the_keyboard_is_enough(page: Page, client: Client) -> None:
    from selenium.webdriver.common.keys import Keys

    page.driver.get(client.url)
    page.wait(lambda: page.see("#examples a"))
    page.press("/")
    assert page.focused().get_attribute("id") == "text"
    page.press("a red star", Keys.ENTER)
    ids = page.ids()
    page.press(Keys.ARROW_DOWN)
    assert int(page.focused().get_attribute("data-id")) == ids[0]
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert int(page.focused().get_attribute("data-id")) == ids[2]
    columns = len(page.run("return getComputedStyle(document.getElementById('grid')).gridTemplateColumns").split())
    page.press(Keys.ARROW_DOWN)
    assert int(page.focused().get_attribute("data-id")) == ids[2 + columns]
    outline = page.run("return getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px", "focus is visible"
    page.press(Keys.HOME, Keys.ENTER)
    page.wait(lambda: f"like={ids[0]}" in page.driver.current_url)
    page.results()
    page.press(Keys.ESCAPE)
    assert page.focused().get_attribute("id") == "text"
    stops = page.run("return [...document.querySelectorAll('#grid a')].filter((a) => a.tabIndex === 0).length")
    assert stops == 2, "the grid is one stop for the tab key, and its picture's original another"


def test_a_phone_shows_two_columns_and_nothing_sticks_out(page: Page, client: Client) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.driver.get(f"{client.url}/?q=green&like=3")
        page.results()
        assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert (
            len(page.run("return getComputedStyle(document.getElementById('grid')).gridTemplateColumns").split()) == 2
        )
        assert all(button.size["width"] >= 32 for button in page.see(".bar button")), "fingers hit the buttons"
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_toggles_and_filters_stand_in_the_address(page: Page, client: Client) -> None:
    page.driver.get(f"{client.url}/?q=x")
    page.results()
    page.one("#diverse").send_keys(" ")
    page.wait(lambda: "diverse=1" in page.driver.current_url)
    page.one("#collapse").send_keys(" ")
    page.wait(lambda: "collapse=1" in page.driver.current_url)
    page.one("#where").send_keys("width > 64\n")
    page.wait(lambda: len(page.results()) <= 3)
    page.driver.refresh()
    assert 1 <= len(page.results()) <= 3
    assert page.one("#diverse").is_selected() and page.one("#where").get_attribute("value") == "width > 64"


def test_back_leaves_a_search_however_often_it_was_sent(page: Page, client: Client) -> None:
    for address in ("/?q=x", "/?q=y"):
        page.driver.get(f"{client.url}{address}")
        page.results()
    page.one("#where").send_keys("width > 64\n")  # changes the condition, and sends it
    page.wait(lambda: len(page.results()) <= 3)
    page.one("#text").send_keys("\n")
    page.results()
    page.driver.back()
    page.wait(lambda: page.driver.current_url == f"{client.url}/?q=x")


def test_errors_say_what_to_do(page: Page, searcher: Searcher) -> None:
    with serving(searcher) as client:
        page.driver.get(f"{client.url}/?q=x&where=width+%3E%3E%3E+3")
        assert ">" in page.problem() and not page.see("#problem button")
        page.one("#where").clear()
        page.one("#where").send_keys("width > 100000\n")
        page.wait(lambda: "Nothing found" in page.problem())
    page.one("#where").clear()
    page.one("#where").send_keys("\n")
    page.wait(lambda: "does not answer" in page.problem())
    assert "fusion serve" in page.problem()
    with serving(searcher, port=int(client.url.rpartition(":")[2])):
        page.one("#problem button").click()
        assert len(page.results()) == 30


def test_what_is_no_picture_is_refused_before_and_after_sending(page: Page, client: Client, tmp_path: Path) -> None:
    for name, content, word in (("a.txt", b"words", "no picture"), ("b.jpg", photo(1)[:700], "image")):
        (tmp_path / name).write_bytes(content)
        page.driver.get(client.url)
        page.wait(lambda: page.see("#welcome"))
        page.one("#file").send_keys(str(tmp_path / name))
        assert word in page.problem()


def test_a_token_is_asked_for_and_pictures_come_with_it(page: Page, searcher: Searcher) -> None:
    with serving(searcher, token=TOKEN) as client:
        page.driver.get(f"{client.url}/?q=a+red+star")
        page.wait(lambda: page.see("#login"))
        page.one("#token").send_keys("wrong\n")
        page.wait(lambda: "wrong" in page.one("#login-problem").text)
        page.one("#token").clear()
        page.one("#token").send_keys(f"{TOKEN}\n")
        assert len(page.results()) == 30 and not page.see("#login")
        assert TOKEN not in page.run("return document.cookie + JSON.stringify({...sessionStorage, ...localStorage})")
        page.driver.refresh()
        page.results()
        page.driver.delete_all_cookies()
