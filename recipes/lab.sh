#!/bin/sh
# How docs/lab was made: every study, then the model in the box and its twin, then the report.
# Run it in the repository's root, on text made by recipes/tiny: sh recipes/lab.sh CORPUS
# A stage that was stopped goes on where it was; over an hour on two cores.
set -eu
corpus=${1:-data/tiny-corpus}
runs=runs/studies
lab=docs/lab
mkdir -p "$runs/shards" "$lab"

for model in tiny deepseek-v2-lite; do # first, as nothing else may run beside it
    [ -e "$lab/plan-$model.json" ] ||
        moescope plan "$model" --speed --save "$lab/plan-$model.json"
done
if [ ! -e "$runs/tokenizer" ]; then
    moescope tokenizer train "$corpus/train" --vocab-size 4096 --sample-bytes 6000000 \
        --out "$runs/tokenizer"
fi
for study in routers balance shared granularity; do
    mkdir -p "$runs/$study"
    ln -sfn ../shards "$runs/$study/shards" # the same token files serve all four
    moescope study "$study" --data "$corpus" --tokenizer "$runs/tokenizer" --seeds 3 \
        --out "$runs/$study"
    cp "$runs/$study/study.json" "$lab/study-$study.json"
done
[ -e "$lab/specialization.json" ] ||
    moescope specialize tiny "$corpus" --save "$lab/specialization.json"
[ -e "$lab/comparison.json" ] ||
    moescope compare tiny tiny-dense --text "$corpus" --save "$lab/comparison.json"
[ -e "$lab/twins.json" ] ||
    moescope compare moe dense --data "$corpus" \
        --tokenizer "$runs/tokenizer" --out "$runs/twins" --save "$lab/twins.json"
[ -e "$lab/ablation.json" ] ||
    moescope ablate tiny "$corpus" --bytes 2500 --save "$lab/ablation.json"
for language in en zh; do
    moescope report "$lab"/*.json --language "$language" --out "runs/report-$language"
done
