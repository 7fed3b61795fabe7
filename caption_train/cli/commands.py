"""The commands: what the scripts at the root, `caption-train` and `python -m caption_train` call.

Nothing heavy is imported before the flags are read, so that `--help` answers at once.
"""

import sys
from collections.abc import Sequence

from caption_train.cli.arguments import parse_options
from caption_train.cli.exit_codes import advise_savers, run
from caption_train.config.captioning import CaptionOptions
from caption_train.config.compiling import CompileOptions
from caption_train.config.training import TrainOptions
from caption_train.errors import UsageError
from caption_train.families import FAMILIES, get_family
from caption_train.system.console import print_result, set_quiet
from caption_train.system.launcher import program_name, start_command
from caption_train.system.memory import pausing_garbage_collection
from caption_train.system.processes import refuse_several_processes
from caption_train.version import __version__

TRAIN = """Train a LoRA for {title} on your own captions.

  {start} --dataset_dir images/ --output_dir loras/my-style

{note}dataset_dir holds images with captions beside them (a.png, a.txt), or what compile_captions.py made of
them. output_dir can be given to an inference script as --peft_model; every checkpoint in it can be, too."""

LAUNCHED = """On one device `python {prog} …` does the same. Without --quiet, accelerate prints
a traceback of its own below every error.

"""

CAPTION = """Caption images with {title}, with a LoRA of yours if you have one.

  {start} --images photos/ --peft_model loras/my-style --save_captions

Without --base_model it is the one that the LoRA was trained on, or {model_id}.
Any {title} on the hub or in a folder will do; the official ones are
  {bases}"""

CAPTION_ANY = """Caption images with {title}, with a LoRA of yours if you have one.

  {start} --images photos/ --peft_model loras/my-style --save_captions
  {start} --images photos/ --base_model {example} --save_captions

Without --base_model it is the one that the LoRA was trained on."""

COMPILE = """Compile image/caption pairs, or Kohya-ss folders, into a metadata.jsonl that trains.

  {start} images/                  writes images/metadata.jsonl
  {start} images/ dataset/         writes dataset/, images and all

Pairs are a.png with a.txt beside it (or a.png.txt), at any depth; captions of several lines become one.
The result is read by the training scripts and by datasets.load_dataset("imagefolder", data_dir=...,
data_files={{"train": "**"}}). Its rows may only name images below metadata.jsonl, so with an output_dir that
does not hold the images they are put there too, as hard links. One inside dataset_dir is refused."""

EXPORT = """Write an adapter or a model in another form, and check that its captions stay the same.

  {start} loras/my-style merged/ --merge           the whole model, for transformers 5
  {start} loras/my-style comfy/ --layout legacy    the adapter, for ComfyUI and others
  {start} loras/my-style comfy/ --layout legacy --merge    the whole model, for them
  {start} old-adapter-or-model/ native/            what they made, for transformers 5

An image is captioned before and after; nothing is written unless the tokens agree."""

EVALUATE = """See whether training helped: caption a dataset with the base and each adapter, and compare.

  {start} --dataset_dir images/ --peft_model loras/my-style --output_dir evaluation/
  {start} photos/ out/ --family {family} --base_model merged/

The images are those that the adapter's run held out, if it held some out of dataset_dir. output_dir gets
report.html, to look at, evaluation.json and evaluation.md; captions are kept there, so the same command goes
on after a stop, and makes only those again that another model, prompt or setting makes."""

MERGE = """Put together what several jobs with --shard have captioned, and check that nothing is missing.

  {start} --images photos/ --output captions.jsonl
  {start} --images photos/ --save_captions

The jobs write captions.shard-1-of-8.jsonl and so on; this makes captions.jsonl of them, in the order of
the images, as one job would have written it. Caption files are only looked for. Images without a caption
are named, and the exit code is 1. One with captions in two shards is named too, and nothing is written."""

REVIEW = """Go through a folder of images and captions on a local page: read, correct, accept.

  {start} images/                                  a page at http://127.0.0.1:7860
  {start} images/ --peft_model loras/my-style      with captions that the model suggests

Captions are saved as training reads them: in files beside the images, or in the metadata.jsonl that is there.
No edit made elsewhere is written over, and every edit can be undone, after a restart too. It ends with a
folder of what was accepted and the command that trains on it. It needs: pip install '.[review]'"""


MAIN = """Teach image captioners your own style.

  caption-train compile images/                                      images with captions become a dataset
  caption-train train {families} --dataset_dir images/ --output_dir loras/my-style
  caption-train caption {families} --images photos/ --peft_model loras/my-style
  caption-train merge --images photos/ --output captions.jsonl       one file of what several jobs wrote
  caption-train evaluate images/ evaluation/ --peft_model loras/my-style
  caption-train review images/                                       read and correct them on a local page
  caption-train export loras/my-style merged/ --merge

Each takes the flags of the script of its name and explains them with --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `caption-train VERB …`, which does what the scripts do; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb, *rest = arguments or ["--help"]
    for_family = {"train": train_main, "caption": caption_main}
    alone = {
        "compile": compile_main,
        "merge": merge_main,
        "evaluate": evaluate_main,
        "review": review_main,
        "export": export_main,
    }
    if verb in alone:
        return alone[verb](rest, prog=f"{program_name()} {verb}")
    if verb in for_family and rest[:1] in (["-h"], ["--help"]):
        verb = "--help"
    if verb in for_family and rest and rest[0] in FAMILIES:
        return for_family[verb](rest[0], rest[1:], prog=f"{program_name()} {verb} {rest[0]}")
    return run(lambda: _tell_or_refuse(verb, rest))


def _tell_or_refuse(verb: str, rest: Sequence[str]) -> int:
    """Print what was asked of the command itself; UsageError for what is no verb."""
    if verb in ("-h", "--help"):
        print(MAIN.format(families="|".join(FAMILIES)))
        return 0
    if verb == "--version":
        print(f"caption-train {__version__}")
        return 0
    if verb in ("train", "caption"):
        named = f"{verb} {rest[0]}: no such family" if rest else f"{verb}: name a family"
        raise UsageError(f"{named}; the families are {', '.join(FAMILIES)}")
    raise UsageError(
        f"{verb}: no such command; there are compile, train, caption, merge, evaluate, review, export "
        "(see --help)"
    )


def train_main(family_name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a training script for a family; return the exit code."""
    family, prog = get_family(family_name), prog or program_name()

    def work() -> int:
        options = parse_options(
            TrainOptions,
            argv,
            prog=prog,
            description=_describe_training(family.title, prog),
            positionals=("dataset_dir", "output_dir"),
            defaults={
                "model_id": family.model_id,
                "target_modules": list(family.facts.lora_target_modules),
                **family.train_defaults,
            },
            choices=family.flag_choices(),
            omit=tuple(family.absent_flags()),
        )
        set_quiet(options.quiet)
        family.cache_converted = options.cache_converted
        if options.plan:
            from caption_train.training.plan_command import plan_training

            return plan_training(options, family)
        from caption_train.training.run.ahead import read_ahead

        ahead = read_ahead(options)
        with pausing_garbage_collection():
            from caption_train.training.failures import explain_lost_process
            from caption_train.training.monitor.console import print_summary
            from caption_train.training.prepare import prepare_training

        with explain_lost_process(options.output_dir, options.rank_timeout):
            trainer = prepare_training(options, family, ahead)
            summary = trainer.train()
        if trainer.run.accelerator.is_main_process:
            start = start_command("caption", family.name, ["python", family.inference_script])
            print_summary(summary, options, start)
        return 0

    return run(work, advise_savers)


def caption_main(family_name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run an inference script for a family; return the exit code."""
    family, prog = get_family(family_name), prog or program_name()

    def work() -> int:
        options = parse_options(
            CaptionOptions,
            argv,
            prog=prog,
            description=(CAPTION if family.model_id else CAPTION_ANY).format(
                title=family.title,
                start=_start("python", prog),
                model_id=family.model_id,
                bases="\n  ".join(family.base_models),
                example=family.example_model,
            ),
            positionals=("images",),
            choices=family.flag_choices(),
            omit=tuple(family.absent_flags()),
        )
        set_quiet(options.quiet)
        family.cache_converted = options.cache_converted
        from caption_train.captioning.job import caption_folder

        return caption_folder(options, family)

    return run(work, lambda: "Use less with --batch_size 1 or --dtype bfloat16.")


def compile_main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run compile_captions.py; return the exit code."""

    def work() -> int:
        options = parse_options(
            CompileOptions,
            argv,
            prog=prog or program_name(),
            description=COMPILE.format(start=_start("python", prog or program_name())),
            positionals=("dataset_dir", "output_dir"),
            choices={"family": tuple(FAMILIES)},
        )
        set_quiet(options.quiet)
        from caption_train.compiling.compile import compile_captions

        return compile_captions(options)

    return run(work, lambda: "Close other programs, or leave out --check_images.")


def merge_main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run merge_captions.py; return the exit code."""

    def work() -> int:
        from caption_train.config.merging import MergeOptions

        options = parse_options(
            MergeOptions,
            argv,
            prog=prog or program_name(),
            description=MERGE.format(start=_start("python", prog or program_name())),
            positionals=("images",),
        )
        set_quiet(options.quiet)
        refuse_several_processes("merge_captions.py")
        from caption_train.merging.merge import merge_captions

        return merge_captions(options)

    return run(work)


def export_main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run export_adapter.py; return the exit code."""

    def work() -> int:
        from caption_train.config.exporting import ExportOptions
        from caption_train.exporting.export import export, find_family

        options = parse_options(
            ExportOptions,
            argv,
            prog=prog or program_name(),
            description=EXPORT.format(start=_start("python", prog or program_name())),
            positionals=("source", "output_dir"),
            choices={"family": tuple(FAMILIES)},
        )
        set_quiet(options.quiet)
        print_result(export(options, get_family(find_family(options))))
        return 0

    return run(work, lambda: "Close other programs, or use a machine with more memory.")


def evaluate_main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run evaluate_captions.py; return the exit code."""

    def work() -> int:
        from caption_train.config.evaluation import EvaluateOptions

        options = parse_options(
            EvaluateOptions,
            argv,
            prog=prog or program_name(),
            description=EVALUATE.format(
                start=_start("python", prog or program_name()), family=next(iter(FAMILIES))
            ),
            positionals=("dataset_dir", "output_dir"),
            choices={"family": tuple(FAMILIES)},
        )
        set_quiet(options.quiet)
        from caption_train.evaluation.evaluate import evaluate

        return evaluate(options)

    return run(work, lambda: "Use less with --batch_size 1 or --dtype bfloat16.")


def review_main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run review_captions.py; return the exit code."""

    def work() -> int:
        from caption_train.config.reviewing import ReviewOptions

        options = parse_options(
            ReviewOptions,
            argv,
            prog=prog or program_name(),
            description=REVIEW.format(start=_start("python", prog or program_name())),
            positionals=("images",),
            choices={"family": tuple(FAMILIES)},
        )
        set_quiet(options.quiet)
        from caption_train.reviewing.server import review_folder

        return review_folder(options)

    return run(work, lambda: "Use less with --dtype bfloat16 or --quantize.")


def _describe_training(title: str, prog: str) -> str:
    note = "" if " " in prog else LAUNCHED.format(prog=prog)
    return TRAIN.format(title=title, start=_start("accelerate launch --quiet", prog), note=note)


def _start(launcher: str, prog: str) -> str:
    """Return how a command is started: a script by a launcher, the installed command by itself."""
    return prog if " " in prog else f"{launcher} {prog}"
