"""serving/routes/page.*: the page at / in a real Chromium: files, progress, answers, the memory, and the plot."""

import re
import shutil

import pytest

from benchmarks.serving.process import ROOT
from hypernet.doc_to_lora import DocToLoRA
from hypernet.serving.app import create_app
from hypernet.serving.state import ServerSettings
from tests.served import served

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
EXAMPLE = ROOT / "examples/fenda_elfax.txt"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    model = DocToLoRA.from_pretrained(ROOT / "assets/tiny").eval().requires_grad_(False)
    app = create_app(model, ServerSettings(directory=str(tmp_path_factory.mktemp("page"))))
    with served(app) as address:
        yield address


@pytest.fixture(scope="module")
def page(address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        found = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark").new_page()
        found.set_default_timeout(60_000)
        found.mistakes, found.hosts = [], set()
        found.on("console", lambda said: found.mistakes.append(said.text) if said.type == "error" else None)
        found.on("pageerror", lambda error: found.mistakes.append(str(error)))
        found.on("request", lambda request: found.hosts.add(request.url.split("/")[2]))
        found.on("dialog", lambda dialog: dialog.accept())
        found.goto(address)
        yield found
        browser.close()


def test_page_in_a_browser(page, address):
    """One visit, since a visit costs seconds: file, progress, four answers, plot, memory; then no mistake, no host."""
    expect = playwright.expect
    expect.set_options(timeout=60_000)
    page.set_input_files("#file", str(EXAMPLE))
    expect(page.locator("#document")).to_have_value(re.compile("Fenda Elfax"))
    page.fill("#question", "Who was the teacher of Fenda Elfax?")
    page.evaluate(
        "window.seen = []; new MutationObserver(() => seen.push([progress.hidden, progress.value, progress.max]))"
        ".observe(document.getElementById('progress'), {attributes: true})"
    )
    page.keyboard.press("Enter")  # from the question: no mouse
    page.wait_for_selector("#result table")
    rows = page.locator("#result tbody tr").all()
    assert [row.locator("th").inner_text() for row in rows][:2] == ["No context", "Adapter"]
    assert rows[1].locator("td.answer").inner_text() == "Olwin Corton"
    assert any(not hidden and 0 < value <= most for hidden, value, most in page.evaluate("seen"))

    said = page.locator("#breakeven-says").inner_text()
    assert page.locator("#plot svg line").count() >= 2
    page.focus("#length")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.locator("#length-shown").inner_text() == "6"
    assert page.locator("#breakeven-says").inner_text() != said or "never" in said

    memory = page.locator("#known tbody tr", has_text="Fenda Elfax")
    count = memory.count()
    assert count > 1 and memory.first.locator("td").nth(1).inner_text() == "fenda_elfax.txt"
    page.get_by_role("button", name="Write their adapters").click()
    expect(page.locator("#memory-status")).to_contain_text("adapters written")
    assert memory.first.locator("td").nth(2).inner_text() == "token, adapter"
    page.fill("#memory-question", "Who was the teacher of Fenda Elfax?")
    page.get_by_role("button", name="Ask and explain").click()
    page.wait_for_selector("#bars rect")
    assert "from the tier" in page.locator("#memory-status").inner_text()

    memory.first.get_by_role("button", name="Correct").click()
    page.get_by_label("Corrected text").fill("Fenda Elfax was taught by <b>Orla Wint</b>.")
    page.keyboard.press("Enter")
    corrected = page.locator("#known tbody tr", has_text="<b>Orla Wint</b>")
    corrected.wait_for()
    page.locator("summary").click()
    page.locator("#versions button").first.click()  # the correction is the last version
    corrected.wait_for(state="detached")
    memory.first.get_by_role("button", name="Forget").click()
    expect(page.locator("#memory-status")).to_contain_text("Forgotten")
    assert memory.count() == count - 1

    page.fill("#memory-question", " " * 3)  # refused by the server, told in one line
    page.set_input_files("#file", files=[{"name": "empty.txt", "mimeType": "text/plain", "buffer": b" "}])
    page.wait_for_selector("#status[role=alert]")
    assert "is empty" in page.locator("#status").inner_text()

    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{wide} px too wide for a phone"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input:not([type=hidden]), textarea, select, button, progress')]"
        ".filter(e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert page.hosts == {address.removeprefix("http://")}
    assert [text for text in page.mistakes if "400" not in text] == []


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_nothing_serious(page, scheme):
    """After the visit above, so with answers, memory, plot and an error on the page."""
    needed = "needs axe-core: pip install axe-playwright-python"
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=needed)
    page.emulate_media(color_scheme=scheme)
    found = axe.Axe().run(page).response["violations"]
    said = [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found]
    assert [one for one in said if one[1] in ("serious", "critical")] == []
