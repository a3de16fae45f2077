"""A diffusers pipeline for a network of DiNext: class labels -> images. It needs torch and diffusers, and no checkout.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    pipe(class_labels=[0, 1]).images[0].save("picture.png")

export.py makes pipeline.py of an exported folder from guidance.py and this file's first part, and the code of its components,
network.py and vae.py, from models.py, small_models.py and the second part.
"""

import inspect
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from diffusion.guidance import MODEL_TIME, check_interval, dynamic_threshold, guide, in_interval


class DiNextPipeline(DiffusionPipeline):
    """Draw images of a class-conditional model.

    Args:
        network: (x, t in 0..1000, label) -> prediction; that of a flow map also takes r, the t where a step ends.
        vae: an AutoencoderKL, AutoencoderDC or TrainedAutoencoder; None: the network draws pixels.
        scheduler: of diffusers.
        sampling: export.py's record of the checkpoint: steps, timesteps, guidance, bounds.
        id2label: names of the classes, by their ids as strings.
    """

    _optional_components = ["vae"]
    model_cpu_offload_seq = "network->vae"

    def __init__(self, network, scheduler, vae=None, sampling: dict | None = None, id2label: dict | None = None):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_to_config(sampling=sampling, id2label=id2label)

    @property
    def labels(self) -> dict[str, int]:
        """The ids of the classes by their names."""
        return {name: i for name, i in self.ids_of(self.config.id2label).items() if isinstance(name, str)}

    def get_label_ids(self, label: str | Sequence[int | str]) -> list[int]:
        """The ids of classes by their names or ids. Raises ValueError for others."""
        ids = self.ids_of(self.config.id2label)
        if isinstance(label, Tensor | np.ndarray):
            label = label.flatten().tolist()
        labels = [label] if isinstance(label, str | int) else [item if isinstance(item, str) else item.item()
                                                              if hasattr(item, "item") else item for item in label]
        if unknown := [label for label in labels if label not in ids]:
            raise ValueError(f"class_labels {unknown} are neither in 0..{self.config.sampling['num_classes'] - 1} nor unique "
                             "names in id2label")
        return [ids[label] for label in labels]

    @torch.no_grad()
    def __call__(self, class_labels: int | str | Sequence[int | str] | Tensor | None = None,
                 guidance_scale: float | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
                 num_inference_steps: int | None = None, output_type: str | None = "pil", return_dict: bool = True,
                 guidance_interval: tuple[float, float] | None = None, latents: Tensor | None = None,
                 batch_size: int = 1) -> ImagePipelineOutput | tuple:
        """One image a label. The order of arguments is that of diffusers' DiTPipeline.

        Args:
            class_labels: ids or names of classes, or one of them; None: `batch_size` random classes.
            guidance_scale, num_inference_steps, guidance_interval: default: the checkpoint's.
            generator: of the noise; a list has one for each image.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in 0..1, or "latent".
            latents: the start noise (B, C, H, W) in place of a draw.
        """
        settings, device = self.config.sampling, self._execution_device
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of pil, np, pt, latent")
        check_interval(guidance_interval)
        if isinstance(generator, list) and not generator:
            raise ValueError("generator is an empty list; expected one generator for each image, or None")
        first = generator[0] if isinstance(generator, list) else generator
        source = first.device if first else torch.device("cpu")
        if class_labels is None:
            class_labels = torch.randint(settings["num_classes"], (batch_size,), generator=first, device=source)
        y = torch.tensor(self.get_label_ids(class_labels), device=device)
        if not len(y):
            raise ValueError("no image is asked for: class_labels is empty, or batch_size is 0")
        if isinstance(generator, list) and len(generator) != len(y):
            raise ValueError(f"{len(generator)} generators were given for {len(y)} images")
        latents = self.prepare_latents(len(y), generator, source, latents)
        scale = settings["cfg_scale"] if guidance_scale is None else guidance_scale

        times = self.prepare_steps(num_inference_steps, device)
        x = latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        learned = getattr(self.scheduler.config, "variance_type", None) == "learned_range"
        options = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        guided = in_interval([round(t, 3) for t in times], scale, guidance_interval or settings["guidance_interval"])
        network = guide(self.evaluate, y, settings["num_classes"], scale, settings["cfg_channels"], guided)
        is_map = settings["map"] and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)  # another draws as of a flow
        ends = [{"r": end} for end in (*times[1:], 0.0)] if is_map else [{}] * len(times)
        for step, time, end in zip(self.progress_bar(self.scheduler.timesteps), times, ends):
            scaled = self.scheduler.scale_model_input(x, step) if hasattr(self.scheduler, "scale_model_input") else x
            t_r = {name: torch.full((len(x),), value, device=device) for name, value in {"t": time, **end}.items()}
            limit = settings["bounded"] and not end.get("r")  # the mean velocity of a step that ends elsewhere gives no x_0
            out = self.prepare_prediction(network(scaled, **t_r), scaled, step, time, limit)
            x = self.scheduler.step(out if learned else out[:, : x.shape[1]], step, x, **options).prev_sample

        images = x if output_type == "latent" else self.decode(x)
        self.maybe_free_model_hooks()
        if not (x.isfinite().all() and images.isfinite().all()):
            raise ValueError("the images are not finite, and would be black pictures; a lower guidance_scale, more steps or "
                             "another dtype may help")
        if output_type == "pil":
            images = self.to_pil(images)
        elif output_type != "latent":
            images = (images + 1) / 2
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_latents(self, count: int, generator: torch.Generator | list[torch.Generator] | None, source: torch.device,
                        latents: Tensor | None) -> Tensor:
        """The start noise (B, C, H, W): a draw on `source`, or what the user gives."""
        shape = (count, *self.config.sampling["shape"])
        latents = randn_tensor(shape, generator, source) if latents is None else latents
        if latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; expected {shape}")
        return latents

    @staticmethod
    def ids_of(id2label: dict[str, str]) -> dict[int | str, int]:
        """Ids by ids, names and parts of names between commas, but those that two classes share, such as ImageNet's crane."""
        names = [(name, int(i)) for i, name in id2label.items()]
        parts = [(part, i) for name, i in names for part in {part.strip() for part in name.split(",")}]
        unique = [{name: i for name, i in pairs if count[name] == 1}
                  for pairs in (parts, names) for count in [Counter(name for name, _ in pairs)]]
        return {int(i): int(i) for i in id2label} | unique[0] | unique[1]

    def prepare_steps(self, count: int | None, device: torch.device) -> list[float]:
        """Set the scheduler's steps. Returns the network's t, 0..1000, at each evaluation."""
        settings, scheduler = self.config.sampling, self.scheduler
        count = count or settings["steps"]
        if settings["flow"]:  # its times are k / count, then shifted
            self.scheduler = scheduler = type(scheduler).from_config(scheduler.config, num_train_timesteps=count)
            scheduler.sigma_min = 1 / count  # before the shift; diffusers' would be shifted twice
        elif scheduler.config.get("variance_type") and not isinstance(scheduler, DDPMScheduler):  # put in its place
            self.scheduler = scheduler = type(scheduler).from_config(scheduler.config, variance_type=None)
        takes_timesteps = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
        if settings["timesteps"] and count == settings["steps"] and takes_timesteps:
            scheduler.set_timesteps(timesteps=settings["timesteps"], device=device)
        else:
            scheduler.set_timesteps(count, device=device)
        return [float(t) * MODEL_TIME / scheduler.config.num_train_timesteps for t in scheduler.timesteps]

    def evaluate(self, x: Tensor, t: Tensor, y: Tensor, **r: Tensor) -> Tensor:
        return self.network(x.to(self.network.dtype), t, y, **r).float()

    def prepare_prediction(self, out: Tensor, x: Tensor, step: Tensor, time: float, limit: bool) -> Tensor:
        """What the scheduler takes: in a flow the velocity, else the prediction. `limit`: its x_0 to the range of pixels."""
        settings, channels = self.config.sampling, x.shape[1]
        prediction, value = settings["prediction"], out[:, :channels]
        scheduled = "velocity" if settings["flow"] else prediction
        if not limit and prediction == scheduled:
            return out
        if settings["flow"]:
            alpha, sigma = 1 - time / MODEL_TIME, time / MODEL_TIME
        else:
            abar = float(self.scheduler.alphas_cumprod[int(step)])
            alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        x_0 = {"epsilon": (x - sigma * value) / alpha, "v": alpha * x - sigma * value, "x0": value,
               "velocity": x - sigma * value}[prediction]
        if limit:
            bound = settings["input_scale"]
            x_0 = bound * dynamic_threshold(x_0 / bound) if settings["dynamic_thresholding"] else x_0.clamp(-bound, bound)
        value = {"epsilon": (x - alpha * x_0) / sigma, "v": (alpha * x - x_0) / sigma, "x0": x_0,
                 "velocity": (x - x_0) / sigma}[scheduled]
        return torch.cat([value, out[:, channels:]], dim=1)

    def decode(self, x: Tensor) -> Tensor:
        """A sampler's x_0 (B, C, H, W) -> images (B, C, H, W) in [-1, 1]."""
        x = x / self.config.sampling["input_scale"]
        if self.vae is None:
            return x.clamp(-1, 1)
        scale, shift = (torch.tensor(self.config.sampling[name], device=x.device).view(-1, 1, 1) for name in ("scale", "shift"))
        return self.vae.decode((x / scale + shift).to(self.vae.dtype)).sample.float().clamp(-1, 1)

    @staticmethod
    def to_pil(images: Tensor) -> list[Image.Image]:
        arrays = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array.squeeze()) for array in arrays]


# --- components ------------------------------------------------------------------------------------

from diffusers import ConfigMixin, ModelMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput  # noqa: E402

import models  # noqa: E402
import small_models  # noqa: E402


class Component(ModelMixin, ConfigMixin):
    """A network of DiNext as a component of diffusers.

    Args:
        name: of its class.
        args: of its constructor.
        auto_map: where diffusers' AutoModel finds the code of this component.
    """

    @register_to_config
    def __init__(self, name: str, args: dict, auto_map: dict):
        super().__init__()
        self.network = (vars(models) | vars(small_models))[name](**args)


class Network(Component):
    def forward(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) in 0..1000, y (B,) -> (B, C or 2C, H, W). r (B,): where the step of a flow map ends."""
        return self.network(x, t, y, r)


class TrainedAutoencoder(Component):
    """It has the methods of diffusers' AutoencoderDC. Its latents need no scale."""

    def encode(self, x: Tensor) -> EncoderOutput:
        """Images (B, C, H, W) in [-1, 1] -> .latent (B, c, h, w)."""
        return EncoderOutput(latent=self.network.encode(x))

    def decode(self, z: Tensor) -> DecoderOutput:
        """Latents (B, c, h, w) -> .sample, images (B, C, H, W), near [-1, 1]."""
        return DecoderOutput(sample=self.network.decode(z))

    def forward(self, x: Tensor) -> DecoderOutput:
        return self.decode(self.encode(x).latent)
