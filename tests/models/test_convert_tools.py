"""The commands on checkpoints as users call them, also by their names in tools/: what they print, write and refuse."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiny
import torch
import warm
from safetensors.torch import load_file, save_file

from megatron_opd.__main__ import main
from megatron_opd.commands import verify
from megatron_opd.tracking.bytes_bar import BytesBar

ROOT = Path(__file__).resolve().parents[2]
STUDENT = ROOT / "examples/quickstart/models/student"
TIMEOUT_S = 600


def ours(given):
    """`megatron-opd convert`, inspect or verify in this process."""
    return main(given if given[:1] in (["inspect"], ["verify"]) else ["convert", *given])


def run(*command, **options):
    """A tool in a process of its own; torchrun and its ranks in fresh ones."""
    hidden = ("RANK", "WORLD_SIZE")
    environment = {**{k: v for k, v in os.environ.items() if k not in hidden}, "OMP_NUM_THREADS": "1"}
    if str(command[0]).endswith(".py"):
        return warm.run(command, env=environment, timeout=TIMEOUT_S, **options)
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks of torchrun too
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture
def model_dir(tmp_path):
    """The quickstart's student: a Qwen3 in bf16 with a SentencePiece tokenizer."""
    return Path(shutil.copytree(STUDENT, tmp_path / "hf"))


@pytest.fixture
def checkpoint(model_dir, tmp_path, capsys):
    assert ours(["hf-to-megatron", "--hf", str(model_dir), "--out", str(tmp_path / "mg")]) == 0
    capsys.readouterr()
    return tmp_path / "mg"


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs convert_checkpoint.py, which must refuse with one error and write nothing; returns the message."""

    def call(*arguments):
        before = sorted(path.name for path in tmp_path.iterdir())
        capsys.readouterr()
        assert ours([str(a) for a in arguments]) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        return said

    return call


def change_json(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_weights(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow  # tests/commands/test_wheel.py converts in a process of its own, too
def test_there_and_back_from_the_shell(tmp_path):
    """Both directions in processes of their own, the first of them shared by two."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc-per-node", "2", "--standalone", "tools/convert_checkpoint.py"]
    done = run(*command, "hf-to-megatron", "--hf", STUDENT, "--out", tmp_path / "mg", "--tp", "2", "--pp", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters  19 of Megatron's, bfloat16") == 1  # one rank talks
    assert len(list((tmp_path / "mg").glob("*.distcp"))) == 2
    done = run(
        "tools/convert_checkpoint.py", "megatron-to-hf", "--checkpoint", tmp_path / "mg", "--out", tmp_path / "b"
    )
    assert done.returncode == 0, done.stderr
    assert "megatron-to-hf: done in" in done.stderr
    one, other = load_file(STUDENT / "model.safetensors"), load_file(tmp_path / "b/model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (STUDENT / name).read_bytes()
    done = run("tools/convert_checkpoint.py", "verify", STUDENT, tmp_path / "mg", "--logits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights: 25 of 25 tensors are equal bit for bit; max |Δ| 0" in done.stdout
    assert "logits: 83 tokens, max |Δ|" in done.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(model_dir, checkpoint, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    for command in (["hf-to-megatron", "--hf", model_dir, "--tp", 2], ["megatron-to-hf", "--checkpoint", checkpoint]):
        assert ours([*map(str, command), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
        out = capsys.readouterr().out
        for words in (
            "19 of Megatron's, bfloat16",
            "size        0.21 MB;",
            "GB free",
            "memory      at most",
            "dry run",
        ):
            assert words in out
    assert sorted(tmp_path.iterdir()) == before


def test_padding_for_a_layout_is_said_and_undone(tmp_path, capsys):
    tiny.save(tiny.build("qwen2", vocab_size=93), tmp_path / "hf")
    command = ["hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "mg")]
    assert ours([*command, "--tp", "4", "--vocab-multiple", "6"]) == 0
    assert "vocabulary  93 entries and 3 of padding" in capsys.readouterr().out
    assert ours(["verify", str(tmp_path / "hf"), str(tmp_path / "mg")]) == 0


def test_inspect(model_dir, checkpoint, capsys):
    for directory, words in ((model_dir, "Hugging Face"), (checkpoint, "torch_dist (Megatron)")):
        assert ours(["inspect", str(directory), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["format"], facts["parameters"], facts["dtype"]) == (words, 102784, "bfloat16")
        assert ours(["inspect", str(directory)]) == 0
        assert "102,784" in capsys.readouterr().out
    (checkpoint / "__0_0.distcp").unlink()
    assert ours(["inspect", str(checkpoint)]) == 1
    assert "problem: " in capsys.readouterr().err


def test_verify_finds_a_single_changed_weight(model_dir, checkpoint, capsys):
    change_weights(model_dir, lambda w: w["model.layers.1.mlp.up_proj.weight"][5, 7].add_(0.5))
    assert ours(["verify", str(model_dir), str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj.weight: max |Δ| 0.5" in out
    assert "24 of 25 tensors are equal bit for bit" in out
    assert out.endswith("DIFFERENT\n")
    assert ours(["verify", str(model_dir), str(checkpoint), "--atol", "0.6"]) == 0
    assert "within the tolerance" in capsys.readouterr().out
    change_weights(model_dir, lambda w: w["model.norm.weight"][:1].fill_(float("nan")))
    assert ours(["verify", str(model_dir), str(checkpoint), "--atol", "0.6"]) == 1
    assert "model.norm.weight: max |Δ| inf" in capsys.readouterr().out


def test_verify_finds_logits_that_are_no_numbers(model_dir, checkpoint, capsys, monkeypatch):
    def logits(side, ids):
        """One side's last sequence has a NaN, which max() overlooks behind a number."""
        made = [torch.zeros(len(sequence), 4) for sequence in ids]
        made[-1][-1, -1] = float("nan") if side.path == checkpoint else 0.0
        return made

    monkeypatch.setattr(verify, "_logits", logits)
    assert ours(["verify", str(model_dir), str(checkpoint), "--logits"]) == 1
    out = capsys.readouterr().out
    assert "max |Δ| inf" in out
    assert out.endswith("DIFFERENT\n")


def test_verify_refuses_different_models(model_dir, tmp_path, refused):
    tiny.save(tiny.build("qwen3"), tmp_path / "other")
    assert "are different models: hidden_size is 64 and 32" in refused("verify", model_dir, tmp_path / "other")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "there is no config.json in it"),
        (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda d: os.truncate(d / "model.safetensors", 150_000), "model.safetensors is damaged or cut short"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}'),
            "tensor 'lm_head.weight' is missing",
        ),
        (
            lambda d: change_json(d / "config.json", num_hidden_layers=3),
            "model.layers.2.input_layernorm.weight' is mis",
        ),
        (
            lambda d: change_json(d / "config.json", intermediate_size=96),
            "mlp.down_proj.weight' has shape [64, 192], but",
        ),
        (
            lambda d: change_json(d / "config.json", architectures=["GPT2LMHeadModel"]),
            "architecture GPT2LMHeadModel is not supported; known: LlamaForCausalLM, MistralForCausalLM, Qwen2",
        ),
        (lambda d: change_weights(d, lambda w: w.pop("model.norm.weight")), "tensor 'model.norm.weight' is missing"),
        (
            lambda d: change_weights(d, lambda w: w.update(b=torch.ones(1))),
            "tensor 'b' does not belong to the model of its config.json",
        ),
        (
            lambda d: change_weights(d, lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
            "'model.norm.weight' has type I8; known: F32, BF16, F16, F64",
        ),
    ],
)
def test_damaged_models_are_refused(model_dir, tmp_path, refused, damage, message):
    damage(model_dir)
    assert message in refused("hf-to-megatron", "--hf", model_dir, "--out", tmp_path / "out")


def test_an_index_that_names_absent_files_is_refused(model_dir, tmp_path, refused):
    names = load_file(model_dir / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | {"lm_head.weight": "two.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refused("hf-to-megatron", "--hf", model_dir, "--out", tmp_path / "out")
    assert "the index names two.safetensors, which does not exist" in said


def test_damaged_checkpoints_are_refused(checkpoint, model_dir, tmp_path, refused):
    command = ["megatron-to-hf", "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    change_json(checkpoint / "config.json", intermediate_size=96)
    assert "mlp.linear_fc1.weight' has shape [2, 384, 64], but config.json says [2, 192, 64]" in refused(*command)
    os.truncate(checkpoint / "__0_0.distcp", 100_000)
    assert "__0_0.distcp is cut short: 100000 bytes" in refused(*command, "--like", model_dir)
    os.truncate(checkpoint / ".metadata", 1000)
    assert ".metadata is damaged or cut short" in refused(*command, "--like", model_dir)
    (checkpoint / ".metadata").unlink()
    assert "is not a torch_dist checkpoint" in refused(*command, "--like", model_dir)


def test_outputs_are_never_overwritten_by_accident(model_dir, checkpoint, tmp_path, refused, capsys):
    command = ["hf-to-megatron", "--hf", str(model_dir), "--out", str(checkpoint)]
    assert "exists and is not empty; choose another directory, or give --overwrite" in refused(*command)
    before = (checkpoint / ".metadata").stat().st_ino
    assert ours([*command, "--overwrite"]) == 0
    assert (checkpoint / ".metadata").stat().st_ino != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    said = refused("hf-to-megatron", "--hf", model_dir, "--out", tmp_path / "mine", "--overwrite")
    assert "is not a model or checkpoint, so --overwrite will not remove it" in said
    assert "must not be the same directory" in refused("hf-to-megatron", "--hf", model_dir, "--out", model_dir / "mg")
    back = ["megatron-to-hf", "--checkpoint", checkpoint, "--like", model_dir, "--overwrite", "--out"]
    assert "must not be the same directory" in refused(*back, model_dir)
    assert "or one within the other" in refused(*back, model_dir / "back", "--dry-run")
    assert sorted(model_dir.iterdir()) == sorted(model_dir / path.name for path in STUDENT.iterdir())


def test_layouts_that_do_not_fit_are_refused(model_dir, tmp_path, refused):
    command = ["hf-to-megatron", "--hf", model_dir, "--out", tmp_path / "out"]
    assert "--tp 3 does not divide the 4 attention heads" in refused(*command, "--tp", 3)
    assert "--pp 4 does not divide the 2 layers" in refused(*command, "--pp", 4)


def test_not_enough_room_is_refused_before_anything_is_written(model_dir, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    said = refused("hf-to-megatron", "--hf", model_dir, "--out", tmp_path / "out")
    assert "not enough room" in said


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_up_leaves_nothing(model_dir, checkpoint, tmp_path, direction):
    given = ["--hf", model_dir] if direction == "hf-to-megatron" else ["--checkpoint", checkpoint]
    before = sorted(tmp_path.iterdir())
    done = run(
        *("tools/convert_checkpoint.py", direction, *given, "--out", tmp_path / "out"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("reason", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_conversion_leaves_nothing(model_dir, checkpoint, tmp_path, monkeypatch, reason):
    def interrupt(_, __):
        raise reason

    monkeypatch.setattr(BytesBar, "__call__", interrupt)
    before = sorted(tmp_path.iterdir())
    for command in (["hf-to-megatron", "--hf", model_dir], ["megatron-to-hf", "--checkpoint", checkpoint]):
        arguments = [*map(str, command), "--out", str(tmp_path / "out")]
        if reason is KeyboardInterrupt:
            assert ours(arguments) == 130
        else:
            with pytest.raises(SystemExit):
                ours(arguments)
        assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def run_dir(model_dir, checkpoint, tmp_path):
    """What a run leaves behind, made of a converted checkpoint: no config and no tokenizer beside the weights."""
    step = tmp_path / "run/checkpoints/step_00000010"
    step.mkdir(parents=True)
    for path in [*checkpoint.glob("*.distcp"), checkpoint / ".metadata", checkpoint / "metadata.json"]:
        shutil.copy(path, step)
    student = {"family": "qwen3", "num_layers": 2, "hidden_size": 64}
    (step / "loop.json").write_text(json.dumps({"step": 10, "student": student, "layout": [2, 2, 1]}))
    (tmp_path / "run/config.yaml").write_text(f"student: {{model: {model_dir}}}\n")
    return tmp_path / "run"


def test_what_is_no_checkpoint_is_said_before_asking_for_its_model(run_dir, tmp_path, refused):
    command = ["megatron-to-hf", "--out", tmp_path / "out", "--checkpoint"]
    assert "/nowhere is not a torch_dist checkpoint" in refused(*command, tmp_path / "nowhere")
    said = refused(*command, run_dir)
    assert "it is the directory of a run: name one of its checkpoints, such as" in said
    assert "checkpoints/step_00000010" in said


def test_a_runs_checkpoint(run_dir, model_dir, tmp_path, capsys, refused):
    step = run_dir / "checkpoints/step_00000010"
    command = ["megatron-to-hf", "--checkpoint", str(step), "--out", str(tmp_path / "out")]
    assert ours(command) == 0
    assert ours(["verify", str(model_dir), str(step)]) == 0
    capsys.readouterr()
    assert ours(["inspect", str(step), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["saved at layout"]) == (10, "tensor 2 x pipeline 2 x data 1 (loads at any)")
    assert "is the directory of a run; name one of its checkpoints" in refused("inspect", run_dir)
    command[-1] = str(tmp_path / "other")
    change_json(step / "loop.json", student={"family": "qwen3", "rope_base": 5.0})
    assert "its student's rope_base is 5.0, in the config.json of" in refused(*command)
    (run_dir / "config.yaml").write_text("student: {model: not/here}\n")
    assert "names not/here as student.model, which is not here; give its place with --like" in refused(*command)
    (run_dir / "config.yaml").unlink()
    assert "has no config.json; name a directory of the same model with --like" in refused(*command)


@pytest.mark.parametrize("command", ["", "hf-to-megatron", "megatron-to-hf", "inspect", "verify"])
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        ours([*filter(None, [command]), "--help"])
    assert stopped.value.code == 0
    assert "examples:\n  megatron-opd " in capsys.readouterr().out


class _Server(BaseHTTPRequestHandler):
    """Answers /generate as SGLang does, with the log-probabilities of `logps`."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["return_logprob"], asked["logprob_start_len"]) == ("/generate", True, 0)
        logps = [None, *self.server.logps[tuple(asked["input_ids"])]]
        triples = [[logp, token, None] for logp, token in zip(logps, asked["input_ids"], strict=True)]
        body = json.dumps({"text": "", "meta_info": {"input_token_logprobs": triples[: self.server.at_most]}}).encode()
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(body if self.server.status == 200 else b"out of order")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), _Server)
    server.status, server.at_most = 200, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_logprobs_of_three_engines(server, tmp_path):
    """The stand-in says what transformers says, but for one token of the second prompt."""
    from megatron_opd.student import token_logps

    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in prompts))
    logps = [x.tolist() for x in token_logps.logps_by_transformers(STUDENT, prompts, torch.float32)]
    logps[1][1] -= 0.25
    server.logps = {tuple(ids): x for ids, x in zip(prompts, logps, strict=True)}
    url = f"http://127.0.0.1:{server.server_port}"
    command = ["tools/compare_logprobs.py", "--hf", STUDENT, "--prompts", tmp_path / "p.jsonl", "--sglang", url]
    done = run(*command, "--out", tmp_path / "out", "--atol", "0.2")
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report["pairs"]) == ["transformers - megatron", "transformers - sglang", "megatron - sglang"]
    assert report["pairs"]["transformers - megatron"]["max"] < 2e-5
    found = report["pairs"]["transformers - sglang"]
    assert found["max"] == pytest.approx(0.25, abs=1e-6)
    assert found["mean"] == pytest.approx(0.25 / 6, abs=1e-6)
    assert (found["worst"]["prompt"], found["worst"]["position"], found["worst"]["token"]) == (1, 2, 12)
    assert "transformers - sglang: mean |Δ| 0.0417, max |Δ| 0.25 at prompt 1, position 2, token 12" in done.stdout
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.endswith("DIFFERENT: 0.25 is above --atol 0.2\n")


@pytest.mark.slow
def test_logprobs_at_a_layout(checkpoint, tmp_path):
    torchrun = Path(sys.executable).with_name("torchrun")
    done = run(
        *(torchrun, "--nproc-per-node", "4", "--standalone", "tools/compare_logprobs.py", "--hf", STUDENT),
        *("--megatron", checkpoint, "--tp", "2", "--pp", "2", "--text", "12+34=", "1+1", "--out", tmp_path / "out"),
        *("--atol", "2e-5"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers - megatron: mean |Δ|" in done.stdout


def test_what_compare_logprobs_refuses(server, tmp_path, capsys):
    def refused(*arguments):
        assert main(["compare-logprobs", "--hf", str(STUDENT), *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "no such file" in refused("--prompts", tmp_path / "absent.jsonl")
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6]}\n{"text": 1}\n')
    assert "line 2 has neither prompt nor token_ids" in refused("--prompts", tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"token_ids": null}\n')
    assert "line 1 has neither prompt nor token_ids" in refused("--prompts", tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"token_ids": 5}\n')
    assert "line 1: token_ids must be a list of ids, not 5" in refused("--prompts", tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 32]}\n')
    assert "token id 32 is not in the vocabulary" in refused("--prompts", tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5]}\n')
    assert "no prompt of at least two tokens" in refused("--prompts", tmp_path / "p.jsonl")
    assert "--tp 2 --pp 1 needs 2 ranks or a multiple, not 1" in refused("--text", "1+1", "--tp", "2")
    server.logps = {(5, 6, 7): [-1.0, -2.0]}
    url = f"http://127.0.0.1:{server.server_port}"
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6, 7]}\n')
    server.at_most = 2
    assert "scored other tokens than were sent: 2 of 3" in refused("--prompts", tmp_path / "p.jsonl", "--sglang", url)
    server.status = 400
    assert "answered 400" in refused("--prompts", tmp_path / "p.jsonl", "--sglang", url)
    assert "did not answer as an SGLang server" in refused(
        "--prompts", tmp_path / "p.jsonl", "--sglang", "http://127.0.0.1:9", "--timeout", "2"
    )


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    command = ["tools/bench_convert.py", "--layers", "1", "--hidden", "128", "--vocab", "512", "--work", tmp_path]
    done = run(*command, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert [row["direction"] for row in rows] == ["hf-to-megatron", "megatron-to-hf"]
    assert all(0 < row["peak_bytes"] < 256 << 20 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
