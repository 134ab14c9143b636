"""Side lengths of the levels of a convolutional network."""


def bottom_size(sample_size: int | tuple[int, int] | list[int], num_levels: int) -> tuple[int, int]:
    """Height and width in pixels at the lowest level, after `num_levels - 1` halvings.

    Raises:
        `ValueError`: If the size cannot be halved that often.
    """
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    factor = 2 ** (num_levels - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"Images of {height}x{width} pixels cannot be halved {num_levels - 1} times; take fewer levels "
            f"(channel_mult, num_levels), or another resolution."
        )
    return height // factor, width // factor
