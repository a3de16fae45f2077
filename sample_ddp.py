"""Draw many images on any number of processes and write them as one `.npz` for evaluation.

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/X --num-fid-samples 50000

Image i and its label depend on (seed, i) alone: neither the number of processes nor the batch size changes them.
The `.npz` is ADM's: `arr_0` images (N, H, W, 3) uint8, `arr_1` labels (N,) int64.
"""

import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ActionYesNo
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

import runtime
from sample import add_sampling_arguments, generate, prepare


def build_parser() -> runtime.ArgumentParser:
    parser = runtime.ArgumentParser("Draw many images, on any number of processes, into one .npz.")
    add_sampling_arguments(parser)
    parser.add_argument("--sample-dir", default="samples", help="where the .npz goes")
    parser.add_argument("--per-proc-batch-size", type=int, default=32, help="images that a process draws at once")
    parser.add_argument("--num-fid-samples", type=int, default=50_000, help="exactly so many images")
    parser.add_argument("--global-seed", type=int, default=0)
    parser.add_argument("--tf32", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=True,
                        help="TF32 matrix products on CUDA: faster, less exact")
    return parser


def main(args) -> None:
    torch.set_grad_enabled(False)
    runtime.check_numbers(args, ["num_fid_samples", "per_proc_batch_size"], "at least 1", lambda n: n >= 1)
    world = runtime.start_world(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    restored, autoencoder, settings = prepare(args, world, bare_vae="ema", bare_cfg_scale=1.5)  # DiT's
    folder = world.on_main(lambda: runtime.check_writable(args.sample_dir))
    out = folder / f"{describe(restored, settings, args)}.npz"

    start, count = time.perf_counter(), args.num_fid_samples
    images_path, labels_path = (out.with_name(f".{out.stem}.{name}.npy") for name in ("arr_0", "arr_1"))
    if world.is_main:
        open_memmap(images_path, "w+", np.uint8, (count, *restored.spec["image_size"], 3))
        open_memmap(labels_path, "w+", np.int64, (count,))
    world.barrier()
    images, labels = open_memmap(images_path, "r+"), open_memmap(labels_path, "r+")
    batches = list(torch.arange(count).split(args.per_proc_batch_size))[world.rank :: world.size]
    for batch in tqdm(batches, desc="sampling", unit="batch", disable=not world.is_main):
        indices = batch.tolist()
        labels[indices] = [random_label(args.global_seed, i, restored.model.num_classes) for i in indices]
        drawn = generate(restored.model, autoencoder, labels[indices].tolist(), indices, args.global_seed, **settings)
        images[indices] = three_channels(drawn)
    images.flush()
    labels.flush()
    world.barrier()

    if world.is_main:
        write_npz(out, arr_0=images_path, arr_1=labels_path)
        print(f"Wrote {out}: {count} images in {time.perf_counter() - start:.1f} s")
    world.barrier()


def describe(restored, settings: dict, args) -> str:
    """A file name that tells the settings."""
    spec, autoencoder = restored.spec, Path(restored.spec["vae"]).name
    return (f"{spec['model']['name'].replace('/', '-')}-{restored.name}-size-{spec['image_size'][0]}-vae-{autoencoder}-"
            f"cfg-{settings['cfg_scale']}-{settings['cfg_channels']}-{settings['sampler']}-{spec['sampling']['num_sampling_steps']}-"
            f"eta-{settings['eta']}-{args.precision}-seed-{args.global_seed}-{args.num_fid_samples}")


def random_label(seed: int, index: int, num_classes: int) -> int:
    """The label of image `index`, uniform over the classes."""
    return int(torch.randint(num_classes, (), generator=runtime.generator("label", seed, index)))


def three_channels(images: Tensor) -> np.ndarray:
    """(B, H, W, 1 or 3) -> (B, H, W, 3)."""
    return images.expand(*images.shape[:3], 3).numpy()


def write_npz(path: Path, **arrays: Path) -> None:
    """Move `.npy` files into one `.npz`, without reading them into memory; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
        for name, source in arrays.items():
            file.write(source, f"{name}.npy")
    temporary.replace(path)
    for source in arrays.values():
        source.unlink()


if __name__ == "__main__":
    runtime.run(main, build_parser())
