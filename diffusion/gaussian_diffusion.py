"""The discrete Gaussian process of DDPM: q(x_t | x_0), its posterior, p(x_{t-1} | x_t), and the losses.

Sources: DDPM (Ho et al., arXiv:2006.11239), Improved DDPM (Nichol & Dhariwal, arXiv:2102.09672), v-prediction
(Salimans & Ho, arXiv:2202.00512).

Legend: B batch, C channels, H W size, T timesteps of this process. abar is alphas_cumprod. t (B,) holds whole numbers
0..T-1; 0 is nearest to the data. The model receives the same time of the process before respacing, `timestep_map[t]`, on
the scale 0..1000.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from runtime import UserError

from .process import check_channels
from .samplers import SamplingLoops
from .schedules import MODEL_TIME

Model = Callable[..., Tensor]  # (x (B, C, H, W), t (B,), **model_kwargs) -> (B, C or 2C, H, W)

PREDICTIONS = ("epsilon", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
LOSSES = ("mse", "rescaled_mse", "rescaled_kl")


class GaussianDiffusion(SamplingLoops):
    """A Process (see process.py) with one step per beta, or with one step per timestep that `timesteps` keeps.

    Args:
        betas: one per timestep, float64, between 0 and 1.
        timesteps: ascending timesteps to keep (all by default). Larger betas join the kept ones.
        prediction: what the network's first C channels predict.
        variance: of p(x_{t-1} | x_t). "fixed_small": the posterior's; "fixed_large": beta_t; "learned_range": C more
            channels interpolate between these two.
        loss: "mse", plus the bound if the variance is learned; "rescaled_mse", where that bound is multiplied by T/1000;
            "rescaled_kl", the bound alone, multiplied by T.
        input_scale: x_0 is the data given to `training_losses`, times this. The caller divides samples by it.
    """

    validation_terms = ("loss",)
    recommended = {"sampler": "ddpm", "num_sampling_steps": 250, "cfg_scale": 4.0}

    def __init__(self, betas: np.ndarray, timesteps: list[int] | None = None, prediction: str = "epsilon",
                 variance: str = "learned_range", loss: str = "mse", input_scale: float = 1.0):
        for value, allowed in ((prediction, PREDICTIONS), (variance, VARIANCES), (loss, LOSSES)):
            if value not in allowed:
                raise UserError(f"{value!r} is unknown; allowed: {', '.join(allowed)}")
        if not (0 < np.min(betas) and np.max(betas) < 1):
            raise UserError("betas must lie between 0 and 1")
        if not 0 < input_scale < math.inf:
            raise UserError(f"input_scale {input_scale} is not a positive number")
        if input_scale != 1 and (variance == "learned_range" or loss == "rescaled_kl"):
            raise UserError(f"input_scale {input_scale} needs learn_sigma false and no use_kl: the likelihood of the bound is "
                            "that of pixels in [-1, 1]")
        self.input_scale = input_scale
        self.prediction, self.variance, self.loss = prediction, variance, loss
        self.learn_sigma = variance == "learned_range"
        self.timestep_map = list(range(len(betas)) if timesteps is None else timesteps)

        model_times = np.asarray(self.timestep_map) * (MODEL_TIME / len(betas))
        abar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))[self.timestep_map]
        abar_prev = np.append(1.0, abar[:-1])
        betas = 1 - abar / abar_prev
        self.betas, self.alphas_cumprod = betas, abar
        self.num_timesteps = len(betas)
        self.grid = tuple(range(self.num_timesteps - 1, -2, -1))  # -1 is the data

        # q(x_{t-1} | x_t, x_0), DDPM Eq. 6-7. Its variance is 0 at t = 0, so the log uses that of t = 1 there.
        posterior_variance = betas * (1 - abar_prev) / (1 - abar)
        first = posterior_variance[1] if len(betas) > 1 else betas[0]
        self._tables = {
            "alpha": np.sqrt(abar), "sigma": np.sqrt(1 - abar),
            "recip_alpha": np.sqrt(1 / abar), "recip_snr": np.sqrt(1 / abar - 1), "log_beta": np.log(betas),
            "large_log_variance": np.log(np.append(first, betas[1:])),
            "posterior_log_variance_clipped": np.log(np.append(first, posterior_variance[1:])),
            "posterior_variance": posterior_variance,
            "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1 - abar),
            "posterior_mean_coef2": (1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar),
            "model_times": model_times,
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def _at(self, name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
        """Entries t (B,) of a table, in fp32, shaped to broadcast with `like`. Tables are copied to each device once."""
        if t.device not in self._on_device:
            self._on_device[t.device] = {key: torch.as_tensor(table, dtype=torch.float32).to(t.device)
                                         for key, table in self._tables.items()}
        rows = self._on_device[t.device][name][t]
        return rows if like is None else rows.view(-1, *[1] * (like.dim() - 1))

    # --- forward process and the changes of variable between x_0, epsilon and v ------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM Eq. 4): (B, C, H, W)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._at("alpha", t, x_start) * x_start + self._at("sigma", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and log-variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0), DDPM Eq. 6-7."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self._at("posterior_log_variance_clipped", t, x_t)

    def _xstart_from(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The x_0 (B, C, H, W) that follows from the network's prediction at x = x_t."""
        match self.prediction:
            case "epsilon":
                return self._at("recip_alpha", t, x) * x - self._at("recip_snr", t, x) * prediction
            case "v":
                return self._at("alpha", t, x) * x - self._at("sigma", t, x) * prediction
            case "x0":
                return prediction

    def _target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network must predict: (B, C, H, W)."""
        match self.prediction:
            case "epsilon":
                return noise
            case "v":
                return self._at("alpha", t, noise) * noise - self._at("sigma", t, noise) * x_start
            case "x0":
                return x_start

    # --- reverse process -------------------------------------------------------------------------

    def p_mean_variance(self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True,
                        denoised_fn: Callable[[Tensor], Tensor] | None = None,
                        model_kwargs: dict | None = None) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t): "mean", "variance", "log_variance" and "pred_xstart", each (B, C, H, W), in fp32.

        `denoised_fn` is applied to the predicted x_0. It is then clipped to the range of pixels: [-1, 1] times input_scale.
        """
        out = model(x, self._at("model_times", t), **(model_kwargs or {})).to(x.dtype)  # (B, C or 2C, H, W)
        check_channels(out, x, self.learn_sigma)
        pred_xstart = self._xstart_from(out[:, : x.shape[1]], x, t)
        pred_xstart = denoised_fn(pred_xstart) if denoised_fn else pred_xstart
        pred_xstart = pred_xstart.clamp(-self.input_scale, self.input_scale) if clip_denoised else pred_xstart
        mean, small = self.q_posterior_mean_variance(pred_xstart, x, t)
        match self.variance:
            case "fixed_small":  # exactly 0 at t = 0, where exp(log_variance) is not
                log_variance, variance = small, self._at("posterior_variance", t, x)
            case "fixed_large":
                log_variance = self._at("large_log_variance", t, x)
                variance = log_variance.exp()
            case "learned_range":  # Improved DDPM Eq. 15
                share = (out[:, x.shape[1] :] + 1) / 2  # (B, C, H, W)
                log_variance = share * self._at("log_beta", t, x) + (1 - share) * small
                variance = log_variance.exp()
        return {"mean": mean, "variance": variance.expand_as(x), "log_variance": log_variance.expand_as(x),
                "pred_xstart": pred_xstart}

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        abar = 1.0 if t == -1 else float(self.alphas_cumprod[t])
        return math.sqrt(abar), math.sqrt(1 - abar)

    def predict(self, model: Model, x: Tensor, t: int,
                denoised_fn: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        times = torch.full((len(x),), t, device=x.device)
        x_start = self.p_mean_variance(model, x, times, clip_denoised=False, denoised_fn=denoised_fn)["pred_xstart"]
        alpha, sigma = self.alpha_sigma(t)
        return x_start, (x - alpha * x_start) / sigma

    # --- losses ----------------------------------------------------------------------------------

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform over 0..T-1."""
        return torch.randint(self.num_timesteps, (count,), generator=generator, device=generator.device)

    def training_losses(self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None,
                        noise: Tensor | None = None) -> dict[str, Tensor]:
        """"loss" is the sum of "mse" and, if the variance is learned, "vb" (bits per dimension); "rescaled_kl" has no terms."""
        noise, x_start = torch.randn_like(x_start) if noise is None else noise, self.input_scale * x_start
        x_t = self.q_sample(x_start, t, noise)
        out = model(x_t, self._at("model_times", t), **(model_kwargs or {})).float()
        check_channels(out, x_t, self.learn_sigma)
        if self.loss == "rescaled_kl":
            return {"loss": self._bound(out, x_start, x_t, t) * self.num_timesteps}
        prediction, *rest = out.split(x_start.shape[1], dim=1)
        terms = {"mse": mean_flat((self._target(x_start, noise, t) - prediction) ** 2)}
        if self.learn_sigma:  # detach: the bound trains the variance alone, not the mean (Improved DDPM, section 3.1)
            terms["vb"] = self._bound(torch.cat([prediction.detach(), *rest], dim=1), x_start, x_t, t)
            if self.loss == "rescaled_mse":
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000)
        return terms | {"loss": sum(terms.values())}

    def _bound(self, out: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The variational bound's term at t, in bits per dimension: (B,). At t = 0: the decoder's negative log-likelihood."""
        p = self.p_mean_variance(lambda *_: out, x_t, t, clip_denoised=False)
        true_mean, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"]))
        nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"]))
        return torch.where(t == 0, nll, kl) / math.log(2)


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)), elementwise, in nats.

    The terms cancel, so the order of the sum matters: another order moves the rescaled bound by 4e-5 at t = 999, in fp32.
    """
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2)
                  + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log P, elementwise in nats, of x in [-1, 1] at 256 levels, under N(means, exp(log_scales)^2). DDPM Eq. 13.

    The two outermost levels extend to infinity. The normal CDF is a tanh approximation: the published models were trained
    with it.
    """
    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centered, inverse_scale, half_level = x - means, torch.exp(-log_scales), 1 / 255
    above = cdf(inverse_scale * (centered + half_level))
    below = cdf(inverse_scale * (centered - half_level))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()
