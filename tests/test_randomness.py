import torch

from runtime.randomness import generator


def test_randomness_is_a_function_of_its_address():
    def draw(*address):
        return torch.randn(4, generator=generator(*address)).tolist()

    assert draw("noise", 0, 17) == draw("noise", 0, 17)
    others = [draw("noise", 0, 17), draw("noise", 0, 18), draw("noise", 1, 17), draw("other", 0, 17), draw("noise", 0, 1, 7)]
    assert len({tuple(values) for values in others}) == 5
