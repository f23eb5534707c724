#!/usr/bin/env bash
# A full fine-tune of all parameters. Further arguments go to training/train.py and win over the
# ones here: scripts/train.sh --steps 500 --output out/mine [--resume]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi

exec "$python" training/train.py \
    --model smollm2 \
    --data builtin \
    --loss auto \
    --steps 1000 \
    --batch-size 4 \
    --sequence-length 512 \
    --learning-rate 2e-5 \
    --warmup-steps 50 \
    --weight-decay 0.01 \
    --checkpoint-interval 100 \
    --output out/train \
    "$@"
