# The whole path from pairs to a report, station by station, on any corpus of pairs. Sourced by bash.
#
# Before `run_pipeline` the caller sets
#   OUT      folder of everything that is made; CONFIG  the training YAML
#   PAIRS    command that writes $OUT/pairs/{train,heldout}.jsonl and their pictures
#   TEXT IMAGE CLIP TRAIN EVALUATE   arrays: further options of the tools
#   FIRST_LEG_STEPS                  steps of the first leg

run_pipeline() {
    local pairs=$OUT/pairs tokenizer=$OUT/tokenizer exported=$OUT/exported run=$OUT/train
    STAGES=$OUT/stages.tsv
    local data=("data.shards=$OUT/shards/train" "retrieval.index=$OUT/index/train" "output=$run" "${TRAIN[@]}")

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
    python tools/build_index.py --shards "$OUT/shards/heldout" --bank "$OUT/shards/train" \
        --encoder "$OUT/clip" --output "$OUT/index/heldout"
}
