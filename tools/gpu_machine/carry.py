"""The command line of tools/gpu_carry.sh: wheels for a machine without a network, in folders of a limited size."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from gpu_machine import pieces

ROOT = Path(__file__).resolve().parents[2]
_MIB = 1 << 20
_TIMEOUT_S = 1800
BASE = (
    "megatron-core", "transformers", "tokenizers", "huggingface-hub", "regex", "safetensors", "sentencepiece",
    "protobuf", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "PyYAML",
    "Jinja2", "MarkupSafe", "rich", "markdown-it-py", "mdurl", "Pygments", "psutil", "packaging", "tqdm", "numpy",
    "math-verify", "latex2sympy2-extended", "antlr4-python3-runtime", "pytest", "pluggy", "iniconfig", "pytest-timeout",
    "wheel", "aiohttp", "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl",
    "idna", "tenacity",
)  # fmt: skip
"""Packages of the first stage where only torch is there."""
ENGINE = (
    "transformer-engine", "transformer-engine-cu13", "einops", "onnx", "onnx-ir", "onnxscript", "ml-dtypes",
    "nvdlfw-inspect", "nvidia-cudnn-frontend", "importlib-metadata", "zipp",
)  # fmt: skip
"""Packages of Transformer Engine, but for its PyTorch part, which is built (docs/gpu.md)."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parsed(argv)
    try:
        return _carry(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"error: pip download ended with exit code {error.returncode}", file=sys.stderr)
    return 1


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_carry.sh",
        description="Download the wheels that tools/gpu_checks.sh needs on a machine with torch and without a network,"
        " and lay them into DIR/1, DIR/2, …: the small packages first, then Transformer Engine. Large wheels are cut"
        " into parts, which `WHEELS=DIR tools/gpu_checks.sh` puts together there.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print packages, files and sizes; write nothing")
    parser.add_argument("--into", type=Path, default=ROOT / ".carry", metavar="DIR", help="(.carry, which git ignores)")
    parser.add_argument("--limit-mib", type=int, default=56, metavar="N",
                        help="most MiB of a folder (56: 64 less the sources, which travel along)")  # fmt: skip
    parser.add_argument("--python-version", default="3.12", metavar="X.Y", help="of the other machine (3.12)")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt", metavar="FILE",
                        help="versions of the packages (constraints.txt)")  # fmt: skip
    parser.add_argument("--there", type=Path, metavar="FILE",
                        help="`pip list --format=freeze` of the other machine; they stay at home")  # fmt: skip
    parser.add_argument("--wheel", type=Path, nargs="+", default=[], metavar="FILE",
                        help="wheels from here, for example transformer_engine_torch-*.whl (docs/gpu.md)")  # fmt: skip
    parser.add_argument("--no-engine", action="store_true", help="without Transformer Engine")
    arguments = parser.parse_args(argv)
    if arguments.limit_mib < 1:
        parser.error("--limit-mib must be at least 1")
    return arguments


def _carry(arguments: argparse.Namespace) -> int:
    pins = read_pins(arguments.constraints)
    there = set(read_pins(arguments.there)) if arguments.there else set()
    names = [BASE, () if arguments.no_engine else ENGINE]
    wanted = [[_requirement(name, pins) for name in group if normal(name) not in there] for group in names]
    downloads = arguments.into / "downloads"
    groups = []
    for number, requirements in enumerate(wanted):
        folder = downloads / ("base", "engine")[number]
        if not arguments.dry_run and requirements:
            _download(requirements, folder, arguments.python_version)
        groups.append(_chosen(requirements, folder))
    groups[-1] += arguments.wheel
    found = pieces.plan([group for group in groups if group], arguments.limit_mib * _MIB)
    if not arguments.dry_run:
        pieces.write(found, arguments.into)
    _print(wanted, found, arguments)
    return 0


def read_pins(page: Path) -> dict[str, str]:
    """Versions by normal name, of the lines `name==version`."""
    lines = [line.split("#")[0].strip().partition("==") for line in page.read_text().splitlines()]
    return {normal(name): version.strip() for name, _, version in lines if version}


def normal(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower().strip()


def _requirement(name: str, pins: dict[str, str]) -> str:
    return f"{name}=={pins[normal(name)]}" if normal(name) in pins else name


def _download(requirements: list[str], into: Path, python_version: str) -> None:
    """Raises CalledProcessError."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    # pip compares these names exactly: a wheel for an older C library has another one.
    platforms = [f"manylinux_2_{minor}" for minor in range(39, 4, -1)]
    platforms += ["manylinux2014", "manylinux2010", "manylinux1"]
    command += [part for name in platforms for part in ("--platform", f"{name}_x86_64")]
    subprocess.run([*command, "-d", str(into), *requirements], check=True, timeout=_TIMEOUT_S)


def _chosen(requirements: list[str], folder: Path) -> list[Path]:
    """The newest file of each requirement: a folder may still have other versions from an earlier call."""
    found = []
    for requirement in requirements:
        name, _, version = requirement.partition("==")
        files = [file for file in folder.glob("*.whl") if _is(file, normal(name), version)]
        found += sorted(files, key=lambda file: file.stat().st_mtime)[-1:]
    return found


def _is(wheel: Path, name: str, version: str) -> bool:
    parts = wheel.name.split("-")
    return normal(parts[0]) == name and (not version or parts[1] == version)


def _print(wanted: list[list[str]], found: list[pieces.Piece], arguments: argparse.Namespace) -> None:
    print("| folder | file | MB |\n|---|---|---:|")
    for piece in found:
        print(f"| {arguments.into.name}/{piece.folder} | {piece.name} | {piece.size / 1e6:.1f} |")
    folders = {piece.folder: 0 for piece in found}
    for piece in found:
        folders[piece.folder] += piece.size
    for folder, size in folders.items():
        print(f"{arguments.into.name}/{folder}: {size / _MIB:.1f} MiB")
    have = {normal(piece.source.name.split("-")[0]) for piece in found}
    missing = [r for group in wanted for r in group if normal(r.partition("==")[0]) not in have]
    if missing:
        print(f"not downloaded yet: {' '.join(missing)}")
    if not arguments.no_engine and "transformer-engine-torch" not in have:
        print("Transformer Engine's PyTorch part is missing: build its wheel and add it by --wheel (docs/gpu.md)")


if __name__ == "__main__":
    raise SystemExit(main())
