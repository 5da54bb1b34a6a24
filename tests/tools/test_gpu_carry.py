"""Wheels in folders of a limited size, and put together again: the same bytes."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_machine import carry, install, pieces

ROOT = Path(__file__).resolve().parents[2]


def files(folder, *sizes):
    folder.mkdir()
    made = []
    for number, size in enumerate(sizes):
        made.append(folder / f"package{number}-1.0-py3-none-any.whl")
        made[-1].write_bytes(random.Random(number).randbytes(size))
    return made


def bytes_of(folder):
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".sha256")


@pytest.mark.parametrize("limit", [1, 7, 1000, 1001, 3000, 10_000])
def test_split_and_joined_is_the_same(tmp_path, limit):
    made = files(tmp_path / "in", *((20, 7, 0, 1) if limit < 100 else (3001, 999, 1000, 0, 2000)))
    pieces.write(pieces.plan([made[:2], made[2:]], limit), tmp_path / "out")
    folders = sorted((tmp_path / "out").iterdir(), key=lambda folder: int(folder.name))
    assert [folder.name for folder in folders] == [str(n + 1) for n in range(len(folders))]
    assert max(map(bytes_of, folders)) <= limit
    joined, lacking = pieces.join(tmp_path / "out", tmp_path / "joined")
    assert not lacking
    found = [*joined, *pieces.carried(tmp_path / "out", "*.whl")]
    assert {file.name: file.read_bytes() for file in found} == {file.name: file.read_bytes() for file in made}
    assert len(found) == len(made)


def test_the_first_group_needs_no_later_folder(tmp_path):
    small, large = files(tmp_path / "a", 10, 20), files(tmp_path / "b", 250)
    found = pieces.plan([small, large], 100)
    assert [(p.folder, p.source.parent.name, p.size) for p in found] == [
        (1, "a", 20), (1, "a", 10), (2, "b", 100), (3, "b", 100), (4, "b", 50),
    ]  # fmt: skip


def test_a_part_that_is_missing_or_damaged_is_named(tmp_path):
    made = files(tmp_path / "in", 250, 30)
    pieces.write(pieces.plan([made], 100), tmp_path / "out")
    (tmp_path / "out/2" / f"{made[0].name}.part-2-of-3").rename(tmp_path / "kept")
    joined, lacking = pieces.join(tmp_path / "out", tmp_path / "joined")
    assert (joined, lacking) == ([], [f"{made[0].name}: no part 2 of 3"])
    (tmp_path / "out/2" / f"{made[0].name}.part-2-of-3").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="the parts do not give the file that was cut"):
        pieces.join(tmp_path / "out", tmp_path / "joined")
    assert not (tmp_path / "joined" / made[0].name).exists()
    # Written again, with fewer folders: none of the old ones is left.
    pieces.write(pieces.plan([made], 1000), tmp_path / "out")
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["1"]


def a_wheel(folder, name, version, size):
    """A wheel of one module that pip takes."""
    import zipfile

    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"x = {version!r}\n" + "#" * size)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_installed_from_their_parts(tmp_path, capfd):
    made = [a_wheel(tmp_path, "whole_one", "1", 10), a_wheel(tmp_path, "cut_one", "2", 9000)]
    pieces.write(pieces.plan([[made[0]], [made[1]]], 5500), tmp_path / "carry")
    pieces.write(pieces.plan([[made[0]]], 10**6), tmp_path / "carry/downloads")  # what is no piece is left alone
    (tmp_path / "carry/1" / made[0].name).replace(tmp_path / "carry" / made[0].name)
    assert install.main([str(tmp_path / "carry"), str(tmp_path / "site")]) == 0
    assert "2 wheels" in capfd.readouterr().out
    assert "x = '1'" in (tmp_path / "site/whole_one.py").read_text()
    assert "x = '2'" in (tmp_path / "site/cut_one.py").read_text()
    (tmp_path / "site/cut_one.py").unlink()
    assert install.main([str(tmp_path / "carry"), str(tmp_path / "site")]) == 0  # the same wheels: nothing to do
    assert not (tmp_path / "site/cut_one.py").exists()
    assert install.main([str(tmp_path / "site"), str(tmp_path / "other")]) == 1


def call(*arguments):
    return subprocess.run(
        ["bash", ROOT / "tools/gpu_carry.sh", *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable}, text=True, capture_output=True, timeout=120,
    )  # fmt: skip


def test_a_dry_run_lists_files_and_sizes_and_writes_nothing(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pins\npydantic_core==2.1\nmegatron-core==0.16.1\n")
    there = tmp_path / "there.txt"
    there.write_text("PyYAML==6.0\n")
    downloads = tmp_path / "carry/downloads/base"
    downloads.mkdir(parents=True)
    (downloads / "pydantic_core-2.1-cp312-x.whl").write_bytes(b"x" * 3_000_000)
    (downloads / "pydantic_core-2.0-cp312-x.whl").write_bytes(b"x")
    wheel = tmp_path / "transformer_engine_torch-2.0-x.whl"
    wheel.write_bytes(b"x" * 1_500_000)
    before = sorted(tmp_path.rglob("*"))
    done = call("--dry-run", "--into", tmp_path / "carry", "--constraints", constraints, "--there", there,
                "--limit-mib", 1, "--wheel", wheel)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert "| carry/1 | pydantic_core-2.1-cp312-x.whl.part-1-of-3 | 1.0 |" in done.stdout
    assert "| carry/4 | transformer_engine_torch-2.0-x.whl.part-1-of-2 | 1.0 |" in done.stdout
    absent = next(line for line in done.stdout.splitlines() if line.startswith("not downloaded yet"))
    assert "megatron-core==0.16.1" in absent
    assert "PyYAML" not in absent
    assert "pydantic-core" not in absent
    assert "PyTorch part is missing" not in done.stdout


def test_wrong_arguments_are_one_line(tmp_path):
    done = call("--dry-run", "--constraints", tmp_path / "absent.txt")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "absent.txt" in done.stderr
    assert "at least 1" in call("--limit-mib", "0").stderr


def test_packages_are_those_of_the_constraints():
    pins = carry.read_pins(ROOT / "constraints.txt")
    loose = [name for name in carry.BASE if carry.normal(name) not in pins]
    assert loose == ["wheel"]
