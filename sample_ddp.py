"""Draw many images on any number of processes, into one `.npz` for evaluation.

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/X --num-fid-samples 50000

Image i and its label depend only on (seed, i): not on the number of processes nor, up to rounding, on the batch size.
After a kill, the same command continues, on any number of processes: each batch is a file in NAME.parts until all are done.

- NAME.npz has ADM's format: `arr_0` images (N, H, W, 3) uint8, `arr_1` labels (N,) int64.
- NAME.json has the settings. An existing output with other settings is refused, or deleted with --overwrite.
"""

from pathlib import Path

import torch
from jsonargparse import ActionYesNo, Namespace

from pipeline.drawing import BATCH, Task, draw_images
from pipeline.generation import Sampling, prepare, restore_autoencoder, restore_checkpoint, restore_guide
from pipeline.settings import SamplingSettings, add_sampling_arguments
from pipeline.spec import BareWeights
from runtime import cli
from runtime.files import check_writable
from runtime.processes import start_world


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser("Draw many images, on any number of processes, into one .npz.")
    add_sampling_arguments(parser)
    parser.add_argument("--sample-dir", default="samples", help="folder of the .npz")
    parser.add_argument("--per-proc-batch-size", type=int, default=BATCH, help="images that a process draws at once")
    parser.add_argument("--num-fid-samples", type=int, default=50_000, help="number of images")
    parser.add_argument("--global-seed", type=int, default=0, help="image i depends only on (seed, i) and its label")
    parser.add_argument("--balanced", action="store_true", help="all classes in turn instead of random labels")
    parser.add_argument("--png", action="store_true", help="also write NAME/000000.png, …")
    parser.add_argument("--overwrite", action="store_true", help="delete an existing output with other settings")
    parser.add_argument("--tf32", action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=True,
                        help="TF32 matrix products on CUDA: faster, less exact")
    return parser


def main(args: Namespace) -> None:
    torch.set_grad_enabled(False)
    cli.check_numbers(args, ["num_fid_samples", "per_proc_batch_size"], "at least 1", lambda n: n >= 1)
    world = start_world(args.device, args.tf32)
    given = SamplingSettings.given(vars(args))
    bare = BareWeights(args.model, args.image_size, args.num_classes, "ema", 1.5, args.objective)  # as DiT's sample_ddp.py

    restored = restore_checkpoint(world, args.ckpt, bare, args.vae)
    guide = restore_guide(world, args.guide_ckpt, bare, args.vae)
    sampling = Sampling.of(restored.spec, given, restored.model, guide)
    autoencoder = restore_autoencoder(world, restored, sampling, same=args.vae is None)
    prepare(restored, sampling, args.compile)
    task = Task(restored, autoencoder, sampling, args.num_fid_samples, args.global_seed, args.balanced)
    out = Path(args.sample_dir) / f"{task.name}.npz"
    world.on_main(lambda: check_writable(out.parent))
    record = world.on_main(lambda: task.record(args.tf32, args.compile, args.objective))
    work = draw_images(task, out, record, world, args.per_proc_batch_size, args.overwrite, args.png)
    if world.is_main:
        done = f"{work.drawn} drawn now, in {work.seconds:.1f} s ({work.drawn / work.seconds:.3g} images/s); between batches " \
               f"the device waited {work.waited:.2%} of the time" if work.drawn else "all of them already drawn"
        print(f"Wrote {out}: {task.count} images, {done}")


if __name__ == "__main__":
    cli.run(main, build_parser())
