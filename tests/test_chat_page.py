"""The page at the server's address: what is served, what is kept of what users say, and all of it in a browser."""

import base64
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from support.browser import Browser, Page
from support.served import asking, coloured, listening, post, seeing
from support.small_student import ANSWER, DREAM, LABELS, TEXTS, small_tokenizer

from bundle.load import Student
from distill.errors import BadInput
from distill.learning.feedback import Feedback, keep_said, read_feedback
from distill.mining.triplets import LENSES
from distill.serve.app import create_app
from distill.serve.guard import Allowed
from distill.serve.page import FILES
from distill.serve.scheduler import Scheduler
from distill.serve.shelf import Shelf
from distill.serve.student import Offer
from distill.teacher.open_source import open_source

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTION = TEXTS[0]
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
OTHER = DREAM.replace("a ball", "the rain")
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "feedback.jsonl"


@pytest.fixture(scope="module")
def shelf(dreamer: Path, smollm2: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """`run` keeps what is said of it, `seer` sees and keeps nothing."""
    model, tokenizer = open_source(dreamer).backbone(256).eval(), small_tokenizer(smollm2)
    run, seer = Student("run", model, tokenizer, "Be brief."), seeing(model, tokenizer, tmp_path_factory.mktemp("eyes"))
    shelf = Shelf([Offer(lambda: run, True, 0.0, 2.0, partial(keep_said, kept)), Offer(lambda: seer, True, 0.0, 1.0)])
    yield shelf
    shelf.close()


@pytest.fixture(scope="module")
def app(shelf: Shelf) -> Starlette:
    return create_app(shelf)


def get(app: Starlette, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    return asking(app, lambda asked: asked.request(method, path, headers=headers))


def test_browsers_get_the_page_and_programs_what_ollama_says(app: Starlette) -> None:
    for accept in ("*/*", "application/json", ""):
        told = get(app, "/", accept=accept)
        assert (told.text, told.headers["content-type"]) == ("Ollama is running", "text/plain; charset=utf-8")
    assert get(app, "/", "HEAD").status_code == 200
    page = get(app, "/", **BROWSER)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?! src)|<style|\sstyle=|\son\w+=", page.text)
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert sorted(f"/{name}" for name in named if name != "data:,") == sorted({*FILES} - {"/"})
    for path in FILES:
        text = get(app, path, **BROWSER).text
        assert not re.search(r"https?:|@import|\burl\((?!#)|innerHTML", text), path  # it fetches nothing of others


def test_the_page_is_open_where_the_rest_wants_a_token(shelf: Shelf) -> None:
    app = create_app(shelf, Allowed("secret"))
    assert all(get(app, path, **BROWSER).status_code == 200 for path in FILES)
    assert post(app, "/feedback", {"model": "run"}).status_code == 401


def said(verdict: str, better: str = "", **more: Any) -> dict[str, Any]:
    whole = {"thinking": DREAM, "content": ANSWER, "verdict": verdict, "better": better}
    return {"model": "run", "messages": ASKED, **whole, **more}


def test_what_is_said_of_answers_is_kept_as_a_chat_keeps_it(app: Starlette, kept: Path) -> None:
    kept.unlink(missing_ok=True)
    assert post(app, "/feedback", said("good")).json() == {"status": "success"}
    assert post(app, "/feedback", said("better", "It falls.")).status_code == 200
    turns: Any = [{"role": "system", "content": "Be brief."}, *ASKED]
    wanted = [Feedback(turns, DREAM, ANSWER, "good"), Feedback(turns, DREAM, ANSWER, "better", "It falls.")]
    assert read_feedback(kept) == wanted
    odd = "It falls.\u2028Down.\x85"
    assert post(app, "/feedback", said("better", odd)).status_code == 200
    wanted.append(Feedback(turns, DREAM, ANSWER, "better", odd))
    assert read_feedback(kept) == wanted, "a line break of Unicode is none of a file's"
    for reason in ("length", "stop"):
        assert post(app, "/feedback", said("good", done_reason=reason)).status_code == 200
        wanted.append(Feedback(turns, DREAM, ANSWER, "good", cut=reason == "length"))
    assert read_feedback(kept) == wanted
    own: Any = [{"role": "system", "content": "Talk like a pirate."}, *ASKED]
    assert post(app, "/feedback", said("good", messages=own)).status_code == 200
    wanted.append(Feedback(own, DREAM, ANSWER, "good"))
    assert read_feedback(kept) == wanted, "a conversation with a system message of its own reads no other"
    wrong: list[tuple[dict[str, Any], int, str]] = [
        (said("fine"), 400, "'fine' is none of good, bad, better"),
        (said("better", " "), 400, "better is empty"),
        (said("good", messages=[]), 400, "must be a conversation that ends with a question"),
        (said("good", messages=[*ASKED, {"role": "assistant", "content": ANSWER}]), 400, "ends with a question"),
        (said("good", content=3), 400, "content: a number instead of a string"),
        (said("good", model="seer"), 400, "seer:latest: only a run keeps feedback"),
        (said("good", model="none"), 404, "model 'none' not found"),
    ]
    for body, status, words in wrong:
        refused = post(app, "/feedback", body)
        assert (refused.status_code, words in refused.json()["error"]) == (status, True), refused.text
    assert read_feedback(kept) == wanted


def test_feedback_on_a_picture_keeps_what_was_read_of_it(shelf: Shelf, app: Starlette, kept: Path) -> None:
    kept.unlink(missing_ok=True)
    (seer,) = (served for served in shelf.students.values() if served.sees)
    object.__setattr__(seer.offer, "keep", partial(keep_said, kept))
    turns = [{**ASKED[0], "images": [coloured("red")]}]
    assert post(app, "/feedback", said("bad", model="seer", messages=turns)).status_code == 200
    object.__setattr__(seer.offer, "keep", None)
    (line,) = read_feedback(kept)
    picture = base64.b64decode(coloured("red"))
    assert line.messages == [{"role": "user", "content": seer.offer.load().asked(QUESTION, [picture])}]
    assert line.messages[0]["content"].count("ball⟩") == 5


# In a browser.


def opened(browser: Browser, url: str, **how: Any) -> Page:
    page = browser.open(f"{url}/", **how)
    page.wait("document.querySelector('#student').options.length > 1")
    return page


def ask(page: Page, text: str = QUESTION) -> None:
    page.eval("document.querySelector('#question').focus()")
    page.write(text)
    page.press("Enter")
    done(page)


def done(page: Page) -> None:
    page.wait("document.querySelector('#stop').hidden && !!document.querySelector('.reply:last-child .actions')")


def texts(page: Page, selector: str) -> list[str]:
    return page.eval(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")


def answer(app: Starlette, thinking: str, model: str = "run") -> str:
    turns = [*ASKED, {"role": "assistant", "content": "", "thinking": thinking}]
    body = {"model": model, "messages": turns, "stream": False, "options": {"temperature": 0}}
    return post(app, "/api/chat", body).json()["message"]["content"]


def test_a_dream_is_shown_and_changed_by_keys_alone(browser: Browser, app: Starlette, kept: Path) -> None:
    kept.unlink(missing_ok=True)
    with listening(app) as url:
        page = opened(browser, url, width=390, height=844, dark=True)
        page.write(QUESTION)  # the field has the focus from the first
        page.press("Enter")
        done(page)
        assert texts(page, ".question p") == [QUESTION]
        assert texts(page, ".lane h3") == list(LENSES)
        assert texts(page, ".slot .label") == ["a ball", "release", "falls to the floor"]
        assert texts(page, ".said") == [ANSWER]
        page.eval("document.querySelector('.slot').focus()")
        page.press("ArrowRight")
        assert page.eval("document.activeElement.textContent") == "release"
        page.press("Home")
        page.press("Enter")
        page.wait("document.querySelectorAll('#labels option').length > 0")
        assert set(page.eval("[...document.querySelectorAll('#labels option')].map((o) => o.value)")) == set(LABELS)
        page.eval("document.querySelector('#label').focus()")
        page.write("a comet")
        page.press("Enter")
        assert texts(page, "#change .error") == [
            f"⟨a comet⟩ is none of this student's {len(LABELS)} tokens; choose one of the list."
        ]
        page.eval("document.querySelector('#label').select()")
        page.write("the rain")
        page.press("Enter")
        done(page)
        assert texts(page, ".slot .label") == ["the rain", "release", "falls to the floor"]
        assert texts(page, ".slot.own") == ["the rain"]
        assert page.eval("document.activeElement.textContent") == "the rain"  # the focus is where it was
        assert texts(page, ".said") == [answer(app, OTHER)]
        page.eval("[...document.querySelectorAll('.actions button')].find((b) => b.textContent === 'Good').focus()")
        page.press("Enter")
        page.wait("!!document.querySelector('.actions [aria-pressed=true]')")
        assert [(line.dream, line.verdict) for line in read_feedback(kept)] == [(OTHER, "good")]
        assert page.eval("document.documentElement.scrollWidth") == 390
        assert page.errors == []
        assert all(address.startswith((url, "data:")) for address in page.requests)


def test_what_it_should_have_said_and_dropped_steps(browser: Browser, app: Starlette, kept: Path) -> None:
    kept.unlink(missing_ok=True)
    with listening(app) as url:
        page = opened(browser, url)
        ask(page)
        page.click(".actions button:nth-of-type(3)")
        page.eval("document.querySelector('#better textarea').select()")
        page.write("It <b>falls</b>.")
        page.click("#better [type=submit]")
        page.wait("!!document.querySelector('.actions [aria-pressed=true]')")
        assert [line.better for line in read_feedback(kept)] == ["It <b>falls</b>."]
        page.click(".slot")
        page.click("#drop")
        done(page)
        assert texts(page, ".slot") == []
        page.click(".actions button:last-of-type")  # its own dream
        done(page)
        assert texts(page, ".slot .label") == ["a ball", "release", "falls to the floor"]
        page.click("#anew")
        page.click("#dreams")
        ask(page, "<i>What</i> happens when you drop a ball?")
        assert texts(page, ".question p") == ["<i>What</i> happens when you drop a ball?"]
        assert texts(page, ".lane") == []
        assert page.errors == []


def test_what_is_left_out_is_told(browser: Browser, app: Starlette) -> None:
    with listening(app) as url:
        page = opened(browser, url)
        ask(page, "the ball " * 300)
        (told,) = texts(page, ".reply .facts")
        assert re.search(r" s.*; the first \d+ tokens, with any system message, are left out: ", told)
        assert page.errors == []


def test_a_verdict_is_kept_with_what_the_answer_was_told(browser: Browser, app: Starlette, kept: Path) -> None:
    """An earlier answer that was written anew since was not there when it was said."""
    kept.unlink(missing_ok=True)
    with listening(app) as url:
        page = opened(browser, url)
        ask(page)
        ask(page, "And then?")
        page.eval("turns[0].replies[0].answer = 'Another.'")  # as a changed dream's may be
        page.eval("turns[1].replies[0].ended.done_reason = 'length'")
        page.click(".turn:last-child .actions button")
        page.wait("!!document.querySelector('.actions [aria-pressed=true]')")
        (line,) = read_feedback(kept)
        turns = [*ASKED, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "And then?"}]
        assert line.messages == [{"role": "system", "content": "Be brief."}, *turns]
        assert line.cut
        assert page.errors == []


def test_two_side_by_side_and_a_picture(browser: Browser, app: Starlette, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(base64.b64decode(coloured("red")))
    with listening(app) as url:
        page = opened(browser, url)
        assert page.eval("document.querySelector('#picture').disabled")
        choose = "(s) => { s.value = 'seer:latest'; s.dispatchEvent(new Event('change')); }"
        page.eval(f"[document.querySelector('#other')].forEach({choose})")
        ask(page)
        assert texts(page, ".reply h2") == ["run", "seer"]
        assert texts(page, ".said") == [ANSWER, ANSWER]
        left, right = page.eval(
            "[...document.querySelectorAll('.reply')].map((node) => node.getBoundingClientRect().top)"
        )
        assert left == right
        page.attach("#picture", tmp_path / "red.png")
        page.wait("document.querySelector('#pictures img')?.naturalWidth === 32")
        ask(page, "What is this?")
        assert page.eval("document.querySelector('.question img').naturalWidth") == 32
        assert texts(page, ".error:not(dialog *)") == ["messages[2].images: this student reads no pictures"]
        assert len(texts(page, ".turn:last-child .said")) == 2
        assert len(page.errors) == 1  # the browser itself tells of the answer 400
        page.resize(390, 844)
        page.settle()
        assert page.eval("document.documentElement.scrollWidth") == 390


def test_what_goes_wrong_is_said(browser: Browser, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    step, broken = Scheduler._step, [BadInput("out of order")]

    def fails(*args: Any) -> None:
        if broken:
            raise broken.pop()
        step(*args)

    with listening(create_app(shelf, Allowed("secret"))) as url:
        page = browser.open(f"{url}/")
        page.wait("!document.querySelector('#door').hidden")
        for token in ("wrong", "secret"):
            page.eval("document.querySelector('#token').select()")
            page.write(token)
            page.press("Enter")
            page.wait(
                "document.querySelector('#student').options.length > 1 || !document.querySelector('#notice').hidden"
            )
            assert texts(page, "#notice p")[0].startswith("unauthorized")
        page.wait("document.querySelector('#student').options.length > 1 && document.querySelector('#notice').hidden")
        monkeypatch.setattr(Scheduler, "_step", fails)
        ask(page)
        assert texts(page, "[role=alert].error:not(dialog *)") == ["out of order"]
        page.click(".reply .actions button")
        done(page)
        assert texts(page, ".said") == [ANSWER]
    ask(page)
    assert texts(page, "[role=alert].error:not(dialog *)") == [
        "The server can't be reached; is `dream serve` still running?"
    ]
