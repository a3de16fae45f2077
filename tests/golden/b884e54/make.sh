#!/usr/bin/env bash
# How the files of this folder were made. Usage, in an empty folder: PYTHON=… bash make.sh CHECKOUT_OF_b884e54
set -euo pipefail
BASE=$1 PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1

train() {
    "$PYTHON" "$BASE/train.py" --data-path digits --vae pixels --global-batch-size 12 --lr 0.002 --ema-decay 0.5 \
        --preview-every 0 --log-every 1 --num-workers 0 --device cpu "$@"
}
gaussian() {
    train --run-name gaussian --model DiT-S/2 --model-args '{"hidden_size": 8, "depth": 2, "num_heads": 2}' \
        --diffusion-args '{"sampling": {"sampler": "ddpm", "num_sampling_steps": "8", "cfg_scale": 1.5}}' "$@"
}
flow() {
    train --run-name flow --model DiNext-U-S --model-args '{"hidden_size": 4, "depths": [1, 1, 1, 1, 1]}' --diffusion-args \
        '{"objective": "flow", "time_sampling": "logit-normal", "sampling": {"sampler": "heun", "num_sampling_steps": 4}}' "$@"
}
autoencoder() {
    train --run-name autoencoder --model Autoencoder-F4C8 --model-args '{"hidden_size": 8}' "$@"
}
mlp() {
    train --run-name mlp --model MLP --model-args '{"hidden_size": 16, "label_features": 8}' \
        --diffusion-args '{"objective": "flow", "flow_loss": "velocity+epsilon+x0"}' "$@"
}

for name in gaussian flow autoencoder mlp; do
    $name --max-steps 4                                          # results/NAME/checkpoints/0000004.pt is NAME.pt
    cp "results/$name/checkpoints/0000004.pt" "$name.pt"
    [ $name = autoencoder ] || "$PYTHON" "$BASE/sample.py" --ckpt $name.pt --seed 0 --class-labels "0 3 7" --num-samples 2 \
        --device cpu --out $name.png
    $name --max-steps 6                                          # continues to 0000006.pt
done
"$PYTHON" - "$BASE" <<'PYTHON'
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
from PIL import Image

from pipeline import checkpoint
from runtime.pictures import to_unit_range
from training.datasets import load_dataset
from training.rows import Rows

for name in ("gaussian", "flow", "autoencoder", "mlp"):
    if name == "autoencoder":
        images = load_dataset("digits", split="val").__getitems__(Rows.plain(np.arange(4)))[0]
        with torch.no_grad():
            arrays = {"reconstruction": checkpoint.restore_own_autoencoder(f"{name}.pt")(to_unit_range(images)).numpy()}
    else:
        arrays = {"pixels": np.asarray(Image.open(f"{name}.png"))}
    state = checkpoint.load(f"results/{name}/checkpoints/0000006.pt")
    for part in ("model", "ema"):
        arrays |= {f"{part}/{key}": value.numpy() for key, value in state[part].items()}
    np.savez_compressed(f"{name}.npz", **arrays)
PYTHON
