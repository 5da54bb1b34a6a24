"""`megatron-opd push RUN_DIR --to Org/Name`: the export of a run and its model card, in one commit to the hub."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from megatron_opd.core.arguments import Commands
from megatron_opd.core.run_dir import CHECKPOINTS, HF_EXPORT, MARKER, complete

CARD = "README.md"


def add(commands: Commands) -> None:
    """The command and its options."""
    push = commands.add_parser("push", help="upload the export of a run to the Hugging Face hub, with a model card")
    push.add_argument("run_dir", help="run.dir of a finished run")
    push.add_argument("--to", required=True, metavar="Org/Name", help="repository; made if it is not there")
    push.add_argument("--private", action="store_true", help="make it a private one")
    push.add_argument("--license", default="", metavar="NAME", help="licence in the card, e.g. apache-2.0")
    push.add_argument("--card", metavar="FILE", help="model card of your own in place of the made one")
    push.add_argument("--dry-run", action="store_true", help="print the card and the files; ask nobody, send nothing")
    push.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Upload, or with --dry-run say what would be. Raises ValueError for a run that has no whole export."""
    from megatron_opd.config.model_names import may_be_name
    from megatron_opd.models import hub

    if not may_be_name(arguments.to) or ":" in arguments.to or "@" in arguments.to:
        raise ValueError(f"--to {arguments.to} must be Org/Name, with your account or organisation as Org")
    export = _export(Path(arguments.run_dir))
    card = _card(arguments)
    files = {path.relative_to(export).as_posix(): path for path in sorted(export.rglob("*")) if path.is_file()}
    files.pop(CARD, None)  # of the model that this one was made from
    sizes = {CARD: len(card.encode()), **{name: path.stat().st_size for name, path in files.items()}}
    if arguments.dry_run:
        print(card)
    visibility = " (private)" if arguments.private else ""
    print(f"{'would upload' if arguments.dry_run else 'uploading'} to {arguments.to}{visibility}:")
    for name, size in sizes.items():
        print(f"  {hub.size(size):>11}  {name}", flush=True)
    if not arguments.license and not arguments.card:
        print("the card names no licence; --license does, e.g. --license apache-2.0")
    if not arguments.dry_run:
        print(f"done: {_upload(arguments.to, card, files, is_private=arguments.private)}")
    return 0


def _export(run_dir: Path) -> Path:
    """The export of a run. Raises ValueError where it is not there, or not that of the run as it is now."""
    from megatron_opd.models import output_dir
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.models.headers import check_tensors
    from megatron_opd.tracking.report_run import read_run

    run = read_run(run_dir)
    export, unfinished = run_dir / HF_EXPORT, output_dir.temporary(run_dir / HF_EXPORT)
    how = "`megatron-opd train` with the run's config finishes it"
    if not (export / "config.json").is_file():
        what = f"{unfinished} was cut off" if unfinished.exists() else f"{export} is not there"
        raise ValueError(f"{run.dir} has no finished export: {what}; {how} (train.export must be true)")
    newest = complete(run_dir / CHECKPOINTS)[-1:]
    if newest and (newest[0] / MARKER).stat().st_mtime > (export / "config.json").stat().st_mtime + 1.0:
        raise ValueError(f"{export} is older than {newest[0]}: the run went on behind it; {how}")
    try:
        wrong = check_tensors(export, read_architecture(export))
    except ValueError as error:  # not even the headers can be read
        wrong = [str(error)]
    if wrong:
        raise ValueError("\n".join([f"{export} is not whole:", *wrong]))
    return export


def _card(arguments: argparse.Namespace) -> str:
    from megatron_opd.tracking import model_card
    from megatron_opd.tracking.report_run import read_run

    if not arguments.card:
        run, version = read_run(Path(arguments.run_dir)), metadata.version("megatron-opd")
        return model_card.make(run, arguments.to, license_name=arguments.license, version=version)
    if arguments.license:
        raise ValueError("--license writes into the made card; with --card, put it into that file")
    return Path(arguments.card).read_text(encoding="utf-8")


def _upload(name: str, card: str, files: dict[str, Path], *, is_private: bool) -> str:
    """Returns the address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from megatron_opd.models import hub_errors

    api = HfApi(library_name="megatron-opd")
    with _explained(name):
        api.create_repo(name, private=is_private, exist_ok=True)
        if is_private and not api.model_info(name).private:
            raise hub_errors.Unavailable(f"{name} is there already, and public; make it private first, or name another")
        adds = [CommitOperationAdd(CARD, card.encode()), *(CommitOperationAdd(n, p) for n, p in files.items())]
        return str(api.create_commit(name, adds, commit_message="Upload by megatron-opd push").commit_url)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Errors of an upload in words."""
    from huggingface_hub import constants, errors

    from megatron_opd.models import hub_errors

    try:
        yield
    except hub_errors.Unavailable:
        raise
    except errors.OfflineModeIsEnabled:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from None
    except Exception as error:  # its own, and those of three HTTP libraries
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
            raise ValueError(
                f"{constants.ENDPOINT} does not let this account write to {name}: set HF_TOKEN to a token with write"
                " access, or log in with `hf auth login`"
            ) from error
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"the upload to {constants.ENDPOINT}/{name} failed: {said}") from error
