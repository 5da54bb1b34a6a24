"""torch_dist checkpoints a region at a time: written, read back in any boxes, damaged."""

import pytest
import torch

from megatron_opd.models.torch_dist_dir import Region, TorchDistDir, is_torch_dist, write

WHOLE = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)


@pytest.fixture
def checkpoint(tmp_path):
    """Two layers stacked under one key, each its own region, and a vector."""
    regions = [Region("stack", (2, 4, 3), (layer, 0, 0), (1, 4, 3)) for layer in range(2)]
    regions.append(Region("vector", (5,), (0,), (5,)))
    write(tmp_path / "c", regions, lambda r: WHOLE[r.offset[0]] if r.key == "stack" else torch.ones(5), torch.float32)
    return tmp_path / "c"


def test_regions_are_read_back_in_any_box(checkpoint):
    assert is_torch_dist(checkpoint)
    opened = TorchDistDir(checkpoint)
    assert opened.shape("stack") == (2, 4, 3)
    assert opened.dtype("stack") == torch.float32
    assert torch.equal(opened.read(Region("stack", (2, 4, 3), (0, 0, 0), (2, 4, 3))), WHOLE)
    box = Region("stack", (2, 4, 3), (0, 1, 1), (2, 2, 2))
    assert torch.equal(opened.read(box), WHOLE[:, 1:3, 1:3])
    assert opened.damage() == []


def test_each_tensor_is_made_when_its_turn_comes(tmp_path):
    alive = []

    def produce(region):
        alive.append(region.key)
        assert (tmp_path / "c").is_dir()
        return torch.full((4,), float(len(alive)))

    write(tmp_path / "c", [Region(key, (4,), (0,), (4,)) for key in "abc"], produce, torch.bfloat16)
    opened = TorchDistDir(tmp_path / "c")
    assert alive == ["a", "b", "c"]
    assert [opened.read(Region(key, (4,), (0,), (4,)))[0].item() for key in "abc"] == [1, 2, 3]
    assert opened.dtype("a") == torch.bfloat16


@pytest.mark.parametrize("error", [ValueError("the weight is bad"), OSError(28, "No space left on device")])
def test_errors_while_writing_come_through_as_they_are(tmp_path, error):
    def produce(_):
        raise error

    with pytest.raises(type(error), match=r"the weight is bad|No space left"):
        write(tmp_path / "c", [Region("a", (4,), (0,), (4,))], produce, torch.float32)
    assert not is_torch_dist(tmp_path / "c")


def test_an_interrupt_while_writing_is_an_interrupt(tmp_path):
    def produce(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "c", [Region("a", (4,), (0,), (4,))], produce, torch.float32)


def test_what_is_not_a_checkpoint_is_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"is not a torch_dist checkpoint: there is no \.metadata"):
        TorchDistDir(tmp_path)
    metadata = (checkpoint / ".metadata").read_bytes()
    for damaged in (metadata[: len(metadata) // 2], b"", b"{}"):
        (checkpoint / ".metadata").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.metadata is damaged or cut short"):
            TorchDistDir(checkpoint)


def test_files_that_are_missing_or_cut_short_are_named(checkpoint):
    (file,) = checkpoint.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    opened = TorchDistDir(checkpoint)
    assert opened.damage() == [f"the file {file.name} is cut short: {len(whole) - 100} bytes of {len(whole)}"]
    with pytest.raises(ValueError, match="vector cannot be read"):
        opened.read(Region("vector", (5,), (0,), (5,)))
    file.unlink()
    assert TorchDistDir(checkpoint).damage() == [f"the file {file.name} is missing"]
    with pytest.raises(ValueError, match="vector cannot be read"):
        TorchDistDir(checkpoint).read(Region("vector", (5,), (0,), (5,)))


def test_regions_that_are_not_there_are_refused(checkpoint, tmp_path):
    opened = TorchDistDir(checkpoint)
    with pytest.raises(ValueError, match="there is no tensor 'other'"):
        opened.read(Region("other", (1,), (0,), (1,)))
    write(tmp_path / "half", [Region("stack", (2, 4, 3), (0, 0, 0), (1, 4, 3))], lambda _: WHOLE[0], torch.float32)
    with pytest.raises(ValueError, match="stack has only 0 of 12 values"):
        TorchDistDir(tmp_path / "half").read(Region("stack", (2, 4, 3), (1, 0, 0), (1, 4, 3)))
