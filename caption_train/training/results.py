"""Completes the finished model's folder: results in its card, sample pictures, an upload to the hub."""

import io
import os
from pathlib import Path

from caption_train.adapters.model_card import Shown, add_results
from caption_train.adapters.record import TRAINING_FILE
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.reporting.report import REPORT_FILE
from caption_train.system.console import print_line
from caption_train.system.files import parse_json, read_json_object, write_atomically
from caption_train.training.monitor.log import LOG_FILE, Sample
from caption_train.training.monitor.report import RunReport
from caption_train.training.monitor.samples import COUNT, PreviewCaptioner
from caption_train.training.run.run import TrainingRun

SAMPLES = "samples"
LARGEST_SIDE = 512
FLAG = "--push_to_hub"


def complete_card(run: TrainingRun, sampler: PreviewCaptioner, report: RunReport) -> None:
    """Write results, samples and a link to the report into the model card of the finished model.

    Args:
        run: the finished run.
        sampler: its previews; those before the first step are missing where the run was resumed since.
        report: its report, whose images are the samples where there are no previews.
    """
    first, latest = sampler.first, sampler.latest
    if not latest:
        first, latest = report.find_samples(COUNT)
    output_dir = run.options.output_dir
    after = find_validation(output_dir)
    if not (after or latest):
        return
    before = {sample.file: sample.generated for sample in first}
    shown = []
    for number, sample in enumerate(latest, 1):
        file = f"{SAMPLES}/{number}.jpg"
        _write_picture(output_dir / file, sample)
        shown.append(Shown(file, sample.reference, before.get(sample.file, ""), sample.generated))
    link = REPORT_FILE if report.is_written else None
    add_results(output_dir, run.record, run.progress.base_evaluation, after, shown, link)


def find_validation(output_dir: Path) -> dict[str, float]:
    """Return the newest validation results, by name, of the model in a folder up to the step that it has."""
    step = read_json_object(output_dir / TRAINING_FILE).get("global_step") or 0
    found: dict[str, float] = {}
    for line in map(parse_json, (output_dir / LOG_FILE).read_text("utf-8").splitlines()):
        values = {k.removeprefix("eval_"): value for k, value in line.items() if k.startswith("eval_")}
        if values and 0 < line["step"] <= step:
            found = values
    return found


def _write_picture(path: Path, sample: Sample) -> None:
    picture, content = sample.image.copy(), io.BytesIO()
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    picture.save(content, "JPEG", quality=88)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, content.getvalue())


def check_hub(repository: str | None) -> None:
    """Raise UsageError before a run if `--push_to_hub` could not upload: a bad name, or no login."""
    if repository is None:
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{FLAG} {repository}: {str(error).partition(chr(10))[0]}") from error
    if not is_offline() and not get_token():
        raise UsageError(f"{FLAG} {repository}: no login; run `hf auth login`, or set HF_TOKEN")


def push(output_dir: Path, repository: str) -> None:
    """Upload a finished model to the hub; with HF_HUB_OFFLINE set, say what would be uploaded.

    Raises:
        CaptionTrainError: the upload failed; the model is in its folder.
    """
    files = list_files(output_dir)
    if is_offline():
        print_line(f"{FLAG} {repository}: offline, so nothing is uploaded; it would be {', '.join(files)}")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=output_dir, allow_patterns=files)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CaptionTrainError(
            f"{FLAG} {repository}: {reason}; the model is in {output_dir}, upload it with: "
            f"hf upload {repository} {output_dir}"
        ) from error
    print_line(f"uploaded to https://huggingface.co/{repository}")


def list_files(output_dir: Path) -> list[str]:
    """Return the files of a finished model: those beside its checkpoints, and its sample pictures.

    The report stays here: it holds small copies of many validation images.
    """
    names = [path.name for path in output_dir.iterdir() if path.is_file() and not path.is_symlink()]
    kept = [name for name in names if not name.startswith((".", "log", "last", "best", REPORT_FILE))]
    pictures = [f"{SAMPLES}/{path.name}" for path in (output_dir / SAMPLES).glob("*.jpg")]
    return sorted(kept) + sorted(pictures)


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
