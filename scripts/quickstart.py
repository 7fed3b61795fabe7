"""From a fresh clone to captions in a style of one's own; quickstart.sh and quickstart.ps1 call this."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys

from make_venv import PROGRAMS, PYTHON, ROOT, environment, make_venv, run

DESCRIPTION = """Makes .venv, trains a LoRA on examples/shapes/train, captions examples/shapes/heldout with
and without it, and writes what came out to quickstart/. Run it again as often as you like."""

# A family is its scripts, its base and its recipe; nothing below depends on which one it is.
RECIPE = ["--rank", "16", "--learning_rate", "2e-3", "--batch_size", "8", "--epochs", "8"]
FAMILIES = {
    "florence": {
        "scripts": ("train_florence_lora.py", "inference_florence.py"),
        "base": "florence2-tiny",
        "recipe": [
            *[*RECIPE[:-1], "6"],
            *["--target_modules", "qkv", "proj", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ],
    },
    "blip": {"scripts": ("train_blip_network.py", "inference.py"), "base": "blip-tiny", "recipe": RECIPE},
    "moondream": {
        "scripts": ("train_moondream_lora.py", "inference_moondream.py"),
        "base": "moondream-tiny",
        "recipe": RECIPE,
    },
    "vlm": {
        "scripts": ("train_vlm_lora.py", "inference_vlm.py"),
        "base": "vlm-tiny",
        "recipe": RECIPE,
        "model": "Qwen/Qwen3-VL-2B-Instruct",
    },
}
# Given in full: accelerate warns of nothing then, and takes no other project's configuration.
LAUNCH = ["accelerate", "launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]

NEXT = """
Next, with your own images (a.jpg with its caption in a.txt) and a real model:

  {activate}
  python compile_captions.py IMAGES
  python {train} --dataset_dir IMAGES --output_dir loras/my-style{model}
  python {caption} --images PHOTOS --peft_model loras/my-style --save_captions"""


def main():
    started = "powershell scripts/quickstart.ps1" if os.name == "nt" else "bash scripts/quickstart.sh"
    parser = argparse.ArgumentParser(
        prog=started,
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=FAMILIES, default="florence")
    name = parser.parse_args().family
    family = FAMILIES[name]
    train, caption = family["scripts"]
    base = "examples/bases/" + family["base"]

    make_venv()
    out = "quickstart/" + name
    shutil.rmtree(str(ROOT / out), ignore_errors=True)
    (ROOT / out).mkdir(parents=True)

    step("1. Compile: pictures with captions beside them become a dataset")
    show(["python", "compile_captions.py", "examples/shapes/train", out + "/dataset"])

    step("2. Train a LoRA on it")
    folders = ["--dataset_dir", out + "/dataset", "--output_dir", out + "/lora", "--model_id", base]
    show([*LAUNCH, train, *folders, *family["recipe"]])

    step("3. Caption pictures it has never seen: the base alone, then with the LoRA")
    held_out = ["python", caption, "--images", "examples/shapes/heldout", "--batch_size", "20"]
    show([*held_out, "--base_model", base, "--output", out + "/base.jsonl"])
    show([*held_out, "--peft_model", out + "/lora", "--output", out + "/lora.jsonl"])

    step("4. Compare")
    report = ["scripts/quickstart_report.py", "examples/shapes/heldout", out, "quickstart/summary.json"]
    run([str(PYTHON), *report], variables())

    activate = r".venv\Scripts\Activate.ps1" if os.name == "nt" else "source .venv/bin/activate"
    model = " --model_id " + family["model"] if "model" in family else ""
    print(NEXT.format(activate=activate, train=train, caption=caption, model=model))


def step(title):
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() and os.name != "nt" else ("", "")
    print("\n" + bold + title + plain, flush=True)


def show(command):
    """Print a command and run it."""
    written = subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
    print("$ " + written, flush=True)
    program = shutil.which(command[0], path=str(PROGRAMS)) or command[0]
    run([program, *command[1:]], variables())


def variables():
    """Return the environment: nothing from a hub is needed, so nothing is asked of it.

    Models this small gain next to nothing from threads, and lose much by them on a busy machine.
    """
    return environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS") or "1")


if __name__ == "__main__":
    main()
