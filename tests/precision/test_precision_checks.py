"""What of `precision` is refused before a run, in which words, and what of the machine people are told."""

import dataclasses
import importlib.util
import sys
import types

import pytest
from test_config import problems_of, tree_with
from test_precision_plan import ARCH

from megatron_opd.config import file as cfg
from megatron_opd.core import stacks
from megatron_opd.precision import fits, installed
from megatron_opd.precision.gate import Measured, Noise, too_coarse

ODD = dataclasses.replace(ARCH, vocab_size=90, padded_vocab_size=90)


def fitting(config):
    return fits.look(
        config.precision, config.student, teachers=config.teachers, parallel=config.parallel, train=config.train,
        is_deterministic=config.run.deterministic,
    )  # fmt: skip


def with_fp8(**fp8):
    layers = fp8.pop("layers", "auto")
    student = {"model": "s", "dtype": fp8.pop("dtype", "bf16")}
    tree = tree_with(precision__fp8=fp8, precision__layers=layers)
    tree["student"] = student
    for teacher in tree["teachers"]:
        teacher["dtype"] = student["dtype"]
    return tree


@pytest.mark.parametrize(
    ("fp8", "fragment"),
    [
        ({"teachers": ["c"]}, "precision.fp8.teachers: there is no model 'c' (there are all, a, b)"),
        (
            {"heads": ["c"], "emulate": True},
            "heads: there is no model 'c' (there are all, student, a, b)",
        ),
        ({"student": "full", "recipe": "delayed", "first_layers_bf16": 1}, "precision.fp8.recipe delayed"),
        ({"student": "full", "last_layers_bf16": -1}, "precision.fp8.last_layers_bf16 must not be negative"),
        ({"student": "full", "max_kl_ratio": 0}, "precision.fp8.max_kl_ratio must be above 0"),
        ({"student": "full", "check_prompts": 0}, "precision.fp8.check_prompts must be at least 1"),
        ({"resident": True}, "precision.fp8.resident"),
        ({"emulate": True}, "precision.fp8.emulate: nothing is in FP8"),
        ({"student": "forward"}, "precision.fp8.student=forward is emulated only: Transformer Engine has"),
        ({"heads": ["a"], "recipe": "blockwise"}, "the recipe blockwise is emulated only for output heads"),
        ({"heads": ["all"], "recipe": "mxfp8"}, "the recipe mxfp8 is emulated only for output heads"),
        ({"heads": ["student"], "recipe": "blockwise"}, "the recipe blockwise is emulated only for output heads"),
        ({"heads": ["student"], "recipe": "mxfp8"}, "the recipe mxfp8 is emulated only for output heads"),
        ({"heads": ["student"], "recipe": "delayed"}, "the recipe delayed is emulated only for output heads"),
        ({"teachers": ["a"], "recipe": "delayed"}, "those of teachers would stay at 1"),
        ({"student": "full", "layers": "local"}, "precision.layers=local has no FP8"),
        ({"student": "full", "dtype": "fp32"}, "precision.fp8.student needs student.dtype=bf16"),
        ({"teachers": ["b"], "dtype": "fp32"}, "'b' needs teachers.1.dtype=bf16"),
    ],
)
def test_settings_that_are_refused(fp8, fragment):
    (problem,) = problems_of(with_fp8(**fp8))
    assert fragment in problem


def test_names_that_mean_other_models():
    tree = with_fp8(student="full")
    tree["teachers"][0]["name"] = "student"
    (problem,) = problems_of(tree)
    assert "choose another" in problem


def test_a_served_teacher_is_refused_by_name():
    tree = with_fp8(teachers=["a"])
    tree["teachers"][0] |= {"backend": "sglang", "carrier": "topk"}
    problems = [p for p in problems_of(tree) if "precision" in p]
    assert len(problems) == 1
    assert "'a' is behind servers" in problems[0]


def test_resident_and_offload_exclude_each_other_on_a_gpu():
    tree = with_fp8(teachers=["a"], resident=True)
    tree["teachers"][0]["offload"] = True
    (problem,) = problems_of(tree)
    assert "set offload=false for teacher 'a'" in problem


@pytest.mark.parametrize("fp8", [{}, {"student": "full"}, {"student": "full", "recipe": "delayed"},
                                 {"teachers": ["a"], "recipe": "delayed", "emulate": True},
                                 {"student": "forward", "emulate": True, "dtype": "fp32"},
                                 {"heads": ["student"], "layers": "local", "dtype": "fp16"},
                                 {"heads": ["a"], "layers": "local", "dtype": "fp16"},
                                 {"heads": ["all"], "dtype": "fp32"},
                                 {"heads": ["all"], "teachers": ["all"], "emulate": True}])  # fmt: skip
def test_settings_that_are_taken(fp8):
    assert cfg.from_dict(with_fp8(**fp8)).precision.fp8.is_on == bool(fp8)


def test_other_types_are_refused_with_what_there_is():
    (problem,) = problems_of(tree_with(student__model="s", student__dtype="fp8"))
    assert problem.startswith("student.dtype: ")
    assert all(dtype in problem for dtype in ("fp32", "bf16", "fp16"))


def test_fp16_is_taken():
    tree = tree_with(student__model="s", student__dtype="fp16", optim__initial_loss_scale=2.0**16)
    for teacher in tree["teachers"]:
        teacher["dtype"] = "fp16"
    config = cfg.from_dict(tree)
    assert [config.student.dtype, *(t.dtype for t in config.teachers)] == ["fp16"] * 3
    (problem,) = problems_of(tree_with(optim__initial_loss_scale=0.5))
    assert problem.startswith("optim.initial_loss_scale must be at least 1")


class Machine:
    """What a machine has, in place of this one."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch
        self.has(cuda=False)

    def has(self, *, cuda=True, capability=(9, 0), cuda_version="13.0", stack=stacks.OLDEST, **packages):
        versions = {name.replace("_", "-"): version for name, version in packages.items()}
        self.patch.setattr(installed, "has_cuda", lambda: cuda)
        self.patch.setattr(installed.torch.cuda, "get_device_capability", lambda *_: capability)
        self.patch.setattr(installed.torch.version, "cuda", cuda_version)
        self.patch.setattr(installed, "version", versions.get)
        self.patch.setattr(stacks, "here", lambda: stack)
        self.patch.setattr(installed, "imported", lambda name: _imported(name, versions))
        installed.engine.cache_clear()


def _imported(name, versions):
    """What importing a module of Transformer Engine gives where its packages are there, or not."""
    if "transformer-engine-torch" not in versions:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    return types.ModuleType("transformer_engine")


@pytest.fixture
def machine(monkeypatch):
    yield Machine(monkeypatch)
    installed.engine.cache_clear()


def look(**fp8):
    return fitting(cfg.from_dict(with_fp8(**fp8)))


def test_fp8_without_a_gpu_is_refused_and_emulation_is_not(machine):
    (problem,), _ = look(student="full")
    assert problem.startswith("precision.fp8: there is no CUDA device here")
    assert "precision.fp8.emulate=true" in problem
    assert look(student="full", emulate=True)[0] == []


def test_fp8_without_transformer_engine_is_not_quietly_left_out(machine):
    machine.has()
    (problem,), _ = look(student="full")
    assert "Transformer Engine is not installed" in problem
    assert "would ignore FP8" in problem
    machine.has(transformer_engine="2.11.0")  # without its PyTorch part
    assert look(student="full")[0] == [problem]


def test_a_head_alone_needs_a_device_but_no_transformer_engine(machine):
    (problem,), _ = look(heads=["student"])
    assert problem.startswith("precision.fp8: there is no CUDA device here")
    assert look(heads=["a"])[0] == [problem]
    machine.has()
    assert look(heads=["all"])[0] == []
    machine.has(capability=(8, 0))
    (problem,), _ = look(heads=["student"])
    assert problem.startswith("precision.fp8.recipe=tensorwise")


def test_a_student_s_vocabulary_that_cuts_teachers_heads_into_what_no_kernel_takes(machine, monkeypatch):
    machine.has()
    monkeypatch.setattr(fits, "read_architecture", lambda model, vocab_multiple: ODD if model == "s" else ARCH)
    (problem,), _ = look(heads=["a"])
    assert "the vocabulary of student.model, which cuts the heads of a, is 90" in problem
    (problem,), _ = look(heads=["all"])
    assert "the vocabulary (student.vocab_multiple pads it) of student.model is 90" in problem
    assert look(student="full", emulate=True)[0] == []


@pytest.mark.parametrize(
    ("stack", "version", "fits"),
    [
        *((stacks.OLDEST, version, True) for version in ("2.9.0", "2.11.0")),
        *((stacks.OLDEST, version, False) for version in ("2.8.0", "2.12.0", "2.20.2")),
        *((stacks.NEWEST, version, True) for version in ("2.20.0", "2.20.2")),
        *((stacks.NEWEST, version, False) for version in ("2.11.0", "2.19.0", "2.21.0")),
    ],
)
def test_versions_of_transformer_engine(machine, stack, version, fits):
    machine.has(stack=stack, transformer_engine=version, transformer_engine_torch=version)
    problems, notes = look(teachers=["a"])
    assert (problems == []) == fits
    assert notes[:2] == [
        f"layers: Transformer Engine {version}",
        f"optimizer: FusedAdam of Transformer Engine {version}",
    ]


def test_another_megatron_is_refused(machine, monkeypatch):
    machine.has()
    monkeypatch.undo()
    monkeypatch.setattr(stacks.importlib.metadata, "version", lambda package: "0.18.0")
    assert look(teachers=["a"]) == ([installed.megatron_problem()], [])
    assert "megatron-core 0.18.0 is none of those" in installed.megatron_problem()


ATTENTION = [("train", "packing", True, "train.packing"), ("parallel", "context", 2, "parallel.context")]


def attended(section, key, value, *, layers="auto", dtype="fp32", **run):
    """Problems of a run whose sequences are packed, or split."""
    tree = with_fp8(dtype="fp32", layers=layers)
    tree.setdefault(section, {})[key] = value
    tree["run"] |= run
    tree["student"]["dtype"] = dtype
    tree["teachers"][0]["dtype"] = dtype
    return fitting(cfg.from_dict(tree))[0]


@pytest.mark.parametrize(("section", "key", "value", "setting"), ATTENTION)
def test_fp32_is_refused_where_the_engine_packs_or_splits(machine, section, key, value, setting):
    machine.has()
    assert attended(section, key, value) == []  # on Megatron's own layers
    machine.has(transformer_engine="2.11.0", transformer_engine_torch="2.11.0")
    assert attended(section, key, value, layers="local") == []
    named = ("student.dtype", "teachers.0.dtype", "teachers.1.dtype")
    for problem, name in zip(attended(section, key, value), named, strict=True):
        assert problem.startswith(setting)
        assert f"set {name}=bf16" in problem
    (problem,) = attended(section, key, value, dtype="bf16")
    assert "teachers.1.dtype=bf16" in problem
    assert look(dtype="fp32")[0] == []  # without either


@pytest.mark.parametrize(
    ("capability", "packages", "deterministic", "fits"),
    [((7, 5), {}, False, False), ((8, 0), {}, False, True), ((8, 0), {}, True, False), ((9, 0), {}, True, True),
     ((8, 0), {"flash_attn": "2.8.0"}, True, True)],
)  # fmt: skip
def test_devices_whose_engine_packs_and_splits(machine, capability, packages, deterministic, fits):
    machine.has(capability=capability, transformer_engine="2.11.0", transformer_engine_torch="2.11.0", **packages)
    problems = attended("parallel", "context", 2, dtype="bf16", deterministic=deterministic)
    assert [p for p in problems if "compute capability" in p] == ([] if fits else problems)
    assert fits or "precision.layers=local" in problems[0]


@pytest.mark.parametrize(
    ("recipe", "capability", "fits"),
    [("tensorwise", (8, 0), False), ("tensorwise", (8, 9), True), ("delayed", (9, 0), True),
     ("blockwise", (8, 9), False), ("blockwise", (9, 0), True), ("mxfp8", (9, 0), False), ("mxfp8", (10, 0), True),
     ("mxfp8", (12, 0), False), ("tensorwise", (12, 0), True)],
)  # fmt: skip
def test_devices_that_do_a_recipe(machine, recipe, capability, fits):
    machine.has(capability=capability, transformer_engine="2.11.0", transformer_engine_torch="2.11.0")
    problems, _ = look(student="full", recipe=recipe)
    assert (problems == []) == fits
    assert all(f"precision.fp8.recipe={recipe}" in problem for problem in problems)


def test_blocks_need_a_newer_cuda(machine):
    machine.has(cuda_version="12.8", transformer_engine="2.11.0", transformer_engine_torch="2.11.0")
    problems, _ = look(student="full", recipe="blockwise")
    assert problems == ["precision.fp8.recipe=blockwise: it needs torch for CUDA 12.9 or later, not 12.8"]
    assert look(student="full", recipe="tensorwise")[0] == []


@pytest.mark.parametrize(
    ("version", "dtype", "fits"),
    [("2.9.1+cu130", "bf16", False), ("2.6.0", "fp16", False), ("2.9.1", "fp32", True), ("2.10.0", "bf16", True),
     ("2.13.0+cpu", "fp16", True), ("2.100.0", "bf16", True)],
)  # fmt: skip
def test_a_torch_that_cannot_add_to_the_head_s_gradient(machine, monkeypatch, version, dtype, fits):
    monkeypatch.setattr(installed.torch, "__version__", version)
    assert look(dtype=dtype)[0] == []  # CPUs do it another way
    machine.has()
    problems = [problem for problem in look(dtype=dtype)[0] if "torch" in problem]
    assert (problems == []) == fits
    assert all("install torch 2.10 or later" in problem and "student.dtype=fp32" in problem for problem in problems)


def test_what_takes_the_place_of_what_is_missing(machine, monkeypatch):
    assert installed.notes("auto") == []  # nothing to tell without a GPU
    machine.has()
    first, second = installed.notes("auto")
    assert "Megatron's own, for Transformer Engine is not installed" in first
    assert "torch's AdamW" in second
    monkeypatch.setattr(installed, "has_apex", lambda: True)
    assert installed.notes("auto")[1] == "optimizer: FusedAdam of NVIDIA's Apex"
    assert installed.notes("local")[0] == "layers: Megatron's own (precision.layers=local)"


class Package:
    """A Transformer Engine in a directory of its own, with a GPU to use it on."""

    def __init__(self, root, monkeypatch):
        self.root, self.patch = root, monkeypatch
        monkeypatch.syspath_prepend(root)
        monkeypatch.setattr(installed, "has_cuda", lambda: True)
        monkeypatch.setattr(installed.torch.cuda, "get_device_capability", lambda *_: (9, 0))

    def holds(self, code, *, top="", version=None):
        """`code` is what its PyTorch part does when it is imported, `top` the package itself."""
        part = self.root / "transformer_engine/pytorch"
        part.mkdir(parents=True, exist_ok=True)
        (self.root / "transformer_engine/__init__.py").write_text(top)
        (part / "__init__.py").write_text(code)
        if version:
            metadata = self.root / f"transformer_engine-{version}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n")
        self.forget()

    def forget(self):
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        installed.engine.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    made = Package(tmp_path, monkeypatch)
    made.forget()
    yield made
    monkeypatch.undo()
    made.forget()


QUIET, LOUD = "megatron-core would quietly use its own layers", "megatron-core would fail alike"
NO_METADATA = "import importlib.metadata\n__version__ = importlib.metadata.version('transformer_engine')"


@pytest.mark.parametrize(
    ("code", "top", "said", "then"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "", "ImportError: undefined symbol: _ZN3c10", QUIET),
        ("import nvdlfw_inspect_is_missing", "", "ModuleNotFoundError: No module named 'nvdlfw_in", QUIET),
        ("import ctypes; ctypes.CDLL('libcublas_of_another_cuda.so.99')", "", "OSError: libcublas_of_another", LOUD),
        ("raise FileNotFoundError('Could not find shared object file')", "", "FileNotFoundError: Could not", LOUD),
        ("assert 0, 'versions differ'", "", "AssertionError: versions differ", LOUD),
        ("", "raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line)", LOUD),
        ("", NO_METADATA, "PackageNotFoundError: No package metadata was found for transformer_engine", QUIET),
        ("raise ImportError", "", "ImportError: no more is said", QUIET),
    ],
)
def test_an_engine_that_cannot_be_imported_is_no_engine_and_not_quiet(package, code, top, said, then):
    package.holds(code, top=top, version=None if top == NO_METADATA else "2.11.0")
    (problem,), notes = look()
    assert problem.startswith("Transformer Engine" + (" 2.11.0" if top != NO_METADATA else "") + " is installed")
    assert said in problem
    assert then in problem
    assert "layers: Megatron's own" in notes[0]
    assert said.removesuffix(")") in notes[1]
    assert installed.transformer_engine() is None
    assert look(student="full")[0].count(problem) == 1
    without = fitting(cfg.from_dict(with_fp8(layers="local")))[0]
    assert without == ([] if then == QUIET else [problem])  # Megatron imports it whatever the layers are
    assert ("precision.layers=local" in problem) == (then == QUIET)


def test_an_engine_that_works_tells_its_version(package):
    package.holds("", top="__version__ = '2.10.1'")
    assert installed.transformer_engine() == "2.10.1"  # built from source: no metadata
    package.holds("")
    assert installed.transformer_engine() == "of an unknown version"
    assert "does not fit this megatron-core" in installed.fp8_problem()
    package.holds("", version="2.11.0")
    assert installed.transformer_engine() == "2.11.0"
    assert installed.engine_problem("auto") is None


def test_without_the_package_or_its_part_there_is_nothing_to_say(package):
    assert installed.engine() is None
    (package.root / "transformer_engine").mkdir()
    (package.root / "transformer_engine/__init__.py").touch()
    package.forget()
    assert installed.engine() is None
    assert look()[0] == []


@pytest.mark.parametrize("is_nvidias", [False, True])
def test_the_other_apex_is_refused_without_importing_it(tmp_path, monkeypatch, is_nvidias):
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    if is_nvidias:
        (package / "optimizers").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    problem = installed.apex_problem()
    assert "apex" not in sys.modules
    assert installed.has_apex() == is_nvidias
    if is_nvidias:
        assert problem is None
    else:
        assert "pip uninstall apex" in problem
        assert look()[0] == [problem]  # also of a run without FP8


def measured(*, signal=1.0, **noises):
    found = tuple(Noise(name, value, value, 1.0) for name, value in noises.items())
    return Measured(signal, found, 0.1, 100)


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        (measured(a=0.05, ensemble=0.02, student=0.1), []),
        (measured(a=0.11, ensemble=0.02, student=0.0), ["teacher 'a'"]),
        (measured(a=0.0, ensemble=0.2, student=0.3), ["the teachers' average", "the student"]),
        (measured(signal=0.1, a=0.05), ["teacher 'a'"]),  # the same noise beside less to learn
        (measured(signal=0.0, a=1e-9), ["teacher 'a'"]),  # nothing to learn
        (measured(signal=0.0, a=0.0), []),
        (measured(a=-1e-9), []),  # rounding of a KL of 0
        (measured(a=float("nan")), ["teacher 'a'"]),
        (measured(signal=float("nan"), a=0.1), ["teacher 'a'"]),
    ],
)
def test_what_is_too_coarse(found, refused):
    fp8 = cfg.from_dict(with_fp8(student="full")).precision.fp8
    problems = too_coarse(found, fp8)
    assert len(problems) == len(refused), problems
    for problem, who in zip(problems, refused, strict=True):
        assert f"FP8 changes {who} by" in problem
        assert "precision.fp8.max_kl_ratio=0.1" in problem


def test_measured_in_words_and_numbers():
    found = measured(signal=0.5, a=0.05)
    assert found.metrics() == {
        "fp8/gradient_error": 0.1, "fp8/kl/a": 0.05, "fp8/top1/a": 1.0, "fp8/ratio/a": pytest.approx(0.1),
    }  # fmt: skip
    assert found.lines()[0] == (
        "fp8: a: KL 0.05 nats a token (at most 0.05), 10.00% of the 0.5 to be learned; top-1 agreement 100.00%"
    )
