"""A run's page in a real browser: Chromium, driven by chromedriver over plain HTTP. Where these are
not, what needs them is skipped."""
import base64
import hashlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from data.runs import Record, Run, Verdict, write_run
from evaluate import printable
from research.page import PAGE, main, page

GOLD = '{"name": "lamp_on", "arguments": {"room": "hall"}}'
EVIL = ('</script><script>window.broken = 1</script><img src=x onerror="window.broken = 1"><!-- '
        "&lt; \x1b[2J\x00\u202e\ud800 ${1} ")
LONG = (EVIL + "word ") * 160 + "x" * 2000                       # of more than 20,000 characters


def verdict(right: bool, text: str = "", reason: str = "wrong value: room") -> Verdict:
    return Verdict(text or (GOLD if right else GOLD.replace("hall", "den")), right,
                   "" if right else reason, {})


def record(id: str, before: bool, after: bool, outcome: str = "adapted", **changes) -> Record:
    made = Record(
        id, request=f"Lamp in the hall, please ({id})", margin=0.5, uncertain=outcome != "certain",
        outcome=outcome, candidates={f"lamp_{i}": -float(i) for i in range(12)},
        base=verdict(before), answer=verdict(after),
        pairs=[{"request": "Lamp in the attic", "text": "y of the attic", "read_back": True}],
        rejected=[{"text": "a bad try", "reason": "unknown argument: y"}], losses=[2.0, 0.5, 0.25],
        norms=[9.0, 2.0, 1.0], seconds={"H": 1.0, "T": 0.5}, gold=GOLD, log_p=[], entropy=[],
        ids=[], prompt_tokens=2345)
    return replace(made, **changes)


RECORDS = [record("a", False, True, margin=0.7), record("b", True, False, margin=0.2),
           record("c", True, True, "certain", margin=0.99, pairs=[], rejected=[], losses=[]),
           record("d", False, False, "no pair", margin=0.4, pairs=[], losses=[])]
OTHERS = [replace(RECORDS[0], answer=verdict(False)), *RECORDS[1:3], record("e", False, False)]
HOSTILE = [record(f"{EVIL}{i}", False, True, request=LONG, gold=LONG, candidates={EVIL: -1.0},
                  base=verdict(False, LONG, EVIL), answer=verdict(True, LONG[999:]),
                  pairs=[{"request": LONG, "text": LONG, "read_back": False}],
                  rejected=[{"text": LONG, "reason": EVIL}]) for i in range(3)]
CONFIG = {"bench": "lamps", "tau": 0.95, "model": "tiny", "uses_labels": True}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """The addresses of pages of one run, of two, of a hostile one, and of 300 samples."""
    folder, urls = tmp_path_factory.mktemp("pages"), {}
    runs = {"one": RECORDS, "other": OTHERS, "hostile": HOSTILE,
            "large": [record(f"s{i}", i % 3 == 0, i % 2 == 0, request="A long prompt. " * 800,
                              margin=i / 300) for i in range(300)]}
    for name, records in runs.items():
        assert write_run(Run(folder / name, CONFIG, records), {})
    for name, shown in {**{name: [name] for name in runs}, "two": ["one", "other"]}.items():
        out = folder / f"{name}.html"
        assert main([*[str(folder / run) for run in shown], "--out", str(out)]) == 0
        urls[name] = out.as_uri()
    return urls


class Browser:
    """A session of WebDriver (w3.org/TR/webdriver2), with what these tests use of it."""

    def __init__(self, profile: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            try:
                self.send("/status")
                break
            except OSError:
                assert time.monotonic() < deadline and self.driver.poll() is None
                time.sleep(0.05)
        flags = ["headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "no-first-run", f"user-data-dir={profile}"]
        wanted = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"},
                  "goog:chromeOptions": {"args": [f"--{flag}" for flag in flags]}}
        self.url += "/session/" + self.send(
            "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def send(self, path: str, body: dict | None = None, method: str | None = None):
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, method=method,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str, width: int = 1300, scheme: str = "light") -> None:
        self.debug("Emulation.setDeviceMetricsOverride", width=width, height=800,
                   deviceScaleFactor=1, mobile=width < 500)
        self.debug("Emulation.setEmulatedMedia",
                   features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("/url", {"url": "about:blank"})
        self.send("/url", {"url": url})
        deadline = time.monotonic() + 30        # the driver may answer while it is still loading
        while self.ask("location.href + document.readyState") != f"{url}complete":
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def debug(self, command: str, **params) -> None:
        self.send("/goog/cdp/execute", {"cmd": command, "params": params})

    def ask(self, script: str, *args):
        return self.send("/execute/sync", {"script": f"return {script}", "args": args})

    def click(self, selector: str) -> None:
        found = self.send("/element", {"using": "css selector", "value": selector})
        self.send(f"/element/{next(iter(found.values()))}/click", {})

    def press(self, *keys: str) -> None:
        """Keys as a person presses them, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def listed(self) -> list[str]:
        return self.ask("[...document.querySelectorAll('#samples .id')].map(e => e.textContent)")

    def text(self, selector: str) -> str:
        return self.ask("document.querySelector(arguments[0]).innerText", selector)

    def texts(self, selector: str) -> list[str]:
        return self.ask("[...document.querySelectorAll(arguments[0])].map(e => e.textContent)",
                        selector)


DOWN, UP, ENTER, ESCAPE = "\ue015", "\ue013", "\ue007", "\ue00c"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.send("", method="DELETE")
    browser.driver.terminate()
    browser.driver.wait()


def test_a_sample_is_found_by_a_filter_and_opened_and_its_story_is_whole(browser, pages):
    browser.open(pages["one"])
    assert browser.listed() == list("abcd")
    browser.click("#filters [value=fixed]")
    assert browser.listed() == ["a"] and browser.text("#found") == "1 of 4 samples"
    browser.click("#samples a")
    told = browser.text("#told")
    for part in ("Lamp in the hall, please (a)", "u = 0.700", "τ = 0.95", "uncertain", "lamp_0",
                 "Lamp in the attic", "y of the attic", "read back", "1 rejected try", "2.000",
                 "0.250", "wrong value: room", "Gold answer", GOLD, "2,345 prompt tokens"):
        assert part in told, part
    assert (browser.texts("#told del"), browser.texts("#told ins")) == (["den"], ["hall"])
    assert "4 less likely" not in told and "6 less likely" in told
    browser.click("#told details summary")
    browser.click("#told section:nth-of-type(2) summary")
    assert "unknown argument: y" in browser.text("#told") and "a bad try" in browser.text("#told")
    assert browser.ask("document.querySelectorAll('#told svg circle').length") == 3
    assert "uses labels" in browser.text("header") and "+0.0" in browser.text("#runs")


@pytest.mark.parametrize("what, ids", [("all", "abcd"), ("fixed", "a"), ("harmed", "b"),
                                       ("uncertain", "abd"), ("no pair", "d")])
def test_each_filter_lists_its_samples_and_says_how_many_they_are(browser, pages, what, ids):
    browser.open(pages["one"])
    browser.click(f"#filters [value='{what}']")
    assert browser.listed() == list(ids)
    assert browser.texts("#filters [aria-pressed=true]") == [f"{what}{len(ids)}"]


def choose(browser: Browser, name: str, value: str) -> None:
    browser.ask("(e => { e.value = arguments[1]; e.dispatchEvent(new Event('change')) })"
                "(document.getElementById(arguments[0]))", name, value)


def test_samples_are_sorted_by_margin_and_filtered_by_reason(browser, pages):
    browser.open(pages["one"])
    choose(browser, "sort", "low")
    assert browser.listed() == list("bdac")
    choose(browser, "sort", "high")
    assert browser.listed() == list("cadb")
    choose(browser, "sort", "file")
    options = browser.texts("#reason option")
    assert options == ["Any reason", "answer: wrong value (2)", "rejected: unknown argument (3)"]
    choose(browser, "reason", "answer: wrong value")
    assert browser.listed() == list("bd")


def test_the_page_is_used_by_keys_alone(browser, pages):
    browser.open(pages["one"])
    browser.press("/", *"HALL (c")
    assert browser.listed() == ["c"]
    browser.press(ESCAPE)
    assert len(browser.listed()) == 4
    browser.press(DOWN, DOWN)
    assert browser.text("#told h2") == "b"
    browser.press(UP)
    assert browser.text("#told h2") == "a"
    browser.press(ENTER)
    assert browser.ask("document.activeElement.id") == "story"
    browser.press(ESCAPE)
    assert browser.ask("document.activeElement.closest('#samples') !== null")


@pytest.mark.parametrize("before, after, gone, new", [
    ("one two three four", "one 2 three five four", ["two"], ["2", " five"]),
    ("same", "same", [], []), ("", "all new", [], ["all new"]),
    ("a b c b d", "b c d b", ["a ", "b "], [" b"]),
    ('{"x": "Ä1"}', '{"x": "Ö1"}', ["Ä1"], ["Ö1"]),
    ("a " * 9000, "b " * 9000, ["a " * 8999 + "a"], ["b " * 8999 + "b"])],
    ids=["words", "nothing", "all", "order", "letters", "too long to compare"])
def test_the_words_that_changed_are_marked_and_no_others(browser, pages, before, after, gone, new):
    if browser.ask("typeof changes") != "function":
        browser.open(pages["one"])
    marked = browser.ask("changes(arguments[0], arguments[1]).map("
                         "parts => parts.filter(p => p.changed).map(p => p.text))", before, after)
    assert marked == [gone, new]
    assert browser.ask("changes(arguments[0], arguments[1]).map("
                  "parts => parts.map(p => p.text).join(''))", before, after) == [before, after]


def test_two_runs_stand_side_by_side_and_what_differs_can_be_listed(browser, pages):
    browser.open(pages["two"] + "#a")
    assert browser.listed() == list("abcde")
    left, right = browser.ask("[...document.querySelectorAll('.column')].map(e => {"
                              "const r = e.getBoundingClientRect(); return [r.left, r.top] })")
    assert left[0] < right[0] and left[1] == right[1]
    assert "they differ in: answer after" in browser.text("#told")
    assert len(browser.texts("#runs tbody tr")) == 2
    browser.click("#filters [value=differ]")
    assert browser.listed() == list("ade")
    browser.open(pages["two"] + "#e")
    assert "This run has no such sample." in browser.text("#told")


def test_text_of_models_and_data_is_text_whatever_it_holds(browser, pages):
    browser.open(pages["hostile"])
    assert browser.ask("[window.broken === undefined, document.images.length, "
                       "document.scripts.length, document.querySelectorAll('#told b').length]") == [
        True, 0, 2, 3]                                      # the two scripts are its own
    assert browser.text("#told h2") == printable(f"{EVIL}0").strip()
    texts = browser.texts("#told .text")
    assert texts[0] == texts[-1] == printable(LONG) and len(texts[0]) > 20_000
    assert browser.texts("#told .name") == [printable(EVIL)]
    assert not browser.ask("/[\\x00-\\x09\\x0b-\\x1f\\u202e]/.test(document.body.textContent)")
    assert browser.send("/se/log", {"type": "browser"}) == []       # nothing was blocked or failed


@pytest.mark.parametrize("name", ["one", "two", "hostile"])
def test_on_a_phone_nothing_is_wider_than_the_screen_and_a_story_replaces_the_list(
        browser, pages, name):
    browser.open(pages[name], width=390)
    assert browser.ask("document.documentElement.scrollWidth") == 390
    def visible(): return browser.ask("['samples', 'told'].map(id => "
                                      "document.getElementById(id).offsetParent !== null)")
    assert visible() == [True, False]
    browser.click("#samples a")
    assert visible() == [False, True]
    assert browser.ask("document.documentElement.scrollWidth") == 390
    assert browser.ask("[...document.querySelectorAll('#told *')].every("
                       "e => e.namespaceURI.endsWith('svg') || e.scrollWidth <= e.clientWidth ||"
                       " getComputedStyle(e).display === 'inline')")
    browser.click("#back")
    assert visible() == [True, False]


def test_it_is_dark_where_the_reader_likes_it_dark(browser, pages):
    shades = []
    for scheme in ("light", "dark"):
        browser.open(pages["one"], scheme=scheme)
        colors = browser.ask("[document.body, document.querySelector('.card')].map(e => "
                             "getComputedStyle(e).backgroundColor + getComputedStyle(e).color)")
        numbers = [list(map(int, re.findall(r"\d+", color))) for color in colors]
        shades.append([sum(number[:3]) - sum(number[3:]) for number in numbers])
    assert min(shades[0]) > 400 and max(shades[1]) < -400   # the ground less the letters


def test_all_of_300_samples_are_there_as_soon_as_the_page_is(browser, pages):
    browser.open(pages["large"])
    assert len(browser.listed()) == 300 and browser.text("#found") == "300 samples"


# ------------------------------------------------------------------------------ without a browser

def test_nothing_in_the_data_can_end_it_and_the_page_may_run_its_own_script_alone():
    text = page([Run(Path(EVIL[:9]), CONFIG, HOSTILE)])
    held = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1]
    assert "<" not in held and json.loads(held)["samples"][0]["request"] == printable(LONG)
    assert text.count("<script") == PAGE.read_text().count("<script")
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    own = re.search(r"<script>(.*?)</script>", text, re.S)[1].encode()
    assert base64.b64encode(hashlib.sha256(own).digest()).decode() in policy


def test_a_page_shows_one_run_or_two(pages, tmp_path, capsys):
    one = urllib.request.url2pathname(pages["one"].removeprefix("file://")).removesuffix(".html")
    assert main([one] * 3 + ["--out", str(tmp_path / "x.html")]) == 2
    assert "these are 3 runs: a page shows one, or two" in capsys.readouterr().err
    for name, request in (("lamp", "Turn it on"), ("door", "Open it")):
        assert write_run(Run(tmp_path / name, CONFIG, [record("ask-0", True, True,
                                                              request=request)]), {})
    assert main([str(tmp_path / "lamp"), str(tmp_path / "door")]) == 2
    assert "other samples under the same ids" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    assert write_run(Run(tmp_path / "none", CONFIG, []), {})
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "x.html")]) == 0
