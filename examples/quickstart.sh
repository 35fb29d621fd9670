#!/usr/bin/env bash
# From pairs to generated images: all stages on colored shapes, on two CPU cores.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/examples/pipeline.sh"

usage() {
    cat <<'TXT'
usage: bash examples/quickstart.sh [--out DIR] [--long | --small]

Creates colored shapes with captions, trains both tokenizers, a retrieval encoder and a model in two legs
(tensor 2 x pipeline 2, then data parallel 2 with ZeRO-1), converts it, generates images for held-out
captions, and writes DIR/report.html and DIR/report.json.

  --out DIR   output folder (default: runs/quickstart); a second run starts from the beginning
  --long      more steps: 30 minutes instead of 14
  --small     a few steps per stage, to check that every stage runs; the images are meaningless
  PYTHON, VENV (environment)   interpreter and virtual environment (default: python3, .venv)
TXT
}

parse_options "$ROOT/runs/quickstart" "$@"
cd "$ROOT"
prepare_environment
clear_output

pairs=9000 image_steps=1200 clip_steps=400 train_steps=3000 FIRST_LEG_STEPS=40 validate_every=500
EVALUATE=(--checker examples/shapes/checker.py --temperature 0.3 --guidance 1 1.5 2 --images 192 --sweep-images 96)
case $SIZE in
    long) train_steps=10000 ;;
    small)
        pairs=400 image_steps=30 clip_steps=10 train_steps=12 FIRST_LEG_STEPS=6 validate_every=6
        EVALUATE+=(--images 8 --sweep-images 4 --guidance 1 2 --examples 4)
        ;;
esac
TITLE="Colored shapes: captions to images and back"
CONFIG=examples/quickstart/train.yaml
CAPTION="a large red circle in the centre on a white background"
PAIRS=(python examples/shapes/generate.py --pairs "$pairs" --size 32)
SPECIALS=(--specials 32 --sentinels 16)
TEXT=(--vocab-size 480)
IMAGE=(--image-size 32 --downsample 4 --codebook-size 256 --steps "$image_steps")
CLIP=(--steps "$clip_steps")
TRAIN=("train.steps=$train_steps" "validation.interval=$validate_every")
run_pipeline
echo
echo "open $OUT/report.html"
