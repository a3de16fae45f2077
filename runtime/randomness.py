"""Random numbers by address: there is no generator state to save or carry on."""

import hashlib

import torch


def generator(*address: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend only on its address, for example ("noise", seed, image, step)."""
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def seed_global(*address: str | int) -> None:
    """Seed torch's global generators, of the CPU and of all GPUs, by an address. Networks with dropout draw from them."""
    torch.manual_seed(generator(*address).initial_seed())
