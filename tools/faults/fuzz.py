"""Inputs that hypothesis makes up: settings, data rows, chat templates, and answers for rewards.

Each injection is a program of its own, so that one that hangs or crashes is seen: `main` tries some inputs from a seed
and prints what was wrong, as JSON.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import program
import warm
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from faults.kind import Played, kind

_END_S = 300.0
_EXAMPLES = 25
_QUICKSTART = yaml.safe_load((program.ROOT / program.CONFIG).read_text())
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@kind
def fuzzed_settings(rng: random.Random, directory: Path) -> Played:
    """A config with values of any type and size in random places: `check` accepts it, or says one thing."""
    return _apart("settings", rng)


@kind
def fuzzed_overrides(rng: random.Random, directory: Path) -> Played:
    """Random settings on the command line."""
    return _apart("overrides", rng)


@kind
def fuzzed_rows(rng: random.Random, directory: Path) -> Played:
    """A data file with random rows, lines and bytes."""
    return _apart("rows", rng)


@kind
def fuzzed_template(rng: random.Random, directory: Path) -> Played:
    """A chat template of random pieces."""
    return _apart("template", rng)


@kind
def fuzzed_answers(rng: random.Random, directory: Path) -> Played:
    """Random answers to graders: a number from 0 to 1, the same one twice, in time."""
    return _apart("answers", rng)


def _apart(what: str, rng: random.Random) -> Played:
    number = rng.randrange(1 << 32)
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom faults import fuzz\nfuzz.main({what!r}, {number})"
    played = Played({"what": what, "seed": number})
    try:
        done = warm.run(["-c", code], env=program.environment(), timeout=_END_S)
    except subprocess.TimeoutExpired:
        played.wrong = [f"hung for {_END_S:g} s"]
        return played
    lines = done.stdout.splitlines()
    try:
        played.wrong = json.loads(lines[-1])
    except (IndexError, ValueError):
        played.wrong = [f"exit code {done.returncode}: {done.stderr[-500:]}"]
    return played


def main(what: str, number: int) -> None:
    """Try inputs of one sort; prints a list of what was wrong."""
    strategy, attempt = SORTS[what]
    wrong: list[str] = []

    @seed(number)
    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def trial(drawn: Any) -> None:
        try:
            wrong.extend(attempt(drawn))
        except BaseException as error:  # SystemExit too: nothing may end the program
            wrong.append(f"{type(error).__name__}: {error} for {drawn!r}"[:600])

    trial()
    print("\n" + json.dumps(wrong), flush=True)


def _checked(*arguments: str, drawn: Any) -> list[str]:
    """Complaints about a `check`, which may accept its input, or end with one error in words for people."""
    done = program.here("check", *arguments)
    said = f"{done.stdout}\n{done.stderr}"
    if done.returncode == 0:
        return []
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode not in (1, 2) or "Traceback" in said or (done.returncode == 1 and len(errors) != 1):
        return [f"exit code {done.returncode}, {said[-300:]} for {drawn!r}"[:900]]
    return []


def _checked_file(name: str, content: bytes, *arguments: str, drawn: Any) -> list[str]:
    """The same with a file of that name, whose path takes the place of FILE."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(content)
        return _checked(*(argument.replace("FILE", str(path)) for argument in arguments), drawn=drawn)


def _paths(tree: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places of a nested config."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in [(*before, key), *_paths(value, (*before, key))]]


_EDIT = st.tuples(st.sampled_from(_paths(_QUICKSTART)), _JSON | st.just("..remove"))


def _try_settings(edits: list[tuple[tuple[Any, ...], Any]]) -> list[str]:
    tree = json.loads(json.dumps(_QUICKSTART))
    for (*way, last), value in edits:
        at = tree
        try:
            for key in way:
                at = at[key]
            if value == "..remove":
                del at[last]
            else:
                at[last] = value
        except (KeyError, IndexError, TypeError):
            continue  # an edit before has taken the place away
    try:
        text = yaml.safe_dump(tree, allow_unicode=True).encode()
    except (UnicodeEncodeError, yaml.YAMLError):
        return []
    return _checked_file("config.yaml", text, "FILE", drawn=edits)


_NAMES = st.sampled_from([".".join(map(str, path)) for path in _paths(_QUICKSTART)]) | st.text(max_size=12)


def _try_overrides(given: list[tuple[str, Any]]) -> list[str]:
    texts = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given]
    return _checked(program.CONFIG, *("--", *texts) if any(t.startswith("-") for t in texts) else texts, drawn=texts)


_ROW = st.fixed_dictionaries(
    {"prompt": st.text(max_size=30) | _JSON},
    optional={"answer": st.text(max_size=8) | _JSON, "messages": _JSON, "teacher": _JSON, "weight": _JSON},
)
_LINE = (
    _ROW.map(lambda row: json.dumps(row).encode())
    | _JSON.map(lambda v: json.dumps(v).encode())
    | st.binary(max_size=40)
)


def _try_rows(lines: list[bytes]) -> list[str]:
    given = (program.CONFIG, "data.train=[{name: add, path: FILE}]")
    return _checked_file("rows.jsonl", b"\n".join(lines), *given, drawn=lines)


_PIECES = st.sampled_from(
    [
        *("{% for m in messages %}", "{% endfor %}", "{{ m.role }}", "{{ m['content'] }}", "{{ messages[0].content }}"),
        *(
            "{% if add_generation_prompt %}",
            "{% endif %}",
            "assistant:",
            "{{ bos_token }}",
            "{{ eos_token }}",
            "{{",
            "%}",
        ),
        *("{{ 1 / 0 }}", "{{ messages[9].x.y }}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "\n"),
        *("{% generation %}", "{% endgeneration %}", "{{ messages | tojson }}", "{% set x = namespace(a=1) %}", "\x00"),
        *("{{ strftime_now('%Y') }}", "{{ range(10 ** 9) | list }}", "{% include 'x' %}", "{% macro f() %}", "é日"),
    ]
)


def _try_template(pieces: list[str]) -> list[str]:
    given = (program.CONFIG, "data.chat_template=FILE")
    return _checked_file("template.jinja", "".join(pieces).encode(), *given, drawn=pieces)


_WORDS = st.sampled_from(
    [
        *(
            "7",
            "-3",
            "1,234.5",
            "1e400",
            "2/3",
            "½",
            "٣",
            "####",
            "#### 7",
            "\\boxed{",
            "}",
            "\\boxed{7}",
            "\\frac{1}{2}",
        ),
        *(
            "\\sqrt",
            "$",
            "x^2 + 1",
            "<think>",
            "</think>",
            "The answer is",
            "\n",
            "\\text{m}",
            "10^{10^{10}}",
            "%",
            "nan",
        ),
        *("9" * 400, "((((", "\\int_0^1 x dx", "{1, 2}", "[0, 1)", "x = 7", "\\infty", "\x00", "\ud800", "é"),
    ]
)
_ANSWER = st.lists(_WORDS | st.text(max_size=6), max_size=8).map(" ".join)


def _try_answers(drawn: tuple[str, str]) -> list[str]:
    from megatron_opd.core.types import Prompt
    from megatron_opd.rewards import build_reward

    name, text = drawn
    reward = build_reward(name)
    prompt = Prompt(index=0, token_ids=(1,), text="?", answer="7", source="s")
    first, again = (reward.grade([(prompt, text)]) for _ in range(2))
    wrong = [] if first == again else [f"{name}: {first} and then {again} for {text!r}"]
    return wrong + ([] if len(first) == 1 and 0 <= first[0] <= 1 else [f"{name}: {first} for {text!r}"])


SORTS: dict[str, tuple[Any, Callable[[Any], list[str]]]] = {
    "settings": (st.lists(_EDIT, min_size=1, max_size=3), _try_settings),
    "overrides": (st.lists(st.tuples(_NAMES, _JSON), min_size=1, max_size=2), _try_overrides),
    "rows": (st.lists(_LINE, min_size=1, max_size=4), _try_rows),
    "template": (st.lists(_PIECES, min_size=1, max_size=8), _try_template),
    "answers": (st.tuples(st.sampled_from(["exact", "gsm8k", "math"]), _ANSWER), _try_answers),
}
