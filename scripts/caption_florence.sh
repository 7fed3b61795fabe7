#!/usr/bin/env bash
# Caption images with Florence-2 and a LoRA, in whatever folder you are:
#
#   bash scripts/caption_florence.sh "my photos" loras/my-style --save_captions
#
# First the images, then the LoRA, then any flags of inference_florence.py. Or from the environment: INPUT,
# LORA_MODEL and BASE_MODEL (not given: the one the LoRA was trained on).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$here/.venv/bin:$PATH"

input=${INPUT:-} lora_model=${LORA_MODEL:-} base_model=${BASE_MODEL:-}
if [[ ${1:--} != -* ]]; then input=$1 && shift; fi
if [[ ${1:--} != -* ]]; then lora_model=$1 && shift; fi
if [[ -z $input ]]; then
  echo "caption_florence.sh: give the images as the first argument, or set INPUT" >&2
  exit 2
fi

echo "Input: $input" >&2
echo "LoRA model: ${lora_model:-none}" >&2

exec python "$here/inference_florence.py" --images "$input" \
  ${base_model:+--base_model "$base_model"} ${lora_model:+--peft_model "$lora_model"} "$@"
