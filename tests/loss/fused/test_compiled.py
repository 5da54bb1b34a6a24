"""Where the compiled kernels come from: the cache first, checked before it is mapped; a compiler; or a reason."""

import pwd
import re
import shutil
import sysconfig
from pathlib import Path

import psutil
import pytest
from program import assert_gone

from megatron_opd.loss.fused import compiled, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler here")
GOOD_COMPILER = """#!/bin/sh
echo called >> {calls}
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
"""


@pytest.fixture
def place(monkeypatch, tmp_path):
    """An empty cache, and as compiler a program that copies a library which is there."""
    return Place(monkeypatch, tmp_path, library=compiled.load().library._name)


class Place:
    """Where kernels are looked for and made."""

    def __init__(self, monkeypatch, tmp_path, *, library):
        self.set, self.dir, self.cache = monkeypatch.setenv, tmp_path, tmp_path / "cache"
        self.calls, self.library = tmp_path / "calls", tmp_path / "library.so"
        shutil.copy(library, self.library)
        self.set("MEGATRON_OPD_CACHE", str(self.cache))
        self.compiler(GOOD_COMPILER.format(calls=self.calls, library=self.library))

    def compiler(self, script):
        """Make this program the compiler; its name, which is part of a kernel's, stays."""
        (self.dir / "c++").write_text(script)
        (self.dir / "c++").chmod(0o755)
        self.set("CXX", str(self.dir / "c++"))

    def no_compiler(self):
        (self.dir / "c++").unlink(missing_ok=True)

    def kept(self):
        """The names in the cache."""
        return sorted(path.name for path in self.cache.iterdir())

    def compiled(self):
        """How often the compiler was called."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


def test_the_cache_is_looked_in_first_even_without_a_compiler(place):
    first = compiled.load()
    (name,) = place.kept()
    assert re.fullmatch(rf"kernels-[0-9a-f]{{16}}-{first.hash}\.so", name)
    assert first.note == ""
    assert compiled.load().hash == first.hash
    assert place.compiled() == 1
    place.no_compiler()
    place.cache.chmod(0o555)  # which root does not notice; nothing is written for others either
    try:
        again = compiled.load()
    finally:
        place.cache.chmod(0o755)
    assert (again.hash, again.note) == (first.hash, "")


def emptied(content):
    return b""


def cut(content):
    """Within its pages: mapping it works, touching what is not there is SIGBUS."""
    return content[: len(content) // 2]


def flipped(content):
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def padded(content):
    return content + b"\0"


def other(content):
    return b"#!/bin/sh\n"


@pytest.mark.parametrize("damage", [emptied, cut, flipped, padded, other])
def test_a_damaged_kernel_is_never_mapped_and_made_anew(place, damage):
    whole = compiled.load().hash
    (name,) = place.kept()
    path = place.cache / name
    path.write_bytes(damage(path.read_bytes()))
    found = compiled.load()
    assert (found.hash, found.note) == (whole, f"{path} is damaged")
    assert (compiled.load().note, place.compiled()) == ("", 2)
    path.write_bytes(damage(path.read_bytes()))
    place.no_compiler()
    with pytest.raises(compiled.NoKernels, match=r"is damaged; there is no C\+\+ compiler"):
        compiled.load()


def test_a_library_without_the_function_is_made_anew(place):
    foreign = next(Path(sysconfig.get_config_var("DESTSHARED")).glob("*.so")).read_bytes()
    whole = compiled.load().hash
    (name,) = place.kept()
    (place.cache / name).unlink()
    wrong = place.cache / name.replace(whole, compiled._hash(foreign))
    wrong.write_bytes(foreign)
    found = compiled.load()
    assert (found.hash, found.note) == (whole, f"{wrong} has no function megatron_opd_rows")


@pytest.mark.parametrize("wrong", [lambda: compiled.SOURCE, lambda: next(iter(compiled.HEADERS))])
def test_what_a_compiler_makes_wrong_stays_out_of_the_cache(place, wrong):
    place.compiler(GOOD_COMPILER.format(calls=place.calls, library=wrong()))
    with pytest.raises(compiled.NoKernels, match="what was compiled cannot be loaded"):
        compiled.load()
    assert place.kept() == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho 'no such instruction set' >&2; exit 1\n", "failed: no such instruction set"),
        ("#!/bin/sh\nexit 3\n", "failed: exit code 3"),
        ("#!/bin/sh\nkill -9 $$\n", "failed: exit code -9"),
        ("#!/bin/sh\nexit 0\n", "failed: exit code 0"),
        ("no program at all", "Exec format error"),
    ],
)
def test_a_compiler_that_fails_is_a_reason(place, script, said):
    place.compiler(script)
    with pytest.raises(compiled.NoKernels, match=said):
        compiled.load()
    assert place.kept() == []


def test_a_compiler_that_hangs_is_ended_with_its_children(place, monkeypatch):
    place.compiler(f"#!/bin/sh\nsleep 1000 & echo $! > {place.dir}/child\nwait\n")
    monkeypatch.setattr(compiled, "COMPILE_TIMEOUT_S", 1.0)
    with pytest.raises(compiled.NoKernels, match="took more than 1 s"):
        compiled.load()
    child = int((place.dir / "child").read_text())
    assert_gone([psutil.Process(child)] if psutil.pid_exists(child) else [])
    assert place.kept() == []


def test_no_compiler_and_an_empty_cache_is_a_reason(place):
    place.no_compiler()
    with pytest.raises(compiled.NoKernels, match=r"there is no C\+\+ compiler '.*' \(CXX names another one\)"):
        compiled.load()


def file_in_its_place(place, monkeypatch):
    (place.dir / "file").write_text("")
    place.set("MEGATRON_OPD_CACHE", str(place.dir / "file"))
    return "file cannot be read"


def home_is_a_file(place, monkeypatch):
    (place.dir / "home").write_text("")
    monkeypatch.delenv("MEGATRON_OPD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    place.set("HOME", str(place.dir / "home"))
    return "cannot be written to"


def read_only(place, monkeypatch):
    """As a file system is; modes do not stop root."""
    made = compiled.tempfile.mkdtemp

    def refuses(dir=None):
        if dir is not None:
            raise OSError(30, "Read-only file system")
        return made()

    monkeypatch.setattr(compiled.tempfile, "mkdtemp", refuses)
    return r"cache cannot be written to \(Read-only file system\)"


def nobody(place, monkeypatch):
    """A user without HOME and without an entry among the users, as containers have."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("MEGATRON_OPD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return "this user has no home directory"


def full(place, monkeypatch):
    """The disk fills up between compiling and keeping."""

    def refuses(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled.os, "fsync", refuses)
    return "No space left on device"


@pytest.mark.parametrize("prevent", [file_in_its_place, home_is_a_file, read_only, nobody, full])
def test_without_a_place_to_keep_it_the_kernel_runs_all_the_same_and_says_so(place, monkeypatch, prevent):
    whole = compiled._hash(place.library.read_bytes())
    said = prevent(place, monkeypatch)
    for times in (1, 2):
        found = compiled.load()
        assert found.hash == whole
        assert re.search(said, found.note)
        assert "compiled for this process alone" in found.note
        assert place.compiled() == times
