"""Draw the network of Chroma1-Radiance: `python docs/diagram.py` writes docs/assets/network.svg."""

from html import escape
from pathlib import Path

OUTPUT = Path(__file__).parent / "assets" / "network.svg"
WIDTH, HEIGHT = 720, 640
INK, GRAY = "#1f2430", "#6b7280"
IMAGE, TEXT, BLOCK, MASK, MODULATION = "#dcebdd", "#ece4f5", "#f8fafc", "#c2410c", "#1d4ed8"
TITLE = "The network of Chroma1-Radiance"
DESCRIPTION = (
    "A noisy image becomes image tokens, and a prompt becomes text tokens by T5. 19 double blocks "
    "and 38 single blocks process both, and the NeRF head predicts pixels. The mask decides which "
    "text tokens attention reads in every block. An approximator computes shift, scale and gate of "
    "every block from the time."
)


def draw_text(x: float, y: float, text: str, size: int = 17, color: str = INK, **style: str) -> str:
    """Return a line of text around (x, y)."""
    attributes = {"text-anchor": "middle"} | {k.replace("_", "-"): v for k, v in style.items()}
    pairs = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{pairs}>{escape(text)}</text>'
    )


def draw_box(x: float, y: float, width: float, height: float, fill: str, *lines: str) -> str:
    """Return a box with centered lines; the first one is bold."""
    parts = [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" '
        f'stroke="{GRAY}"/>'
    ]
    top = y + height / 2 + 6 - 10.5 * (len(lines) - 1)
    for i, line in enumerate(lines):
        style = {"font_weight": "600"} if i == 0 else {}
        parts.append(draw_text(x + width / 2, top + 21 * i, line, 17 if i == 0 else 15, **style))
    return "".join(parts)


def draw_arrow(*points: tuple[float, float], color: str = INK) -> str:
    """Return an arrow along a line of points."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    marker = {INK: "ink", MASK: "mask", MODULATION: "modulation"}[color]
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" '
        f'marker-end="url(#{marker})"/>'
    )


def draw_text_tokens(x: float, y: float) -> str:
    """Return the row of text tokens: real ones, one attended padding token, and hidden ones."""
    parts = []
    for i in range(8):
        is_real, is_attended = i < 4, i < 5
        fill = "#8b6fb3" if is_real else "#ffffff"
        color, dash = (INK, "") if is_attended else (GRAY, ' stroke-dasharray="3 3"')
        parts.append(
            f'<rect x="{x + 24 * i:g}" y="{y:g}" width="18" height="18" rx="3" fill="{fill}" '
            f'stroke="{color}"{dash}/>'
        )
    bracket = f"M{x - 4:g},{y + 24:g} v6 H{x + 118:g} v-6"
    return "".join([*parts, f'<path d="{bracket}" fill="none" stroke="{MASK}" stroke-width="2"/>'])


def draw_network() -> str:
    """Return the diagram as SVG."""
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{color}"/></marker>'
        for name, color in (("ink", INK), ("mask", MASK), ("modulation", MODULATION))
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif"><title>{TITLE}</title>'
        f"<desc>{DESCRIPTION}</desc><defs>{markers}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>',
        # Inputs.
        draw_box(40, 20, 200, 56, IMAGE, "noisy image", "H × W × 3"),
        draw_box(270, 20, 200, 56, TEXT, "prompt", "encoded by T5"),
        draw_box(520, 20, 170, 56, "#f3f4f6", "time t", "1: noise, 0: image"),
        # Tokens.
        draw_arrow((140, 76), (140, 118)),
        draw_box(40, 120, 200, 62, IMAGE, "image tokens", "one for 16 × 16 pixels"),
        draw_arrow((370, 76), (370, 118)),
        draw_text(370, 136, "text tokens", font_weight="600"),
        draw_text_tokens(277, 146),
        draw_arrow((605, 76), (605, 118), color=MODULATION),
        draw_box(520, 120, 170, 62, "#dbe4fb", "approximator", "344 vectors"),
        # Blocks.
        draw_arrow((70, 182), (70, 248)),
        draw_arrow((440, 172), (440, 248)),
        draw_box(40, 250, 430, 78, BLOCK, "19 double blocks", "masked attention over all tokens,",
                 "separate weights for image and text"),
        draw_arrow((255, 328), (255, 368)),
        draw_box(40, 370, 430, 60, BLOCK, "38 single blocks",
                 "masked attention and MLP in parallel"),
        # The mask.
        draw_arrow((335, 176), (335, 248), color=MASK),
        draw_text(327, 204, "mask: attention reads the", 15, MASK, text_anchor="end"),
        draw_text(327, 222, "prompt and one padding token", 15, MASK, text_anchor="end"),
        # The modulation.
        draw_arrow((605, 182), (605, 289), (472, 289), color=MODULATION),
        draw_arrow((605, 289), (605, 400), (472, 400), color=MODULATION),
        draw_text(613, 316, "modulation:", 15, MODULATION, text_anchor="start"),
        draw_text(613, 335, "shift, scale", 15, MODULATION, text_anchor="start"),
        draw_text(613, 354, "and gate", 15, MODULATION, text_anchor="start"),
        # The head.
        draw_arrow((255, 430), (255, 478)),
        draw_text(263, 460, "image tokens", 15, GRAY, text_anchor="start"),
        draw_box(40, 480, 430, 60, IMAGE, "NeRF head", "a small network for each patch"),
        draw_arrow((40, 48), (18, 48), (18, 510), (38, 510)),
        draw_text(28, 462, "the noisy pixels again", 15, GRAY, text_anchor="start"),
        draw_arrow((255, 540), (255, 578)),
        draw_box(40, 580, 430, 44, IMAGE, "velocity, or the image: H × W × 3"),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(draw_network(), "utf-8")
