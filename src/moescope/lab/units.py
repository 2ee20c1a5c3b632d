"""Numbers as people read them: in the largest unit that leaves them at one or more."""


def of_parameters(count: int) -> str:
    return _scaled(count, {10**9: "B", 10**6: "M", 10**3: "K", 1: ""})


def of_bytes(count: int) -> str:
    return _scaled(count, {10**12: " TB", 10**9: " GB", 10**6: " MB", 10**3: " KB", 1: " B"})


def of_flops(count: int) -> str:
    return _scaled(count, {10**12: " TFLOP", 10**9: " GFLOP", 10**6: " MFLOP", 1: " FLOP"})


def plain(value: float, digits: int) -> str:
    """Round to so many digits, but never into powers of ten: 12,345.6 with 4 is "12,346"."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _scaled(value: int, units: dict[int, str]) -> str:
    size = next((size for size in units if value >= size), 1)
    return f"{value / size:.2f}{units[size]}" if size > 1 else f"{value}{units[size]}"
