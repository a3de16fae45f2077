"""Randomness is addressed, not carried: a generator whose numbers are a function of its address."""

import hashlib

import torch


def generator(*address: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of its address alone, such as ("noise", seed, image, step)."""
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
