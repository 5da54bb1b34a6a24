"""Install carried wheels into a folder, without a network: `python tools/gpu_machine/install.py WHEELS SITE`.

Parts of large wheels are put together first. A second call with the same wheels does nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu_machine import pieces


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    folder, site = (Path(argument) for argument in argv)
    joined, lacking = pieces.join(folder, site.with_name(f"{site.name}_joined"))
    for line in lacking:
        print(f"left out: {line}")
    wheels = [*pieces.carried(folder, "*.whl"), *joined]
    if not wheels:
        print(f"there is no wheel under {folder}")
        return 1
    installed = site / "INSTALLED"
    names = "\n".join(wheel.name for wheel in wheels)
    if not installed.is_file() or installed.read_text() != names:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--upgrade", "--disable-pip-version-check", "--target", str(site)]
        if code := subprocess.run([*command, *map(str, wheels)]).returncode:
            return code
        installed.write_text(names)
    left_out = f", {len(lacking)} left out for lack of parts" if lacking else ""
    print(f"{len(wheels)} wheels, {sum(w.stat().st_size for w in wheels) / 1e6:.0f} MB{left_out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
