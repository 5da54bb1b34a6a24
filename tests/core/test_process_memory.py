"""How much memory there is, as the machine and control groups of either version say it."""

import math

import pytest

from megatron_opd.core import process_memory

GB = 10**9


def machine(root, *, available=20 * GB, groups=""):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    return root


def group(root, path, limit, used, *, files=0, version=2):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {files}\nactive_file 7\n")


def test_without_a_group_it_is_the_machines(tmp_path):
    assert process_memory.available(machine(tmp_path)) == pytest.approx(20 * GB, abs=1024)


def test_nothing_is_known(tmp_path):
    assert process_memory.available(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"a/b": (8 * GB, 3 * GB)}, 5 * GB),
        ({"a/b": ("max", 3 * GB), "a": (16 * GB, 9 * GB)}, 7 * GB),  # the group around ours
        ({"a/b": (8 * GB, 3 * GB), "a": (16 * GB, 15 * GB)}, 1 * GB),
        ({"a/b": ("max", 3 * GB)}, 20 * GB),
        ({"a/b": (3 * GB, 4 * GB)}, 0),
        ({"": (4 * GB, 1 * GB)}, 3 * GB),  # a container's own is the topmost that it sees
        ({"a/b": (80 * GB, 1 * GB)}, 20 * GB),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_all_limits_counts(tmp_path, limits, expected, version):
    root = machine(tmp_path, groups="7:cpu,memory:/a/b\n3:pids:/x\n" if version == 1 else "0::/a/b\n")
    for path, (limit, used) in limits.items():
        limit = 2**63 - 4096 if version == 1 and limit == "max" else limit
        group(root, f"memory/{path}" if version == 1 else path, limit, used, version=version)
    assert process_memory.available(root) == pytest.approx(expected, abs=1024)


def test_files_that_can_be_dropped_are_room(tmp_path):
    root = machine(tmp_path, groups="0::/a\n")
    group(root, "a", 8 * GB, 7 * GB, files=4 * GB)
    assert process_memory.available(root) == 5 * GB


def test_of_this_process():
    assert 10**6 < process_memory.resident() <= process_memory.peak()
    assert process_memory.available() > 0
    process_memory.give_back()


def test_where_the_system_does_not_say(tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nVmRSS:\t   12 kB\n")
    assert process_memory.resident(tmp_path / "status") == 12 * 1024
    assert process_memory.peak(tmp_path / "status") == 0
    assert process_memory.resident(tmp_path / "none") == 0


def test_growth_is_given_back_and_what_steps_need_is_kept(monkeypatch):
    given = []
    monkeypatch.setattr(process_memory, "give_back", lambda: given.append(True))
    kept = process_memory.Kept()
    first = [kept.bound(size) for size in (100, 105, 114)]
    assert first == [False] * 3
    assert kept.bound(116)  # given back; the next is what a step takes by itself
    again = [kept.bound(size) for size in (130, 149, 150)]
    assert again == [False, False, True]
    smaller = [kept.bound(size) for size in (60, 149)]
    assert smaller == [False, False]  # steps of other lengths take more
    assert len(given) == 2
