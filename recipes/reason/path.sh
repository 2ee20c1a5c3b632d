#!/bin/sh
# The whole path, three seeds: `sh recipes/reason/path.sh runs/reason`.
# What is there already is left alone, so that an interrupted path goes on where it was.
set -e
out=${1:-runs/reason}
here=recipes/reason
data=$out/data

train() { # CONFIG START OUT SEED [...]
    config=$1 start=$2 to=$3 seed=$4
    shift 4
    [ -e "$to/training.json" ] && return
    moescope train "$config" --start-from "$start" --out "$to" --seed "$seed" --resume "$@"
}
measure() { # MODEL
    [ -e "$out/measured/$1.json" ] && return
    python $here/measure.py "$out/$1" --out "$out/measured/$1.json"
}

[ -e "$data" ] || python $here/text.py --out "$data"
for model in base dense; do
    [ -e "$out/$model/training.json" ] ||
        moescope train $here/$model.toml --data "$data/text" --out "$out/$model" --resume
    measure $model
done
sed 's/^replay = true/replay = false/' $here/zero.toml >"$out/unreplayed.toml"
for seed in 0 1 2; do
    train $here/zero.toml "$out/base" "$out/zero-$seed" $seed
    train "$out/unreplayed.toml" "$out/base" "$out/unreplayed-$seed" $seed
    train $here/cold.toml "$out/base" "$out/cold-$seed" $seed --data "$data/cold"
    train $here/zero.toml "$out/cold-$seed" "$out/cold-rl-$seed" $seed
    [ -e "$data/chains-$seed" ] ||
        python $here/measure.py "$out/zero-$seed" --out "$out" --chains "$data/chains-$seed"
    train $here/distill.toml "$out/dense" "$out/distilled-$seed" $seed --data "$data/chains-$seed"
    train $here/zero.toml "$out/dense" "$out/dense-rl-$seed" $seed
    for run in zero unreplayed cold cold-rl distilled dense-rl; do
        measure $run-$seed
    done
done
python $here/tables.py "$out"
