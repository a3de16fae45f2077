"""Draw with diffusers from a folder of export.py, without this checkout: python load_exported.py FOLDER, beside noise.pt.

The images go to out.pt. A test runs this file in another folder.
"""

import sys

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import scheduling_ddpm

torch.set_num_threads(1)
noise = torch.load("noise.pt")
later = iter(noise["later"])
draw, scheduling_ddpm.randn_tensor = scheduling_ddpm.randn_tensor, lambda *args, **kwargs: next(later)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
torch.save(pipe(class_labels=["owl", 0], latents=noise["start"], output_type="pt").images, "out.pt")
scheduling_ddpm.randn_tensor = draw
assert len(pipe(class_labels=[1], num_inference_steps=3).images) == 1  # another number of steps, and a picture
message = ""
try:
    pipe(class_labels=[3])  # the null label
except ValueError as error:
    message = str(error)
assert "class_labels [3] are neither in 0..2" in message
