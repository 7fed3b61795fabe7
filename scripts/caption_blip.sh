#!/usr/bin/env bash
# Caption images with BLIP and a LoRA, in whatever folder you are:
#
#   bash scripts/caption_blip.sh "my photos" loras/my-style --save_captions
#
# First the images, then the LoRA, then any flags of inference.py. Or from the environment: INPUT, LORA_MODEL,
# BASE_MODEL (not given: the one the LoRA was trained on) and BEAMS.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$here/.venv/bin:$PATH"

input=${INPUT:-} lora_model=${LORA_MODEL:-} base_model=${BASE_MODEL:-} beams=${BEAMS:-10}
if [[ ${1:--} != -* ]]; then input=$1 && shift; fi
if [[ ${1:--} != -* ]]; then lora_model=$1 && shift; fi
if [[ -z $input ]]; then
  echo "caption_blip.sh: give the images as the first argument, or set INPUT" >&2
  exit 2
fi

echo "Input: $input" >&2
echo "LoRA model: ${lora_model:-none}" >&2
echo "Base model: ${base_model:-as the LoRA has it}" >&2

# Given in full, so that accelerate neither warns of what it assumes nor takes what another project configured.
launch=(accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
exec "${launch[@]}" "$here/inference.py" --images "$input" --beams "$beams" \
  ${base_model:+--base_model "$base_model"} ${lora_model:+--peft_model "$lora_model"} "$@"
