"""Where an axis has its marks, and how numbers are written beside it."""

import math


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers within [low, high], at most `most` and two or more where possible."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + number) * step for number in range(count)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within [low, high] of positive numbers, with 2 and 5 where few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(decades) // 6)
    powers = [10.0**power for power in decades if power % every == 0 and low <= 10.0**power <= high]
    if len(powers) > 2:
        return powers
    between = [10.0**power * times for power in decades for times in (1, 2, 5)]
    between = [value for value in between if low <= value <= high]
    return between if len(between) > 1 else linear_ticks(low, high)


def short(value: float) -> str:
    """Return a number as an axis shows it: 1.2M, 40k, 0.003, 3e-05."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}" if size >= 1e-3 or not size else f"{value:.3g}"
