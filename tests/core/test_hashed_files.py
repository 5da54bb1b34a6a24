"""Hashes of files, and who computes which."""

import os

import pytest

from megatron_opd.core import hashed_files


def test_a_file_is_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(hashed_files, "_PIECE_BYTES", 8)
    monkeypatch.setattr(hashed_files, "_READ_BYTES", 3)
    path, data = tmp_path / "file", os.urandom(8 * 3 + 5)
    hashes = set()
    for content in (data, data[:8], data[:16], b"", data[:7], data[8:16] + data[:8], bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(content)
        assert hashed_files.blake2b(path, threads=1) == hashed_files.blake2b(path, threads=3)
        hashes.add(hashed_files.blake2b(path))
    assert len(hashes) == 7


def test_every_file_has_one_rank():
    files = {f"f{i}": {"bytes": size, "blake2b": ""} for i, size in enumerate((7, 0, 100, 3, 3, 50, 49))}
    shares = [hashed_files.share(files, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    assert max(sum(files[name]["bytes"] for name in share) for share in shares) == 100


@pytest.mark.parametrize(
    "found",
    [
        *(None, [], {}, 3, {"a": 1}, {"a": {}}, {"a": {"bytes": "3", "blake2b": ""}}, {"a": {"bytes": 3}}),
        *({"../a": {"bytes": 3, "blake2b": ""}}, {"a": {"bytes": 3, "blake2b": 7}}),
    ],
)
def test_what_no_save_writes_is_none(found):
    assert hashed_files.parsed(found) is None
