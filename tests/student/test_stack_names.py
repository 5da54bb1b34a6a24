"""The Megatron that is installed has what its stack says of it."""

import importlib
import inspect
import re
from operator import attrgetter

from megatron_opd.core import stacks
from megatron_opd.student import cpu


def test_megatron_here_has_what_its_stack_says():
    cpu.enable()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    stack = stacks.here()
    writer = getattr(filesystem_async.FileSystemWriterAsync, stack.writes_files)
    assert list(inspect.signature(writer).parameters)[2:] == ["rank", "write_buckets", "global_results_queue"]
    for path in (stack.reads_common, stack.checks_kind):
        assert "checkpoint_dir" in inspect.signature(attrgetter(path)(dist_checkpointing)).parameters
    for name, line in stack.idle_talk:
        module = importlib.import_module(name)
        assert module.logger.name == module.__name__
        assert line in re.sub(r'"\s*"', "", inspect.getsource(module))


def marks(parallel):
    """Of each parameter of Megatron's layers: whether it is marked as a shard, and along which dimension."""
    import torch
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    config = ModelParallelConfig(
        tensor_model_parallel_size=2, perform_initialization=False, use_cpu_initialization=True
    )
    how = {"config": config, "init_method": torch.nn.init.zeros_}
    layers = [
        ColumnParallelLinear(4, 4, bias=False, **how),
        RowParallelLinear(4, 4, bias=False, input_is_parallel=True, skip_bias_add=False, **how),
        VocabParallelEmbedding(4, 4, **how),
    ]
    return [getattr(layer.weight, "tensor_model_parallel", False) for layer in layers]


def test_layers_mark_their_shards_as_the_stack_says(ranks):
    for marked in ranks.run(2, marks, tensor=2):
        assert marked == [stacks.here().marks_shards] * 3
