"""A user's functions as tools: described by their signatures, checked, and kept from harming a run."""

import asyncio

import own_tools
import pytest
from test_tools_environment import call, played, turn

from megatron_opd.config.environment import EnvironmentConfig
from megatron_opd.rollout.environments import functions
from megatron_opd.rollout.environments.build import build_kind
from megatron_opd.rollout.environments.refusals import problem_with


def parameters():
    return functions.schema_of(own_tools.weather, "own_tools:weather")["function"]["parameters"]


def test_the_schema_is_the_signatures():
    kind = build_kind(EnvironmentConfig(name="tools", tools=["own_tools:weather"]))
    (schema,) = kind.tools
    assert schema["type"] == "function"
    function = schema["function"]
    assert (function["name"], function["description"]) == ("weather", "The weather of a city.")
    assert function["parameters"]["required"] == ["city"]
    assert function["parameters"]["properties"]["days"] == {"type": "integer", "description": "How many days."}
    assert "return" not in function


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"city": "Ulm"}, ""),
        ({"city": "Ulm", "days": 3, "unit": "F", "tags": ["a"]}, ""),
        ({"city": "Ulm", "tags": None}, ""),
        ({}, "the argument 'city' is missing"),
        ({"city": ["Ulm"]}, "the argument 'city' must be of type string"),
        ({"city": "Ulm", "days": "3"}, "the argument 'days' must be of type integer"),
        ({"city": "Ulm", "days": 3.5}, "the argument 'days' must be of type integer"),
        ({"city": "Ulm", "days": True}, "the argument 'days' must be of type integer"),
        ({"city": "Ulm", "unit": "K"}, "the argument 'unit' must be one of 'C', 'F'"),
        ({"city": "Ulm", "tags": ["a", 1]}, "the argument 'tags[1]' must be of type string"),
        ({"city": "Ulm", "self": 1}, "there is no argument 'self'; there are: city, days, unit, tags"),
    ],
)
def test_arguments_are_checked_against_it(arguments, problem):
    assert problem_with(arguments, parameters()) == problem


def test_schemas_of_other_origin():
    inner = {"type": "object", "properties": {"n": {"type": "number", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    schema = {"properties": {"o": inner, "x": {"anyOf": [{"type": "null"}, {"type": ["string", "integer"]}]}, "y": {}}}
    for good in ({}, {"o": {"n": 1.5}}, {"x": None}, {"x": 3}, {"y": [{}]}):
        assert problem_with(good, schema) == ""
    assert problem_with({"o": {}}, schema) == "the argument 'o.n' is missing"
    assert problem_with({"o": {"n": 10}}, schema) == "the argument 'o.n' must be at most 9"
    assert problem_with({"o": {"n": -1}}, schema) == "the argument 'o.n' must be at least 0"
    assert problem_with({"x": 1.5}, schema) == "the argument 'x' must be of type null"
    assert problem_with({"z": 1}, schema | {"additionalProperties": True}) == ""
    assert problem_with({"z": 1}, {}) == "there is no argument 'z'; there are: none"
    of_any = {"properties": {"o": {"type": "object", "additionalProperties": {"type": "integer"}}}}
    assert problem_with({"o": {"k": "v"}}, of_any) == "the argument 'o.k' must be of type integer"


def said(name, *, tools=None, **arguments):
    (reply,) = played(turn(call(name, **arguments)), tools=tools or [f"own_tools:{name}"])
    return reply.messages[0]["content"], reply.failures


def test_what_it_returns_is_told_as_text():
    assert said("weather", city="Köln") == ('{"city": "Köln", "days": 1, "unit": "C", "tags": null}', {})
    assert said("slowly", seconds=0.0) == ("done", {})
    assert said("fails", how="odd") == ("{1, 2}", {})
    assert len(said("fails", how="flood")[0]) == functions.MAX_CHARACTERS


def test_a_function_that_fails_is_told_and_counted():
    text, failures = said("fails", how="x")
    assert (text[:17], len(text), failures) == ("Error: ValueError", 1000, {"error": 1})
    for how in ("exit", "stop"):
        assert said("fails", how=how)[1] == {"error": 1}


def test_an_async_function_that_takes_too_long():
    tool = functions.Function(own_tools.slowly)
    outcome = asyncio.run(tool.call({"seconds": 600.0}, 0.05))
    assert (outcome.failure, outcome.text) == ("timeout", "Error: the tool was given up after 0.05 seconds")


def test_an_async_function_that_ends_the_program_is_told_and_counted():
    (reply,) = played(turn(call("leaves", status=7)), tools=["own_tools:leaves"])
    assert reply.messages[0]["content"] == "Error: RuntimeError: SystemExit(7)"
    assert reply.failures == {"error": 1}
