#!/usr/bin/env bash
# The stages of quickstart.sh on a large set of drawings: icons in many styles, clip art, stamps and emoji.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/examples/pipeline.sh"

usage() {
    cat <<'TXT'
usage: bash examples/icons.sh [--out DIR] [--small]

Builds the corpus of examples/icons/generate.py (about 41,000 images of 64 x 64), then runs the stages of
examples/quickstart.sh, without a checker: the report shows held-out names beside the images generated for them.
Requires the packages that bash examples/icons/install_icons.sh installs.

If it is interrupted, the same command continues: finished stages are not repeated, and the corpus, the shards and the
training continue where they were.

  --out DIR   output folder (default: runs/icons)
  --small     few drawings and a few steps per stage, to check that every stage runs; the images are meaningless
  PYTHON, VENV (environment)   interpreter and virtual environment (default: python3, .venv)
TXT
}

parse_options "$ROOT/runs/icons" "$@"
[ "$SIZE" != long ] || { echo "error: icons.sh has no --long" >&2; exit 2; }
cd "$ROOT"
prepare_environment
resume_output

image_steps=2000 clip_steps=1500 train_steps=8000 FIRST_LEG_STEPS=40 validate_every=1000 vocabulary=3000
image_size=64
PAIRS=(python examples/icons/generate.py --size 64 --workers 2)
EVALUATE=(--images 64 --sweep-images 32 --guidance 1 1.5 2 --temperature 0.8 --examples 12)
if [ "$SIZE" = small ]; then
    image_steps=20 clip_steps=10 train_steps=12 FIRST_LEG_STEPS=6 validate_every=6 vocabulary=900 image_size=32
    PAIRS=(python examples/icons/generate.py --size 32 --workers 2 --limit 40 --sources iconify stamps
        --sets fluent-emoji-flat emojione flat-color-icons fxemoji)
    EVALUATE=(--images 4 --sweep-images 2 --guidance 1 2 --examples 4)
fi
TRAIN=("train.steps=$train_steps" "validation.interval=$validate_every")
[ "$SIZE" != small ] || TRAIN+=(data.seq_length=192)
TITLE="Icons: captions to images and back"
CONFIG=examples/icons/train.yaml
CAPTION="red heart, OpenMoji style"
SPECIALS=(--specials 64 --sentinels 32)
TEXT=(--vocab-size "$vocabulary")
IMAGE=(--image-size "$image_size" --downsample 4 --codebook-size 512 --num-res-blocks 1 --steps "$image_steps")
CLIP=(--steps "$clip_steps")
run_pipeline
echo
echo "open $OUT/report.html"
