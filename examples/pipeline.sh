# All stages from pairs to a report, for any corpus of pairs. Sourced by bash.
#
# Before `run_pipeline` the caller sets
#   OUT      folder of all results; CONFIG  the training YAML
#   PAIRS    command that writes $OUT/pairs/{train,heldout}.jsonl and their images
#   TEXT IMAGE CLIP TRAIN EVALUATE   arrays of further options of the tools
#   SPECIALS                         options for the number of special tokens, the same for both tokenizers
#   CAPTION                          a caption to generate images for; it need not be in the corpus
#   FIRST_LEG_STEPS                  steps of the first leg;  TITLE  title of the report

run_pipeline() {
    local pairs=$OUT/pairs tokenizer=$OUT/tokenizer exported=$OUT/exported run=$OUT/train
    STAGES=$OUT/stages.tsv
    local data=("data.shards=$OUT/shards/train" "retrieval.index=$OUT/index/train"
        "validation.shards=$OUT/shards/heldout" "validation.index=$OUT/index/heldout" "output=$run" "${TRAIN[@]}")

    stage "pairs" "${PAIRS[@]}" --output "$pairs"
    stage "text tokenizer" python tools/train_tokenizer.py text --input "$pairs/train.jsonl" \
        --output "$tokenizer" "${TEXT[@]}" "${SPECIALS[@]}"
    stage "image tokenizer" python tools/train_tokenizer.py image --input "$pairs/train.jsonl" \
        --output "$tokenizer" "${IMAGE[@]}" "${SPECIALS[@]}"
    stage "shards" make_shards "$pairs" "$tokenizer"
    stage "retrieval encoder" python tools/train_clip.py --input "$pairs/train.jsonl" \
        --text-model "$tokenizer/text.model" --output "$OUT/clip" "${CLIP[@]}"
    stage "index" make_indexes
    stage "a batch as the model sees it" python tools/show_batch.py "$CONFIG" "${data[@]}" \
        --tokenizer "$tokenizer" --batch 0
    stage "training, tensor 2 x pipeline 2" as_ranks 4 -m megatron_cm3leon.train "$CONFIG" "${data[@]}" \
        parallel.tensor=2 parallel.pipeline=2 "train.stop_after=$FIRST_LEG_STEPS"
    stage "training, data 2 with ZeRO-1" as_ranks 2 -m megatron_cm3leon.train "$CONFIG" "${data[@]}" \
        parallel.zero=1
    stage "conversion" python tools/convert_checkpoint.py export --tokenizer "$tokenizer" \
        --checkpoint "$run/checkpoints/$(cat "$run/latest")" --output "$exported"
    stage "generation" generate_examples "$exported"
    stage "evaluation" python tools/evaluate.py --model "$exported" --shards "$OUT/shards/heldout" \
        --index "$OUT/index/heldout" --output "$OUT/evaluation" "${EVALUATE[@]}"
    stage "report" python tools/report.py --evaluation "$OUT/evaluation" --model "$exported" --run "$run" \
        --stages "$STAGES" --title "$TITLE" --output "$OUT"
}

make_shards() {
    local split
    for split in train heldout; do
        python tools/preprocess_data.py --input "$1/$split.jsonl" --tokenizer "$2" \
            --output "$OUT/shards/$split" --workers 2 --part-size 1000
    done
}

make_indexes() {
    python tools/build_index.py --shards "$OUT/shards/train" --encoder "$OUT/clip" --output "$OUT/index/train"
    python tools/build_index.py --shards "$OUT/shards/heldout" --bank "$OUT/index/train" \
        --encoder "$OUT/clip" --output "$OUT/index/heldout"
}

# Each task once from the command line: generate images, caption one of them, and regenerate a part of it.
generate_examples() {
    python tools/generate.py image --model "$1" "$CAPTION" --candidates 4 --output "$OUT/generated"
    python tools/generate.py image --model "$1" "$CAPTION" --candidates 4 --retrieve "$OUT/index/train" \
        --output "$OUT/generated-with-retrieval"
    local image
    image=$(find "$OUT/generated" -name '*.png' ! -name '*sheet*' | sort | head -n 1)
    python tools/generate.py caption --model "$1" "$image"
    python tools/generate.py infill --model "$1" --image "$image" --box 2 2 6 6 --caption "$CAPTION" \
        --output "$OUT/infilled"
}

# parse_options DEFAULT ARGUMENTS...: sets OUT and SIZE (quickstart, small or long), and empties OUT.
parse_options() {
    OUT=$1 SIZE=default
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --out) OUT=${2:?--out needs a folder}; shift 2 ;;
            --long) SIZE=long; shift ;;
            --small) SIZE=small; shift ;;
            -h | --help) usage; exit 0 ;;
            *) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
        esac
    done
    mkdir -p "$OUT"
    OUT=$(cd "$OUT" && pwd)
}

# Start from the beginning: remove what an earlier run of this script wrote, and nothing else.
clear_output() {
    if [ -n "$(ls -A "$OUT")" ] && [ ! -f "$OUT/stages.tsv" ]; then
        echo "error: $OUT is not empty and was not written by this script; give another --out." >&2
        exit 2
    fi
    find "$OUT" -mindepth 1 -delete
    : >"$OUT/stages.tsv"
}

# Continue what an earlier run of this script with the same size wrote to OUT: its finished stages are skipped.
resume_output() {
    local before="" entries
    entries=$(ls -A "$OUT")
    [ ! -f "$OUT/size.txt" ] || before=$(cat "$OUT/size.txt")
    if [ -n "$entries" ] && [ -z "$before" ]; then
        echo "error: $OUT is not empty and was not written by this script; give another --out." >&2
        exit 2
    fi
    if [ -n "$before" ] && [ "$before" != "$SIZE" ]; then
        echo "error: $OUT holds a run of size $before, not $SIZE; give another --out, or remove it first." >&2
        exit 2
    fi
    echo "$SIZE" >"$OUT/size.txt"
    touch "$OUT/stages.tsv"
    RESUME=yes
}
