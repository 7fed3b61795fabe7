#!/usr/bin/env bash
# From a fresh clone to captions in a style of one's own, in minutes, on pictures and a tiny base that are here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: bash scripts/quickstart.sh [--family florence|blip|moondream|vlm]

Makes .venv, trains a LoRA on examples/shapes/train, captions examples/shapes/heldout with and without it,
and writes what came out to quickstart/. Run it again as often as you like."

family=florence model=
while (($#)); do
  case $1 in
    --family) family=${2-} && shift $(($# > 1 ? 2 : 1)) ;;
    --family=*) family=${1#*=} && shift ;;
    -h | --help) echo "$usage" && exit 0 ;;
    *) echo "quickstart.sh: unknown argument $1"$'\n'"$usage" >&2 && exit 2 ;;
  esac
done

# A family is its scripts, its base and its recipe; nothing below depends on which one it is.
case $family in
  florence)
    train=train_florence_lora.py caption=inference_florence.py base=examples/bases/florence2-tiny
    recipe=(--rank 16 --learning_rate 2e-3 --batch_size 8 --epochs 6
      --target_modules qkv proj q_proj k_proj v_proj out_proj fc1 fc2)
    ;;
  blip)
    train=train_blip_network.py caption=inference.py base=examples/bases/blip-tiny
    recipe=(--rank 16 --learning_rate 2e-3 --batch_size 8 --epochs 8)
    ;;
  moondream)
    train=train_moondream_lora.py caption=inference_moondream.py base=examples/bases/moondream-tiny
    recipe=(--rank 16 --learning_rate 2e-3 --batch_size 8 --epochs 8)
    ;;
  vlm)
    train=train_vlm_lora.py caption=inference_vlm.py base=examples/bases/vlm-tiny model=Qwen/Qwen3-VL-2B-Instruct
    recipe=(--rank 16 --learning_rate 2e-3 --batch_size 8 --epochs 8)
    ;;
  *) echo "quickstart.sh: --family ${family:-(nothing)}: there are florence, blip, moondream, vlm" >&2 && exit 2 ;;
esac

bash scripts/make_venv.sh
export PATH="$PWD/.venv/bin:$PATH"
# Nothing from a hub is needed, so nothing is asked of it.
export HF_HUB_OFFLINE=1
# Models this small gain next to nothing from threads, and lose much by them on a busy machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

bold= && plain= && [[ -t 1 ]] && bold=$'\033[1m' && plain=$'\033[0m'
step() { printf '\n%s%s%s\n' "$bold" "$1" "$plain"; }
say() { printf '$' && printf ' %q' "$@" && printf '\n' && "$@"; }

out=quickstart/$family
rm -rf "$out" && mkdir -p "$out"

step "1. Compile: pictures with captions beside them become a dataset"
say python compile_captions.py examples/shapes/train "$out/dataset"

step "2. Train a LoRA on it"
# Given in full, so that accelerate neither warns of what it assumes nor takes what another project configured.
launch=(accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
say "${launch[@]}" "$train" --dataset_dir "$out/dataset" --output_dir "$out/lora" --model_id "$base" "${recipe[@]}"

step "3. Caption pictures it has never seen: the base alone, then with the LoRA"
held_out=(--images examples/shapes/heldout --batch_size 20)
say python "$caption" "${held_out[@]}" --base_model "$base" --output "$out/base.jsonl"
say python "$caption" "${held_out[@]}" --peft_model "$out/lora" --output "$out/lora.jsonl"

step "4. Compare"
python scripts/quickstart_report.py examples/shapes/heldout "$out" quickstart/summary.json

cat <<END

Next, with your own images (a.jpg with its caption in a.txt) and a real model:

  source .venv/bin/activate
  python compile_captions.py IMAGES
  accelerate launch --quiet $train --dataset_dir IMAGES --output_dir loras/my-style${model:+ --model_id $model}
  python $caption --images PHOTOS --peft_model loras/my-style --save_captions
END
