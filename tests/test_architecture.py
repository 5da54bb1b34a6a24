"""The architecture, kept by reading the source: the lists below are the rules, the functions only look them up."""

import ast
import importlib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_opd"

# The rooms from the ground up: a room imports only from rooms above it here. docs/design.md shows the same list.
ROOMS = {
    "config": "the settings, a section a class; reading and checking them",
    "core": "types that travel, batching, sharded vocabulary, the grid of ranks, the run's directory and signals",
    "models": "model directories as files: configs, tokenizers, weights in both formats, conversion; no Megatron",
    "tracking": "what a run writes for people: metrics, logs, tables, plots",
    "rewards": "how good an answer is, by name; the sandbox that runs answers",
    "precision": "FP8 as data: recipes, the plan, rounding, the gate",
    "sglang": "the only HTTP client, and the only room that knows SGLang: servers, requests, weight sync",
    "loss": "divergences, ensembles and terms; the fused kernels; teachers with another tokenizer",
    "prompts": "rows of data sets as prompts: files, chat templates, mixing, storage",
    "planner": "what a run needs, from config.json alone; arithmetic, without torch",
    "student": "everything Megatron: groups, model, optimizer, step, export, checkpoint",
    "rollout": "who answers the prompts: the embedded engine, servers, teachers, the data set",
    "teachers": "what teachers say about the student's tokens: in-process, or behind servers",
    "trainer": "the loop and what it is made of: preflight, experience, updates, evaluation, saving",
    "launch": "starting a run: its processes on this machine, or a Slurm job",
    "commands": "what users call: a module for each command of `megatron-opd`",
}
AT_THE_ROOT = ["__init__.py", "__main__.py", "py.typed"]
DATA = ["methods"]  # folders without code
LEAVES = ["config/*", "core/*"]
HTTP = ["aiohttp", "httpx", "requests", "urllib.request"]
ONLY_IN = {
    "megatron": ["student/*", "teachers/megatron_teacher.py"],
    **{client: ["sglang/*"] for client in HTTP},
    "tenacity": ["sglang/*"],
    f"{PACKAGE}.trainer.loop": ["commands/*"],
}
NEVER_IN = {
    **dict.fromkeys(["transformers", *HTTP], LEAVES),
    "torch": ["config/*", "planner/*"],
    f"{PACKAGE}.student": ["teachers/*"],
    "pickle": ["sglang/*"],  # what a server sends is data; nothing that it says is ever run
}
EXCEPT = {
    # An in-process teacher is built like the student, and heads are cut like its own; the builders pass things on.
    f"{PACKAGE}.student": ["teachers/megatron_teacher.py", "teachers/head_shard.py", "*/__init__.py"],
    "pickle": ["sglang/weights/tensor.py"],  # which sends some, as the server demands, and reads none
}

# How big things may get. Parameters do not count `self` and `cls`.
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 350, 60, 7
BUDGETS_OVER = [PACKAGE, "tools"]


def parsed(*folders):
    """(path, syntax tree) of every source file in the folders."""
    return [(path, ast.parse(path.read_text())) for f in folders for path in sorted((ROOT / f).rglob("*.py"))]


def below(path):
    return path.relative_to(ROOT / PACKAGE).as_posix()


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path, nodes):
    """(imported name, line) of the import statements among `nodes`; relative ones are made absolute."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*here, *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def at_import_time(tree):
    """The statements that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not lazy and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from at_import_time(node)


def within(name, package):
    return f"{name}.".startswith(f"{package}.")


def is_one_of(path, patterns):
    return any(fnmatch(below(path), pattern) for pattern in patterns)


def assert_none(offenders):
    """`offenders` are (path, line, what is wrong)."""
    lines = [f"{path.relative_to(ROOT)}:{line} {wrong}" for path, line, wrong in offenders]
    assert not lines, "\n" + "\n".join(lines)


def test_layers():
    offenders = []
    for path, tree in parsed(PACKAGE):
        for name, line in imports(path, ast.walk(tree)):  # lazy imports count too
            allowed = [where for package, where in ONLY_IN.items() if within(name, package)]
            refused = [
                where
                for package, where in NEVER_IN.items()
                if within(name, package) and not is_one_of(path, EXCEPT.get(package, []))
            ]
            if any(not is_one_of(path, where) for where in allowed) or any(is_one_of(path, w) for w in refused):
                offenders.append((path, line, f"must not import {name}"))
    assert_none(offenders)


# Calls that run what a file tells them to, and where each is at home.
UNPICKLING = {
    "torch.load": ["models/unpickling.py"],
    "pickle.load": [],
    "pickle.loads": [],
    "pickle.Unpickler": ["models/unpickling.py"],
    "dcp.FileSystemReader": ["models/listed_reader.py"],
    "dist_checkpointing.load": ["student/listed_loading.py"],
    "dist_checkpointing.load_common_state_dict": [],
    "np.load": [],
    "numpy.load": [],
    "marshal.loads": [],
    "shelve.open": [],
    "yaml.load": [],
    "yaml.unsafe_load": [],
    "yaml.full_load": [],
}


def test_files_are_unpickled_in_one_place():
    """What a checkpoint may contain is a list there (docs/security.md)."""
    assert_none(
        (path, node.lineno, f"must not use {ast.unparse(node)}")
        for path, tree in parsed(PACKAGE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in UNPICKLING
        and below(path) not in UNPICKLING[ast.unparse(node)]
    )


def room(name):
    """The room of a dotted name of ours, or its file at the root."""
    return name.split(".")[1]


def test_rooms_import_downwards():
    order = {name: floor for floor, name in enumerate(ROOMS)}
    assert_none(
        (path, line, f"{here} must not import from {room(name)}, which stands above it")
        for path, tree in parsed(PACKAGE)
        if (here := below(path).split("/")[0]) in order
        for name, line in imports(path, ast.walk(tree))  # lazy imports count too
        if within(name, PACKAGE) and order.get(room(name), len(order)) > order[here]
    )


def test_every_file_is_in_a_room():
    top = {path.name for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"}
    assert top == {*ROOMS, *AT_THE_ROOT, *DATA}
    assert {path.suffix for name in DATA for path in (ROOT / PACKAGE / name).iterdir()} == {".yaml"}
    assert all((ROOT / PACKAGE / name / "__init__.py").is_file() for name in ROOMS)


def test_every_command_is_a_module_of_its_name():
    headings = importlib.import_module(f"{PACKAGE}.__main__").COMMANDS
    listed = [module.__name__.split(".")[-1] for modules in headings.values() for module in modules]
    has_add = {
        path.stem
        for path, tree in parsed(f"{PACKAGE}/commands")
        if any(isinstance(node, ast.FunctionDef) and node.name == "add" for node in tree.body)
    }
    assert sorted(listed) == sorted(has_add)
    shown = importlib.import_module(f"{PACKAGE}.__main__")._parser().description
    assert [line.split()[0].replace("-", "_") for line in shown.splitlines() if line.startswith("  ")] == listed


def test_the_design_shows_the_rooms_in_their_order():
    shown = (ROOT / "docs/design.md").read_text()
    at = [shown.find(f"{name:<10}{purpose}") for name, purpose in ROOMS.items()]
    assert -1 not in at
    assert at == sorted(at)


def test_no_import_cycles():
    sources = parsed(PACKAGE)
    modules = {dotted(path) for path, _ in sources}
    edges = {}
    for path, tree in sources:
        for name, line in imports(path, at_import_time(tree)):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules:
                edges.setdefault(dotted(path), {})[target] = (path, line)

    def reachable(start):
        seen, todo = set(), [start]
        while todo:
            todo += (new := set(edges.get(todo.pop(), ())) - seen)
            seen |= new
        return seen

    assert_none(
        (*where, f"closes an import cycle: {module} -> {target} -> … -> {module}")
        for module, targets in edges.items()
        for target, where in targets.items()
        if module == target or module in reachable(target)
    )


def test_no_global_statements():
    assert_none(
        (path, node.lineno, f"global {', '.join(node.names)}")
        for path, tree in parsed(*BUDGETS_OVER)
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    )


def test_budgets():
    offenders = []
    for path, tree in parsed(*BUDGETS_OVER):
        found = [(1, "the file has", len(path.read_text().splitlines()), "lines", MAX_FILE_LINES)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                names = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
                parameters = len([name for name in names if name not in ("self", "cls")])
                found.append((node.lineno, f"{node.name} has", length, "lines", MAX_FUNCTION_LINES))
                if not any("triton.jit" in ast.unparse(d) for d in node.decorator_list):  # kernels take no objects
                    found.append((node.lineno, f"{node.name} has", parameters, "parameters", MAX_PARAMETERS))
        offenders += [(path, at, f"{who} {n} {unit}, more than {most}") for at, who, n, unit, most in found if n > most]
    assert_none(offenders)


def test_pytest_collects_every_test_file(pytestconfig):
    """It leaves out folders by name, and refuses two modules of one name."""
    files = list(Path(__file__).parent.rglob("test_*.py"))
    skipped = pytestconfig.getini("norecursedirs")
    folders = {part for file in files for part in file.relative_to(Path(__file__).parent).parts[:-1]}
    assert not [folder for folder in folders if any(fnmatch(folder, pattern) for pattern in skipped)]
    assert sorted({file.name for file in files}) == sorted(file.name for file in files)
