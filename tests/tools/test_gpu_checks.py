"""tools/gpu_checks.sh with stand-ins for its checks: each is limited, ended and in the table before the next begins."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from gpu_machine import checks, figures

ROOT = Path(__file__).resolve().parents[2]
PASSES = 'print("12 passed in 0.5s")'
FAILS = 'import sys; print("no such kernel"); sys.exit(3)'
HANGS = (
    "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "open(os.environ['CHILD'], 'w').write(str(child.pid));"
    "print('   3 s  logits, KL: 4.4ms', flush=True); time.sleep(600)"
)
GARBAGE = "import os; os.write(1, bytes(range(256)) * 50 + b'\\n | a \\x1b[31mlast\\x1b[0m | line\\r\\n\\n')"


def page(tmp_path, *rows):
    """A list of checks: (name, code, figure, more settings)."""
    text = ""
    for name, code, figure, more in rows:
        settings = {"stage": "plain", "what": f"the {name}", **more}
        lines = [f"{key} = {value!r}".replace("True", "true") for key, value in settings.items()]
        text += f"[[check]]\nname = {name!r}\ncommand = ['-c', '''{code}''']\nfigure = {figure!r}\n" + "\n".join(lines)
        text += "\n\n"
    path = tmp_path / "checks.toml"
    path.write_text(text)
    return path


def start(tmp_path, *arguments, **env):
    return subprocess.Popen(
        ["bash", ROOT / "tools/gpu_checks.sh", "--out", tmp_path / "out", *arguments],
        env={**os.environ, "PYTHON": sys.executable, "CHILD": str(tmp_path / "child"), **env},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(tmp_path, *arguments, **env):
    """(exit code, cells by check on stdout, stderr)."""
    with start(tmp_path, *arguments, **env) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, cells(out), err


def cells(text):
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert all(len(row) == 5 for row in rows), text
    return {row[0]: row[1:] for row in rows if not row[0].startswith("---") and row[0] != "check"}


def has_ended(pid):
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True


def test_one_passes_one_fails_one_hangs_one_prints_garbage(tmp_path):
    rows = [("good", PASSES, "pytest", {}), ("bad", FAILS, "last-line", {}), ("hung", HANGS, "bench", {"limit_s": 2}),
            ("odd", GARBAGE, "last-line", {}), ("empty", 'print("3 skipped in 0.1s")', "pytest", {}),
            ("no-run", "pass", "run", {})]  # fmt: skip
    code, found, err = run(tmp_path, "--checks", page(tmp_path, *rows), "--limit", "60")
    assert code == 1
    assert list(found) == [row[0] for row in rows]
    results = {name: row[1:3] for name, row in found.items()}
    assert results == {
        "good": ["ok", "12 passed in 0.5s"],
        "bad": ["FAILED (3)", "no such kernel"],
        "hung": ["TOO LONG (over 2 s)", "logits, KL: 4.4ms"],
        "odd": ["ok", "/ a last / line"],
        "empty": ["FAILED (no test ran)", "3 skipped in 0.1s"],
        "no-run": ["ok", ""],
    }
    assert found["good"][0] == "the good"
    assert "no such kernel" in err
    assert has_ended((tmp_path / "child").read_text())
    assert cells((tmp_path / "out/table.md").read_text()) == found
    assert "===== odd" in (tmp_path / "out/logs.txt").read_text()
    # A second call goes on with the same table.
    code, found, _ = run(tmp_path, "--checks", page(tmp_path, *rows), "--only", "g*", "no-run")
    assert (code, list(found)) == (0, ["good", "no-run"])
    text = (tmp_path / "out/table.md").read_text()
    assert text.count("| good |") == 2
    assert text.count("| check |") == 1


def test_a_run_that_is_cut_leaves_its_lines_and_no_process(tmp_path):
    path = page(tmp_path, ("good", PASSES, "pytest", {}), ("hung", HANGS, "bench", {}), ("late", PASSES, "pytest", {}))
    with start(tmp_path, "--checks", path, "--limit", "600") as process:
        until = time.monotonic() + 300
        while not (tmp_path / "child").is_file() or not (tmp_path / "child").read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert list(cells((tmp_path / "out/table.md").read_text())) == ["good"]
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(cells(out)) == ["good"]
    assert has_ended((tmp_path / "child").read_text())


def test_what_cannot_begin_in_time_is_in_the_table(tmp_path):
    path = page(tmp_path, ("good", PASSES, "pytest", {}))
    code, found, _ = run(tmp_path, "--checks", path, "--budget", "0")
    assert code == 1
    assert found["good"][1] == "not run: the time was up"


def test_nothing_follows_a_required_check_that_failed(tmp_path):
    rows = [("device", FAILS, "last-line", {"required": True}), ("good", PASSES, "pytest", {})]
    code, found, _ = run(tmp_path, "--checks", page(tmp_path, *rows), "--only", "good")
    assert code == 1
    assert {name: row[1] for name, row in found.items()} == {"device": "FAILED (3)", "good": "not run: device failed"}


def test_without_transformer_engine_the_table_says_so(tmp_path):
    path = page(tmp_path, ("good", PASSES, "pytest", {}), ("fp8", PASSES, "pytest", {"stage": "te"}))
    (tmp_path / "torch.py").touch()
    engine = tmp_path / "transformer_engine"
    engine.mkdir()
    (engine / "__init__.py").write_text("raise ImportError('libcudnn.so.9 is missing')")
    code, found, _ = run(tmp_path, "--checks", path, PYTHONPATH=str(tmp_path))
    assert code == 0
    assert found["fp8"][1] == "skipped: ImportError: libcudnn.so.9 is missing"
    (engine / "__init__.py").write_text("import sys; assert 'torch' in sys.modules  # it finds NCCL only then")
    (engine / "pytorch.py").touch()
    assert run(tmp_path, "--checks", path, PYTHONPATH=str(tmp_path))[1]["fp8"][1] == "ok"


def test_the_list_without_running_it(tmp_path):
    with start(tmp_path, "--list") as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    rows = [line for line in out.splitlines() if re.match(r"\| [a-z]", line)][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [check.name for check in checks.read(checks.PAGE)]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no [[check]]"),
        ("[[check", "not TOML"),
        ("[[check]]\nname = 'a'\ncommand = []", "missing"),
        ("[[check]]\nname='a'\nwhat='b'\nstage='late'\ncommand=[]\nfigure='run'", "'late' is none of plain, te"),
        ("[[check]]\nname='a'\nwhat='b'\nstage='te'\ncommand=['$no']\nfigure='run'", "'no'"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, text, problem):
    path = tmp_path / "checks.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(problem)):
        checks.read(path)


def test_a_name_that_is_no_check_is_refused():
    with pytest.raises(ValueError, match="no check like 'fp9'; they are: device, "):
        checks.chosen(checks.read(checks.PAGE), stages=["plain"], patterns=["fp9"])


def test_the_real_list_has_the_promised_order_and_every_gpu_test():
    listed = checks.read(checks.PAGE)
    assert [check.name for check in listed if check.required] == [listed[0].name] == ["device"]
    stages = [checks.STAGES.index(check.stage) for check in listed]
    assert stages == sorted(stages)
    assert all(check.limit_s > 0 for check in listed)
    asked = " ".join(part for check in listed for part in check.command)
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if re.search(r"^pytestmark\b.*mark\.gpu\b", file.read_text(), re.MULTILINE):
            name = file.relative_to(ROOT).as_posix()
            assert name in asked, f"{name} is in no check of tools/gpu_machine/checks.toml: add it"
    for part in asked.split():
        if part.endswith((".py", ".yaml")):
            assert (ROOT / part).is_file(), part


def test_settings_of_the_real_list_are_settings(tmp_path):
    """Every quickstart in it reads; what only a GPU can check is left to it."""
    from megatron_opd.config import file as config_file

    lists = tomllib.loads(checks.PAGE.read_text())["lists"]
    assert lists["quickstart"][2] == "train"
    for check in checks.read(checks.PAGE):
        given = check.arguments(tmp_path)
        if "examples/quickstart.yaml" not in given:
            continue
        begin = given.index("examples/quickstart.yaml") + 1
        overrides = [part for part in given[begin:] if "=" in part]
        overrides += ["precision.fp8.emulate=true"] if "--emulate" in given else []
        config_file.load(ROOT / "examples/quickstart.yaml", overrides)


def test_a_run_in_the_table(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "fp8/ratio/a": 0.01, "fp8/ratio/student": 0.02}\n'
        '{"step": 0, "eval/accuracy/all": 0.1, "eval/kl/ensemble": 1.5}\n'
        '{"step": 1, "tokens_per_s": 10}\n{"step": 2, "tokens_per_s": 400}\n{"step": 3, "tokens_per_s": 300}\n'
        '{"step": 3, "eval/accuracy/all": 0.975, "eval/kl/ensemble": 0.03}\n{"step": 4, "tok'
    )
    found = figures.figure("run", "", tmp_path)
    assert found == "accuracy 97.5%, KL 0.0300, 300 tokens/s, FP8 noise 2.000% of the KL"


def test_gpu_tests_are_collected_without_pytest_timeout():
    """A bare machine may lack it, and an unknown marker would end the collection of everything."""
    command = ["-m", "pytest", "--collect-only", "-q", "-p", "no:timeout", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run(
        [sys.executable, *command, "tests/gpu/test_colocated_cuda.py"],
        cwd=ROOT, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
