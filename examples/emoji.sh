#!/usr/bin/env bash
# The stages of quickstart.sh on a real set of images: every Noto color emoji with its CLDR name and keywords.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/examples/pipeline.sh"

usage() {
    cat <<'TXT'
usage: bash examples/emoji.sh [--out DIR] [--small]

Renders every Noto color emoji, then runs the stages of examples/quickstart.sh, without a checker:
the report shows held-out emoji beside the images generated for their captions. Requires the Debian packages
fonts-noto-color-emoji, unicode-data and unicode-cldr-core, which tests/examples/install_emoji.sh installs.

  --out DIR   output folder (default: runs/emoji); a second run starts from the beginning
  --small     a few steps per stage, to check that every stage runs; the images are meaningless
  PYTHON, VENV (environment)   interpreter and virtual environment (default: python3, .venv)
TXT
}

parse_options "$ROOT/runs/emoji" "$@"
[ "$SIZE" != long ] || { echo "error: emoji.sh has no --long" >&2; exit 2; }
cd "$ROOT"
prepare_environment
clear_output

image_steps=2000 clip_steps=600 train_steps=3500 FIRST_LEG_STEPS=40 validate_every=500
PAIRS=(python examples/emoji/generate.py)
EVALUATE=(--images 64 --sweep-images 64 --guidance 1 1.5 2 --temperature 0.7 --examples 12)
if [ "$SIZE" = small ]; then
    image_steps=30 clip_steps=20 train_steps=12 FIRST_LEG_STEPS=6 validate_every=6
    PAIRS+=(--limit 200)
    EVALUATE=(--images 4 --sweep-images 2 --guidance 1 2 --examples 4)
fi
TITLE="Emoji: captions to images and back"
CONFIG=examples/emoji/train.yaml
CAPTION="red heart"
SPECIALS=(--specials 64 --sentinels 32)
TEXT=(--vocab-size 1472)
IMAGE=(--image-size 32 --downsample 4 --codebook-size 512 --num-res-blocks 1 --steps "$image_steps")
CLIP=(--steps "$clip_steps")
TRAIN=("train.steps=$train_steps" "validation.interval=$validate_every")
run_pipeline
echo
echo "open $OUT/report.html"
