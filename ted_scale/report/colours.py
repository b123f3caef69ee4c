"""The page's colours, in light and in dark: of text, of lines, of heat. tests/report checks the contrast of each on its ground.

Note: eight colours are not enough for thirty layers, so that every further eight lines have another dash.
"""

from bokeh.palettes import Cividis256

LINES = {
    "light": ("#0b5fb0", "#b3261e", "#1b7339", "#7b3fb5", "#985000", "#006a73", "#a3246d", "#50565d"),
    "dark": ("#6cb2ff", "#ff8a80", "#6fd58e", "#c9a3ff", "#ffb366", "#5fd6e0", "#ff94cf", "#b8bec7"),
}
INKS = {
    "light": {"ground": "#ffffff", "text": "#1c2128", "soft": "#50565d", "grid": "#dde1e6", "raised": "#f4f6f8", "link": "#0b5fb0"},
    "dark": {"ground": "#14161a", "text": "#e6e9ee", "soft": "#b0b7c1", "grid": "#343a43", "raised": "#1e2127", "link": "#6cb2ff"},
}  # fmt: skip
DASHES = ("solid", "dashed", "dotted", "dashdot")
HEAT = Cividis256[::4]  # equally readable for most colour-blind eyes


def dash_of(number: int) -> str:
    return DASHES[number // len(LINES["light"]) % len(DASHES)]


def variables(theme: str) -> str:
    """The theme as CSS variables."""
    inks = [f"--{name}: {colour}" for name, colour in INKS[theme].items()]
    lines = [f"--line{number}: {colour}" for number, colour in enumerate(LINES[theme])]
    return "; ".join([*inks, *lines])
