"""The page of a run in a browser: it shows, sorts, filters and tells, without an error, and opens at once."""

import chromium
import numpy as np
import pytest
import viewed

from megatron_opd.tracking import view

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason=chromium.MISSING)
ORDER = "[...document.querySelectorAll('.card')].map((c) => Number(c.dataset.n))"
TIP = "document.getElementById('tip')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two steps; of the last, answer 2 is nasty."""
    run = tmp_path_factory.mktemp("runs") / "small & <b>"
    nasty = {"prompt": viewed.NASTY, "response": viewed.NASTY}
    answers = [viewed.scored(i, **(nasty if i == 2 else {})) for i in range(8)]
    answers[6] = viewed.scored(6, turns=2, calls=1, ended="max_turns")
    before = [viewed.scored(i, 5) for i in range(3)]
    for answer in answers[:4]:
        answer.columns["advantage"][:] = np.linspace(-1, 1, 11)
    view.view(viewed.run(run, {5: before, 10: answers}), run / "view.html", most_steps=9)
    return run / "view.html"


@pytest.fixture
def page(browser, small):
    browser.theme("light")
    browser.open(small)
    yield browser
    assert browser.said == []
    assert browser.asked == [small.as_uri()]


def choose(page, control, value):
    page.js(
        f"((c) => {{ c.value = '{value}'; c.dispatchEvent(new Event('change')); return c.value; }})"
        f"(document.getElementById('{control}'))"
    )


def texts_of(page, control):
    return page.js(f"[...document.getElementById('{control}').options].map((o) => o.text)")


def colour(page, selector):
    return page.js(f"getComputedStyle(document.querySelector({selector!r})).backgroundColor")


def test_it_shows_the_last_step(page):
    assert page.js("document.title") == "small & <b> · megatron-opd"
    assert texts_of(page, "step") == ["5", "10"]
    assert page.js("document.querySelectorAll('.card').length") == 8
    assert page.js("document.querySelectorAll('.card[data-n=\"7\"] .tokens > span').length") == 12
    assert page.js("document.querySelectorAll('.card[data-n=\"7\"] .tokens > .x').length") == 1  # not learnt
    assert page.js("document.querySelectorAll('#charts polyline').length") == 3
    assert "8 of 8 answers, 88 tokens" in page.js("document.getElementById('sum').textContent")


def test_it_says_who_wrote_what(page):
    first = "[...document.querySelectorAll('.card[data-n=\"7\"] .begins')].map((t) => t.dataset.who)"
    assert page.js(first) == ["turn 1", "environment", "turn 2"]
    later = "[...document.querySelectorAll('.card[data-n=\"6\"] .chip')].map((t) => t.textContent)"
    assert page.js(later) == ["reward 0.5", "2 turns, 1 call", "ended: max_turns"]


def test_texts_stay_texts(page):
    assert page.js("document.querySelector('.card[data-n=\"2\"] .prompt').textContent") == viewed.NASTY.replace(
        "\u202e", "\\u202e"
    )
    assert page.js("document.querySelectorAll('img, script[src], .card script, .card b b').length") == 0
    assert texts_of(page, "teacher") == ["all together", *viewed.TEACHERS]


def test_sorting_by_kl(page):
    totals = "[...document.querySelectorAll('.card .total b:first-of-type')].map((b) => Number(b.textContent))"
    assert (found := page.js(totals)) == sorted(found, reverse=True)
    choose(page, "sort", "least")
    assert (found := page.js(totals)) == sorted(found)
    choose(page, "sort", "order")
    assert page.js(ORDER) == list(range(8))
    choose(page, "sort", "best")
    assert page.js(ORDER) == [3, 7, 2, 6, 1, 5, 0, 4]
    choose(page, "teacher", "big")  # whose KL to the student grows with the answer's number
    choose(page, "sort", "total")
    assert page.js(ORDER) == list(range(8))[::-1]


def test_filters(page):
    choose(page, "sort", "order")
    assert texts_of(page, "source") == ["all", "gsm8k", "chat"]
    choose(page, "source", "chat")
    assert page.js(ORDER) == [1, 3, 5, 7]
    choose(page, "reward", "one")
    assert page.js(ORDER) == [3, 7]
    choose(page, "source", "")
    choose(page, "reward", "")
    page.js("(q => { q.value = 'QUESTION 5'; q.dispatchEvent(new Event('input')); })(document.getElementById('query'))")
    assert page.js(f"new Promise((done) => setTimeout(() => done({ORDER}), 200))") == [5]
    page.js("(q => { q.value = 'no such'; q.dispatchEvent(new Event('input')); })(document.getElementById('query'))")
    said = "document.getElementById('answers').textContent"
    assert page.js(f"new Promise((done) => setTimeout(() => done({said}), 200))") == "No answer passes these filters."


def test_a_token_of_the_list_leaves_the_answers_with_it(page):
    page.js("document.querySelector('#worst button').click()")
    assert page.js("document.querySelector('#worst [aria-pressed=true]') !== null")
    assert page.js("document.querySelectorAll('.card').length === new Set([...document.querySelectorAll('.mark')]"
                   ".map((m) => m.closest('.card'))).size")  # fmt: skip


def test_steps(page):
    page.js("document.getElementById('before').click()")
    assert page.js(ORDER) == [2, 1, 0] or sorted(page.js(ORDER)) == [0, 1, 2]
    assert page.js("document.getElementById('before').disabled")
    page.key("]", "]")
    assert page.js("document.querySelectorAll('.card').length") == 8


def test_colours_of_every_measure_in_light_and_dark(page):
    assert page.js("[...document.getElementById('by').options].map((o) => o.value)") == [
        "kl", "gap", "entropy", "surprise", "advantage"
    ]  # fmt: skip
    choose(page, "sort", "order")
    first, last = (f'.card[data-n="0"] .tokens > span:nth-child({i})' for i in (1, 12))
    choose(page, "by", "advantage")
    light = colour(page, first), colour(page, last)
    assert light[0] != light[1]  # -1 and 1
    page.theme("dark")
    assert {colour(page, first), colour(page, last)}.isdisjoint(light)
    assert colour(page, "body") != "rgb(255, 255, 255)"
    choose(page, "by", "kl")
    assert page.js("document.querySelectorAll('.tokens .far').length") > 0


def test_the_window_of_a_token(page):
    choose(page, "sort", "order")
    page.js("document.querySelector('.card').scrollIntoView({block: 'center', behavior: 'instant'})")
    page.point('.card[data-n="1"] .tokens > span:nth-child(2)')
    assert not page.js(f"{TIP}.hidden")
    assert page.js(f"[...{TIP}.querySelectorAll('caption')].map((c) => c.textContent)") == [
        "student", *viewed.TEACHERS
    ]  # fmt: skip
    assert page.js(f"[...{TIP}.querySelectorAll('table')].map((t) => t.rows.length)") == [5, 5, 5]
    assert "token 2 of 12" in page.js(f"{TIP}.textContent")
    page.point("h1")
    assert page.js(f"{TIP}.hidden")


def test_by_keyboard_alone(page):
    choose(page, "sort", "order")
    page.js("document.activeElement.blur()")
    page.key("j", "j")
    assert page.js("document.activeElement.closest('.card').dataset.n") == "0"
    page.key("ArrowRight")
    assert "token 2 of 12" in page.js(f"{TIP}.textContent")
    page.key("End")
    assert "token 12 of 12" in page.js(f"{TIP}.textContent")
    assert "student: " in page.js("document.getElementById('spoken').textContent")
    page.key("n", "n")
    assert page.js("document.querySelector('.tokens .at').classList.contains('far')")
    page.key("Escape")
    assert page.js(f"{TIP}.hidden")
    page.key("/", "/")
    assert page.js("document.activeElement.id") == "query"


@pytest.mark.slow
def test_500_answers_open_within_a_second(browser, tmp_path):
    """A second of the script's own time, which is about 0.1 s on an idle core."""
    rng = np.random.default_rng(0)
    answers = [viewed.scored(i, length=300, rng=rng) for i in range(500)]
    run = viewed.run(tmp_path / "run", {1: answers})
    view.view(run, run / "view.html", most_steps=1)
    browser.open(run / "view.html")
    assert browser.js("document.querySelectorAll('.card').length") == 500
    assert browser.js("performance.getEntriesByName('opened')[0].duration") < 1000
    assert (
        browser.js("document.querySelectorAll('.tokens > span').length") < 50_000
    )  # the others come when they are near
    assert browser.said == []
