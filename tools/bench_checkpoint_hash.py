#!/usr/bin/env python3
"""Measure what the hashes of a checkpoint's files cost: GB/s of hash functions, of threads, and of reading alone.

Prints a Markdown table. The file is random bytes, in the machine's memory after it was written, as it is right after a
save; a load adds the disk's time. Figures are the best of several rounds, so other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tool

from megatron_opd.core import durable, hashed_files

_READ_BYTES = 1 << 20


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure what hashing a checkpoint's files costs.")
    parser.add_argument("--gigabytes", type=tool.positive, default=1, metavar="N", help="of the file (%(default)s)")
    parser.add_argument("--rounds", type=tool.positive, default=3, metavar="N", help="best of (%(default)s)")
    parser.add_argument("--threads", type=tool.positive, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--dir", type=Path, help="where the file is written (default: the temporary directory)")
    arguments = parser.parse_args(argv)
    with tempfile.NamedTemporaryFile(dir=arguments.dir) as file:
        started = time.perf_counter()
        for _ in range(arguments.gigabytes * 1000):
            file.write(os.urandom(10**6))
        file.flush()
        made = time.perf_counter()
        durable.sync(file.name)
        synced = time.perf_counter()
        print(f"{arguments.gigabytes} GB; written in {made - started:.1f} s, then on disk in {synced - made:.1f} s\n")
        print("| what | GB/s | seconds for 500 GB on 8 ranks |", "|---|---:|---:|", sep="\n")
        for what, work in _cases(Path(file.name), arguments.threads):
            speed = arguments.gigabytes / min(_seconds(work) for _ in range(arguments.rounds))
            print(f"| {what} | {speed:.2f} | {500 / speed / 8:.0f} |", flush=True)
    return 0


def _cases(path: Path, threads: list[int]) -> list[tuple[str, Callable[[], object]]]:
    """What is measured, by name."""
    cases: list[tuple[str, Callable[[], object]]] = [("reading alone", partial(_read, path, lambda _: None))]
    cases += [(f"{name}, one thread", partial(_read, path, hashlib.new(name).update)) for name in ("sha256", "blake2b")]
    cases.append(("crc32, one thread", partial(_read, path, zlib.crc32)))
    try:
        import xxhash

        cases.append(("xxh3 (a package), one thread", partial(_read, path, xxhash.xxh3_128().update)))
    except ImportError:
        pass
    return cases + [
        (f"blake2b in pieces, {n} thread{'s' * (n > 1)}", partial(hashed_files.blake2b, path, n)) for n in threads
    ]


def _read(path: Path, use: Callable[[memoryview], object]) -> None:
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            use(buffer[:count])


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
