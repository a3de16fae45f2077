"""A diffusers pipeline for a network of DiNext: class labels -> images. It needs torch and diffusers, and no checkout.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    pipe(class_labels=[0, 1]).images[0].save("picture.png")

export.py makes pipeline.py of an exported folder from guidance.py and this file's first part, and the code of its components,
network.py and vae.py, from models.py, small_models.py and the second part.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from diffusion.guidance import MODEL_TIME, dynamic_threshold, guide, in_interval


class DiNextPipeline(DiffusionPipeline):
    """Draw images of a class-conditional model.

    Args:
        network: (x, t in 0..1000, label) -> prediction.
        vae: an AutoencoderKL, AutoencoderDC or TrainedAutoencoder; None: the network draws pixels.
        scheduler: of diffusers.
        sampling: export.py's record of the checkpoint: steps, timesteps, guidance, bounds.
        id2label: names of the classes, by their ids as strings.
    """

    _optional_components = ["vae"]

    def __init__(self, network, scheduler, vae=None, sampling: dict | None = None, id2label: dict | None = None):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_to_config(sampling=sampling, id2label=id2label)

    @torch.no_grad()
    def __call__(self, class_labels: Sequence[int | str], num_inference_steps: int | None = None,
                 guidance_scale: float | None = None, guidance_interval: tuple[float, float] | None = None,
                 generator: torch.Generator | None = None, latents: Tensor | None = None, output_type: str = "pil",
                 return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """One image a label.

        Args:
            class_labels: ids, or names of classes.
            num_inference_steps, guidance_scale, guidance_interval: default: the checkpoint's.
            generator: of the noise.
            latents: the start noise (B, C, H, W) in place of a draw.
            output_type: "pil", "pt" (B, C, H, W) in [-1, 1], or "latent".
        """
        settings, device = self.config.sampling, self._execution_device
        ids = self.ids_of(self.config.id2label)
        if unknown := [label for label in class_labels if label not in ids]:
            raise ValueError(f"class_labels {unknown} are neither in 0..{settings['num_classes'] - 1} nor unique names in "
                             "id2label")
        y = torch.tensor([ids[label] for label in class_labels], device=device)
        if latents is None:
            source = "cpu" if generator is None else generator.device
            latents = torch.randn(len(y), *settings["shape"], generator=generator, device=source)
        x = latents.to(device, torch.float32)
        scale = settings["cfg_scale"] if guidance_scale is None else guidance_scale

        times = self.prepare_steps(num_inference_steps, device)
        guided = in_interval(times, scale, guidance_interval or settings["guidance_interval"])
        network = guide(self.evaluate, y, settings["num_classes"], scale, settings["cfg_channels"], guided)
        for step, time in zip(self.progress_bar(self.scheduler.timesteps), times):
            out = self.limit_pixels(network(x, torch.full((len(x),), time, device=device)), x, step, time)
            if getattr(self.scheduler.config, "variance_type", None) != "learned_range":
                out = out[:, : x.shape[1]]  # without a learned variance
            x = self.scheduler.step(out, step, x, generator=generator).prev_sample

        images = self.to_pil(self.decode(x)) if output_type == "pil" else x if output_type == "latent" else self.decode(x)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def ids_of(id2label: dict[str, str]) -> dict[int | str, int]:
        """Ids by ids and names. A name that two classes share, such as ImageNet's cranes, is left out."""
        count = Counter(id2label.values())
        return {int(i): int(i) for i in id2label} | {name: int(i) for i, name in id2label.items() if count[name] == 1}

    def prepare_steps(self, count: int | None, device: torch.device) -> list[float]:
        """Set the scheduler's steps. Returns the network's t, 0..1000, at each evaluation."""
        settings, scheduler = self.config.sampling, self.scheduler
        count = count or settings["steps"]
        if settings["prediction"] == "flow":  # its times are k / count
            self.scheduler = scheduler = type(scheduler).from_config(scheduler.config, num_train_timesteps=count)
        if settings["timesteps"] and count == settings["steps"]:
            scheduler.set_timesteps(timesteps=settings["timesteps"], device=device)
        else:
            scheduler.set_timesteps(count, device=device)
        return [float(t) * MODEL_TIME / scheduler.config.num_train_timesteps for t in scheduler.timesteps]

    def evaluate(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(x.to(self.network.dtype), t, y).float()

    def limit_pixels(self, out: Tensor, x: Tensor, step: Tensor, time: float) -> Tensor:
        """The prediction with its x_0 limited to the range of pixels; for latents, the prediction itself."""
        settings, channels = self.config.sampling, x.shape[1]
        if not settings["bounded"]:
            return out
        prediction, value = settings["prediction"], out[:, :channels]
        if prediction == "flow":
            alpha, sigma = 1 - time / MODEL_TIME, time / MODEL_TIME
            x_0 = x - sigma * value
        else:
            abar = float(self.scheduler.alphas_cumprod[int(step)])
            alpha, sigma = abar**0.5, (1 - abar) ** 0.5
            x_0 = {"epsilon": (x - sigma * value) / alpha, "v": alpha * x - sigma * value, "x0": value}[prediction]
        limit = settings["input_scale"]
        x_0 = limit * dynamic_threshold(x_0 / limit) if settings["dynamic_thresholding"] else x_0.clamp(-limit, limit)
        value = {"epsilon": (x - alpha * x_0) / sigma, "v": (alpha * x - x_0) / sigma, "x0": x_0,
                 "flow": (x - x_0) / sigma}[prediction]
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
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,) in 0..1000, y (B,) -> (B, C or 2C, H, W)."""
        return self.network(x, t, y)


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
