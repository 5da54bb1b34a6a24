"""What docs/performance.md tells a reader to write."""

import re
from pathlib import Path

from megatron_opd import loss as losses
from megatron_opd.loss import fused

PAGE = Path(__file__).resolve().parents[3] / "docs/performance.md"


def test_examples_run():
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 1
    names = {}
    exec(examples[0], names)
    assert names["loss"].item() > 0
    assert names["student"].grad[0, 3:].abs().sum() == 0  # masked
    assert names["student"].grad[0, :3].abs().sum() > 0
    assert names["hidden"].grad.abs().sum() > 0
    assert names["head"].grad.shape == (1000, 64)


def test_the_public_names_are_the_fused_loss():
    assert losses.distillation_loss is fused.distillation_loss
    assert losses.linear_distillation_loss is fused.linear_distillation_loss
    assert losses.NonFiniteLogits is fused.NonFiniteLogits
