"""loop.json as a file that people and disks change: every change is one error that names the key."""

import json

import pytest

from megatron_opd.core import marker

LOOP = {
    "step": 40,
    "version": 40,
    "prompts": {"add": 320, "max": 0},
    "skips": 0,
    "student": {"family": "qwen3", "hidden_size": 64, "rope_factor": None, "lora.targets": ["qkv"], "norm_eps": 1e-6},
    "layout": [2, 2, 1],
}


@pytest.fixture
def read(tmp_path):
    """Reads a checkpoint of step 40 whose loop.json is this text, or this object as JSON."""
    checkpoint = tmp_path / "step_00000040"
    checkpoint.mkdir()

    def read(content, name="step_00000040"):
        if name != checkpoint.name:
            (tmp_path / name).mkdir()
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / name / "loop.json").write_bytes(text)
        return marker.read(tmp_path / name)

    return read


def test_what_was_written_is_read(read):
    assert read(marker.text(LOOP).encode()) == LOOP
    assert read(LOOP) == LOOP  # as versions without a checksum wrote it
    assert marker.others(LOOP) == {"version": 40, "prompts": {"add": 320, "max": 0}, "skips": 0}


@pytest.mark.parametrize("key", ["step", "student", "layout"])
def test_a_missing_key(read, key):
    with pytest.raises(marker.DamagedMarker, match=f"^loop.json: {key} is missing$"):
        read({name: value for name, value in LOOP.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("step", 99, "step is 99, but the directory is step_00000040"),
        ("step", 0, "step is 0"),
        ("step", -40, "step is -40"),
        ("step", "40", 'step is "40"'),
        ("step", 40.0, "step is 40.0"),
        ("step", True, "step is true"),
        ("step", None, "step is null"),
        ("step", [40], r"step is \[40\]"),
        ("step", float("nan"), "step is NaN"),
        ("layout", [], r"layout is \[\]"),
        ("layout", [2, 2], r"layout is \[2, 2\]"),
        ("layout", [1] * 5, "layout is"),
        ("layout", [2, 0, 1], "layout.1 is 0"),
        ("layout", [2, 2, "1"], 'layout.2 is "1"'),
        ("layout", {"tensor": 2}, "layout is"),
        ("layout", "2,2,1", "layout is"),
        ("student", None, "student is null"),
        ("student", [], r"student is \[\]"),
        ("student", "qwen3", "student is"),
        ("student", {"family": {"name": "qwen3"}}, "student.family is"),
        ("student", {"lora.targets": [1, 2]}, "student.lora.targets is"),
    ],
)
def test_a_wrong_value(read, key, value, said):
    with pytest.raises(marker.DamagedMarker, match=f"^loop.json: {said}"):
        read({**LOOP, key: value})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"step": 40', "is not JSON"),
        (b"\x00" * 500, "is not JSON"),
        (b"\xff\xfe", "is not text"),
        (b"[]", r"must hold an object, not \[\]"),
        (b"null", "must hold an object, not null"),
        (b"40", "must hold an object, not 40"),
        (b'"step"', "must hold an object"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"step": 40, "step": 41}', "is not JSON.*: 'step' is there twice"),
        (b'{"step": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_a_file_that_holds_something_else(read, text, said):
    with pytest.raises(marker.DamagedMarker, match=f"^loop.json {said}"):
        read(text)


def test_there_is_no_file(tmp_path):
    with pytest.raises(marker.DamagedMarker, match=r"loop\.json cannot be opened: No such file"):
        marker.read(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda loop: loop["prompts"].update(add=321),
        lambda loop: loop["prompts"].pop("max"),
        lambda loop: loop.update(skips=1),
        lambda loop: loop.update(note="mine"),
        lambda loop: loop["student"].update(hidden_size=65),
        lambda loop: loop["layout"].append(1),
        lambda loop: loop.update(checksum="0" * 64),
        lambda loop: loop.update(checksum=1),
    ],
)
def test_an_edit_that_fits_the_schema_is_found_by_the_checksum_and_can_be_meant(read, edit):
    loop = json.loads(marker.text(LOOP))
    edit(loop)
    with pytest.raises(marker.DamagedMarker, match=r"not as it was written.*take the line \"checksum\" out too"):
        read(loop)
    del loop["checksum"]
    assert read(loop) == loop


def test_every_flipped_bit_is_found(read):
    """In each byte one of its bits: what is read is what was written, or nothing, or has a key that nobody knows."""
    whole = marker.text(LOOP).encode()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        try:
            found = read(bytes(flipped))
        except marker.DamagedMarker:
            continue
        assert found == LOOP or set(found) - set(LOOP), place


def test_a_copy_under_another_name_may_have_any_step(read):
    assert read(LOOP, name="step_00000100_best") == LOOP
    with pytest.raises(marker.DamagedMarker, match="step is 40, but the directory is step_00000100"):
        read(LOOP, name="step_00000100")
