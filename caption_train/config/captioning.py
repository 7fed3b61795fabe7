"""Defines the flags of the inference scripts; config/training.py explains the form. Standard library only."""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from caption_train.config.fields import LARGEST_SEED, CountOrAuto, find_above, find_below, find_not_utf8, flag

CLEANERS = ("strip_special", "one_line", "first_sentence", "dedupe_tags")
"""What `--clean` does, in this order."""
RESERVED_KEYS = ("file_name", "caption", "tags", "split", "prompt", "answer", "remarks", "replaces")
"""Columns of rows and journals that are no caption of a named prompt; `caption` is another name of `text`."""
KEY_VARIABLE = "CAPTION_TRAIN_API_KEY"
"""Environment variable of a server's key: no flag, which other users of the machine would see."""

_model = partial(flag, group="model")
_input = partial(flag, group="images")
_server = partial(
    flag, group=f"a served model (its key, if it wants one, in the environment variable {KEY_VARIABLE})"
)
_captions = partial(flag, group="captions")
_output = partial(flag, group="output")


@dataclass(frozen=True)
class CaptionOptions:
    """The flags of an inference script."""

    images: list[str] = _input(
        [],
        "images to caption: files, folders, globs, a .txt file that lists one image a line, or shards (.tar, "
        ".parquet)",
    )
    recursive: bool = _input(False, "look into the folders inside a folder too")
    limit: int | None = _input(None, "caption the first N of the images that are left, to try")
    shard: str | None = _input(
        None,
        "caption part I of N, for N independent jobs with the same --images; merge_captions.py puts them "
        "together",
        metavar="I/N",
    )
    metadata: Path | None = _input(
        None,
        "a .jsonl or .csv file whose columns prompt, text and tags say what images are asked (or --output)",
    )

    base_model: str | None = _model(
        None, "model to caption with: a hub id or a folder (default: the adapter's, or see above)"
    )
    peft_model: Path | None = _model(None, "folder of the adapter (LoRA, IA3, …) to put on the base model")
    revision: str | None = _model(None, "branch, tag or commit of the base model on the hub")
    cache_converted: bool = _model(False, "keep a native copy of a checkpoint in the legacy layout")
    device: str | None = _model(
        None, "device to run on, such as cuda, cuda:1, mps or cpu (found if not given)"
    )
    dtype: str = _model(
        "float32",
        "precision of the model; auto is the one that the adapter was trained in, else bfloat16, as far as "
        "the device has it",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = _model(
        None,
        "hold the base in 4-bit NF4 (or 8bit): less memory; --dtype is auto then, if not given",
        choices=("4bit", "8bit"),
        const="4bit",
    )

    endpoint: str | None = _server(
        None, "caption through an OpenAI-compatible server (vLLM, llama.cpp, SGLang) at this URL"
    )
    model: str | None = _server(None, "name that the server has for the model")
    concurrency: int = _server(8, "requests under way at once")
    timeout: float = _server(120.0, "seconds to wait for an answer")
    retries: int = _server(5, "further tries, with growing pauses, where there is no answer")

    prompt: str | None = _captions(None, "text the model is given with every image (default: the adapter's)")
    task: str | None = _captions(None, "task token, instead of --prompt")
    preset: str | None = _captions(None, "a prompt by its name, instead of --prompt")
    prompt_template: str | None = _captions(
        None, "a prompt with {caption} {tags} {name} {folder} {prompt} of every image, instead of --prompt"
    )
    prompts: list[str] = _captions(
        [],
        "several captions of every image, each a column NAME of --output and a file a.NAME.txt; repeatable",
        repeated=True,
        metavar="NAME=PROMPT",
    )
    system_prompt: str | None = _captions(
        None, "what the model is told before every prompt (default: the adapter's, else the checkpoint's)"
    )
    max_pixels: int | None = _captions(
        None, "make images smaller that have more pixels: fewer image tokens (default: the adapter's)"
    )
    beams: int | None = _captions(None, "beams of the beam search (default: the checkpoint's)")
    max_token_length: int = _captions(256, "longest caption in tokens")
    temperature: float = _captions(0.0, "sample at this temperature; 0 takes the likeliest caption")
    top_p: float = _captions(1.0, "sample from the likeliest tokens that sum to this probability")
    seed: int = _captions(42, "seed of sampling; a caption depends on it and its image alone")
    batch_size: CountOrAuto = _captions(
        4, "images captioned at once, in every process; auto: more and more, as memory has room"
    )
    num_workers: CountOrAuto = _captions(
        2,
        "processes that read and resize images ahead of the model; auto goes by cores and the "
        "size of the images",
    )
    group_by_length: bool = _captions(
        False,
        "fill batches with prompts and images of similar length in tokens: less padding",
        recorded="if given",
    )
    draft_decode: bool = _captions(
        False,
        "decode large JPEG files at a half, a quarter or an eighth of their size, not below what the model "
        "reads: faster, with slightly other pixels",
        recorded="if given",
    )
    cuda_graphs: bool = _captions(
        False,
        "on an NVIDIA GPU, record a decoding step once and replay it (experimental)",
        recorded="if given",
    )
    engine: str = _captions(
        "local",
        "what runs the model: this process (or those of torchrun), or actors on a Ray cluster: that of "
        "RAY_ADDRESS, else one on this machine",
        choices=("local", "ray"),
        recorded="if given",
    )
    actors: int | None = _captions(
        None, "processes that hold the model with --engine ray (default: one a GPU)", recorded="if given"
    )
    gpus_per_actor: float | None = _captions(
        None, "GPUs, or part of one, of each of them (default: 1 where there are any)", recorded="if given"
    )
    worker_timeout: int = _captions(600, "seconds to wait for a batch of --num_workers; 0 waits for ever")

    save_captions: bool = _output(False, "write every caption to a file beside its image")
    caption_extension: str = _output(".txt", "extension of those files")
    output: Path | None = _output(None, "write all captions to this .jsonl, metadata.jsonl or .csv file")
    output_shards: str | None = _output(
        None, "folder, or URL of one, for the captioned copies of shards that --images names", metavar="PATH"
    )
    output_format: str | None = _output(
        None,
        "write them as tars, or as rows without images (default: as they are)",
        choices=("webdataset", "parquet", "jsonl"),
    )
    existing: str = _output(
        "keep",
        "what becomes of captions that are there: kept, or what is new replaces, follows or precedes them",
        choices=("keep", "overwrite", "append", "prepend"),
    )
    overwrite: bool = _output(False, "caption images again that have a caption already: --existing overwrite")
    separator: str | None = _output(
        None,
        "between a caption and what is appended or prepended (default: a comma and a space, after the end of "
        "a sentence a space)",
        metavar="TEXT",
    )
    clean: list[str] = _output([], f"clean captions before they are written: {', '.join(CLEANERS)}")
    prefix: str = _output("", "put this before every caption")
    suffix: str = _output("", "put this after every caption")
    trigger: str | None = _output(None, "begin captions with this word and a comma, where it is not in them")
    visualize: Path | None = _output(
        None, "draw the boxes and labels of answers on copies of the images in this folder"
    )
    quiet: bool = _output(False, "print errors and results only", recorded=False)

    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where each value that is not a default came from: field name → "command line" or the config file."""

    @property
    def replaces(self) -> bool:
        """Whether captions that are there are replaced: `--overwrite` or `--existing overwrite`."""
        return self.overwrite or self.existing == "overwrite"

    def check(self) -> list[str]:
        """Return everything that is wrong with these options, one line each."""
        problems = [] if self.images else ["--images is required"]
        problems += ["--images is empty; is a variable not set?"] if "" in self.images else []
        # Images and what is written beside them may have any name.
        problems += find_not_utf8(self, "images", "output", "output_shards", "visualize", "metadata")
        problems += find_above(self, LARGEST_SEED, "seed")
        problems += find_below(
            self, 1, "limit", "beams", "max_token_length", "batch_size", "max_pixels", "concurrency", "actors"
        )
        problems += find_below(self, 0, "temperature", "seed", "num_workers", "retries", "worker_timeout")
        problems += find_below(self, 0, "gpus_per_actor")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top_p is a probability above 0, up to 1; {self.top_p} is not")
        if self.top_p < 1 and not self.temperature:
            problems.append("--top_p only has a meaning with --temperature")
        if self.temperature and (self.beams or 1) > 1:
            problems.append("--temperature samples and --beams searches: give one")
        if self.prompt is not None and self.task is not None:
            problems.append("--prompt and --task name the same thing twice: give one")
        if self.preset is not None and (self.prompt is not None or self.task is not None):
            problems.append("--preset is a prompt: drop it, or --prompt and --task")
        if not set(self.caption_extension).isdisjoint("/\\\0") or not self.caption_extension.strip("."):
            problems.append(f"--caption_extension {self.caption_extension!r} is no file extension like .txt")
        if self.output and self.output.suffix not in (".jsonl", ".csv"):
            problems.append(f"--output {self.output} must end in .jsonl or .csv")
        if self.overwrite and self.existing not in ("keep", "overwrite"):
            problems.append(f"--overwrite and --existing {self.existing} say two things: give one")
        if self.existing in ("append", "prepend") and not (
            self.save_captions or self.output or self.output_shards
        ):
            problems.append(f"--existing {self.existing} adds to files: give --save_captions or --output")
        if self.separator is not None and self.existing not in ("append", "prepend"):
            problems.append("--separator only has a meaning with --existing append or prepend")
        problems += self._check_shard() + self._check_shards() + self._check_engine()
        return problems + self._check_prompts() + self._check_endpoint()

    def _check_engine(self) -> list[str]:
        if self.engine == "ray":
            others = ("endpoint", "cuda_graphs", "draft_decode", "group_by_length")
            problems = [f"--{name} does not go with --engine ray" for name in others if getattr(self, name)]
            if self.batch_size == "auto":
                problems.append("--batch_size auto does not go with --engine ray: give a number")
            return problems
        of_ray = ("actors", "gpus_per_actor")
        return [f"--{name} is of --engine ray" for name in of_ray if getattr(self, name) is not None]

    def _check_shard(self) -> list[str]:
        if self.shard is None:
            return []
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            return [f"--shard {self.shard} is not I/N with I from 1 to N, such as 2/8"]
        if self.output and self.existing in ("append", "prepend"):
            return [f"--existing {self.existing} with --shard adds to caption files alone: drop --output"]
        return []

    def _check_shards(self) -> list[str]:
        if self.output_shards is None:
            return ["--output_format is of shards: give --output_shards too"] if self.output_format else []
        if not self.output_shards:
            return ["--output_shards is empty; is a variable not set?"]
        others = dict.fromkeys(
            ("save_captions", "output", "visualize", "recursive", "group_by_length"), "which writes shards"
        )
        problems = []
        if any(entry.startswith("key=") for entry in self.prompts):
            problems.append("--prompts key: that column of shards says something else; choose another name")
        return problems + [
            f"--{name} does not go with --output_shards, {reason}"
            for name, reason in others.items()
            if getattr(self, name)
        ]

    def _check_prompts(self) -> list[str]:
        problems = [
            f"--clean {name}: there are {', '.join(CLEANERS)}" for name in self.clean if name not in CLEANERS
        ]
        given = [n for n in ("prompt", "task", "preset") if getattr(self, n) is not None]
        given += ["prompt_template"] * (self.prompt_template is not None) + ["prompts"] * bool(self.prompts)
        if len(given) > 1 and not {"prompt_template", "prompts"}.isdisjoint(given):
            problems.append(f"--{given[0]} and --{given[1]} both say what is asked: give one")
        if self.prompts and self.visualize:
            problems.append("--visualize draws one answer an image: drop it, or --prompts")
        if self.metadata and self.metadata.suffix not in (".jsonl", ".csv"):
            problems.append(f"--metadata {self.metadata} must end in .jsonl or .csv")
        seen = set()
        for entry in self.prompts:
            name, sign, _ = entry.partition("=")
            if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                problems.append(f"--prompts {entry}: write NAME=PROMPT, the name of letters, digits and _")
            elif name in RESERVED_KEYS:
                problems.append(f"--prompts {name}: that column says something else; choose another name")
            elif name in seen:
                problems.append(f"--prompts {name}: is given twice")
            seen.add(name)
        return problems

    def _check_endpoint(self) -> list[str]:
        if self.endpoint is None:
            return ["--model is the name of a served model: give --endpoint too"] if self.model else []
        problems = [] if self.model else ["--endpoint needs --model, the server's name of the model"]
        local = ("base_model", "beams", "quantize", "draft_decode", "group_by_length")
        if flag := next((name for name in local if getattr(self, name)), None):
            problems.append(f"--{flag} is for models loaded here: drop it, or --endpoint")
        if not self.timeout > 0:
            problems.append(f"--timeout must be above 0, not {self.timeout}")
        return problems
