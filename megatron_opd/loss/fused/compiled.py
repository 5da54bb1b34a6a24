"""`kernels.cpp` as a shared library: found in the cache and checked, or compiled there at first use.

The compiler is called directly: the code needs no header of torch (seconds, not a minute), and several ranks that
start at once each compile into a file of their own and rename it, so no lock can be left behind by one that was killed.
A library's name ends in the hash of its content. It is compared before the library is mapped, because one that was cut
short would end the process with SIGBUS. The cache is read first: a compiler is needed only where it has nothing whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_opd.core import lifeline

SOURCE = Path(__file__).with_name("kernels.cpp")
HEADERS = tuple(SOURCE.with_name(name) for name in ("memory.h", "vectors.h"))
FUNCTION = "megatron_opd_rows"
_INSTRUCTIONS = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
"""By what torch finds; nothing for others. Not -march=native: the cache may be shared by machines that differ."""
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-shared",
    "-fPIC",
]
COMPILE_TIMEOUT_S = 300.0


class NoKernels(Exception):
    """There is no library, for the reason that the message gives."""


class _Unusable(Exception):
    """A file of the cache is no library of ours."""


@dataclass(frozen=True, slots=True)
class CompiledKernels:
    """A library that is loaded."""

    library: ctypes.CDLL
    hash: str
    """The start of its content's SHA-256: another compiler makes others, whose last bits may differ."""
    note: str = ""
    """What people should know about where it came from."""


def load() -> CompiledKernels:
    """The library for this machine. Raises NoKernels where there is none and none can be made."""
    compiler = os.environ.get("CXX", "c++")
    flags = [*_FLAGS, *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])]
    code = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    key = _hash(code + " ".join([compiler, *flags]).encode())
    notes: list[str] = []
    cache = _cache(notes)
    for path in _there(cache, key, notes):
        try:
            return CompiledKernels(_opened(path), path.stem.rpartition("-")[2])
        except _Unusable as error:
            notes.append(f"{path} {error}")
    try:
        with _scratch(cache, notes) as scratch:
            made = _compile(compiler, flags, scratch)
            return _kept(made, cache, key, notes)
    except (OSError, _Unusable, subprocess.SubprocessError) as error:
        raise NoKernels("; ".join([*notes, _reason(error)])) from None


def _cache(notes: list[str]) -> Path | None:
    """MEGATRON_OPD_CACHE, or a directory in the user's cache; None where there is no such place."""
    own, of_user = (os.environ.get(name) for name in ("MEGATRON_OPD_CACHE", "XDG_CACHE_HOME"))
    try:
        return Path(own) if own else Path(of_user or Path.home() / ".cache") / "megatron_opd"
    except RuntimeError:  # no HOME, and the user is in no table
        notes.append("this user has no home directory")
        return None


def _there(cache: Path | None, key: str, notes: list[str]) -> list[Path]:
    """The libraries of the cache that were made of this code in this way."""
    try:
        names = os.listdir(cache) if cache is not None else []
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{cache} cannot be read ({error.strerror})")
        return []
    assert cache is not None or not names
    return [cache / name for name in sorted(names) if cache and name.startswith(f"kernels-{key}-")]


def _opened(path: Path) -> ctypes.CDLL:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _Unusable(f"cannot be read ({error.strerror})") from None
    if path.name.rpartition("-")[2] != f"{_hash(content)}.so":
        raise _Unusable("is damaged")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unusable(f"cannot be loaded ({error})") from None
    if not hasattr(library, FUNCTION):
        raise _Unusable(f"has no function {FUNCTION}")
    return library


@contextlib.contextmanager
def _scratch(cache: Path | None, notes: list[str]) -> Iterator[Path]:
    """A directory to compile in: in the cache, or a temporary one where that cannot be written to."""
    inside = None
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            inside = tempfile.mkdtemp(dir=cache)
        except OSError as error:
            notes.append(f"{cache} cannot be written to ({error.strerror})")
    made = Path(inside or tempfile.mkdtemp())
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _compile(compiler: str, flags: list[str], scratch: Path) -> Path:
    """Raises OSError, SubprocessError."""
    if shutil.which(compiler) is None:
        raise OSError(f"there is no C++ compiler '{compiler}' (CXX names another one)")
    made = scratch / "kernels.so"
    said = ""
    for threads in (["-fopenmp"], []):  # some compilers come without the OpenMP library
        command = [compiler, *flags, *threads, str(SOURCE), "-o", str(made)]
        code, said = _run(command)
        if code == 0 and made.is_file():
            return made
    raise OSError(f"the C++ compiler '{compiler}' failed: {said.strip()[-400:] or f'exit code {code}'}")


def _run(command: list[str]) -> tuple[int, str]:
    """(exit code, what it said) of a program that gets COMPILE_TIMEOUT_S; its children end with it."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lifeline.end_with_parent,
    ) as process:
        try:
            said, _ = process.communicate(timeout=COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise OSError(f"the C++ compiler '{command[0]}' took more than {COMPILE_TIMEOUT_S:g} s") from None
    return process.returncode, said.decode(errors="replace")


def _kept(made: Path, cache: Path | None, key: str, notes: list[str]) -> CompiledKernels:
    """What was compiled, loaded, and moved into the cache where that takes files. Raises OSError, _Unusable."""
    content_hash = _hash(made.read_bytes())
    named = made.replace(made.with_name(f"kernels-{key}-{content_hash}.so"))
    library = _opened(named)  # what cannot be loaded stays out of the cache
    is_kept = False
    if cache is not None and cache in named.parents:
        try:
            _flush(named)
            named.replace(cache / named.name)
            _flush(cache)
            is_kept = True
        except OSError as error:
            notes.append(f"{cache} does not keep it ({error.strerror})")
    if not is_kept:
        notes.append("compiled for this process alone, at every start; MEGATRON_OPD_CACHE names another place")
    return CompiledKernels(library, content_hash, "; ".join(notes))


def _flush(path: Path) -> None:
    """Have a file or directory on disk, so that no end of the machine leaves a name without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return f"what was compiled {error}" if isinstance(error, _Unusable) else str(error)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
