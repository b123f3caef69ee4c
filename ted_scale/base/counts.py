"""A count of parameters as a reader takes it in: in millions, and written out where these would show fewer than two digits."""


def millions(count: int, decimals: int = 2) -> str:
    return f"{count / 1e6:,.{decimals}f} M" if count >= 10 ** (7 - decimals) else f"{count:,}"
